"""Figures, CSV and the page of an evaluation: every column, and all of it from JSON alone."""

import csv
import json
import math

import pytest
from made_up_evaluation import ERROR_A, ERROR_B, LOSSES, SETUP, models

from nexus_ds.report.evaluation import (
    evaluation_sections,
    perplexity_table,
    write_evaluation,
)
from nexus_ds.report.page import Spread, text_table
from nexus_ds.report.summary import Summary, summarise


@pytest.fixture
def summary():
    return summarise(models(), SETUP)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def section(summary, title, tmp_path):
    (found,) = [s for s in evaluation_sections(summary, tmp_path) if s.title == title]
    return found


# Tables: every column -----------------------------------------------------------------------------


def test_every_column_of_the_perplexity_table(summary):
    table = perplexity_table(summary)
    assert table.header == ["model", "a", "b", "all"] and table.best == "min"
    assert table.rows[1:3] == [
        [
            "before",
            pytest.approx(math.exp(2)),
            pytest.approx(math.exp(3)),
            pytest.approx(math.exp(2.5)),
        ],
        [
            "after",
            pytest.approx(math.exp(1)),
            pytest.approx(math.exp(3.1)),
            pytest.approx(math.exp(2.05)),
        ],
    ]


def test_every_column_of_the_routing_table(summary, tmp_path):
    table = section(summary, "Routing of after", tmp_path).table
    assert table.header == ["text of", "first", "second", "own expert", "mean gate"]
    assert table.rows == [
        ["a", pytest.approx(0.7), pytest.approx(0.3), pytest.approx(0.7), pytest.approx(0.55)],
        ["b", pytest.approx(0.3), pytest.approx(0.7), pytest.approx(0.7), pytest.approx(0.65)],
    ]


def test_every_column_of_the_change_table(summary, tmp_path):
    found = section(summary, "From before to after", tmp_path)
    assert found.table.header == [
        "perplexity of",
        "before",
        "after",
        "change",
        "in nats",
        "verdict",
    ]
    assert [row[0] for row in found.table.rows] == ["a", "b", "all"]
    assert [row[1:3] for row in found.table.rows] == [
        pytest.approx([math.exp(x), math.exp(y)]) for x, y in ((2.0, 1.0), (3.0, 3.1), (2.5, 2.05))
    ]
    whole = math.hypot(ERROR_A, ERROR_B) / 2
    assert [row[4] for row in found.table.rows] == [
        Spread(pytest.approx(mean), pytest.approx(error), signed=True)
        for mean, error in ((-1.0, ERROR_A), (0.1, ERROR_B), (-0.45, whole))
    ]
    # t of 3 degrees of freedom is 3.18: 0.1 is less than 3.18 * 0.0707
    assert [[row[3], row[5]] for row in found.table.rows] == [
        [f"-63.2 ± {100 * math.exp(-1) * ERROR_A:.1f} %", "better"],
        [f"+10.5 ± {100 * math.exp(0.1) * ERROR_B:.1f} %", "same"],
        [f"-36.2 ± {100 * math.exp(-0.45) * whole:.1f} %", "better"],
    ]
    assert "Not decided: the same as far as 4 windows can tell: b (+10.5" in found.text


def test_every_column_of_the_checkpoints(summary, tmp_path):
    table = section(summary, "Checkpoints", tmp_path).table
    assert dict(zip(table.header, table.rows[2], strict=True)) == {
        "model": "after",
        "kind": "Nexus",
        "family": "x",
        "dtype": "F32",
        "experts": 2,
        "top-k": 1,
        "parameters": 10,
        "active per token": 5,
        "tokens/s": 100,
    }
    assert table.rows[0][4:6] == [None, None] and table.rows[0][-1] == 300


# CSV: every column --------------------------------------------------------------------------------


@pytest.fixture
def figures(summary, tmp_path):
    write_evaluation(summary, tmp_path)
    return tmp_path / "figures"


