"""Recipes of comparisons: each one makes jobs, each changed setting changes something, those for
clusters can be planned."""

import functools
import json
import math
from pathlib import Path

import pytest

from nexus_ds.__main__ import main
from nexus_ds.config import RECIPES, load_config, read_recipe
from nexus_ds.experiments.comparison.build import build
from nexus_ds.experiments.comparison.recipe_reader import Case
from nexus_ds.planning import fitting
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.settings import STAGES, Config

NAMES = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
COMPARED = [name for name in NAMES if "compare" in read_recipe(name)]
CLUSTER = ["compare-470m", "compare-2.8b"]
LAST = ["compare.seeds=[0]"]  # one seed says as much here as three


@functools.cache
def comparison(name):
    """The jobs of a recipe; `build` writes nothing, so that the directory need not be there."""
    overrides = [] if load_config(name).pipeline.domains else ["pipeline.domains=[a,b,c]"]
    return build(name, [*overrides, *LAST], Path("nowhere"))


def test_each_table_figure_and_scale_has_a_recipe():
    scales = {
        "compare-tiny",
        "compare-converged",
        "compare-small",
        "compare-470m",
        "compare-2.8b",
    }
    paper = {
        f"paper/{name}"
        for name in ("table2", "table3", "figure4", "figure5", "figure6", "figure7", "figure8")
    }
    cluster = [read_recipe(name)["model"] for name in CLUSTER]
    assert scales | paper <= set(COMPARED) and all(
        read_recipe(name)["model"] in cluster for name in paper
    )
    assert len([name for name in COMPARED if name.startswith("ablations/")]) >= 12


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_can_be_made_of_it(name):
    found = comparison(name)
    made = {key[0] for key in (*found.contenders, *found.extensions)}
    assert made == {"", *load_config(name).compare.variants}
    assert not Path("nowhere").exists()
    for _, seeds in found.extensions.values():
        steps = [step for step in seeds[0].steps if step]
        assert len(steps) >= 3 and math.gcd(*steps) >= 10, (
            "scored so often that it costs more than the finetuning"
        )


def of_recipe(table, key):
    """Return the model of the recipe as it stands, None where a variant alone has this row."""
    row = table.get(("", *key[1:]))
    return row[1][0].model if row else None


@pytest.mark.parametrize("name", [name for name in COMPARED if load_config(name).compare.variants])
def test_each_changed_setting_makes_other_models(name):
    found = comparison(name)
    for variant in load_config(name).compare.variants:
        changed = [
            key
            for table in (found.contenders, found.extensions)
            for key, (_, seeds) in table.items()
            if key[0] == variant and seeds[0].model != of_recipe(table, key)
        ]
        assert changed, f"{variant} changes nothing"


RETRAINED = (
    "ablations/budget",
    "ablations/converged-starts",
    "compare-converged",
)  # they vary the dense models themselves


@pytest.mark.parametrize("name", [name for name in COMPARED if name not in RETRAINED])
def test_dense_models_are_trained_once(name):
    """Contenders and variants differ after the branches, so these are shared."""
    jobs = [job.name for job in comparison(name).builder.jobs.values()]
    dense = [job for job in jobs if job.split(" ", 2)[-1] == "seed" or " branch-" in job]
    assert len(dense) == len(set(dense)) > 1


def test_a_converged_seed_is_trained_once_for_all_seeds():
    found = build("compare-converged", [], Path("nowhere"))
    seeds = [job for job in found.builder.jobs.values() if job.name.endswith(" seed")]
    # the recipe's own, and one for each shorter regime
    assert sorted(job.tokens for job in seeds) == pytest.approx(
        [530_000, 2_650_000, 10_600_000, 42_400_000], rel=0.01
    )
    given = [word for word in load_config("compare-converged").compare.variants if "token" in word]
    assert len(given) == 9
    share = []
    for name in ("", *given):
        case = Case(0, tuple(load_config("compare-converged").compare.variants.get(name, ())))
        reader = found.builder.reader
        branch = reader.config("branch", case, "branch=any").training.tokens
        spent = 4 * branch + reader.config("moe", case).training.tokens
        share.append(spent / reader.config("seed", case).training.tokens)
    # an equal budget relative to what the seed has read
    assert share == pytest.approx([0.0604] * 10, abs=2e-4)


