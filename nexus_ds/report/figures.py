"""Figures as PNG: routing heatmaps, cosine tables, perplexity bars, curves.

They are legible without colour vision. Every figure has a title, named axes and, where there are
cells or bars, their values. Nothing opens a window.

Not covered: interactive figures, vector formats, more than about 16 experts or domains in one
legible picture.

Shapes: L layers, D domains of text, E routed experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from nexus_ds.console import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's colours, told apart with any of the usual colour-vision deficiencies; black and
# pale yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#6F6F6F")
FRAME = "#D55E00"
HATCHES = ("", "//", "..")  # a second mark once the colours are used up
LINES = ("-", "--", "-.", ":")
MAX_PANELS = 8  # layers drawn; all are in the CSV
MAX_GROUPED = 18  # bars in one group picture
DPI = 130
DOLLAR = re.compile(r"(?<!\\)\$")


class Look(TypedDict):
    """Keywords of a bar."""

    color: str
    hatch: str
    edgecolor: str
    linewidth: float


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` inches.

    No global state knows it, so nothing has to be closed.
    """
    # Imported here: matplotlib takes half a second, and --help of every verb would pay for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(
        figsize=(width, height),
        dpi=DPI,
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    return figure


def _as_it_is(name: str) -> str:
    """Return a name as matplotlib draws it: no formula between dollars, nothing it fails at."""
    return DOLLAR.sub(r"\\$", visible(name))


def _told_as_it_is(place: float, index: int, tell: Callable[[float, int], str]) -> str:
    return _as_it_is(tell(place, index))


def _draw_names_as_they_are(figure: Figure) -> None:
    """Have names of others drawn as text, whatever is in them."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for text in figure.findobj(Text):
        text.set_text(_as_it_is(text.get_text()))
    # Those of ticks are written anew by each drawing, powers of ten as formulas.
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        tell = axis.get_major_formatter()
        if isinstance(tell, FuncFormatter):
            axis.set_major_formatter(partial(_told_as_it_is, tell=tell))


def save_figure(figure: Figure, out: Path) -> Path:
    """Write a figure as PNG, its folder too; return the path."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _draw_names_as_they_are(figure)
    # No date or version in the file: equal numbers give equal bytes.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out


# Heatmaps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """What the colours of a heatmap mean."""

    low: float
    high: float
    colours: str


SHARES = _Scale(0.0, 1.0, "Blues")
COSINES = _Scale(-1.0, 1.0, "RdBu_r")


def _is_dark(image: AxesImage, value: float) -> bool:
    """Return whether the colour of a value is so dark that only white can be read on it."""
    red, green, blue, _ = image.to_rgba(np.array(value))
    # Luma as the eye weighs the colours (Rec. ITU-R BT.601).
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.5)


def _heat(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    scale: _Scale,
    size: float = 9.0,
) -> AxesImage:
    """Draw `values` [rows, columns] with a number in every cell; `size` is that of the letters."""
    image = axes.imshow(
        values,
        cmap=scale.colours,
        vmin=scale.low,
        vmax=scale.high,
        aspect="auto",
    )
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=40,
        ha="right",
        rotation_mode="anchor",
        fontsize=size,
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    for (row, column), value in np.ndenumerate(values):
        # A cosine of -0.001 is not worth a minus.
        text = f"{value:.2f}".replace("-0.00", "0.00")
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color="white" if _is_dark(image, value) else "black",
        )
    return image


def shown_layers(layers: Sequence[int]) -> list[int]:
    """Return positions in `layers` of those that a heatmap shows.

    All, or MAX_PANELS evenly spaced with both ends.
    """
    if len(layers) <= MAX_PANELS:
        return list(range(len(layers)))
    places = np.linspace(0, len(layers) - 1, MAX_PANELS)
    return sorted({round(place) for place in places})


def _frame_own(axes: Axes, domains: Sequence[str], own: Sequence[str]) -> None:
    """Frame the cells of each domain's own experts."""
    # Imported here: see `new_figure`.
    from matplotlib.patches import Rectangle

    for row, domain in enumerate(domains):
        for column, trained_on in enumerate(own):
            if trained_on == domain:
                # A cell is 1 x 1 about its place; a little less, so that neighbours' frames do not
                # touch.
                corner = (column - 0.47, row - 0.46)
                axes.add_patch(
                    Rectangle(
                        corner,
                        0.94,
                        0.92,
                        fill=False,
                        edgecolor=FRAME,
                        linewidth=1.8,
                    )
                )


