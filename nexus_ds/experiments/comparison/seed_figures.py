"""Figures of what several seeds found: paired differences as dots, levels with error bars, quality
against compute.

Every seed is a dot or every mean has its deviation; series differ in colour, marker and line.

Not covered: more than about 14 series or 30 rows in one legible picture.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nexus_ds.report.figures import COLOURS, LINES, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>hp"
MOST_PLACES = 10
"""Of an axis that are named."""
DARK = "#444444"
"""Of lines that a value is read against."""
# From a name to its point: pale, so that points and error bars stay in front.
POINTER = {
    "arrowstyle": "-",
    "color": "#b0b0b0",
    "linewidth": 0.7,
    "shrinkB": 4,
    "relpos": (0, 0.5),
}


def short_count(value: float) -> str:
    """Return a count as people read it: 25k, 1M, 200M, 1B."""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


@dataclass(frozen=True)
class Level:
    """One point: its place on the x axis, its mean and its deviation."""

    x: float
    """A number, or the position of a name."""
    mean: float
    deviation: float | None = None


# Differences by seed ------------------------------------------------------------------------------


def paired_dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    out: Path,
    *,
    title: str,
    xlabel: str,
    ignore: float = 0.0,
) -> Path:
    """Draw differences: `panels[title][row]` holds one number a seed; the mean is a bar.

    The axis is linear near zero and logarithmic further out, so that 0.01 and 1 can both be read.

    Args:
        panels: differences by panel and row.
        out: PNG file to write.
        title: heading of the figure.
        xlabel: name of the axis.
        ignore: differences below it, in either direction, lie in a grey band.
    """
    rows = _names_in(panels)
    width = 2.6 + 4.4 * len(panels)
    height = 1.3 + 0.3 * len(rows)
    figure = new_figure(width, height)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (name, panel) in zip(grid.flat, panels.items(), strict=True):
        _dot_panel(axes, panel, rows, ignore)
        axes.set_title(name, fontsize=10)
    grid[0, 0].set_yticks(range(len(rows)), rows, fontsize=9)
    # Downwards, so that the first row is at the top as in a table.
    grid[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(xlabel, fontsize=10)
    return save_figure(figure, out)


def _names_in(panels: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the rows or series of all panels, each once, in order."""
    found: dict[str, None] = {}
    for panel in panels.values():
        found |= dict.fromkeys(panel)
    return list(found)


def _dot_panel(
    axes: Axes,
    panel: Mapping[str, Sequence[float]],
    rows: Sequence[str],
    ignore: float,
) -> None:
    axes.axvspan(-ignore, ignore, color="#d9d9d9", linewidth=0)
    axes.axvline(0, color=DARK, linewidth=1)
    every: list[float] = []
    for row, values in panel.items():
        _dots(axes, rows.index(row), values)
        every += values
    # Without a band the axis must still be linear somewhere: a logarithm has no zero.
    _difference_axis(axes, every, near=max(ignore, 1e-3))


def _dots(axes: Axes, row: int, values: Sequence[float]) -> None:
    if not values:
        return
    mean = statistics.fmean(values)
    colour = COLOURS[0] if mean < 0 else COLOURS[5]
    axes.plot([mean, mean], [row - 0.32, row + 0.32], color=colour, linewidth=2.4)
    axes.plot(
        values,
        [row] * len(values),
        "o",
        color=colour,
        markersize=5,
        alpha=0.65,
        markeredgewidth=0,
    )


