"""Figures of the benchmarks: speed and shares of a step by model, and cost as work grows.

Not covered: more than about 12 models or 8 quantities in one legible picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_ds.report.figures import COLOURS, HATCHES, LINES, _new, _save

MARKERS = "osD^vPX*"


def speed_bars(
    rows: Sequence[Mapping[str, Any]], parts: Sequence[str], baseline: str, out: Path
) -> Path:
    """Draw each model's speed over the baseline's with its spread, and beside it the shares of its
    step.

    Args:
        rows: `benchmarks.compare.summary`: model, ratio, ratio_low, ratio_high, shares.
        parts: of a step, in the order in which they are drawn.
        baseline: the model that others are compared with.
        out: PNG file to write.
    """
    figure = _new(11.0, 1.6 + 0.45 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    places, names = range(len(rows)), [row["model"] for row in rows]
    ratios = [row["ratio"] for row in rows]
    spread = [
        [row["ratio"] - row["ratio_low"] for row in rows],
        [row["ratio_high"] - row["ratio"] for row in rows],
    ]
    left.barh(places, ratios, xerr=spread, color=COLOURS[0], error_kw={"capsize": 3})
    for place, value in enumerate(ratios):
        left.text(0.02, place, f"{value:.2f}", va="center", color="white", fontsize=9)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel(f"tokens/s over {baseline} (median and range of rounds)")
    start = [0.0] * len(rows)
    for number, part in enumerate(parts):
        values = [max(0.0, row["shares"].get(part, 0.0)) for row in rows]
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "hatch": HATCHES[number // len(COLOURS) % len(HATCHES)],
        }
        right.barh(places, values, left=start, label=part, edgecolor="white", linewidth=0.4, **look)
        start = [a + b for a, b in zip(start, values, strict=True)]
    right.set_xlabel("share of a step with optimizer and data")
    right.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Training speed and where a step's time goes", fontsize=11)
    return _save(figure, out)


def growth_curves(
    rows: Sequence[Mapping[str, Any]], exponents: Mapping[str, Mapping[str, float]], out: Path
) -> Path:
    """Draw time, and peak memory where there is one, against each quantity on logarithmic axes.

    Args:
        rows: `benchmarks.growth`: quantity, x, seconds, peak_bytes.
        exponents: fitted, for the legend.
        out: PNG file to write.
    """
    figure = _new(11.0, 4.8)
    panels = figure.subplots(1, 2)
    for axes, key, scale, label in zip(
        panels, ("seconds", "peak_bytes"), (1.0, 1e-6), ("seconds", "peak memory, MB"), strict=True
    ):
        for number, (quantity, fitted) in enumerate(exponents.items()):
            if key not in fitted:
                continue
            mine = [row for row in rows if row["quantity"] == quantity]
            axes.plot(
                [row["x"] for row in mine],
                [row[key] * scale for row in mine],
                color=COLOURS[number % len(COLOURS)],
                linestyle=LINES[number % len(LINES)],
                marker=MARKERS[number % len(MARKERS)],
                label=f"{quantity} ^ {fitted[key]:.2f}",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("quantity that is changed")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        "Cost of a training step as work grows (quantity ^ fitted exponent)", fontsize=11
    )
    return _save(figure, out)
