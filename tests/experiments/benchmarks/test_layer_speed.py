"""Ratios within rounds, the data that is read, and a whole small comparison."""

import pytest
import torch

from nexus_ds.experiments.benchmarks import layer_speed
from nexus_ds.experiments.benchmarks.layer_speed import Batches, Measured, measure, ratio, summary
from nexus_ds.experiments.benchmarks.models import Shape

CPU = torch.device("cpu")
SHAPE = Shape(
    hidden=32, layers=1, heads=2, ffn=24, vocabulary=60, experts=3, batch=2, length=16, embedding=8
)


def test_a_ratio_compares_times_of_one_round():
    base, other = Measured("a", 1, 0.0, [1.0, 10.0, 2.0]), Measured("b", 1, 0.0, [4.0, 10.0, 1.0])
    found = ratio(other, base)
    # of the baseline's time over the model's
    assert (found.median, found.low, found.high) == (1.0, 0.25, 2.0)


def test_batches_differ_lie_within_the_vocabulary_and_leave_no_file():
    with Batches(SHAPE, CPU) as batches:
        first, second = batches.read(), batches.read()
        path = batches.sampler.files[0].path
        assert path.exists()
    assert not path.exists() and not torch.equal(first, second)
    assert first.shape == (2, 17) and int(first.min()) >= 0 and int(first.max()) < 60


def test_a_small_comparison(monkeypatch):
    monkeypatch.setattr(layer_speed, "BUSY_SECONDS", 0.0)
    lines = []
    results, data = measure(["dense", "nexus-loop"], SHAPE, CPU, torch.float32, 2, lines.append)
    rows = summary(results, data, SHAPE, "dense", CPU)
    assert [row.model for row in rows] == ["dense", "nexus-loop"] and rows[0].ratio == 1.0
    for row, result in zip(rows, results, strict=True):
        assert len(row.rounds) == 2
        assert row.tokens_per_second == pytest.approx(32 / row.step_seconds)
        assert row.mfu is None and row.active_tflops > 0
        assert row.optimizer_seconds > 0 < row.data_seconds
        assert sum(row.shares.values()) == pytest.approx(1.0)
        assert result.loss == pytest.approx(4.1, abs=0.5)  # log 60: nothing was trained
        assert row.to_json()["shares"] == row.shares
    assert {"router", "optimizer", "data"} <= rows[1].shares.keys()
    assert lines[0] == "building dense" and "round 2 of 2" in lines


@pytest.mark.slow
def test_a_compiled_model_is_compared_as_a_whole():
    names = ["nexus-grouped", "nexus-compiled"]
    plain, compiled = measure(names, SHAPE, CPU, torch.float32, 1, lambda _: None)[0]
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
    assert "router" in plain.shares and set(compiled.shares) == {"optimizer", "data"}
