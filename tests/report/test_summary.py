"""Summaries: which model the top level speaks of, warnings, changes between models, and JSON that
is read as it was written."""

import json
import math
from statistics import fmean

import numpy as np
import pytest
from made_up_evaluation import LOSSES, SETUP, measured, models

from nexus_ds.errors import ConfigError
from nexus_ds.report.evaluation import evaluation_sections, intro, write_evaluation
from nexus_ds.report.paired import standard_error
from nexus_ds.report.summary import ModelTasks, Summary, compared, summarise


@pytest.fixture
def summary():
    return summarise(models(), SETUP).to_json()


def test_top_level_speaks_of_the_last_mixture(summary):
    assert summary["routed_model"] == "after" and summary["tokens_per_second"] == 100.25
    assert summary["routing"] == {
        "a": pytest.approx({"first": 0.7, "second": 0.3}),
        "b": pytest.approx({"first": 0.3, "second": 0.7}),
    }
    assert summary["change"]["before"] == "before" and summary["change"]["after"] == "after"
    assert summary["change"]["ratio"] == pytest.approx({"a": math.exp(-1), "b": math.exp(0.1)})


def test_losses_of_windows_are_kept_and_their_mean_is_the_loss(summary):
    assert summary["window_loss"] == LOSSES
    assert summary["loss"] == {
        name: pytest.approx({d: fmean(w) for d, w in v.items()}) for name, v in LOSSES.items()
    }
    assert summary["perplexity"]["after"] == pytest.approx({"a": math.exp(1.0), "b": math.exp(3.1)})


def test_saturated_routers_are_warned_about():
    summary = summarise(models(saturated=True), SETUP)
    (warning,) = summary.warnings
    assert (
        warning.startswith("after: the router is saturated in 6 of 6 places")
        and "0.99 in layer 0" in warning
    )
    assert "Warning: after: the router" in intro(summary)


def test_dense_models_alone():
    summary = summarise({"seed": measured({"a": [2.0, 2.0]}, routed=False)}, SETUP).to_json()
    assert (
        summary["routing"] == {}
        and summary["tokens_per_second"] == 300.0
        and summary["change"] is None
    )


def test_leak_without_other_domains_is_null():
    summary = summarise({"m": measured({"a": [2.0]}, routed=True)}, SETUP).to_json()
    assert summary["models"]["m"]["leak"] == {"first": None, "second": pytest.approx(0.3)}
    json.dumps(summary, allow_nan=False)


def test_a_named_model_is_compared_with_the_last_one():
    change = summarise(models(), SETUP, before="seed").to_json()["change"]
    assert (change["before"], change["after"]) == ("seed", "branch")
    assert change["domains"]["a"]["nats"] == pytest.approx(-0.5)


@pytest.mark.parametrize("name", ["branch", "nobody"])
def test_a_model_that_can_not_be_compared(name):
    with pytest.raises(ConfigError) as caught:
        summarise(models(), SETUP, before=name)
    assert str(caught.value) == (
        f"--before {name}: expected a model given before the last one, which it is compared with; "
        "found: seed, before, after, branch"
    )


def test_models_of_different_tokenizers_are_not_compared():
    infos = {name: part.info for name, part in models().items()}
    assert compared(infos) == ("before", "after")
    assert compared(infos, "before") == ("before", "branch")
    infos["before"]["tokenizer"] = "another"
    assert compared(infos) is None and compared(infos, "before") is None
    assert compared(infos, "seed") is not None


def test_the_limit_is_part_of_the_summary():
    change = summarise(models(), SETUP, limit=0.02).to_json()["change"]
    assert change["limit"] == 0.02 and change["failed"] == [] and change["undecided"] == ["b"]


# The file -----------------------------------------------------------------------------------------


def task(group, score):
    return {
        "group": group,
        "metric": "acc",
        "score": score,
        "stderr": None,
        "shots": 5,
        "examples": 1200,
    }


