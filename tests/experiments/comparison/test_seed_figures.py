"""Figures over seeds: every number is drawn where it belongs, and labels do not cover one
another."""

import itertools

import pytest

from nexus_ds.experiments.comparison import seed_figures
from nexus_ds.experiments.comparison.seed_figures import Level, short_count
from nexus_ds.report import figures
from nexus_ds.report.page import PNG_MAGIC


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved."""
    seen = []

    def keep(figure, out):
        figure.canvas.draw()
        seen.append(figure)
        return figures.save_figure(figure, out)

    monkeypatch.setattr(seed_figures, "save_figure", keep)
    return seen


def texts(figure):
    from matplotlib.text import Text

    return {text.get_text() for text in figure.findobj(Text)}


def test_every_seed_is_a_dot_and_the_mean_a_bar(tmp_path, drawn):
    rows = {"one": [0.2, 0.4], "two": [-0.05], "three": []}
    out = seed_figures.paired_dots(
        {"": rows}, tmp_path / "d.png", title="t", xlabel="x", ignore=0.01
    )
    assert out.read_bytes().startswith(PNG_MAGIC)
    (axes,) = drawn[0].axes
    lines = [
        [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
        for line in axes.lines[1:]
    ]
    bar, dots = lines[0], lines[1]
    assert (
        bar[0] == pytest.approx([0.3, 0.3]) and dots == [[0.2, 0.4], [0.0, 0.0]] and len(lines) == 4
    )
    assert axes.get_xscale() == "symlog" and {"one", "two", "three", "+0.1"} <= texts(drawn[0])
    low, high = axes.get_xlim()
    assert low < -0.05 and high > 0.4


def test_levels_keep_values_and_name_budgets(tmp_path, drawn):
    panels = {
        "new": {"a": [Level(0, 6.0, 0.1), Level(25000, 5.0, None)], "b": [Level(0, 6.5)]},
        "old": {"a": []},
    }
    seed_figures.levels(
        panels, tmp_path / "l.png", title="t", xlabel="tokens", ylabel="nats", lines={"old": 4.5}
    )
    assert {"new", "old", "25k", "a", "b", "before", "tokens", "nats"} <= texts(drawn[0])
    first = drawn[0].axes[0].containers[0].lines[0]
    assert list(first.get_ydata()) == [6.0, 5.0]


def test_levels_over_names(tmp_path, drawn):
    panels = {"old": {"a": [Level(0, 4.0), Level(1, 4.1)], "b": [Level(0, 4.2)]}}
    seed_figures.levels(
        panels, tmp_path / "l.png", title="t", xlabel="x", ylabel="y", names=["plain", "changed"]
    )
    assert {"plain", "changed"} <= texts(drawn[0])
    a, b = (container.lines[0].get_xdata()[0] for container in drawn[0].axes[0].containers)
    assert a < 0 < b < 0.5  # beside one another, nearer to their own name than to the next


def test_names_beside_the_scatter_do_not_cover_one_another(tmp_path, drawn):
    points = {f"contender {n}": Level(1e12, 4.6 + n / 1e4, 0.01) for n in range(12)} | {
        "seed": Level(0, 5.5)
    }
    seed_figures.quality_compute(points, tmp_path / "c.png", title="t", xlabel="x", ylabel="y")
    (axes,) = drawn[0].axes
    boxes = sorted((note.get_window_extent() for note in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 13 and "seed (no training)" in texts(drawn[0])
    from matplotlib.text import Text

    heights = sorted(Text.get_window_extent(note).y0 for note in axes.texts)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 10


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (25_000, "25k"), (1e6, "1M"), (2.5e6, "2.5M"), (1e9, "1B"), (4e10, "40B")],
)
def test_short_count(value, shown):
    assert short_count(value) == shown
