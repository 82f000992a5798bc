"""Loading refuses what transformers would mend or run: missing tensors, code hooks, pickles, rows
that aren't P(D)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import loading
from nexus_ds.checkpoint.config_json import read_config
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import CheckpointError, ConfigError, UnsupportedModelError


@pytest.fixture
def copy(dense_dir, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "copy")
    return tmp_path / "copy"


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_loads_in_fp32_for_inference(dense_dir):
    model = load_model(dense_dir, "fp32")
    assert not model.training and model.dtype == torch.float32


def test_missing_tensor_is_not_made_up(copy):
    change_tensors(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError,
        match=r"1 tensors are missing, the first: 'model.layers.1.mlp.up_proj.weight'",
    ):
        load_model(copy)


def test_unknown_tensor_is_not_dropped(copy):
    change_tensors(
        copy, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)})
    )
    with pytest.raises(
        CheckpointError,
        match=r"1 tensors are not known to the model's family, the first: .*o_proj.bias",
    ):
        load_model(copy)


def test_repeated_tied_head_is_harmless(copy):
    change_tensors(
        copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    load_model(copy)


def test_tensor_of_another_shape(copy):
    change_tensors(copy, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(
        CheckpointError, match=r"transformers can't load this checkpoint|another shape"
    ):
        load_model(copy)


def test_a_value_of_another_kind_in_the_configuration(copy):
    change_config(copy, rms_norm_eps=None)
    with pytest.raises(
        CheckpointError, match=r"transformers can't load this checkpoint: .*rms_norm_eps"
    ):
        load_model(copy)


def test_an_adapter_is_no_checkpoint(copy):
    (copy / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "base"}'
    )
    for load in (load_model, read_config):
        with pytest.raises(
            UnsupportedModelError, match=r"holds an adapter .*LORA of base.*merge it first"
        ):
            load(copy)


def test_code_hooks_are_refused(copy):
    change_config(copy, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        load_model(copy)


def test_code_beside_a_model_is_not_run_even_where_its_hooks_are_not_seen(
    copy, tmp_path, monkeypatch
):
    """Both defences: without the look at config.json, transformers is still told to run nothing."""
    canary = tmp_path / "canary"
    (copy / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    change_config(
        copy,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    monkeypatch.setattr(loading, "know_model_type", lambda directory: None)
    monkeypatch.setattr(loading, "computed_dtype", lambda *arguments: torch.float32)
    with pytest.raises(CheckpointError, match="custom code which must be executed"):
        load_model(copy)
    assert not canary.exists()


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        load_model(copy)


def test_hub_names_are_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_model, open_tokenizer, read_config):
        with pytest.raises(CheckpointError, match="some/model"):
            load("some/model")


def test_rows_that_are_not_the_projection(nexus_dir, tmp_path):
    shutil.copytree(nexus_dir, tmp_path / "copy")
    change_tensors(tmp_path / "copy", lambda t: t["model.layers.1.mlp.gate.weight"].add_(0.1))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate\.weight"):
        load_model(tmp_path / "copy")


def test_unknown_precision(dense_dir):
    with pytest.raises(
        ConfigError, match="precision: unknown value 'fp8'; known: auto, fp32, stored"
    ):
        load_model(dense_dir, "fp8")
