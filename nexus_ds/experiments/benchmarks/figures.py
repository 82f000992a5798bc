"""Figures of the benchmarks: speed and shares of a step by model, and cost as work grows.

Not covered: more than about 12 models or 8 quantities in one legible picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_ds.report.figures import COLOURS, HATCHES, LINES, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    # they import torch, for which `bench --help` would wait
    from nexus_ds.experiments.benchmarks.layer_speed import Speed
    from nexus_ds.experiments.benchmarks.scaling import Point

MARKERS = "osD^vPX*"


def speed_bars(rows: Sequence[Speed], parts: Sequence[str], baseline: str, out: Path) -> Path:
    """Draw each model's speed over the baseline's with its spread, and the shares of its step.

    Args:
        rows: one a model, from the top (`layer_speed.summary`).
        parts: of a step, in the order in which they are drawn.
        baseline: the model that others are compared with.
        out: PNG file to write.
    """
    figure = new_figure(11.0, 1.6 + 0.45 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_ratios(left, rows)
    left.set_xlabel(f"tokens/s over {baseline} (median and range of rounds)")
    _draw_shares(right, rows, parts)
    right.set_xlabel("share of a step with optimizer and data")
    figure.suptitle("Training speed and where a step's time goes", fontsize=11)
    return save_figure(figure, out)


def _draw_ratios(axes: Axes, rows: Sequence[Speed]) -> None:
    places = range(len(rows))
    ratios = [row.ratio for row in rows]
    # matplotlib wants lengths of the whiskers, not their ends
    below = [row.ratio - row.ratio_low for row in rows]
    above = [row.ratio_high - row.ratio for row in rows]
    axes.barh(
        places,
        ratios,
        xerr=[below, above],
        color=COLOURS[0],
        error_kw={"capsize": 3},
    )
    for place, value in enumerate(ratios):
        label = f"{value:.2f}"
        # inside the bar: at its end a whisker would cross the number
        axes.text(0.02, place, label, va="center", color="white", fontsize=9)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [row.model for row in rows])
    axes.invert_yaxis()


def _draw_shares(axes: Axes, rows: Sequence[Speed], parts: Sequence[str]) -> None:
    places = range(len(rows))
    start = [0.0] * len(rows)
    for number, part in enumerate(parts):
        # noise of the clock can make a small remainder negative
        found = [row.shares.get(part, 0.0) for row in rows]
        values = [max(0.0, share) for share in found]
        # a hatch tells apart what shares a colour
        turn, colour = divmod(number, len(COLOURS))
        axes.barh(
            places,
            values,
            left=start,
            label=part,
            color=COLOURS[colour],
            hatch=HATCHES[turn % len(HATCHES)],
            edgecolor="white",
            linewidth=0.4,
        )
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.legend(
        fontsize=8,
        ncols=1,
        # beside the picture: bars fill all of it
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )


def growth_curves(
    rows: Sequence[Point], exponents: Mapping[str, Mapping[str, float]], out: Path
) -> Path:
    """Draw time, and peak memory where there is one, against each quantity on logarithmic axes.

    Args:
        rows: points of all sweeps (`scaling.sweep`, `scaling.router_sweep`).
        exponents: fitted, for the legend: {quantity: {"seconds": a, "peak_bytes": a}}.
        out: PNG file to write.
    """
    figure = new_figure(11.0, 4.8)
    time, memory = figure.subplots(1, 2)
    for number, (quantity, fitted) in enumerate(exponents.items()):
        mine = [row for row in rows if row.quantity == quantity]
        xs = [row.x for row in mine]
        seconds = [row.seconds for row in mine]
        look = _look(number)
        label = f"{quantity} ^ {fitted['seconds']:.2f}"
        time.plot(xs, seconds, label=label, **look)
        # not of the router alone, whose memory is not measured
        if "peak_bytes" in fitted:
            megabytes = [row.peak_bytes / 1e6 for row in mine]
            label = f"{quantity} ^ {fitted['peak_bytes']:.2f}"
            memory.plot(xs, megabytes, label=label, **look)
    _finish_curves(time, "seconds")
    _finish_curves(memory, "peak memory, MB")
    title = "Cost of a training step as work grows (quantity ^ fitted exponent)"
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, out)


def _look(number: int) -> dict[str, Any]:
    """Return how a curve is drawn, so that curves differ without colour too."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _finish_curves(axes: Axes, label: str) -> None:
    # on logarithmic axes a power law is a straight line, its exponent the slope
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("quantity that is changed")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
