"""Figures of the benchmarks: they are PNGs, and equal numbers give equal bytes."""

from nexus_ds.experiments.benchmarks.figures import growth_curves, speed_bars
from nexus_ds.experiments.benchmarks.layer_speed import Speed
from nexus_ds.experiments.benchmarks.scaling import Point

PARTS = ["router", "experts", "ffn", "optimizer"]
OTHERS = {
    "parameters": 10,
    "loss": 4.0,
    "step_seconds": 1.0,
    "tokens_per_second": 8.0,
    "active_tflops": 1.0,
    "mfu": None,
    "optimizer_seconds": 0.1,
    "data_seconds": 0.1,
    "peak_bytes": None,
    "rounds": [1.0, 1.0],
}


def speed(model, ratio, low, high, shares):
    return Speed(model=model, ratio=ratio, ratio_low=low, ratio_high=high, shares=shares, **OTHERS)


ROWS = [
    speed("dense", 1.0, 1.0, 1.0, {"ffn": 0.9, "optimizer": 0.1}),
    speed("nexus", 0.9, 0.8, 1.1, {"router": 0.2, "experts": 0.8}),
]
POINTS = [Point("layers", x, 0.1 * x, 1e6 * x) for x in (1, 2, 4)]
POINTS += [Point("router tokens", x, 0.01 * x, 0.0) for x in (8, 16)]


def test_both_figures_are_written_and_repeatable(tmp_path):
    exponents = {"layers": {"seconds": 1.0, "peak_bytes": 1.0}, "router tokens": {"seconds": 1.0}}
    for turn in "ab":
        speed_bars(ROWS, PARTS, "dense", tmp_path / f"speed-{turn}.png")
        growth_curves(POINTS, exponents, tmp_path / f"growth-{turn}.png")
    for name in ("speed", "growth"):
        first, second = (tmp_path / f"{name}-{turn}.png" for turn in "ab")
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes().startswith(b"\x89PNG")
