"""The seed model's curve: every cell of its table, its CSV, and where there is none."""

import csv

import pytest
from made_up_results import read

from nexus_ds.experiments.comparison.report import write_comparison
from nexus_ds.experiments.comparison.report_seed import seed_sections, seed_table


@pytest.fixture
def with_curve(found):
    found["seed_curve"] = [
        {
            "tokens": 1_000_000 * (n + 1),
            "loss": {"arxiv": 4.0 - n / 4, "c4": 5.0 - n / 2, "github": 9.0},
        }
        for n in range(4)
    ]
    return found


def test_without_what_is_added_later_each_line_has_the_gain_since_the_one_above(with_curve):
    table = seed_table(read(with_curve))
    assert table.header == ["tokens read", "arxiv", "c4", "mean", "gain"]
    assert table.rows == [
        ["1M", 4.0, 5.0, 4.5, None],
        ["2M", 3.75, 4.5, 4.125, 0.375],
        ["3M", 3.5, 4.0, 3.75, 0.375],
        ["4M", 3.25, 3.5, 3.375, 0.375],
    ]


def test_the_page_has_figure_csv_and_table(with_curve, tmp_path):
    write_comparison(read(with_curve), tmp_path)
    assert ">The seed model<" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "figures" / "seed.png").stat().st_size > 10_000
    with (tmp_path / "figures" / "seed.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["tokens", "domain", "loss"] and rows[5] == ["1000000", "c4", "5.0"]
    assert len(rows) == 9


def test_two_points_are_no_curve(with_curve, tmp_path):
    del with_curve["seed_curve"][2:]
    assert seed_sections(read(with_curve), tmp_path) == []
    assert seed_sections(read(with_curve | {"seed_curve": None}), tmp_path) == []