def test_every_column_of_perplexity_csv(figures):
    rows = rows_of(figures / "perplexity.csv")
    assert [(row["model"], row["domain"]) for row in rows] == [
        (name, d) for name in LOSSES for d in "ab"
    ]
    row = rows[2]
    assert list(row) == ["model", "domain", "loss_nats", "perplexity", "standard_error_nats"]
    assert (row["model"], row["domain"]) == ("before", "a")
    assert float(row["loss_nats"]) == pytest.approx(2.0) and float(
        row["perplexity"]
    ) == pytest.approx(math.exp(2))
    assert float(row["standard_error_nats"]) == pytest.approx(math.sqrt((0.04 + 0.04) / 3 / 4))


def test_every_column_of_change_csv(figures):
    a, b, whole = rows_of(figures / "change.csv")
    assert a == {
        "domain": "a",
        "perplexity_before": a["perplexity_before"],
        "perplexity_after": a["perplexity_after"],
        "change": a["change"],
        "change_standard_error": a["change_standard_error"],
        "difference_nats": a["difference_nats"],
        "standard_error_nats": a["standard_error_nats"],
        "verdict": "better",
    }
    assert [float(value) for value in list(a.values())[1:-1]] == pytest.approx(
        [math.exp(2), math.exp(1), math.exp(-1) - 1, math.exp(-1) * ERROR_A, -1.0, ERROR_A]
    )
    assert float(b["difference_nats"]) == pytest.approx(0.1) and b["verdict"] == "same"
    assert whole["domain"] == "all" and float(whole["difference_nats"]) == pytest.approx(-0.45)


def test_every_column_of_routing_csv(figures):
    rows = rows_of(figures / "routing-after.csv")
    assert list(rows[0]) == ["layer", "domain", "expert", "share"]
    found = {(row["layer"], row["domain"], row["expert"]): float(row["share"]) for row in rows}
    assert len(rows) == len(found) == (3 + 1) * 2 * 2
    assert (
        found["2", "a", "second"] == 0.2
        and found["5", "b", "first"] == 0.5
        and found["0", "b", "second"] == 0.9
    )
    assert found["mean", "b", "first"] == pytest.approx(0.3)


def test_every_column_of_cosine_csv(figures):
    """Tables 0 to 5 add k/10 to the unit matrix: embeddings, inputs, two layers' rows, two layers'
    centred rows."""
    for name, before, after in (("cosine-after", 0.0, 0.3), ("cosine-after-centred", 0.1, 0.45)):
        rows = rows_of(figures / f"{name}.csv")
        assert list(rows[0]) == ["expert", "other", "before", "after"]
        found = {(r["expert"], r["other"]): (float(r["before"]), float(r["after"])) for r in rows}
        assert found["first", "second"] == pytest.approx((before, after))
        assert found["second", "second"] == pytest.approx((1 + before, 1 + after))


# The page -----------------------------------------------------------------------------------------


def test_a_page_can_be_made_from_the_file_alone(summary, tmp_path):
    write_evaluation(summary, tmp_path)
    again = Summary.from_json(json.loads((tmp_path / "summary.json").read_text()))
    sections = evaluation_sections(again, tmp_path / "figures")
    titles = [section.title for section in sections]
    assert titles[:2] == ["Perplexity by domain", "From before to after"]
    assert all(section.figure is None or section.figure.is_file() for section in sections)
    explained = [section.text.split("\n\n")[0] for section in sections]
    # two sentences each
    assert all(len([s for s in text.split(". ") if s.strip()]) == 2 for text in explained)
    assert "&lt;&amp;&gt;" in (tmp_path / "report.html").read_text()
    assert "-63.2 ± 2.6 %" in (tmp_path / "report.html").read_text()


def test_lineage_is_readable(summary, tmp_path):
    table = section(summary, "How after came about", tmp_path).table
    assert table.header == ["step", "verb", "settings"]
    assert table.rows == [
        ["1", "upcycle", "note: <&>; fit: before 0.4529, after 0.5; experts: a, b"]
    ]
    assert "upcycle" in text_table(table)
