"""How the seed model of a comparison came to rest: its own validation losses, as figure and table.

A mixture's gain over dense training depends on it: from a seed that still falls steeply whatever
trains longest wins.
Not covered: a seed model that was given, of whose training nothing is known.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from nexus_ds.experiments.comparison import seed_figures
from nexus_ds.experiments.comparison.result_file import Results
from nexus_ds.experiments.comparison.seed_figures import Level
from nexus_ds.report.evaluation import write_csv
from nexus_ds.report.page import Cell, Section, Table

FEWEST = 3
"""Points of a curve; a recipe without `eval_every` has two."""
READING = (
    "Validation loss of the seed model over its own training, nats per token, by domain that it "
    "reads. What starts from a curve that still falls gains by more training alone; the last "
    "column is the gain since the line above, the mean of all domains."
)


def _curves(results: Results) -> dict[str, list[Level]]:
    """Return the losses of each domain that the seed reads, by tokens read."""
    curves: dict[str, list[Level]] = {}
    for point in results.seed_curve:
        for domain, loss in point.loss.items():
            # what is added later is scored from the start
            if domain not in results.domains.new:
                curves.setdefault(domain, []).append(Level(float(point.tokens), loss))
    return curves


def seed_table(results: Results) -> Table | None:
    """Return the seed's losses by tokens read; None where its training has no curve."""
    curves = _curves(results)
    if len(results.seed_curve) < FEWEST:
        return None
    lines: list[list[Cell]] = []
    before = None
    for levels in zip(*curves.values(), strict=True):
        losses = [level.mean for level in levels]
        mean = statistics.fmean(losses)
        gain = None if before is None else before - mean
        lines.append([seed_figures.short_count(levels[0].x), *losses, mean, gain])
        before = mean
    return Table(header=["tokens read", *curves, "mean", "gain"], rows=lines)


def draw_seed(results: Results, out: Path) -> Path:
    """Draw the seed's loss by domain over the tokens that it has read, and write the CSV."""
    curves = _curves(results)
    lines = []
    for domain, levels in curves.items():
        lines += [(int(level.x), domain, level.mean) for level in levels]
    header = ("tokens", "domain", "loss")
    write_csv(out.with_suffix(".csv"), header, lines)
    return seed_figures.levels(
        {"validation text of each domain": curves},
        out,
        title="The seed model over its own training",
        xlabel="tokens read",
        ylabel="loss (nats per token)",
    )


def seed_sections(results: Results, folder: Path) -> list[Section]:
    """Return the section of the seed's curve; none where there is no curve."""
    table = seed_table(results)
    if table is None:
        return []
    figure = draw_seed(results, folder / "seed.png")
    return [
        Section(
            title="The seed model",
            text=READING,
            table=table,
            figure=figure,
        )
    ]
