"""Figures of a comparison, each with its numbers as CSV beside it.

Differences by seed, quality against compute, losses and shares over an extension's finetuning,
changed settings.

Not covered: routing by layer and cosines, which an evaluation draws (evaluation.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nexus_ds.experiments.comparison import seed_figures
from nexus_ds.experiments.comparison.report_tables import (
    DENSE,
    extension_reference,
    extensions_of,
    method_reference,
    methods_of,
    new_domains,
    reference,
    regimes,
    starting_losses,
    variants_of,
    varied,
)
from nexus_ds.experiments.comparison.result_file import ExtensionRow, MethodRow, Results
from nexus_ds.experiments.comparison.seed_figures import Level
from nexus_ds.report.evaluation import write_csv
from nexus_ds.report.paired import LEAST, paired, spread

Curves = dict[str, list[Level]]
MIXTURES = ("upcycled", "router")
"""Groups of methods."""
REGIMES = ("tokens_per_parameter", "setting", "contender", "difference_nats", "deviation")


def _level(x: float, values: Mapping[str, float]) -> Level | None:
    found = spread(values)
    return None if found is None else Level(x, found.mean, found.deviation)


def draw_differences(results: Results, out: Path) -> Path | None:
    """Draw every method minus the reference on the old domains, a dot a seed."""
    rows, old = methods_of(results), results.domains.old
    base = method_reference(rows)
    if base is None:
        return None
    found: dict[str, Mapping[str, float]] = {}
    for row in rows:
        compared = None if row is base else paired(row.losses(old), base.losses(old))
        if compared is not None:
            found[row.title] = compared.by_seed
    if not found:
        return None
    # the best on top
    order = sorted(found, key=lambda name: statistics.fmean(found[name].values()))
    write_csv(
        out.with_suffix(".csv"),
        ("contender", "seed", "difference_nats"),
        [(name, seed, value) for name in order for seed, value in found[name].items()],
    )
    return seed_figures.paired_dots(
        {"": {name: list(found[name].values()) for name in order}},
        out,
        title=f"Loss on the old domains minus that of {base.title}, seed by seed",
        xlabel=f"difference in nats per token (left: better; grey: below {LEAST})",
        ignore=LEAST,
    )


def draw_compute(results: Results, out: Path) -> Path | None:
    """Draw every method's loss on the old domains against its training compute.

    None for fewer than two.
    """
    points: dict[str, Level] = {}
    for row in methods_of(results):
        flops = row.compute.training_flops
        if flops is None:
            continue
        level = _level(float(flops), row.losses(results.domains.old))
        if level is not None:
            points[row.title] = level
    # one point has nothing to be compared with
    if len(points) < 2:
        return None
    one_panel = {"": {name: [level] for name, level in points.items()}}
    _levels_csv(out, "contender", "training_flops", one_panel)
    return seed_figures.quality_compute(
        points,
        out,
        title="Quality against compute",
        xlabel="training FLOPs after the seed model (log scale)",
        ylabel="loss on the old domains (nats per token)",
    )


def _levels_csv(
    out: Path,
    row: str,
    x: str,
    panels: Mapping[str, Mapping[str, Sequence[Level]]],
) -> None:
    rows = []
    for panel, series in panels.items():
        for name, levels in series.items():
            rows += [(panel, name, level.x, level.mean, level.deviation) for level in levels]
    write_csv(out.with_suffix(".csv"), ("panel", row, x, "mean", "deviation"), rows)


def _ordered(results: Results, added: str) -> list[ExtensionRow]:
    """Return the extensions of an addition with the reference first (it is drawn thicker)."""
    rows = extensions_of(results, added)
    base = extension_reference(rows)
    return sorted(rows, key=lambda row: row is not base)


def _curves(
    results: Results, added: str, values_of: Callable[[ExtensionRow, str], Mapping[str, float]]
) -> Curves:
    """Return each extension's levels over its budgets.

    `values_of(row, budget)` gives a number a seed.
    """
    curves: Curves = {}
    for row in _ordered(results, added):
        levels = [_level(float(budget), values_of(row, budget)) for budget in row.budgets]
        curves[row.title] = [level for level in levels if level is not None]
    return curves


def draw_extension(results: Results, added: str, out: Path) -> Path:
    """Draw the loss on the new and on the old domains over the finetuning (paper Figure 4)."""
    old, new = results.domains.old, new_domains(results, added)
    # a title has one line
    shown = ", ".join(old) if len(old) < 6 else f"all {len(old)}"
    old_title = f"old domains: {shown}"
    panels = {
        f"new domain: {added}": _curves(results, added, lambda row, b: row.losses(new, b)),
        old_title: _curves(results, added, lambda row, b: row.losses(old, b)),
    }
    # The level to stay at; on the new domain the mixture before has no expert, so none is drawn.
    start = starting_losses(results, _ordered(results, added)[0], old)
    lines = {old_title: statistics.fmean(start.values())} if start else {}
    _levels_csv(out, "extension", "finetune_tokens", panels)
    return seed_figures.levels(
        panels,
        out,
        title=f"Adding {added}: loss over the finetuning (error bars: deviation over seeds)",
        xlabel="finetuning tokens",
        ylabel="loss (nats per token)",
        lines=lines,
    )


def draw_share(results: Results, added: str, out: Path) -> Path:
    """Draw share and leak over the finetuning (paper Figure 6).

    Share is that of the new domain's tokens at its expert, leak that of the old domains' tokens
    there.
    """
    panels = {
        f"share: {added}'s tokens at the new expert": _curves(results, added, ExtensionRow.shares),
        "leak: old domains' tokens there": _curves(results, added, ExtensionRow.leaks),
    }
    _levels_csv(out, "extension", "finetune_tokens", panels)
    return seed_figures.levels(
        panels,
        out,
        title=f"Adding {added}: who finds the new expert",
        xlabel="finetuning tokens",
        ylabel="share of tokens",
    )


def _against_dense(
    rows: Sequence[MethodRow], old: Sequence[str]
) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return each mixture's loss, and the ensemble's, minus dense training's by seed: by setting
    and label."""
    dense = reference(rows, (DENSE,))
    found: dict[tuple[str, str], Mapping[str, float]] = {}
    for row in rows:
        # merging without training is far off, and would flatten all others
        shown = row.group in MIXTURES or row.name == "btm"
        if dense is None or not shown:
            continue
        compared = paired(row.losses(old), dense.losses(old))
        if compared is not None:
            found[row.variant, row.label] = compared.by_seed
    return found


