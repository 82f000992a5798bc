"""The plain average of dense models: the mean in fp32, rounded once, in the first one's dtype."""

import json
import shutil

import pytest
import torch
from conftest import shaken
from safetensors.torch import load_file, save_file

from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.upcycling.average import average_dense


@pytest.fixture
def models(tmp_path, dense_dir):
    """Three branches in bf16."""
    paths = [shutil.copytree(dense_dir, tmp_path / str(number)) for number in range(3)]
    for number, path in enumerate(paths):
        tensors = {
            n: t.bfloat16()
            for n, t in shaken(load_file(path / "model.safetensors"), number).items()
        }
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return paths


def test_the_mean_is_taken_in_fp32_and_rounded_once(tmp_path, models):
    average_dense(models, tmp_path / "out")
    mean = load_file(tmp_path / "out" / "model.safetensors")
    each = [load_file(path / "model.safetensors") for path in models]
    assert mean.keys() == each[0].keys()
    for name, tensor in mean.items():
        expected = sum(t[name].double() for t in each) / 3
        # Half a unit of the last of 8 bits, and what fp32 itself may be off by.
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.double() - expected).abs() <= expected.abs() * (2**-8 + 1e-6)).all(), name
    # the comparison can fail
    in_bf16 = sum(t["model.layers.0.mlp.up_proj.weight"] for t in each) / 3
    expected = sum(t["model.layers.0.mlp.up_proj.weight"].double() for t in each) / 3
    assert ((in_bf16.double() - expected).abs() > expected.abs() * (2**-8 + 1e-6)).any()


def test_it_is_a_model_as_the_first_one_is(tmp_path, models):
    average_dense(models, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    first = json.loads((models[0] / "config.json").read_text())
    assert {key: config[key] for key in first} == first and config["rope_theta"] == 10000.0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        models[0] / "tokenizer.json"
    ).read_bytes()


def test_models_of_other_shapes_are_refused(tmp_path, models):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(models[0])
    config.intermediate_size = 20
    LlamaForCausalLM(config).save_pretrained(models[2])
    with pytest.raises(
        IncompatibleModelsError, match=r"2 can't be averaged with .*0: model.layers.0.mlp.*differs"
    ):
        average_dense(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
