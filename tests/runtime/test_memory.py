"""Loading a checkpoint of more than a billion parameters: no rank holds more than its shard, a
layer and a constant."""

import json
from pathlib import Path

import pytest
from large import make_large
from launch import finish, start_ranks

WORKER = Path(__file__).parents[1] / "memory_worker.py"
# What is neither shard nor layer: the router's fp32 sidecar, gloo's buffers, the allocator's slack.
CONSTANT = 192 * 2**20


@pytest.mark.slow
@pytest.mark.full
def test_no_rank_holds_more_than_its_shard_and_a_layer(tmp_path):
    parameters = make_large(tmp_path / "large")
    assert parameters > 1_000_000_000
    words = ["model.dtype=bf16", "parallel.expert=4", "training.batch_size=4"]
    finish(start_ranks([WORKER, tmp_path / "large", tmp_path / "out", *words], 4))
    for rank in range(4):
        found = json.loads((tmp_path / f"out.{rank}.json").read_text())
        assert found["share"] < 0.26 * found["model"]
        assert found["peak"] - found["before"] <= found["share"] + found["layer"] + CONSTANT, found
        assert (
            found["read"] < 0.5 * found["model"]
        )  # two of eight experts, what stands outside the experts, and modules


@pytest.mark.slow
@pytest.mark.full
def test_a_training_state_costs_little_more_than_a_copy_of_its_bytes(tmp_path, capsys):
    make_large(tmp_path / "model", hidden=512, ffn=2048, layers=6, experts=4, vocabulary=8000)
    words = ["stage=3", "model.dtype=bf16", "parallel.expert=2", "training.batch_size=2"]
    worker = WORKER.with_name("speed_worker.py")
    finish(
        start_ranks([worker, tmp_path / "model", tmp_path / "states", tmp_path / "out", *words], 2)
    )
    found = json.loads((tmp_path / "out.json").read_text())
    median = {name: sorted(values)[1] for name, values in found["seconds"].items()}
    with capsys.disabled():
        print(f"\n{found['parameters']:,} parameters, {found['bytes']:,} bytes, seconds {median}")
    assert 12 <= found["bytes"] / found["parameters"] < 12.1
    assert median["save"] < 4 * median["copy"]
    assert median["resume"] < 4 * median["copy"]