def _difference_axis(axes: Axes, values: Sequence[float], near: float) -> None:
    """Choose a scale that is linear up to `near` and marks powers of ten beyond."""
    low = min([*values, -near])
    high = max([*values, near])
    distances = [abs(value) for value in values]
    furthest = max(distances or [near]) * 1.3
    margin = 1.15
    # Nearer together they can all be read on one linear scale.
    if furthest > 8 * near:
        margin = 1.5
        axes.set_xscale("symlog", linthresh=near, linscale=0.5)
        ticks = _ticks(low * margin, high * margin, near, furthest)
        names = [f"{tick:+g}" if tick else "0" for tick in ticks]
        axes.set_xticks(ticks, names, fontsize=8.5)
        axes.minorticks_off()
    axes.set_xlim(low * margin, high * margin)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _ticks(
    low: float,
    high: float,
    near: float,
    furthest: float,
) -> list[float]:
    """Return 1 and 3 times powers of ten from `near` to `furthest` on both sides, within the axis.

    Where those are too many to be read, the powers of ten alone.
    """
    steps = []
    for power in range(-3, 5):
        steps += [10.0**power, 3 * 10.0**power]
    steps = [step for step in steps if near <= step <= furthest]
    below = [-step for step in steps if -step >= low]
    above = [step for step in steps if step <= high]
    ticks = [*below, 0.0, *above]
    if len(ticks) <= 9:
        return ticks
    return [tick for tick in ticks if tick == 0 or _leading_digit(tick) == "1"]


def _leading_digit(value: float) -> str:
    # Through text, since 3 * 10**-3 / 10**-3 need not be 3 in floating point.
    return f"{abs(value):.0e}"[0]


# Levels -------------------------------------------------------------------------------------------


def levels(
    panels: Mapping[str, Mapping[str, Sequence[Level]]],
    out: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    names: Sequence[str] = (),
    lines: Mapping[str, float] | None = None,
) -> Path:
    """Draw curves with error bars: `panels[title][series]`; the first series is drawn thicker.

    Args:
        panels: points by panel and series.
        out: PNG file to write.
        title: heading of the figure.
        xlabel, ylabel: names of the axes.
        names: of the x positions 0, 1, …; then points are drawn, not curves.
        lines: by panel, a level that is dashed, for instance that before an extension.
    """
    series = _names_in(panels)
    legend_lines = (len(series) + 2) // 3
    width = 1.4 + 4.6 * len(panels)
    height = 4.4 + 0.2 * legend_lines
    figure = new_figure(width, height)
    grid = figure.subplots(1, len(panels), squeeze=False)
    dashed = lines or {}
    for axes, (panel, curves) in zip(grid.flat, panels.items(), strict=True):
        _curves(axes, curves, series, joined=not names)
        _level_axes(axes, curves, names, dashed.get(panel))
        axes.set_xlabel(xlabel)
        axes.set_title(panel, fontsize=10)
    _legend(figure, list(grid.flat))
    grid[0, 0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, out)


def _level_axes(
    axes: Axes,
    curves: Mapping[str, Sequence[Level]],
    names: Sequence[str],
    before: float | None,
) -> None:
    """Dress one panel of levels: its dashed line, if any, and its places."""
    if before is not None:
        axes.axhline(before, color=DARK, linestyle=":", linewidth=1.4, label="before")
    if names:
        _name_places(axes, names)
    else:
        _count_places(axes, curves)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Level]],
    series: Sequence[str],
    joined: bool,
) -> None:
    """Draw one panel; each series has its look and its shift in every panel."""
    xs: list[float] = []
    bars: list[float | None] = []
    for points in curves.values():
        xs += [level.x for level in points]
        bars += [level.deviation for level in points]
    # Beside names, which stand 1 apart, all series together keep clear of the next name.
    step = 0.7 / max(1, len(series))
    # On a curve less will do, and more would shift its budgets; without error bars none is needed.
    if joined and xs:
        step = (max(xs) - min(xs)) / 150
        if not any(bars):
            step = 0.0
    middle = (len(series) - 1) / 2
    for name, points in curves.items():
        number = series.index(name)
        shift = (number - middle) * step
        _curve(axes, points, name, number, shift, joined)


def _curve(
    axes: Axes,
    points: Sequence[Level],
    name: str,
    number: int,
    shift: float,
    joined: bool,
) -> None:
    """Draw one series, moved by `shift` so that error bars don't cover one another."""
    axes.errorbar(
        [point.x + shift for point in points],
        [point.mean for point in points],
        yerr=[point.deviation or 0.0 for point in points],
        label=name,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5.5,
        linewidth=2.2 if number == 0 else 1.3,
        elinewidth=1.0,
        linestyle=LINES[number % len(LINES)] if joined else "none",
        capsize=2,
    )


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=25,
        ha="right",
        rotation_mode="anchor",
        fontsize=9,
    )


