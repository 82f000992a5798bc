"""What an export writes beside the tensors; test_export_check has what is judged before it
counts."""

import json
import shutil

import pytest
import torch
from launch import start_ranks
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.build import load_stock, new_dense
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import export
from nexus_ds.runtime.engine import moe_layers
from nexus_ds.runtime.export import _plan, _Sink, _write_config, _write_experts
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import ModelConfig, RouterConfig


def written(model, source, out):
    out.mkdir()
    _write_config(model, source, torch.bfloat16, out)
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("kind", ["nexus_dir", "context_dir", "dense_dir"])
def test_the_plan_has_the_tensors_of_the_checkpoint_and_their_shapes(request, kind):
    directory = request.getfixturevalue(kind)
    if kind == "dense_dir":
        model = load_stock(directory, torch.float32)
    else:
        model = load_nexus(directory, torch.float32, Placement(3), RouterConfig(), False)
    stored = TensorReader(directory)
    assert _plan(model, torch.bfloat16) == {
        name: ("BF16", stored.info(name).shape)
        for name in stored.names()
        # written with the embeddings, of which it is a copy
        if name != "lm_head.weight"
    }


def test_the_generation_configuration_is_the_sources(tmp_path, nexus_dir):
    written(load_stock(nexus_dir, torch.float32), nexus_dir, tmp_path / "out")
    generation = (nexus_dir / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == generation


def test_a_failed_write_is_told_at_the_end_and_not_on_the_way(tmp_path):
    """The other ranks gather along: who stops in the middle leaves them waiting for ever."""
    sink = _Sink(tmp_path, {"a": ("F32", (2,)), "b": ("F32", (2,))}, {})
    sink.write("a", torch.zeros(3))
    sink.write("b", torch.zeros(2))
    with pytest.raises(CheckpointError, match="a"):
        sink.close()


def test_a_full_disk_is_named_before_all_ranks_are_told(tmp_path, monkeypatch):
    """They are told in words, which can't be mended afterwards."""

    def full(*given):
        raise ValueError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "_write", full)
    said = rf"No space left on device: free [\d,]+: '{tmp_path / 'out'}'$"
    with pytest.raises(CheckpointError, match=said):
        export._write_and_verify(None, None, torch.float32, tmp_path / "out", None, None)


@pytest.mark.parametrize("kind", ["dense", "nexus"])
def test_rope_stands_in_both_spellings_and_the_dtype_is_that_of_the_weights(
    tmp_path, dense_dir, nexus_dir, kind
):
    source = shutil.copytree(dense_dir if kind == "dense" else nexus_dir, tmp_path / "source")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    before = json.loads((source / "config.json").read_text()) | {
        "rope_parameters": rope,
        "torch_dtype": "float32",
    }
    (source / "config.json").write_text(json.dumps(before))
    config = written(load_stock(source, torch.float32), source, tmp_path / "out")
    assert config["rope_parameters"] == rope and config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    changed = {"rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }


def test_a_new_model_says_both_too(tmp_path):
    sizes = ModelConfig(
        hidden_size=16, layers=1, heads=2, ffn_size=24, max_positions=64, rope_theta=700.0
    )
    config = written(new_dense(sizes, vocabulary=31, eos=0, seed=0), None, tmp_path / "out")
    assert (
        config["rope_parameters"] == {"rope_type": "default", "rope_theta": 700.0}
        and config["rope_theta"] == 700.0
    )
    assert config["tie_word_embeddings"] is True and config["architectures"] == ["LlamaForCausalLM"]


def test_embeddings_are_tied_where_the_model_ties_them(tmp_path, dense_dir):
    """transformers keeps a head of its own in spite of a configuration that ties; so does the
    trained model."""
    source = shutil.copytree(dense_dir, tmp_path / "source")
    assert (
        written(load_stock(source, torch.float32), source, tmp_path / "tied")["tie_word_embeddings"]
        is True
    )
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    assert (
        written(load_stock(source, torch.float32), source, tmp_path / "untied")[
            "tie_word_embeddings"
        ]
        is False
    )


def test_owners_of_experts_go_ahead_of_the_writing_by_one_stack(monkeypatch, nexus_dir, alone):
    placement = Placement(experts=3)
    model = load_nexus(nexus_dir, torch.float32, placement, RouterConfig(), False)
    done = []
    monkeypatch.setattr(internals, "wait_for_device", lambda: done.append("wait"))
    _write_experts(0, moe_layers(model)[0], lambda name, matrix: done.append("write"))
    assert done == [*["write"] * 3, "wait"] * 3


RANK = """
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from nexus_ds.config import Config
from nexus_ds.errors import CheckpointError
from nexus_ds.launch import position
from nexus_ds.runtime import export
from nexus_ds.runtime.ranks import join, together

@contextmanager
def failing(out):
    with real(out) as directory:
        if fails == "entering":
            raise OSError(28, "No space left on device", str(directory))
        yield directory
        if fails == "leaving":
            raise OSError(5, "Input/output error", str(directory))

join(240)
dist.init_process_group("gloo")
out = Path(sys.argv[1]) / "model"
real, export.new_directory = export.new_directory, failing
export.observe = lambda engine, probe_BS: None
export._write_and_verify = lambda *given: together(lambda: {"tokens": 3})[0]
engine = SimpleNamespace(module=torch.nn.Linear(1, 1))
for fails in ("entering", "leaving", "never"):
    try:
        given = (engine, Config(), torch.float32, out, torch.zeros(1, 4), None)
        print(fails, export.export(*given).tokens, flush=True)
    except CheckpointError as error:
        print(fails, str(error).partition(":")[0], flush=True)
    # the ranks are still in step, and see the directory if it was made
    assert together(lambda: position().rank) == [0, 1]
    assert out.exists() == (fails == "never")
    found = [path.name for path in out.parent.iterdir() if path.suffix != ".lock"]
    assert found == (["model"] if fails == "never" else []), found
    together(lambda: None)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_what_fails_around_the_writing_on_rank_0_is_told_to_all(tmp_path):
    ranks = start_ranks(["-c", RANK, tmp_path], 2)
    said = [rank.communicate(timeout=240)[0].splitlines() for rank in ranks]
    expected = [
        "entering [Errno 28] No space left on device",
        "leaving [Errno 5] Input/output error",
        "never 3",
    ]
    assert said == [expected] * 2 and [rank.returncode for rank in ranks] == [0, 0]
