"""Checkpoints in memory: the oracle against stock transformers, and the facts about the layer."""

import json
import runpy
import shutil

import oracle
import pytest
import torch
from conftest import make_nexus

from nexus_ds.checkpoint.build import (
    empty_skeleton,
    load_stock,
    new_dense,
    transformers_config,
)
from nexus_ds.checkpoint.config_json import read_config
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.settings import ModelConfig, RouterConfig

TOKENS = torch.arange(40).remainder(29).view(2, 20)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize("top_k", [1, 2])
def test_written_down_rows_give_the_logits_that_the_projection_gives(tmp_path, top_k):
    """Fact 1: P can be replaced by its precomputed rows. The stock model has the rows, the oracle
    has P."""
    checkpoint = make_nexus(tmp_path / "nexus", names=list("abcd"), top_k=top_k)
    reference = oracle.load(checkpoint, torch.float32, RouterConfig())
    assert (
        float((logits(reference) - logits(load_stock(checkpoint, torch.float32))).abs().max())
        <= 1e-6
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_written_down_rows_route_as_the_projection_does_in_bf16(tmp_path, top_k):
    """Layer by layer and without the shared expert, beside which routed ones are lost in the
    rounding."""
    checkpoint = make_nexus(tmp_path / "nexus", names=list("abcd"), top_k=top_k)
    reference, stock = (
        oracle.load(checkpoint, torch.bfloat16, RouterConfig()),
        load_stock(checkpoint, torch.bfloat16),
    )
    x_BSH = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for plain, block in zip(reference.model.layers, stock.model.layers, strict=True):
        plain.mlp.shared_experts.down_proj.weight.data.zero_()
        block.mlp.shared_expert.down_proj.weight.data.zero_()
        with torch.no_grad():
            found, expected = plain.mlp(x_BSH).float(), block.mlp(x_BSH).float()
        difference_T = (found - expected).abs().amax(-1).flatten() / expected.abs().max()
        # a token between two experts may take either
        assert float(difference_T.quantile(0.95)) <= 2e-2


def test_the_output_is_the_shared_expert_plus_the_gated_routed_one(nexus_dir):
    """Fact 3, computed once more by hand."""
    layer = oracle.load(nexus_dir, torch.float32, RouterConfig()).model.layers[0].mlp
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    p = (x[0] @ layer.router.rows(torch.float32).T).softmax(-1)
    assert torch.allclose(p.sum(-1), torch.ones(5))
    for t in range(5):
        best = int(p[t].argmax())
        expected = layer.shared_experts(x[0, t]) + p[t, best] * layer.experts(x[0, t], best)
        assert torch.allclose(layer(x)[0, t], expected, atol=1e-6)


def test_a_new_dense_model_has_the_sizes_of_the_recipe():
    sizes = ModelConfig(
        hidden_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn_size=40,
        max_positions=96,
        rope_theta=5e3,
        tied_embeddings=False,
    )
    model = new_dense(sizes, 70, 3, 0)
    config, block = model.config, model.model.layers[1]
    assert (config.vocab_size, config.eos_token_id, config.max_position_embeddings) == (70, 3, 96)
    assert config.rope_parameters["rope_theta"] == 5e3 and len(model.model.layers) == 2
    assert block.self_attn.q_proj.weight.shape == (
        48,
        48,
    ) and block.self_attn.k_proj.weight.shape == (24, 48)
    assert block.mlp.gate_proj.weight.shape == (40, 48)
    assert (
        model.lm_head.weight.shape == (70, 48)
        and model.lm_head.weight is not model.model.embed_tokens.weight
    )
    again, other = new_dense(sizes, 70, 3, 0), new_dense(sizes, 70, 3, 1)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_a_single_routed_expert_has_probability_one(tmp_path):
    layer = (
        oracle.load(make_nexus(tmp_path / "one", names=["a"]), torch.float32, RouterConfig())
        .model.layers[0]
        .mlp
    )
    x = torch.randn(1, 3, 16)
    assert torch.allclose(layer(x), layer.shared_experts(x) + layer.experts(x, 0), atol=1e-6)


def test_code_of_a_checkpoint_is_never_run(tmp_path, dense_dir, monkeypatch):
    """A configuration that names a module beside it: the module would leave a file behind."""
    odd, canary = shutil.copytree(dense_dir, tmp_path / "odd"), tmp_path / "canary"
    (odd / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    config = json.loads((odd / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "model_type": "evil",
    }
    (odd / "config.json").write_text(json.dumps(config))
    loaders = (transformers_config, lambda directory: load_stock(directory, torch.float32))
    for load in loaders:
        with pytest.raises(UnsupportedModelError, match="auto_map"):
            load(odd)
    monkeypatch.setattr(
        "nexus_ds.checkpoint.build.know_model_type", lambda directory: None
    )  # without the first defence
    for load in loaders:
        with pytest.raises(CheckpointError, match=r"custom code|evil"):
            load(odd)
    assert not canary.exists()
    runpy.run_path(str(odd / "evil.py"))
    assert canary.exists()


def test_experts_permuted_together_with_their_domains_leave_the_output_unchanged(tmp_path):
    """Fact 6."""
    checkpoint, order = make_nexus(tmp_path / "nexus", names=list("abcd"), top_k=2), [2, 0, 3, 1]
    expected = logits(oracle.load(checkpoint, torch.float32, RouterConfig()))
    permuted = oracle.load(checkpoint, torch.float32, RouterConfig())
    for block in permuted.model.layers:
        for stacked in ("w1", "w2", "w3"):
            parameter = getattr(block.mlp.experts, stacked)
            parameter.data = parameter.data[order]
    moved = logits(permuted)
    assert float((moved - expected).abs().max()) > 1e-5, (
        "the experts alone are moved: the output has to change"
    )
    for block in permuted.model.layers:
        block.mlp.router.domain_inputs = block.mlp.router.domain_inputs[order]
    assert float((logits(permuted) - expected).abs().max()) <= 1e-6


def stock(directory):
    return load_stock(directory, torch.float32)


def streamed(directory):
    return streamed_model(directory, torch.float32, torch.device("cpu"))


def skeleton(directory):
    return empty_skeleton(directory, read_config(directory), torch.float32)


def test_a_header_that_only_transformers_refuses_is_told_in_one_line(plain_moe_dir, tmp_path):
    """Metadata of a number: nobody here reads it, its library insists on a map."""
    shutil.copytree(plain_moe_dir, tmp_path / "copy")
    [path] = (tmp_path / "copy").glob("*.safetensors")
    content = path.read_bytes()
    metadata = b'"__metadata__":{"format":"pt"}'
    assert metadata in content
    odd = b'"__metadata__":1'.ljust(len(metadata))
    path.write_bytes(content.replace(metadata, odd))
    for read in (load_model, stock):
        with pytest.raises(CheckpointError, match=r"can't load this checkpoint: .*expected a map"):
            read(tmp_path / "copy")


ALL = [load_model, stock, streamed, skeleton, transformers_config]
WHOLE = [load_model, stock, streamed]


@pytest.mark.parametrize(
    ("name", "text", "said", "readers"),
    [
        ("config.json", {"attention_dropout": "x"}, "attention_dropout", ALL),
        ("config.json", {"pad_token_id": -5000000}, "", [load_model, stock, streamed, skeleton]),
        ("generation_config.json", "8", "", WHOLE),
        # a whole model passes over a file that is no JSON
        ("generation_config.json", "", "not a valid JSON", [streamed]),
        ("generation_config.json", '{"a": ' + "[" * 900 + "]" * 900 + "}", "", WHOLE),
    ],
)
def test_what_transformers_cannot_load_is_told_in_one_line(
    plain_moe_dir, tmp_path, name, text, said, readers
):
    """Whole, for training, layer by layer, and a configuration alone: each has its own way."""
    shutil.copytree(plain_moe_dir, tmp_path / "copy")
    path = tmp_path / "copy" / name
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    for read in readers:
        with pytest.raises(
            CheckpointError, match=f"copy: transformers can't load this checkpoint: .*{said}"
        ) as refusal:
            read(tmp_path / "copy")
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
