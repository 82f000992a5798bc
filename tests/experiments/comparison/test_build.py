"""The jobs of a comparison: what is shared, what is not, and that the budgets are what they say."""

from pathlib import Path

import pytest

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.comparison.build import additions, build
from nexus_ds.experiments.comparison.methods import EXTENSIONS, METHODS

OUT = Path("comparison")


def made(*overrides, recipe="compare-tiny"):
    return build(recipe, ["compare.seeds=[0]", *overrides], OUT)


def jobs(found, part):
    return [job for job in found.builder.jobs.values() if part in job.name]


def test_names_stand_once_and_extensions_start_from_contenders():
    names = [c.name for c in METHODS]
    assert len(set(names)) == len(names) and len({e.name for e in EXTENSIONS}) == len(EXTENSIONS)
    assert all(e.starts_from in names for e in EXTENSIONS)


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


def test_the_name_of_an_output_does_not_depend_on_where_it_lies():
    here, there = (
        build("compare-tiny", ["compare.seeds=[0]"], out) for out in (OUT, Path("/elsewhere/deep"))
    )
    assert [p.relative_to(OUT) for p in here.builder.jobs] == [
        p.relative_to("/elsewhere/deep") for p in there.builder.jobs
    ]


def test_matched_contenders_have_the_whole_budget():
    found = made(
        "compare.contenders=[union,nexus,sparse_upcycling_matched]",
        "compare.extensions=[linear_reset]",
    )
    trained = {
        name: sum(job.flops for job in jobs(found, f"seed 0 {name}") if job.words[0] == "train")
        for name in ("union", "sparse_upcycling_matched")
    }
    whole = [
        job
        for part in ("python", "docs", "algebra", "tables")
        for job in jobs(found, f"branch-{part}")
    ]
    whole += [job for job in jobs(found, "seed 0 nexus") if job.words[0] == "train"]
    budget = sum(job.flops for job in whole)
    assert trained["union"] == pytest.approx(budget, rel=0.002) and trained["union"] > 1e12
    assert trained["sparse_upcycling_matched"] == pytest.approx(budget, rel=0.002)


def by_hand(active, layers, hidden, length):
    """Operations of a token, forward and backward: six a weight that multiplies, and causal
    attention over `length`.

    Queries by keys and weights by values, forward: 2 x 2 x hidden x length / 2; the backward pass
    costs twice that.
    """
    return 6 * active + layers * 3 * 2 * hidden * length


def test_operations_of_a_dense_model_and_of_a_mixture_are_those_counted_by_hand():
    """The demo's sizes: vocabulary 2048 (tied), hidden 96, 3 layers, inner width 256, length 128, 4
    experts, top-1."""
    attention, norms, ffn = 4 * 96 * 96, 2 * 96, 3 * 96 * 256
    dense = 2048 * 96 + 96 + 3 * (attention + norms + ffn)
    rows = 4 * 96 + 96  # the router's, and the shared expert's gate
    # the shared expert is the dense model's FFN; a token visits one routed expert
    mixture = dense + 3 * (ffn + rows)
    found = made("compare.contenders=[nexus,union]", "compare.extensions=[nexus_append]")
    expected = {
        "seed 0 seed": dense,
        "seed 0 branch-python": dense,
        "seed 0 union": dense,
        "seed 0 nexus": mixture,
    }
    # one more expert: a row more, and a token still visits one
    expected["seed 0 nexus_append-cpp"] = mixture + 3 * 96
    jobs_of = {job.name: job for job in found.builder.jobs.values() if job.words[0] == "train"}
    for name, active in expected.items():
        assert jobs_of[name].flops == jobs_of[name].tokens * by_hand(active, 3, 96, 128), name
    assert (
        jobs_of["seed 0 seed"].tokens == 977 * 8 * 128
        and jobs_of["seed 0 nexus"].tokens == 391 * 8 * 128
    )
    top_two = made(
        "compare.contenders=[nexus]", "compare.extensions=[nexus_append]", "router.top_k=2"
    )
    (job,) = [
        job
        for job in jobs(top_two, "seed 0 nexus")
        if job.words[0] == "train" and "append" not in job.name
    ]
    assert job.flops == job.tokens * by_hand(mixture + 3 * ffn, 3, 96, 128)


def test_operations_with_a_given_seed_are_those_of_its_sizes(dense_dir):
    """Vocabulary 31 (tied), hidden 16, 2 layers, inner width 24; four experts, and the recipe's
    length of 128."""
    ffn = 3 * 16 * 24
    dense = 31 * 16 + 16 + 2 * (4 * 16 * 16 + 2 * 16 + ffn)
    found = made(
        "compare.contenders=[nexus]", "compare.extensions=[nexus_append]", f"model.path={dense_dir}"
    )
    (branch,) = jobs(found, "seed 0 branch-python")
    (nexus,) = [
        job
        for job in jobs(found, "seed 0 nexus")
        if job.words[0] == "train" and "append" not in job.name
    ]
    assert branch.flops == branch.tokens * by_hand(dense, 2, 16, 128)
    assert nexus.flops == nexus.tokens * by_hand(dense + 2 * (ffn + 4 * 16 + 16), 2, 16, 128)


def test_p_sees_pretraining_text_without_an_expert_where_its_start_reads_chunks():
    found = made(
        "compare.contenders=[nexus,nexus_context]",
        "compare.extensions=[nexus_zero_shot,nexus_refit]",
        "pipeline.seed_domains=[python,web,cpp]",
    )
    grown = [job for job in found.builder.jobs.values() if job.words[0] in ("upcycle", "extend")]
    files = {job.name: Path(job.words[job.words.index("--config") + 1]) for job in grown}
    assert {
        name: found.builder.configs[file].router.fit_background for name, file in files.items()
    } == {
        "seed 0 upcycle nexus": [],
        "seed 0 extend nexus_refit cpp": [],
        "seed 0 upcycle nexus_context": ["web"],
        "seed 0 extend nexus_zero_shot cpp": ["web"],
    }


def test_budgets_become_steps_that_are_validated():
    found = made(
        "compare.contenders=[nexus]",
        "compare.extensions=[nexus_append]",
        "compare.budgets=[2048,6144]",
    )
    _, seeds = found.extensions[("", "nexus_append", "cpp")]
    assert seeds[0].steps == {0: 0, 2: 2048, 6: 6144}
    (file,) = [
        path
        for path in found.builder.configs
        if "nexus_append-cpp" in path.name and "start" not in path.name
    ]
    training = found.builder.configs[file].training
    assert (training.eval_every, training.steps, training.tokens) == (2, 6, 0)


def test_adding_each_together_and_in_sequence():
    words = ["pipeline.new_domains=[x,y]", "stage=extend"]
    assert additions(load_config("demo", words)) == {"x": [["x"]], "y": [["y"]]}
    assert additions(load_config("demo", [*words, "compare.adding=together"])) == {
        "x+y": [["x", "y"]]
    }
    assert additions(load_config("demo", [*words, "compare.adding=sequence"])) == {
        "x, then y": [["x"], ["y"]]
    }
    found = made(
        "pipeline.new_domains=[x,y]",
        "compare.adding=sequence",
        "compare.extensions=[nexus_append]",
        "compare.contenders=[nexus]",
    )
    extends = jobs(found, "extend nexus_append")
    first = next(job for job in jobs(found, "nexus_append-x") if job.words[0] == "train")
    assert len(extends) == 2 and first.output in extends[1].needs


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
            "compare.adding=all",
            "compare.adding: unknown value 'all'; known: each, together, sequence",
        ),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ConfigError) as caught:
        made(override)
    assert message in str(caught.value)
