"""Figures of the benchmarks: they are PNGs, and equal numbers give equal bytes."""

from nexus_ds.experiments.benchmarks.figures import growth_curves, speed_bars

ROWS = [
    {
        "model": "dense",
        "ratio": 1.0,
        "ratio_low": 1.0,
        "ratio_high": 1.0,
        "shares": {"ffn": 0.9, "optimizer": 0.1},
    },
    {
        "model": "nexus",
        "ratio": 0.9,
        "ratio_low": 0.8,
        "ratio_high": 1.1,
        "shares": {"router": 0.2, "experts": 0.8},
    },
]
POINTS = [
    {"quantity": "layers", "x": x, "seconds": 0.1 * x, "peak_bytes": 1e6 * x} for x in (1, 2, 4)
]
POINTS += [
    {"quantity": "router tokens", "x": x, "seconds": 0.01 * x, "peak_bytes": 0.0} for x in (8, 16)
]


def test_both_figures_are_written_and_repeatable(tmp_path):
    exponents = {"layers": {"seconds": 1.0, "peak_bytes": 1.0}, "router tokens": {"seconds": 1.0}}
    for turn in "ab":
        speed_bars(
            ROWS, ["router", "experts", "ffn", "optimizer"], "dense", tmp_path / f"speed-{turn}.png"
        )
        growth_curves(POINTS, exponents, tmp_path / f"growth-{turn}.png")
    for name in ("speed", "growth"):
        first, second = (tmp_path / f"{name}-{turn}.png" for turn in "ab")
        assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(
            b"\x89PNG"
        )
