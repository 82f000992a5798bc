"""Figures of a comparison: all there, with the numbers that were measured beside each."""

from statistics import fmean, stdev

import pytest
from made_up_results import OLD, mean_loss, read, rows_of, seeds_of, with_longer_seed

from nexus_ds.experiments.comparison.report_figures import draw_regimes


def test_every_figure_has_its_numbers_beside_it(written):
    figures = {path.stem for path in (written / "figures").glob("*.png")}
    assert figures == {path.stem for path in (written / "figures").glob("*.csv")}
    assert figures >= {
        "differences",
        "compute",
        "extension-github",
        "share-github",
        "settings",
        "routing-Nexus",
        "routing-Nexus-refit",
        "cosine-Nexus",
        "cosine-Nexus-centred",
    }


def test_csv_of_a_figure_holds_what_was_measured(written, found):
    rows = rows_of(written / "figures" / "extension-github.csv")
    (row,) = [
        r
        for r in rows
        if r["extension"] == "Linear, reset"
        and r["finetune_tokens"] == "50000.0"
        and r["panel"].startswith("new")
    ]
    entry = next(e for e in found["extensions"] if e["name"] == "linear_reset")
    expected = [seed["budgets"]["50000"]["loss"]["github"] for seed in entry["seeds"].values()]
    assert float(row["mean"]) == pytest.approx(sum(expected) / 3) and float(row["deviation"]) > 0


def assert_csv(path, columns, line):
    """Check one line of a CSV, found by its text columns; numbers agree approximately."""
    rows = rows_of(path)
    assert list(rows[0]) == list(columns)
    keys = [column for column, value in zip(columns, line, strict=True) if isinstance(value, str)]
    wanted = dict(zip(columns, line, strict=True))
    (row,) = [row for row in rows if all(row[key] == wanted[key] for key in keys)]
    numbers = [float(row[column]) for column in columns if column not in keys]
    assert numbers == pytest.approx([value for value in line if not isinstance(value, str)])


def test_every_column_of_the_figures_csv(written, found):
    folder = written / "figures"
    linear, nexus = (seeds_of(found, "contenders", name) for name in ("linear", "nexus"))
    losses, base = mean_loss(linear, OLD), mean_loss(nexus, OLD)
    assert_csv(
        folder / "differences.csv",
        ("contender", "seed", "difference_nats"),
        ("Linear router", "1", losses[1] - base[1]),
    )
    level = ("panel", "contender", "training_flops", "mean", "deviation")
    assert_csv(
        folder / "compute.csv", level, ("", "Linear router", 6e12, fmean(losses), stdev(losses))
    )
    last = seeds_of(found, "extensions", "linear_reset", budget="50000")
    columns = ("panel", "extension", "finetune_tokens", "mean", "deviation")
    for panel, domains in (
        ("new domain: github", ["github"]),
        (f"old domains: {', '.join(OLD)}", OLD),
    ):
        values = mean_loss(last, domains)
        line = (panel, "Linear, reset", "50000.0", fmean(values), stdev(values))
        assert_csv(folder / "extension-github.csv", columns, line)
    for panel, key in (
        ("share: github's tokens at the new expert", "share"),
        ("leak: old domains' tokens there", "leak"),
    ):
        values = [seed[key] for seed in last]
        line = (panel, "Linear, reset", "50000.0", fmean(values), stdev(values))
        assert_csv(folder / "share-github.csv", columns, line)
    changed = mean_loss(seeds_of(found, "contenders", "linear", "equal_data"), OLD)
    assert_csv(
        folder / "settings.csv",
        ("setting", "contender", "mean", "deviation"),
        ("equal_data", "Linear router", fmean(changed), stdev(changed)),
    )


def test_the_figure_of_regimes_sets_every_contender_against_dense(found, tmp_path):
    assert draw_regimes(read(found), tmp_path / "none.png") is None
    whole = with_longer_seed(found)
    draw_regimes(read(whole), tmp_path / "regimes.png")
    lines = rows_of(tmp_path / "regimes.csv")
    nexus = [line for line in lines if line["contender"] == "Nexus"]
    assert [(line["tokens_per_parameter"], line["setting"]) for line in nexus] == [
        ("1.0", ""),
        ("10.0", "longer"),
    ]
    gaps = []
    for line in nexus:
        losses, dense = (
            mean_loss(seeds_of(whole, "contenders", name, line["setting"]), OLD)
            for name in ("nexus", "union")
        )
        wanted = sum(losses) / len(losses) - sum(dense) / len(dense)
        assert float(line["difference_nats"]) == pytest.approx(wanted, abs=6e-4)
        gaps.append(wanted)
    assert gaps[1] == pytest.approx(gaps[0] - 0.05)
    assert {"Seed", "Branch arxiv"}.isdisjoint(line["contender"] for line in lines)