@pytest.mark.parametrize("name", CLUSTER)
def test_recipes_for_clusters_can_be_planned(name, capsys):
    words = ["--gpus", "32", "--nodes", "4", "--gpu-memory", "80GB", "--link", "200Gb", "--json"]
    assert main(["plan", "--config", name, *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layouts"][0]["fits"] and plan["run"]["tokens"] > 1e10


MACHINES = {
    "8 x 24 GB": Machine(gpus=8, gpu_memory=24e9, host_memory=512e9),
    "8 x 80 GB": Machine(gpus=8, gpu_memory=80e9, host_memory=1e12),
    "4 x 8 x 24 GB": Machine(gpus=32, nodes=4, gpu_memory=24e9, host_memory=512e9, link=25e9 / 8),
}
# for your own models: nothing can be planned without one
PLANNED = [name for name in NAMES if name.partition("/")[0] not in ("own", "own-context")]
# one of each size: other recipes differ in what planning doesn't read
SIZES = {}
for _name in PLANNED:
    _values = {
        key: value for key, value in read_recipe(_name).items() if key not in ("compare", "name")
    }
    SIZES.setdefault(json.dumps(_values, sort_keys=True), []).append(_name)


def stages_of(name):
    """Yield the configuration of each training stage of a recipe."""
    for stage in STAGES:
        words = [f"stage={stage}", *(["branch=any"] if stage == "branch" else [])]
        if not load_config(name).pipeline.domains:
            words.append("pipeline.domains=[a,b,c]")
        yield load_config(name, words)


@pytest.mark.parametrize("names", SIZES.values(), ids=lambda names: names[0])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("ds_json", ["", "z3"])
def test_every_stage_of_every_recipe_fits_or_is_told_what_does(names, machine, ds_json):
    there = MACHINES[machine]
    for config in stages_of(names[0]):
        # the demo's batch of 8 sequences is one for a workstation
        if config.training.batch_size % there.gpus:
            config.training.batch_size = there.gpus
        zero = {"stage": 3} if ds_json else fitting.zero_of(config)
        sizes = sizes_of(config)
        found = fitting.fitted(sizes, there, config, zero)
        if not found.fits:
            said = fitting.refusal(sizes, there, config, found)
            assert "what fits is ZeRO-" in said and "training.micro_batch_size=" in said
            # nothing but the large mixture on small cards, and then under a JSON alone
            assert sizes.counts()["total"] > 9e9 and there.gpu_memory == 24e9 and ds_json
            assert there.nodes == 1, "four nodes hold it"


def test_the_recipe_of_one_gpu_is_planned_on_one(capsys):
    assert (
        main(["plan", "--config", "compare-small", "--gpus", "1", "--gpu-memory", "24GB", "--json"])
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["layouts"][0]["fits"]
        and 50e6 < plan["parameters"]["active"] < plan["parameters"]["total"] < 110e6
    )


def test_recipes_say_what_they_are_for():
    for name in NAMES:
        assert Path(RECIPES / f"{name}.yaml").read_text(encoding="utf-8").startswith("# "), name


def test_the_recipe_for_chats_is_own_with_chats():
    own, chats = load_config("own"), load_config("own-chat")
    assert chats.data.chat and not own.data.chat
    assert chats.model == own.model and chats.router == own.router
    # of every stage: a branch, the mixture and an extension
    for stage in ("moe", "extend", "branch"):
        words = [f"stage={stage}", *(["branch=a"] if stage == "branch" else [])]
        assert load_config("own-chat", words).data.chat


def test_the_papers_way_stays_a_recipe_beside_own():
    """`own` goes further from the seed than branches do, `own-paper` has the settings' defaults."""
    put_together = ("shared_scale", "routed_scale", "task_scale", "merge")
    plain = Config().model
    own, paper = load_config("own").model, load_config("own-paper").model
    assert all(getattr(paper, name) == getattr(plain, name) for name in put_together)
    assert (own.task_scale, own.merge) == (2, "seed") and own.shared_scale + own.routed_scale < 1.1
    rates = ("backbone_lr_scale", "shared_lr_scale", "freeze_old_experts")
    for stage, backbone in (("branch", 0), ("extend", 0.1)):
        words = [f"stage={stage}", *(["branch=a"] if stage == "branch" else [])]
        assert load_config("own", words).training.backbone_lr_scale == backbone
        given = load_config("own-paper", words)
        assert all(getattr(given.training, n) == getattr(Config().training, n) for n in rates)
        assert given.pipeline.merge_weight is None
    assert load_config("own", ["stage=extend"]).pipeline.merge_weight == 0
