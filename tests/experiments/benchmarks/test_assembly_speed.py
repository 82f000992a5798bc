"""The floor writes as much as the verb; ratios are of one round; what is printed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.experiments.benchmarks import assembly_speed
from nexus_ds.experiments.benchmarks.assembly_speed import (
    PROGRAMS,
    Cost,
    describe,
    make_inputs,
    measure,
)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_floor_writes_as_many_bytes_as_the_verb(tmp_path, dtype):
    (tmp_path / "in").mkdir()
    make_inputs(tmp_path / "in", "tiny", dtype, 200_000)
    assert len(list((tmp_path / "in" / "seed").glob("*.safetensors"))) > 1
    for name, program in PROGRAMS.items():
        (tmp_path / name).mkdir()
        program(tmp_path / "in", tmp_path / name)
    verb = load_file(tmp_path / "upcycle" / "mixture" / "model.safetensors")
    floor = (tmp_path / "floor" / "model.safetensors").stat().st_size
    assert floor == sum(tensor.nbytes for tensor in verb.values())
    name = "model.layers.0.mlp.up_proj.weight"
    branch = TensorReader(tmp_path / "in" / "beta").read(name)
    assert torch.equal(branch, verb["model.layers.0.mlp.experts.1.up_proj.weight"])


def test_ratios_are_of_one_round_and_the_floor_comes_first_and_last(monkeypatch):
    costs = iter([Cost(1, 2, 10), Cost(3, 3, 20), Cost(2, 8, 30), Cost(4, 2, 11)])
    ran = []
    monkeypatch.setattr(
        assembly_speed, "cost", lambda program, root: (ran.append(program), next(costs))[1]
    )
    floor, verb = measure(None, ["upcycle"], 2, False, lambda said: None)
    assert ran == ["floor", "upcycle", "upcycle", "floor"] and floor.wall == (1, 1, 1)
    assert verb.wall == (1.75, 0.5, 3.0) and verb.cpu == (2.75, 1.5, 4.0)
    assert verb.peak == 30 and verb.seconds == 2.5
    assert "upcycle, warm        2.50    1.75 (0.50-3.00)    2.75 (1.50-4.00)" in describe(
        [floor, verb]
    )


@pytest.mark.slow
def test_the_verb_prints_a_table_or_json(tmp_path, capsys):
    words = ["bench", "assemble", "--size=tiny", "--rounds=1", f"--work={tmp_path}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "floor, cold" in said and "upcycle, warm" in said and "next: " in said
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["program"] for row in rows] == ["floor", "upcycle"] * 2
    assert not list(tmp_path.iterdir())


def test_numbers_that_make_no_sense(capsys):
    assert main(["bench", "assemble", "--rounds=0"]) == 1
    assert "--rounds 0, --shard 150: expected numbers above 0" in capsys.readouterr().err
