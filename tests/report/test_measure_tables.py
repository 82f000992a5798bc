"""Measures as a table, a section and rows of a CSV: means, errors, and differences in pairs."""

import math

import numpy as np
import pytest

from nexus_ds.errors import ConfigError
from nexus_ds.evaluation.documents import ByDocument
from nexus_ds.report.measure_tables import (
    READING,
    measure_rows,
    measure_sections,
    measure_table,
    measures_named,
)
from nexus_ds.report.page import text_table
from nexus_ds.report.summary import MeasureEntry, mean_over_seeds


def found(values, weights):
    return ByDocument(np.array(values), np.array(weights))


SEED = {"a": found([1.0, 2.0, 4.0], [1, 1, 2]), "b": found([3.0, 5.0], [1, 1])}
NEXUS = {"a": found([0.9, 1.9, 3.8], [1, 1, 2]), "b": found([3.0, 5.2], [1, 1])}
CHANCE = {"a": found([0.1], [1]), "b": found([0.1], [1])}


def by_hand(values, weights):
    """Return the mean of a ratio and its standard error, every document a stretch of its own."""
    values, weights = np.array(values), np.array(weights, dtype=float)
    mean = (values * weights).sum() / weights.sum()
    squares = ((weights * (values - mean)) ** 2).sum()
    count = len(values)
    return mean, math.sqrt(count / (count - 1) * squares) / weights.sum()


def test_table():
    entry = MeasureEntry.of({"seed": SEED, "Nexus": NEXUS}, CHANCE)
    table = measure_table("cloze", entry)
    assert table.header == ["model", "a", "b", "mean"]
    assert [row[0] for row in table.rows] == ["seed", "Nexus", "chance", "Nexus − seed"]
    seed, _, chance, less = table.rows
    a, b = by_hand([1, 2, 4], [1, 1, 2]), by_hand([3, 5], [1, 1])
    assert (seed[1].mean, seed[1].deviation) == pytest.approx(a)
    assert (seed[2].mean, seed[2].deviation) == pytest.approx(b)
    assert seed[3].mean == pytest.approx((a[0] + b[0]) / 2)
    assert seed[3].deviation == pytest.approx(math.hypot(a[1], b[1]) / 2)
    assert [str(cell) for cell in chance[1:]] == ["0.100"] * 3
    # in pairs: the differences vary less than either model
    in_pairs = by_hand([-0.1, -0.1, -0.2], [1, 1, 2])
    assert (less[1].mean, less[1].deviation) == pytest.approx(in_pairs)
    assert str(less[1]) == "-0.150 ± 0.038"
    assert "Nexus − seed" in text_table(table)


def test_one_model_of_bits_has_a_row_alone():
    table = measure_table("bits", MeasureEntry.of({"seed": SEED}, {}))
    assert [row[0] for row in table.rows] == ["seed"]


def test_sections_and_rows():
    measures = {
        "bits": MeasureEntry.of({"seed": SEED}, {}),
        "generation": MeasureEntry.of({"seed": NEXUS}, SEED),
    }
    titles = [section.title for section in measure_sections(measures)]
    assert titles == [
        "Bits per byte (lower is better)",
        "Distance of generated text (bits, lower is better)",
    ]
    assert READING["bits"] in measure_sections(measures)[0].text
    rows = measure_rows(measures)
    assert [row[:3] for row in rows] == [
        ["bits", "seed", "a"],
        ["bits", "seed", "b"],
        ["generation", "seed", "a"],
        ["generation", "seed", "b"],
        ["generation", "real text", "a"],
        ["generation", "real text", "b"],
    ]
    assert rows[0][3:] == [*by_hand([1, 2, 4], [1, 1, 2]), 3, 4]


def test_a_file_gives_the_entry_back():
    entry = MeasureEntry.of({"seed": SEED}, CHANCE)
    assert MeasureEntry.from_json(entry.to_json()) == entry
    assert entry.to_json()["reference"]["a"]["standard_error"] is None


def test_names_of_measures():
    assert measures_named("all", "--measures ") == ["bits", "cloze", "generation"]
    assert measures_named("generation, bits", "--measures ") == ["bits", "generation"]
    assert measures_named("", "--measures ") == []
    with pytest.raises(ConfigError) as caught:
        measures_named("bits,acc", "compare.measures=")
    assert str(caught.value) == (
        "compare.measures='bits,acc': found acc, expected all, or some of bits, cloze, generation"
    )


def test_the_mean_of_seeds_is_taken_document_by_document():
    first = MeasureEntry.of({"seed": SEED, "Nexus": NEXUS}, CHANCE)
    other = {"a": found([1.1, 2.1, 4.0], [1, 1, 2]), "b": found([3.0, 5.0], [1, 1])}
    # the seed model is one for both, a second one was not measured
    second = MeasureEntry.of({"Nexus": other}, CHANCE)
    mean = mean_over_seeds([first, second])
    assert list(mean.models) == ["seed", "Nexus"] and mean.reference == first.reference
    assert mean.models["seed"] == first.models["seed"]
    assert mean.models["Nexus"]["a"].values == pytest.approx([1.0, 2.0, 3.9])
    assert mean.models["Nexus"]["a"].weights == [1, 1, 2]
    assert mean.models["Nexus"]["b"].values == pytest.approx([3.0, 5.1])
