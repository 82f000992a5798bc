"""Figures of a comparison, each with its numbers as CSV beside it.

Differences by seed, quality against compute, losses and shares over an extension's finetuning,
changed settings.

Not covered: routing by layer and cosines, which an evaluation draws (evaluation.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_ds.experiments.comparison import seed_figures
from nexus_ds.experiments.comparison.report_tables import (
    EXTENSION_REFERENCES,
    compute_of,
    extensions_of,
    label,
    methods_of,
    new_domains,
    old_domains,
    reference,
    starting_losses,
    variants_of,
    varied,
)
from nexus_ds.experiments.comparison.seed_figures import Level
from nexus_ds.report.evaluation import write_csv
from nexus_ds.report.paired import LEAST, budgets_of, losses, measured, paired, spread

Entry = Mapping[str, Any]
Curves = dict[str, list[Level]]


def _level(x: float, values: Mapping[str, float]) -> Level | None:
    found = spread(values)
    return None if found is None else Level(x, found.mean, found.deviation)


def draw_differences(results: Entry, out: Path) -> Path | None:
    """Draw every contender minus the reference on the old domains, a dot a seed."""
    entries, domains = methods_of(results), old_domains(results)
    base = reference(entries)
    if base is None:
        return None
    found = {
        label(e): paired(losses(e, domains), losses(base, domains))
        for e in entries
        if e is not base
    }
    rows = {name: value.by_seed for name, value in found.items() if value is not None}
    if not rows:
        return None
    order = sorted(rows, key=lambda name: statistics.fmean(rows[name].values()))
    write_csv(
        out.with_suffix(".csv"),
        ("contender", "seed", "difference_nats"),
        [(name, seed, value) for name in order for seed, value in rows[name].items()],
    )
    return seed_figures.paired_dots(
        {"": {name: list(rows[name].values()) for name in order}},
        out,
        title=f"Loss on the old domains minus that of {label(base)}, seed by seed",
        xlabel=f"difference in nats per token (left: better; grey: below {LEAST})",
        ignore=LEAST,
    )


def draw_compute(results: Entry, out: Path) -> Path | None:
    """Draw every contender's loss on the old domains against its training compute; None for fewer
    than two."""
    points: dict[str, Level] = {}
    for entry in methods_of(results):
        flops = compute_of(entry, "training_flops")
        level = None if flops is None else _level(flops, losses(entry, old_domains(results)))
        if level is not None:
            points[label(entry)] = level
    if len(points) < 2:
        return None
    _levels_csv(
        out, "contender", "training_flops", {"": {name: [level] for name, level in points.items()}}
    )
    return seed_figures.quality_compute(
        points,
        out,
        title="Quality against compute",
        xlabel="training FLOPs after the seed model (log scale)",
        ylabel="loss on the old domains (nats per token)",
    )


def _levels_csv(
    out: Path, row: str, x: str, panels: Mapping[str, Mapping[str, Sequence[Level]]]
) -> None:
    rows = [
        (panel, name, level.x, level.mean, level.deviation)
        for panel, series in panels.items()
        for name, levels in series.items()
        for level in levels
    ]
    write_csv(out.with_suffix(".csv"), ("panel", row, x, "mean", "deviation"), rows)


def _ordered(results: Entry, added: str) -> list[Entry]:
    """Return the extensions of an addition with the reference first (it is drawn thicker)."""
    entries = extensions_of(results, added)
    base = reference(entries, EXTENSION_REFERENCES)
    return sorted(entries, key=lambda entry: entry is not base)


def _curves(
    results: Entry, added: str, values_of: Callable[[Entry, str], Mapping[str, float]]
) -> Curves:
    """Return each extension's levels over its budgets; `values_of(entry, budget)` gives a number a
    seed."""
    return {
        label(e): [
            level
            for b in budgets_of([e])
            if (level := _level(float(b), values_of(e, b))) is not None
        ]
        for e in _ordered(results, added)
    }


def draw_extension(results: Entry, added: str, out: Path) -> Path:
    """Draw the loss on the new and on the old domains over the finetuning (paper Figure 4)."""
    old, new = old_domains(results), new_domains(results, added)
    shown = ", ".join(old) if len(old) < 6 else f"all {len(old)}"
    panels = {
        f"new domain: {added}": _curves(results, added, lambda e, b: losses(e, new, b)),
        f"old domains: {shown}": _curves(results, added, lambda e, b: losses(e, old, b)),
    }
    start = list(starting_losses(results, _ordered(results, added)[0], old).values())
    lines = {title: statistics.fmean(start) for title in list(panels)[1:] if start}
    _levels_csv(out, "extension", "finetune_tokens", panels)
    return seed_figures.levels(
        panels,
        out,
        title=f"Adding {added}: loss over the finetuning (error bars: deviation over seeds)",
        xlabel="finetuning tokens",
        ylabel="loss (nats per token)",
        lines=lines,
    )


def draw_share(results: Entry, added: str, out: Path) -> Path:
    """Draw the new domain's share at its expert and the old domains' leak over the finetuning
    (paper Figure 6)."""
    panels = {
        f"share: {added}'s tokens at the new expert": _curves(
            results, added, lambda e, b: measured(e, "share", b)
        ),
        "leak: old domains' tokens there": _curves(
            results, added, lambda e, b: measured(e, "leak", b)
        ),
    }
    _levels_csv(out, "extension", "finetune_tokens", panels)
    return seed_figures.levels(
        panels,
        out,
        title=f"Adding {added}: who finds the new expert",
        xlabel="finetuning tokens",
        ylabel="share of tokens",
    )


def draw_variants(results: Entry, out: Path) -> Path | None:
    """Draw the loss of each varied contender under each setting (paper Figure 7)."""
    names = ["", *[v for v in variants_of(results) if methods_of(results, v)]]
    series: dict[str, list[Level]] = {title: [] for title in varied(results).values()}
    for x, variant in enumerate(names):
        for entry in methods_of(results, variant):
            level = _level(float(x), losses(entry, old_domains(results)))
            if entry["name"] in varied(results) and level is not None:
                series[varied(results)[entry["name"]]].append(level)
    if not series:
        return None
    shown = ["as it stands", *names[1:]]
    rows = [
        (shown[round(level.x)], name, level.mean, level.deviation)
        for name, ls in series.items()
        for level in ls
    ]
    write_csv(out.with_suffix(".csv"), ("setting", "contender", "mean", "deviation"), rows)
    return seed_figures.levels(
        {"old domains": series},
        out,
        title="One setting changed (error bars: deviation over seeds)",
        xlabel="setting",
        ylabel="loss (nats per token)",
        names=shown,
    )
