"""The jobs of a comparison: what is shared, what is not, and that the budgets are what they say."""

import pytest
from made_up_jobs import jobs, made

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.comparison.build import additions
from nexus_ds.experiments.comparison.methods import EXTENSIONS, METHODS


def test_every_contender_and_extension_can_be_built_and_has_a_row():
    found = made("compare.contenders=[]", "compare.extensions=[]")
    rows = {row for _, row in found.contenders}
    assert rows - {c.name for c in METHODS} == {
        f"branch {d}" for d in ("python", "docs", "algebra", "tables")
    }
    assert {c.name for c in METHODS} - rows == {"branches"}
    assert {name for _, name, _ in found.extensions} == {e.name for e in EXTENSIONS}
    for job in found.builder.jobs.values():
        assert all(need in found.builder.jobs for need in job.needs), job.name


def test_contenders_of_a_seed_share_its_branches_and_nothing_with_another():
    found = made(
        "compare.seeds=[0,1]",
        "compare.contenders=[nexus,linear,btm,average]",
        "compare.extensions=[nexus_append]",
    )
    assert len(jobs(found, "branch-python")) == 2  # one a seed
    assert len(jobs(found, "tokenizer")) == 1
    assert len(jobs(found, " upcycle nexus")) == 2
    needed = {seed: set(jobs(found, f"seed {seed} upcycle nexus")[0].needs) for seed in (0, 1)}
    assert not needed[0] & needed[1]


def test_a_variant_makes_only_what_it_changes():
    low = "low: [router.load_balance=0.0005]"
    big = "big: [stages.branch.training.tokens=9000]"
    variants = f"compare.variants={{{low}, {big}}}"
    found = made("compare.contenders=[nexus]", "compare.extensions=[nexus_append]", variants)
    assert len(jobs(found, "seed 0 seed")) == 1
    assert len(jobs(found, "branch-python")) == 2  # as it is, and with fewer tokens
    trained = [
        job
        for job in jobs(found, "seed 0 nexus")
        if job.words[0] == "train" and "append" not in job.name
    ]
    assert len(trained) == 3
    assert {key[0] for key in found.contenders} == {"", "low", "big"}


def test_a_variant_may_be_of_some_contenders_alone():
    few = "few: ['compare.contenders=[linear]', 'compare.extensions=[none]', router.top_k=2]"
    found = made(
        "compare.contenders=[nexus,linear,union]",
        "compare.extensions=[nexus_append]",
        f"compare.variants={{{few}}}",
    )
    assert {row for variant, row in found.contenders if variant == "few"} == {"linear"}
    assert {variant for variant, _, _ in found.extensions} == {""}


def test_a_contender_may_have_settings_of_its_own_which_a_variant_wins_over():
    own = "compare.contender_settings={union: [training.lr=0.5], linear: [training.lr=0.25]}"
    faster = "compare.variants={faster: [training.lr=0.75]}"
    chosen = ["compare.contenders=[nexus,linear,union]", "compare.extensions=[none]"]
    found, plain = made(*chosen, own, faster), made(*chosen, faster)

    def rate(comparison, variant, row):
        model = comparison.contenders[variant, row][1][0].model
        file = comparison.builder.out / "configs" / f"seed0-{model.name}.yaml"
        return comparison.builder.configs[file].training.lr

    assert rate(found, "", "union") == 0.5 and rate(found, "", "linear") == 0.25
    assert rate(found, "", "nexus") == rate(plain, "", "nexus")
    assert {rate(found, "faster", row) for row in ("union", "linear", "nexus")} == {0.75}
    # linear's branches learn at its rate too, Nexus keeps its own
    assert len(jobs(found, "branch-python")) == len(jobs(plain, "branch-python")) + 1


def test_settings_of_its_own_leave_the_budget_that_a_contender_is_matched_to():
    own = (
        "compare.contender_settings={union: [stages.branch.training.tokens=100], "
        "sparse_upcycling_matched: [stages.moe.training.tokens=100]}"
    )
    names = ("union", "sparse_upcycling_matched")
    chosen = [f"compare.contenders=[nexus,{','.join(names)}]", "compare.extensions=[none]"]
    changed, as_it_was = made(*chosen, own), made(*chosen)
    for name in names:
        models = [found.contenders["", name][1][0].model for found in (changed, as_it_was)]
        tokens = [
            found.builder.jobs[model].tokens
            for found, model in zip((changed, as_it_was), models, strict=True)
        ]
        assert tokens[0] == tokens[1] > 1000


def test_adding_each_together_and_in_sequence():
    words = ["pipeline.new_domains=[x,y]", "stage=extend"]
    assert additions(load_config("demo", words)) == {"x": [["x"]], "y": [["y"]]}
    assert additions(load_config("demo", [*words, "compare.adding=together"])) == {
        "x+y": [["x", "y"]]
    }
    assert additions(load_config("demo", [*words, "compare.adding=sequence"])) == {
        "x, then y": [["x"], ["y"]]
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "compare.contenders=[nexsu]",
            "compare.contenders: unknown name 'nexsu', did you mean nexus?",
        ),
        (
            "compare.extensions=[linear_rest]",
            "compare.extensions: unknown name 'linear_rest', did you mean linear_reset?",
        ),
        (
            "pipeline.domains=[]",
            "pipeline.domains is empty; name the domains of the upcycled experts",
        ),
        (
            "data.chat=true",
            "data.chat=true: a comparison scores plain text alone; give it text, or train by hand",
        ),
        (
            "compare.variants={chats: [data.chat=true]}",
            "data.chat=true: a comparison scores plain text alone; give it text, or train by hand",
        ),
        (
            "compare.contender_settings={unoin: [training.lr=1]}",
            "compare.contender_settings: unknown name 'unoin', did you mean union?",
        ),
        (
            "compare.contender_settings={linear: [router.lr_scale=3]}",
            "compare.contender_settings: found router.lr_scale=3 for linear, which is defined by "
            "router.lr_scale=1; leave it out, or take another contender",
        ),
        (
            "compare.variants={few: ['compare.contenders=[nexsu]']}",
            "compare.contenders: unknown name 'nexsu', did you mean nexus?",
        ),
        (
            "compare.adding=all",
            "compare.adding: unknown value 'all'; known: each, together, sequence",
        ),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ConfigError) as caught:
        made(override)
    assert message in str(caught.value)
