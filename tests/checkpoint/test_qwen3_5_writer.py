"""Rows come in any pieces, and each goes where transformers' Qwen3-Next splits it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.qwen2_moe import moe_config, planned
from nexus_ds.checkpoint.qwen3_5_writer import ReorderedWriter
from nexus_ds.errors import CheckpointError
from tests.checkpoint.test_qwen3_5 import SIZES

DENSE = SIZES | dict(model_type="qwen3_5_text", full_attention_interval=2, tie_word_embeddings=True)
LINEAR = "model.layers.0.linear_attn."


@pytest.fixture
def written(tmp_path):
    """(what was given, what lies in the file, config.json)."""
    config = moe_config(DENSE, 2, 1)
    plan = planned(config, "F32")
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=generator) for name, (_, shape) in plan.items()}
    with ReorderedWriter(tmp_path, plan, config) as writer:
        for name, tensor in given.items():
            if tensor.ndim < 2:
                writer.write(name, tensor)
                continue
            # pieces that end within a head's rows
            for start in range(0, len(tensor), 5):
                writer.write_rows(name, start, tensor[start : start + 5])
    return given, load_file(tmp_path / "model.safetensors"), config


def test_the_rows_of_a_file_are_split_as_its_class_splits_them(written):
    given, found, config = written
    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_next", **keys))
    layer = model.model.layers[0].linear_attn
    qkvz = found[f"{LINEAR}in_proj_qkvz.weight"].T[None]
    ba = found[f"{LINEAR}in_proj_ba.weight"].T[None]
    q, k, v, z, b, a = (x.flatten(2)[0].T for x in layer.fix_query_key_value_ordering(qkvz, ba))
    own = {"qkv": torch.cat((q, k, v)), "z": z, "b": b, "a": a}
    for part, rows in own.items():
        assert torch.equal(rows, given[f"{LINEAR}in_proj_{part}.weight"]), part
    assert torch.equal(found[HEAD], given[EMBEDDING])
    assert f"{LINEAR}in_proj_z.weight" not in found


def test_rows_that_never_came_and_rows_that_came_twice_are_told(tmp_path):
    config = moe_config(DENSE, 2, 1)
    plan = planned(config, "F32")
    name = f"{LINEAR}in_proj_b.weight"
    twice = r"tensor '.*in_proj_ba.weight' was written twice"
    with (
        pytest.raises(CheckpointError, match=twice),
        ReorderedWriter(tmp_path, plan, config) as writer,
    ):
        for _ in range(3):
            writer.write(name, torch.zeros(4, 32))
    (tmp_path / "model.safetensors").unlink()
    some = {name: plan[name], EMBEDDING: plan[EMBEDDING]}
    with (
        pytest.raises(CheckpointError, match="planned tensors were not written"),
        ReorderedWriter(tmp_path, some, config) as writer,
    ):
        writer.write(name, torch.zeros(4, 32))
