"""Summaries: which model the top level speaks of, warnings, changes between mixtures, and a page from JSON alone."""

import json
import math

import numpy as np
import pytest

from nexus_ds.model.scoring import Cosines, Routing, Scores
from nexus_ds.report.evaluation import (
    Measured,
    evaluation_sections,
    intro,
    perplexity_table,
    summarise,
    write_evaluation,
)

SETUP = {"data": "demo", "domains": ["a", "b"], "windows": 2, "length": 8}


def measured(loss, routed, gate=0.5):
    domains = list(loss)
    routing = None
    if routed:
        share = np.full((1, len(domains), 2), 0.5)
        routing = Routing(domains, ["a", "b"], ["a", "b"], [0], share, np.full((1, len(domains)), gate))
    eye = np.eye(2)
    step = {
        "verb": "upcycle",
        "note": "<&>",
        "fit": {"before": 0.45294, "after": 0.5},
        "experts": ["a", "b"],
        "x": None,
    }
    facts = {
        "kind": "Nexus" if routed else "dense", "family": "x", "dtype": "F32", "routed_experts": 2 if routed else 0,
        "top_k": 1, "parameters": {"total": 10, "active": 5}, "lineage": [step],
    }  # fmt: skip
    cosine = Cosines(["a", "b"], eye, eye, eye[None], eye[None]) if routed else None
    return Measured(facts, Scores(loss, dict.fromkeys(loss, 16), 100.0 if routed else 300.0, routing), cosine)


@pytest.fixture
def summary():
    models = {
        "seed": measured({"a": 2.0, "b": 3.0}, routed=False),
        "before": measured({"a": 2.0, "b": 3.0}, routed=True),
        "after": measured({"a": 1.0, "b": 3.1}, routed=True, gate=0.99),
        "branch": measured({"a": 1.5, "b": 4.0}, routed=False),
    }
    return summarise(models, SETUP)


def test_top_level_speaks_of_the_last_mixture(summary):
    assert summary["routed_model"] == "after" and summary["tokens_per_second"] == 100.0
    assert summary["routing"] == {"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}}
    assert summary["change"]["before"] == "before" and summary["change"]["after"] == "after"
    assert summary["change"]["ratio"] == pytest.approx({"a": math.exp(-1), "b": math.exp(0.1)})


def test_saturated_routers_are_warned_about(summary):
    (warning,) = summary["warnings"]
    assert warning.startswith("after: the router is saturated in 2 of 2 places") and "0.99 in layer 0" in warning
    assert "Warning: after: the router" in intro(summary)


def test_dense_models_alone():
    summary = summarise({"seed": measured({"a": 2.0}, routed=False)}, SETUP)
    assert summary["routing"] == {} and summary["tokens_per_second"] == 300.0 and summary["change"] is None


def test_leak_without_other_domains_is_null():
    summary = summarise({"m": measured({"a": 2.0}, routed=True)}, SETUP)
    assert summary["models"]["m"]["leak"] == {"a": None, "b": 0.5}
    json.dumps(summary, allow_nan=False)


def test_perplexity_table_has_the_mean_of_the_losses(summary):
    table = perplexity_table(summary)
    assert table.rows[0] == [
        "seed",
        pytest.approx(math.exp(2)),
        pytest.approx(math.exp(3)),
        pytest.approx(math.exp(2.5)),
    ]
    assert table.best == "min"


def test_a_page_can_be_made_from_the_file_alone(summary, tmp_path):
    write_evaluation(json.loads(json.dumps(summary)), tmp_path)
    again = json.loads((tmp_path / "summary.json").read_text())
    sections = evaluation_sections(again, tmp_path / "figures")
    titles = [section.title for section in sections]
    assert titles[:2] == ["Perplexity by domain", "From before to after"]
    assert all(section.figure is None or section.figure.is_file() for section in sections)
    assert all(
        len([s for s in section.text.split(". ") if s.strip()]) == 2 for section in sections
    )  # two sentences each
    assert "&lt;&amp;&gt;" in (tmp_path / "report.html").read_text()


def test_lineage_is_readable(summary, tmp_path):
    (section,) = [s for s in evaluation_sections(summary, tmp_path) if s.title == "How after came about"]
    assert section.table.rows == [["1", "upcycle", "note: <&>; fit: before 0.4529, after 0.5; experts: a, b"]]


def test_change_has_verdicts(summary, tmp_path):
    (section,) = [s for s in evaluation_sections(summary, tmp_path) if s.title == "From before to after"]
    assert section.table.header == ["perplexity of", "before", "after", "change", "verdict"]
    assert [row[0] for row in section.table.rows] == ["a", "b", "all"]
    assert [row[3:] for row in section.table.rows] == [
        ["-63.2 %", "better"],
        ["+10.5 %", "worse"],
        ["-36.2 %", "better"],
    ]