def _panel_grid(panels: int, rows: int, cells: int) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes for heatmaps of `rows` x `cells`; what is left over is empty."""
    # Four panels make a square; three in a row with one below would not.
    columns = 2 if panels == 4 else min(3, panels)
    lines = math.ceil(panels / columns)
    # Inches of one panel: its names and, for each cell, room for "0.00".
    panel_width = 1.3 + 0.62 * cells
    panel_height = 1.3 + 0.42 * rows
    # The title and the bar of colours need their room beside the smallest panels too.
    width = max(6.0, columns * panel_width + 0.8)
    height = max(3.2, lines * panel_height + 0.6)
    figure = new_figure(width, height)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[panels:]:
        axes.set_axis_off()
    return figure, grid


def routing_heatmap(
    share: np.ndarray,
    domains: Sequence[str],
    experts: Sequence[str],
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    own: Sequence[str] | None = None,
    title: str = "Where tokens go",
) -> Path:
    """Draw the routing share of every layer and their mean.

    Args:
        share: [L, D, E] share of a domain's tokens at each expert; rows sum to 1.
        domains: D names of the text; experts: E names.
        out: PNG file to write.
        layers: numbers of the L layers (default 0..L-1).
        own: E domains that the experts were trained on (default: their names); those cells get a
            frame.
        title: heading of the figure.
    """
    layers = range(len(share)) if layers is None else layers
    own = experts if own is None else own
    # The mean first: where layers differ little it says all there is.
    panels = {"mean over layers": share.mean(axis=0)}
    for place in shown_layers(layers):
        panels[f"layer {layers[place]}"] = share[place]
    figure, grid = _panel_grid(len(panels), len(domains), len(experts))
    for axes, (name, values) in zip(grid.flat, panels.items(), strict=False):
        image = _heat(axes, values, domains, experts, SHARES, size=8.5)
        is_mean = axes is grid.flat[0]
        axes.set_title(name, fontsize=10, fontweight="bold" if is_mean else "normal")
        _frame_own(axes, domains, own)
    figure.suptitle(f"{title} (share of tokens; frame: the domain's own expert)", fontsize=11)
    figure.supxlabel("routed expert", fontsize=10)
    figure.supylabel("domain of the text", fontsize=10)
    # All panels have one scale, so the last one's image stands for all.
    figure.colorbar(
        image,
        ax=grid,
        label="share of tokens",
        shrink=0.8,
    )
    return save_figure(figure, out)


def cosine_pair(
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    out: Path,
    *,
    titles: tuple[str, str] = ("domain embeddings (before P)", "router rows (after P)"),
    title: str = "Cosine between experts",
) -> Path:
    """Draw two tables of cosines side by side on one scale from -1 to 1 (paper section 5.6).

    Args:
        before, after: [E, E].
        names: of the E experts.
        out: PNG file to write.
        titles: of the two tables.
        title: heading of the figure.
    """
    side = 1.6 + 0.62 * len(names)
    width = max(7.0, 2 * side + 1.2)
    height = max(3.4, 0.5 * len(names) + 2.0)
    figure = new_figure(width, height)
    grid = figure.subplots(1, 2, squeeze=False)
    for axes, values, name in zip(grid.flat, (before, after), titles, strict=True):
        image = _heat(axes, np.asarray(values), names, names, COSINES)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("domain of the expert", fontsize=9)
    grid[0, 0].set_ylabel("domain of the expert", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(
        image,
        ax=grid,
        label="cosine",
        shrink=0.85,
    )
    return save_figure(figure, out)


# Bars ---------------------------------------------------------------------------------------------


def perplexity_bars(
    perplexity: Mapping[str, Mapping[str, float]],
    out: Path,
    *,
    title: str = "Perplexity by domain (lower is better)",
) -> Path:
    """Draw `perplexity[model][domain]` with the numbers at the bars.

    Up to MAX_GROUPED bars stand in one picture, a group a domain; more are spread over one panel a
    domain.
    """
    models = list(perplexity)
    found: dict[str, None] = {}
    for values in perplexity.values():
        found |= dict.fromkeys(values)
    domains = list(found)
    rows = []
    # NaN draws no bar, which is right where a model was not scored.
    for values in perplexity.values():
        rows.append([values.get(domain, math.nan) for domain in domains])
    table = np.array(rows)
    if table.size <= MAX_GROUPED:
        figure = _grouped_bars(table, models, domains)
    else:
        figure = _panelled_bars(table, models, domains)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, out)


def _style(model: int) -> Look:
    """Return the look of model number `model`: colours first, hatches when they are used up."""
    hatch = HATCHES[model // len(COLOURS) % len(HATCHES)]
    # The frame is the colour of a hatch too: dark hatches would hide the fill.
    return {
        "color": COLOURS[model % len(COLOURS)],
        "hatch": hatch,
        "edgecolor": "white",
        "linewidth": 0.4,
    }


def _label(value: float) -> str:
    """Return what stands at a bar; nothing where a model was not scored."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _grouped_bars(table: np.ndarray, models: Sequence[str], domains: Sequence[str]) -> Figure:
    """Draw upright bars of `table` [models, D], a group a domain."""
    figure_width = 1.4 + 0.42 * table.size + 0.3 * len(domains)
    figure = new_figure(max(6.5, figure_width), 4.4)
    axes = figure.subplots()
    # Groups stand 1 apart; what is left of it keeps them from touching.
    width = 0.84 / len(models)
    middle = (len(models) - 1) / 2
    for m, (model, values) in enumerate(zip(models, table, strict=True)):
        shift = (m - middle) * width
        places = np.arange(len(domains)) + shift
        bars = axes.bar(places, values, width * 0.94, label=model, **_style(m))
        labels = [_label(value) for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=8)
    _value_axis(axes, table)
    axes.set_xticks(range(len(domains)), domains, fontsize=10)
    axes.set_xlabel("domain of the text")
    figure.legend(
        loc="outside lower center",
        ncols=min(4, len(models)),
        fontsize=9,
        frameon=False,
    )
    return figure