def draw_regimes(results: Results, out: Path) -> Path | None:
    """Draw mixtures and the ensemble minus dense training, by how long the seed was trained.

    Only what was made in more than one regime is shown.
    """
    found = regimes(results)
    points: Curves = {}
    lines = []
    for x, (tokens, rows) in enumerate(found.items()):
        for (variant, label), by_seed in _against_dense(rows, results.domains.old).items():
            level = _level(float(x), by_seed)
            if level is not None:
                points.setdefault(label, []).append(level)
                lines.append((tokens, variant, label, level.mean, level.deviation))
    # a single point says nothing about a regime
    series = {label: levels for label, levels in points.items() if len(levels) > 1}
    if not series:
        return None
    write_csv(out.with_suffix(".csv"), REGIMES, lines)
    return seed_figures.levels(
        {"below 0: better than dense": series},
        out,
        title="Who wins, by how long the seed was trained",
        xlabel="tokens a parameter that the seed model has read",
        ylabel="loss minus dense training's (nats per token)",
        names=[f"{tokens:.3g}" for tokens in found],
    )


def draw_variants(results: Results, out: Path) -> Path | None:
    """Draw the loss of each varied method under each setting (paper Figure 7)."""
    labels = varied(results)
    if not labels:
        return None
    changed = [variant for variant in variants_of(results) if methods_of(results, variant)]
    shown = ["as it stands", *changed]
    series: Curves = {label: [] for label in labels.values()}
    lines = []
    for x, variant in enumerate(["", *changed]):
        for row in methods_of(results, variant):
            level = _level(float(x), row.losses(results.domains.old))
            if row.name in labels and level is not None:
                series[labels[row.name]].append(level)
    for name, levels in series.items():
        for level in levels:
            setting = shown[round(level.x)]
            lines.append((setting, name, level.mean, level.deviation))
    write_csv(out.with_suffix(".csv"), ("setting", "contender", "mean", "deviation"), lines)
    return seed_figures.levels(
        {"old domains": series},
        out,
        title="One setting changed (error bars: deviation over seeds)",
        xlabel="setting",
        ylabel="loss (nats per token)",
        names=shown,
    )