@pytest.fixture
def with_tasks(summary):
    """What is written where downstream tasks were run too."""
    entry = {
        "mean": 30.0,
        "groups": {"science": 30.0},
        "tasks": {"sciq": task("science", 30.0)},
        "not_run": {"mmlu": "no data"},
    }
    return summary | {"tasks": {"after": entry}}


def test_the_keys_of_the_file_and_their_order(with_tasks):
    assert list(with_tasks) == [
        "data",
        "domains",
        "windows",
        "length",
        "perplexity",
        "loss",
        "window_loss",
        "routed_model",
        "routing",
        "tokens_per_second",
        "change",
        "warnings",
        "models",
        "tasks",
    ]
    assert list(with_tasks["models"]["seed"]) == ["checkpoint", "tokens_per_second"]
    assert list(with_tasks["models"]["after"]) == [
        "checkpoint",
        "tokens_per_second",
        "experts",
        "expert_domains",
        "layers",
        "routing",
        "own_share",
        "leak",
        "share_by_layer",
        "gate_by_layer",
        "cosine",
    ]
    assert list(with_tasks["change"])[:5] == ["before", "after", "ratio", "domains", "all"]


def test_what_is_read_is_what_was_written(with_tasks):
    text = json.dumps(with_tasks)
    again = Summary.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert isinstance(again.tasks["after"], ModelTasks)


def test_of_chats_the_answer_tokens_of_each_window_are_kept(tmp_path):
    parts = models()
    for part in parts.values():
        part.scores.window_labels = {"a": np.array([8, 2, 2, 4])}
    found = summarise(parts, SETUP)
    assert found.labels("after") == {"a": [8, 2, 2, 4]}
    # (8 * 1.1 + 2 * 1.2 + 2 * 0.9 + 4 * 0.8) / 16, less (8 * 2 + 2 * 2.2 + 2 * 1.8 + 4 * 2) / 16
    assert found.loss["after"]["a"] == pytest.approx(1.0125)
    assert found.verdict.domains["a"].difference.mean == pytest.approx(1.0125 - 2.0)
    assert found.verdict.domains["a"].before == pytest.approx(math.exp(2.0))
    text = json.dumps(found.to_json())
    again = Summary.from_json(json.loads(text))
    assert again == found and json.dumps(again.to_json()) == text
    assert "Of chats the answers alone count: 16 tokens of a." in intro(again)
    write_evaluation(again, tmp_path)
    lines = (tmp_path / "figures" / "perplexity.csv").read_text().splitlines()
    errors = {tuple(line.split(",")[:2]): line.split(",")[4] for line in lines[1:]}
    expected = standard_error(LOSSES["after"]["a"], [8, 2, 2, 4])
    assert float(errors["after", "a"]) == pytest.approx(expected)
    plain = summarise(models(), SETUP)
    assert "window_labels" not in plain.to_json() and "chats" not in intro(plain)


@pytest.mark.parametrize("said", [{}, {"tasks": {}}, {"tasks": None}])
def test_without_downstream_tasks_there_are_none_and_no_section_tells_of_them(
    summary, said, tmp_path
):
    assert "tasks" not in summary
    again = Summary.from_json(summary | said)
    assert again.tasks == {} and "tasks" not in again.to_json()
    sections = evaluation_sections(again, tmp_path)
    assert sections and not any("ask" in section.title for section in sections)


def test_keys_that_are_not_known_are_ignored(summary):
    """The demo adds `findings`, `seconds` and `extension`."""
    again = Summary.from_json(summary | {"findings": ["good"]})
    assert again == Summary.from_json(summary)


def test_a_summary_of_an_older_version_still_makes_a_page(summary, tmp_path):
    old = {key: value for key, value in summary.items() if key != "window_loss"}
    old["change"] = {key: summary["change"][key] for key in ("before", "after", "ratio")}
    sections = evaluation_sections(Summary.from_json(old), tmp_path)
    assert "From before to after" not in [section.title for section in sections]