def _panelled_bars(table: np.ndarray, models: Sequence[str], domains: Sequence[str]) -> Figure:
    """Draw lying bars of `table` [models, D], a panel a domain, the models' names at the left."""
    columns = min(3, len(domains))
    lines = math.ceil(len(domains) / columns)
    width = 1.6 + 2.9 * columns
    panel_height = 0.75 + 0.27 * len(models)
    figure = new_figure(width, 0.7 + lines * panel_height)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(domains) :]:
        axes.set_axis_off()
    for axes, domain, values in zip(grid.flat, domains, table.T, strict=False):
        _lying_bars(axes, values)
        axes.set_title(domain, fontsize=10)
    grid[0, 0].set_yticks(range(len(models)), models)
    grid[0, 0].invert_yaxis()  # shared by all panels
    figure.supxlabel("perplexity per token (each panel has its own scale)", fontsize=10)
    return figure


def _lying_bars(axes: Axes, values: np.ndarray) -> None:
    """Draw one bar a model, with room for the numbers beside them."""
    for m, value in enumerate(values):
        bars = axes.barh(m, value, 0.8, **_style(m))
        axes.bar_label(bars, [_label(value)], padding=2, fontsize=8.5)
    # The zero stands for a domain that no model was scored on.
    longest = float(np.nanmax(np.append(values, 0.0)))
    axes.set_xlim(0, max(1.0, longest) * 1.22)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _value_axis(axes: Axes, table: np.ndarray) -> None:
    """Choose the scale of the bars and leave room for the numbers above them."""
    low = float(np.nanmin(table))
    high = float(np.nanmax(table))
    # On a linear scale bars below an eighth of the highest could hardly be told apart.
    if low > 0 and high / low >= 8:
        axes.set_yscale("log")
        # No perplexity is below 1. Above, a fifth of the axis's length is for the numbers.
        headroom = (high / low) ** 0.2
        axes.set_ylim(max(1.0, low / 2), high * headroom)
        axes.set_ylabel("perplexity per token (log scale)")
    else:
        axes.set_ylim(0, high * 1.18)
        axes.set_ylabel("perplexity per token")
    axes.spines[["top", "right"]].set_visible(False)


# Curves -------------------------------------------------------------------------------------------


def _line(
    axes: Axes,
    name: str,
    number: int,
    xs: Sequence[float],
    ys: Sequence[float],
) -> None:
    """Draw curve number `number`, in its colour and its kind of line."""
    points = []
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            points.append((x, y))
    # Marks on a long curve would run together into a thick one.
    marked = len(points) <= 12
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        label=name,
        linewidth=1.8,
        color=COLOURS[number % len(COLOURS)],
        linestyle=LINES[number % len(LINES)],
        marker="o" if marked else None,
        markersize=5,
    )


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    out: Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Path:
    """Draw curves, one a name: `series[name] = (x, y)`.

    Few points are marked, points that are not finite left out.
    """
    figure = new_figure(7.5, 4.4)
    axes = figure.subplots()
    for number, (name, (xs, ys)) in enumerate(series.items()):
        _line(axes, name, number, xs, ys)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=9, frameon=False)
    return save_figure(figure, out)
