"""The floor writes as much as the verb; ratios are of one round; what is printed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.benchmarks import assembly_speed
from nexus_ds.experiments.benchmarks.assembly_speed import (
    MERGEKIT,
    PROGRAMS,
    Cost,
    cost,
    describe,
    make_inputs,
    measure,
)


@pytest.mark.parametrize(
    ("dtype", "family"),
    [("bf16", "llama"), ("fp16", "llama"), ("fp32", "llama"), ("bf16", "qwen3")],
)
def test_the_floor_writes_as_many_bytes_as_the_verb(tmp_path, dtype, family):
    (tmp_path / "in").mkdir()
    make_inputs(tmp_path / "in", "tiny", dtype, 200_000, family)
    assert len(list((tmp_path / "in" / "seed").glob("*.safetensors"))) > 1
    for name, program in PROGRAMS.items():
        (tmp_path / name).mkdir()
        program(tmp_path / "in", tmp_path / name)
    verb = load_file(tmp_path / "upcycle" / "mixture" / "model.safetensors")
    floor = (tmp_path / "floor" / "model.safetensors").stat().st_size
    assert floor == sum(tensor.nbytes for tensor in verb.values())
    # of a Qwen3 columns of the others are multiplied
    name = "model.layers.0.mlp.down_proj.weight"
    branch = TensorReader(tmp_path / "in" / "beta").read(name)
    assert torch.equal(branch, verb["model.layers.0.mlp.experts.1.down_proj.weight"])


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
    assert "upcycle, warm            2.50    1.75 (0.50-3.00)    2.75 (1.50-4.00)" in describe(
        [floor, verb]
    )


@pytest.mark.slow
def test_the_verb_prints_a_table_or_json(tmp_path, capsys, monkeypatch):
    words = ["bench", "assemble", "--size=tiny", "--rounds=1", f"--work={tmp_path}"]
    monkeypatch.setenv("PATH", "/nowhere")
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
    assert main(["bench", "assemble", "--family=qwen3", "--dtype=fp16"]) == 1
    assert "--dtype fp16: found a mixture whose form fp16 can't hold" in capsys.readouterr().err


def stand_in(folder, text):
    """Put a program of mergekit's name on the path."""
    folder.mkdir()
    (folder / MERGEKIT).write_text(f"#!{sys.executable}\n{text}")
    (folder / MERGEKIT).chmod(0o755)
    return str(folder)


def test_another_program_is_measured_as_a_whole(tmp_path, monkeypatch):
    """What it is given, and what it took; the program is a stand-in, the measuring is not."""
    text = "import json, sys, time\nconfig = json.load(open(sys.argv[1]))\n"
    text += "assert [e['source_model'][-5:] for e in config['experts']][0] == 'alpha'\n"
    text += "held = b'x' * (200 << 20)\nend = time.process_time() + 0.3\n"
    text += "while time.process_time() < end: pass\nopen(sys.argv[2], 'w').close()\n"
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", text))
    found = cost(MERGEKIT, tmp_path)
    assert found.peak > 200 and found.cpu >= 0.3 and found.wall > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_another_program_that_fails_is_told_with_its_last_word(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", stand_in(tmp_path / "bin", "import sys; sys.exit('no such model')"))
    with pytest.raises(ConfigError, match=r"mergekit-moe ended with 1: no such model; mend its"):
        cost(MERGEKIT, tmp_path)