def _count_places(axes: Axes, curves: Mapping[str, Sequence[Level]]) -> None:
    places: set[float] = set()
    for points in curves.values():
        places |= {level.x for level in points}
    # Named where something was scored, not at round numbers between; the last one always.
    step = -(-len(places) // MOST_PLACES)
    ticks = sorted(places)[::-1][:: max(step, 1)]
    if ticks:
        names = [short_count(tick) for tick in ticks]
        axes.set_xticks(ticks, names, fontsize=9)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend of all panels, each name once."""
    handles = {}
    for axes in panels:
        # A series has one look in all panels, so any of its handles will do.
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(3, len(handles)),
        fontsize=9,
        frameon=False,
    )


# Quality against compute --------------------------------------------------------------------------


def quality_compute(
    points: Mapping[str, Level],
    out: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Draw quality (y, lower is better) against compute (x, logarithmic), with names.

    Compute of 0 stands at the left edge.
    """
    figure = new_figure(8.6, max(4.2, 1.4 + 0.27 * len(points)))
    axes = figure.subplots()
    positive = [level.x for level in points.values() if level.x > 0] or [1.0]
    highest = max(positive)
    # Where what needs no training stands: a logarithmic axis has no zero.
    edge = min(positive) / 3
    axes.set_xscale("log")
    axes.set_xlim(edge / 1.3, highest * 1.5)
    for number, level in enumerate(points.values()):
        _point(axes, level, number, edge)
    _name_points(axes, points, edge)
    _power_axis(axes, few=highest / edge < 1000)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, out)


def _point(
    axes: Axes,
    level: Level,
    number: int,
    edge: float,
) -> None:
    """Draw point number `number`; none stands left of `edge`."""
    axes.errorbar(
        max(level.x, edge),
        level.mean,
        yerr=level.deviation or 0.0,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=7,
        capsize=2,
        linestyle="none",
    )


def _power_axis(axes: Axes, few: bool) -> None:
    """Name the places of a logarithmic axis; `few`: it has few powers of ten."""
    # Imported here: matplotlib takes half a second, and --help of every verb would pay for it.
    from matplotlib.ticker import LogLocator

    if few:  # name some steps between them
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
    axes.xaxis.set_minor_formatter("")


def _name_points(axes: Axes, points: Mapping[str, Level], edge: float) -> None:
    """Write the names in a column right of the axes, each with a line to its point."""
    order = sorted(points, key=lambda name: points[name].mean)
    low, high = axes.get_ylim()
    gap = (high - low) / max(14, len(order))
    heights = _apart([points[name].mean for name in order], gap)
    # Where many means lie close together, their column of names is higher than they are.
    middle = (min(heights) + max(heights)) / 2
    bottom = min(low, 2 * middle - max(heights))
    top = max(high, *heights) + (high - low) * 0.02
    axes.set_ylim(bottom, top)
    for name, height in zip(order, heights, strict=True):
        level = points[name]
        zero = " (no training)" if level.x <= 0 else ""
        axes.annotate(
            name + zero,
            (max(level.x, edge), level.mean),
            xytext=(1.03, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color="#222222",
            annotation_clip=False,
            arrowprops=POINTER,
        )


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Return places for labels of the rising `values`, at least `gap` apart, near their values.

    Neighbours that are too near push one another away by half of what is lacking, again and again.
    """
    places = np.asarray(values, dtype=float).copy()
    # A bound, not a promise: with 200 rounds a few dozen labels have long come to rest.
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            distance = places[i + 1] - places[i]
            short = gap - distance
            # Rounding alone must not keep it going.
            if short > 1e-9 * gap:
                places[i] -= short / 2
                places[i + 1] += short / 2
                moved = True
        if not moved:
            break
    return [float(place) for place in places]
