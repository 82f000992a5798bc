"""Figures: PNGs of a sensible size that hold what they should; the same numbers give the same
bytes."""

import numpy as np
import pytest

from nexus_ds.report import figures
from nexus_ds.report.page import PNG_MAGIC

DOMAINS, EXPERTS = ["a", "b", "c"], ["a", "b"]


@pytest.fixture
def drawn(monkeypatch):
    """The texts of every figure that is saved, and its axes."""
    seen = []
    save = figures.save_figure

    def keep(figure, out):
        from matplotlib.text import Text

        figure.canvas.draw()
        seen.append((figure, [text.get_text() for text in figure.findobj(Text)]))
        return save(figure, out)

    monkeypatch.setattr(figures, "save_figure", keep)
    return seen


def check_png(path):
    data = path.read_bytes()
    assert data.startswith(PNG_MAGIC)
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert 500 < width < 4000 and 300 < height < 4000


def share(layers):
    return np.random.default_rng(0).dirichlet(np.ones(2), (layers, 3))


def test_routing_heatmap(tmp_path, drawn):
    values = share(2)
    check_png(figures.routing_heatmap(values, DOMAINS, EXPERTS, tmp_path / "r.png", layers=[3, 7]))
    figure, texts = drawn[0]
    assert {"mean over layers", "layer 3", "layer 7", "routed expert", "domain of the text"} <= set(
        texts
    )
    assert {f"{v:.2f}" for v in values.flat} | {
        f"{v:.2f}" for v in values.mean(axis=0).flat
    } <= set(texts)
    frames = [patch for axes in figure.axes[:3] for patch in axes.patches]
    assert len(frames) == 3 * 2  # in each panel the own expert of domains a and b


def test_frames_follow_the_experts_domains(tmp_path, drawn):
    figures.routing_heatmap(share(1), DOMAINS, ["x", "y"], tmp_path / "r.png", own=["c", ""])
    (patch,) = drawn[0][0].axes[0].patches
    assert (round(patch.get_x() + 0.47), round(patch.get_y() + 0.46)) == (0, 2)


def test_many_layers_are_thinned_with_both_ends(tmp_path, drawn):
    assert figures.shown_layers(range(3)) == [0, 1, 2]
    shown = figures.shown_layers(range(40))
    assert len(shown) == figures.MAX_PANELS and shown[0] == 0 and shown[-1] == 39
    check_png(figures.routing_heatmap(share(40), DOMAINS, EXPERTS, tmp_path / "r.png"))
    assert "layer 39" in drawn[0][1] and "layer 1" not in drawn[0][1]


def test_cosine_pair(tmp_path, drawn):
    before = np.array([[1.0, -0.25], [-0.25, 1.0]])
    check_png(figures.cosine_pair(before, before**3, EXPERTS, tmp_path / "c.png"))
    assert {
        "-0.25",
        "-0.02",
        "1.00",
        "domain embeddings (before P)",
        "router rows (after P)",
    } <= set(drawn[0][1])


def test_no_negative_zero(tmp_path, drawn):
    figures.cosine_pair(np.full((2, 2), -0.001), np.eye(2), EXPERTS, tmp_path / "c.png")
    assert "-0.00" not in drawn[0][1]


@pytest.mark.parametrize("models", [2, 9])
def test_perplexity_bars(tmp_path, drawn, models):
    values = {f"model {m}": {d: 20.0 + m + i for i, d in enumerate(DOMAINS)} for m in range(models)}
    check_png(figures.perplexity_bars(values, tmp_path / "p.png"))
    texts = set(drawn[0][1])
    assert {*DOMAINS, *values} <= texts and {"20.0", f"{20.0 + models + 1:.1f}"} <= texts


def test_bars_of_very_different_sizes_and_gaps(tmp_path, drawn):
    figures.perplexity_bars({"x": {"a": 10.0, "b": 2000.0}, "y": {"a": 12.0}}, tmp_path / "p.png")
    figure, texts = drawn[0]
    assert figure.axes[0].get_yscale() == "log" and "2000" in texts and "nan" not in texts


def test_line_plot_leaves_out_what_is_not_finite(tmp_path, drawn):
    series = {"one": ([1, 2, 3], [3.0, float("nan"), 1.0]), "two": ([1, 2], [2.0, 2.5])}
    check_png(
        figures.line_plot(
            series, tmp_path / "l.png", title="loss", xlabel="step", ylabel="nats", log_x=True
        )
    )
    figure, texts = drawn[0]
    assert {"loss", "step", "nats", "one", "two"} <= set(texts)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 3]


@pytest.mark.parametrize("name", ["$x^{$", "half \ud800", "\x1b[2J", "$5 to $7", "\\$"])
def test_names_of_others_are_no_formulas_and_end_nothing(tmp_path, name):
    """matplotlib fails at formulas that are none and at half a character."""
    out, names = tmp_path / "x.png", [name, "b"]
    check_png(figures.routing_heatmap(share(1)[:, :2], names, names, out, title=name))
    check_png(figures.cosine_pair(np.eye(2), np.eye(2), names, out))
    check_png(figures.perplexity_bars({name: {name: 2.0}, "b": {"b": 3.0}}, out))
    check_png(figures.line_plot({name: ([1], [2])}, out, title=name, xlabel=name, ylabel=""))


def test_a_price_is_drawn_as_one(tmp_path):
    drawn = []
    for title in ("$5 to $7", "\\$5 to \\$7"):
        figures.cosine_pair(np.eye(2), np.eye(2), EXPERTS, tmp_path / "x.png", title=title)
        drawn.append((tmp_path / "x.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_equal_numbers_give_equal_bytes(tmp_path):
    paths = [
        figures.routing_heatmap(share(2), DOMAINS, EXPERTS, tmp_path / f"{i}.png") for i in range(2)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
