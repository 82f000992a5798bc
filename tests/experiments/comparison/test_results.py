"""What came out: every number of results.json, read from the right record and counted from the
right jobs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.config import load_config
from nexus_ds.errors import DataError
from nexus_ds.experiments.comparison import results
from nexus_ds.experiments.comparison.build import build
from nexus_ds.experiments.comparison.job_graph import Comparison, Made
from nexus_ds.experiments.comparison.jobs import Job
from nexus_ds.experiments.comparison.methods import EXTENSIONS, METHODS
from nexus_ds.report.summary import MeasureEntry, OverDocuments

FIRST = {"a": {"a": 0.3, "b": 0.7}, "b": {"a": 0.6, "b": 0.4}}
LAST = {"a": {"a": 0.8, "b": 0.2}, "b": {"a": 0.1, "b": 0.9}}


def record(step, loss, own_share, routing, time):
    return {
        "kind": "validation",
        "step": step,
        "loss": {"a": loss, "b": loss + 1},
        "own_share": own_share,
        "routing": routing,
        "time": time,
    }


def logged(step, gate, time):
    return {"kind": "train", "step": step, "router": {"gate": gate}, "time": time}


def write_metrics(model, rows):
    folder = model.with_name(f"{model.name}.training")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture
def model(tmp_path, dense_dir):
    """A training's log, not in the order of its steps: a step was repeated after a stop. Validated
    at 0, 4 and 8."""
    rows = [
        logged(2, 0.4, 110.0),
        record(0, 5.12345678, 0.35, FIRST, 100.0),
        record(4, 4.0, 0.5, FIRST, 130.0),
        logged(8, 0.7, 170.0),
        record(8, 9.0, 0.1, FIRST, 171.0),
        record(8, 3.25, 0.85, LAST, 175.0),
        logged(6, 0.5, 150.0),
    ]
    path = tmp_path / "model"
    path.symlink_to(dense_dir)
    write_metrics(path, rows)
    return path


def test_before_and_after_a_training(model):
    assert results.trained(model).to_json() == {
        "loss": {"a": 3.25, "b": 4.25},
        "own_share": 0.85,
        "routing": LAST,
        "gate": 0.7,
        "untrained": {
            "loss": {"a": 5.123457, "b": 6.123457},
            "own_share": 0.35,
            "routing": FIRST,
            "gate": None,
        },
    }


DAMAGED = [b"{", b"\xff", b"null", b'{"kind": "validation"}', b"[" * 100_000]
OTHER = [
    {"step": "4"},
    {"time": None},
    {"loss": "x"},
    {"loss": {"a": float("nan")}},
    {"loss": {"a": None}},
    {"own_share": "x"},
    {"routing": {"a": 1}},
]


@pytest.mark.parametrize(
    "line",
    [
        *DAMAGED,
        *(json.dumps(record(4, 4.0, 0.5, FIRST, 130.0) | other).encode() for other in OTHER),
    ],
)
def test_a_damaged_line_of_a_log_is_named_with_what_to_do(model, line):
    log = Path(f"{model}.training/metrics.jsonl")
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(DataError) as caught:
        results.trained(model)
    said = str(caught.value)
    assert said.startswith(f"{log}:3: ") and said.endswith(
        f"; expected what train writes; take the line out where a later one has its step, else "
        f"remove {model} and {model}.training, and the same command trains it again"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found no validation"),
        ([logged(2, 0.4, 110.0)], "found no validation"),
        ([{"kind": "validation", "step": 0, "time": 1.0}], "found no 'loss'"),
        ([record(0, 1, 0, {}, 1) | {"loss": 1.0}], "loss: found '1.0', expected an object"),
        ([record(0, 1, 0, {}, 1), {"kind": "train", "step": 0, "time": 1}], "found no 'router'"),
        (
            [record(0, 1, 0, {}, 1), {"kind": "train", "step": 0, "time": 1, "router": {"z": 1}}],
            "found no 'gate'",
        ),
    ],
)
def test_a_log_in_which_something_is_missing(tmp_path, rows, message):
    model = tmp_path / "m"
    write_metrics(model, rows)
    with pytest.raises(DataError) as caught:
        results.trained(model)
    assert str(caught.value) == (
        f"{model}.training/metrics.jsonl: {message}; expected what train writes; "
        f"remove {model} and {model}.training, and the same command trains it again"
    )


def test_an_extension_whose_log_lacks_an_expert(tmp_path):
    made = Made(model=tmp_path / "m", experts=["c"], steps={0: 0})
    write_metrics(made.model, [record(0, 1.0, 0.5, FIRST, 1.0)])
    with pytest.raises(DataError, match=r"metrics.jsonl: found no 'c'; expected what train writes"):
        results.budgets(made, ["a"])


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[]", b"{}", b'{"loss": {"a": NaN}}', b'{"loss": 1}']
)
def test_a_damaged_score_says_how_it_is_made_again(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        results._scores(Made(scores=path))
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and said.endswith(
        f"; expected losses by domain; remove {path}, and the same command makes it again"
    )


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[]", b"{}", b'{"tasks": {}}', b'{"tasks": {"m": {"groups": 1}}}']
)
def test_a_damaged_evaluation_says_how_it_is_made_again(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        results._task_scores(Made(tasks=tmp_path))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'summary.json'}: ") and said.endswith(
        f"; expected what evaluate writes; remove {tmp_path}, and the same command makes it again"
    )


def test_a_dense_training_has_no_router(tmp_path):
    rows = [
        {"kind": "validation", "step": step, "loss": {"a": 2.0 - step}, "time": step}
        for step in (0, 1)
    ]
    write_metrics(
        tmp_path / "dense", [*rows, {"kind": "train", "step": 1, "router": {}, "time": 1}]
    )
    found = results.trained(tmp_path / "dense")
    assert found.loss == {"a": 1.0} and found.untrained.loss == {"a": 2.0}
    assert found.own_share is found.routing is found.gate is None


def comparison_of(*jobs):
    return SimpleNamespace(builder=SimpleNamespace(jobs={job.output: job for job in jobs}))


def test_what_a_model_cost(model):
    out = model.parent
    seed = Job("seed", out / "seed-0a", (), flops=1e6, tokens=1000)
    branches = [Job(f"branch-{d}", out / f"branch-{d}-0a", (), flops=2e3, tokens=20) for d in "ab"]
    start, trained = Job("start", out / "start", ()), Job("nexus", model, (), flops=5e4, tokens=400)
    comparison = comparison_of(seed, *branches, start, trained)
    members = (
        model,
        start.output,
        seed.output,
        *(b.output for b in branches),
        branches[0].output,
        out / "given",
    )
    found = results.compute(comparison, Made(start.output, model, members=members))
    assert found.to_json() == {
        # each job once, the seed's not at all
        "training_flops": 5e4 + 2 * 2e3,
        "training_tokens": 400 + 2 * 20,
        "seconds": 75.0,
        "parameters": describe(model)["parameters"],
    }


def test_an_ensemble_has_the_parameters_of_all_its_members(model, dense_dir):
    one = describe(dense_dir)["parameters"]
    found = results.compute(comparison_of(), Made(members=(model, dense_dir)))
    assert found.to_json() == {
        "training_flops": 0,
        "training_tokens": 0,
        "seconds": None,
        "parameters": {"total": 2 * one["total"], "active": 2 * one["active"]},
    }


def test_every_column_of_a_methods_row(model, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "summary.json").write_text(
        '{"tasks": {"m": {"groups": {"science": 31.5}}}}'
    )
    nexus = next(c for c in METHODS if c.name == "nexus")
    made = {
        3: Made(None, model, tasks=tmp_path / "tasks", members=(model,)),
        4: Made(None, tmp_path / "not made"),
    }
    row = results._method_row(
        comparison_of(Job("n", model, (), flops=7.0, tokens=3)), ("low", "nexus"), nexus, made
    ).to_json()
    assert {key: row[key] for key in row if key not in ("seeds", "compute")} == {
        "name": "nexus",
        "label": nexus.label,
        "variant": "low",
        "about": nexus.about,
        "group": nexus.group,
    }
    assert row["compute"]["training_flops"] == 7.0 and list(row["seeds"]) == ["3"]
    assert row["seeds"]["3"] == results.trained(model).to_json() | {"tasks": {"science": 31.5}}


def test_every_column_of_an_extensions_row(model):
    refit = next(e for e in EXTENSIONS if e.name == "nexus_refit")
    made = {0: Made(None, model, members=(model,), experts=("b",), steps={0: 0, 8: 4096})}
    row = results._extension_row(comparison_of(), ("", "nexus_refit", "b"), refit, made, ["a"])
    row = row.to_json()
    assert {key: row[key] for key in row if key not in ("seeds", "compute")} == {
        "name": "nexus_refit",
        "label": refit.label,
        "variant": "",
        "about": refit.about,
        "added": "b",
        "starts_from": refit.starts_from,
    }
    assert row["seeds"] == {
        "0": {
            "budgets": {
                "0": {
                    "loss": {"a": 5.123457, "b": 6.123457},
                    "routing": FIRST,
                    "share": 0.4,
                    "leak": 0.7,
                    "own_share": 0.3,  # b at b, a at b, a at a
                },
                "4096": {
                    "loss": {"a": 3.25, "b": 4.25},
                    "routing": LAST,
                    "share": 0.9,
                    "leak": 0.2,
                    "own_share": 0.8,
                },
            }
        }
    }


def test_turns_are_the_ends_of_several_additions(model):
    again = model.with_name("again")
    write_metrics(again, [record(0, 7.0, 0.5, FIRST, 1.0), record(4, 2.0, 0.5, FIRST, 2.0)])
    found = results.turns(Made(model=again, turns={"b": model, "c": again}))
    assert [turn.to_json() for turn in found] == [
        {"added": "b", "loss": {"a": 3.25, "b": 4.25}},
        {"added": "c", "loss": {"a": 2.0, "b": 3.0}},
    ]
    assert results.turns(Made(model=model, turns={"b": model})) == []


def test_shares_and_leak_are_read_from_the_right_cells(tmp_path):
    routing = {
        "a": {"a": 0.7, "b": 0.1, "x": 0.2},
        "b": {"a": 0.3, "b": 0.6, "x": 0.1},
        "x": {"a": 0.2, "b": 0.3, "x": 0.5},
    }
    rows = [
        {"kind": "validation", "step": s, "loss": {"a": 1.0 + s}, "routing": routing, "time": s}
        for s in (0, 2, 3)
    ]
    write_metrics(tmp_path / "m", [*rows, rows[1] | {"loss": {"a": 9.0}}])
    made = Made(model=tmp_path / "m", experts=("x",), steps={0: 0, 2: 2048})
    found = results.budgets(made, ["a", "b"])
    assert list(found) == ["0", "2048"]
    first = found["0"]
    assert (first.share, first.leak, first.own_share) == pytest.approx((0.5, 0.15, 0.65))
    assert found["2048"].loss == {"a": 9.0}, "a repeated step counts as it was last"
    assert len(results.records(tmp_path / "m")) == 3


def test_the_seeds_curve_is_that_of_the_recipe_as_it_stands(tmp_path, dense_dir):
    words = ["compare.seeds=[0]", 'compare.variants={"more": ["stages.seed.training.tokens=9000"]}']
    comparison = build("compare-tiny", words, tmp_path)
    config = load_config("compare-tiny", words)
    assert results._seed_curve(comparison, config) == []
    trainings = [
        job for job in comparison.builder.jobs.values() if job.output.name.startswith("seed-")
    ]
    [model] = [job.output for job in trainings if job.tokens > 90_000]
    model.parent.mkdir(parents=True)
    write_metrics(model, [record(step, 6.0 - step, None, None, 1.0) for step in (0, 2, 1)])
    points = results._seed_curve(comparison, config)
    step = config.training.batch_size * config.data.sequence_length
    assert [(point.tokens, point.loss) for point in points] == [
        (step, {"a": 5.0, "b": 6.0}),
        (2 * step, {"a": 4.0, "b": 5.0}),
    ]
    given = [*words, f"model.path={dense_dir}"]
    assert results._seed_curve(build("compare-tiny", given, tmp_path), config) == []


def test_what_was_not_run_has_its_reason():
    found = build(
        "compare-tiny", ["compare.seeds=[0]", "compare.contenders=[nexus]"], Path("comparison")
    )
    (job,) = [job for job in found.builder.jobs.values() if job.name == "seed 0 upcycle nexus"]
    rows = {row.name: row.why for row in results._not_run(found, {job.output: "killed"})}
    assert (
        rows["seed 0 upcycle nexus"] == "killed"
        and rows["BTX"] == "not asked for"
        and "Nexus" not in rows
    )


def test_measures_of_all_seeds_become_one_entry_by_label(tmp_path):
    documents = OverDocuments([1.0, 2.0], [1.0, 1.0])
    contenders = {}
    for number, name in enumerate(("seed", "nexus")):
        seeds = {}
        for seed in (0, 1):
            report = tmp_path / f"{name}-{seed}"
            values = [value + number + seed for value in documents.values]
            models = {name: {"a": OverDocuments(values, documents.weights)}}
            report.mkdir()
            text = json.dumps({"measures": {"bits": MeasureEntry(models).to_json()}})
            (report / "summary.json").write_text(text)
            seeds[seed] = Made(measures=report)
        method = next(method for method in METHODS if method.name == name)
        contenders["", name] = (method, seeds)
    # one that failed is left out
    contenders["", "nexus"][1][1].measures = tmp_path / "none"
    found = results._measures(
        Comparison(None, contenders, {}), load_config("demo", ["compare.seeds=[0,1]"])
    )
    assert list(found) == ["bits"] and list(found["bits"].models) == ["seed", "Nexus"]
    assert found["bits"].models["seed"]["a"].values == [1.5, 2.5]
    assert found["bits"].models["Nexus"]["a"].values == [2.0, 3.0]
