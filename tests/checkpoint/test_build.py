"""Checkpoints in memory: the oracle and NexusMoE against stock transformers, and the facts about
the layer."""

import json
import runpy
import shutil

import oracle
import pytest
import torch
from conftest import make_linear, make_nexus

from nexus_ds.checkpoint.build import load_stock, new_dense, transformers_config
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader, overwrite
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.runtime.nexus_moe import NexusMoE, Placement
from nexus_ds.runtime.parallel_model import load_nexus
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


@pytest.mark.parametrize("grouped", [False, True])
def test_one_process_of_nexus_moe_gives_the_references_logits(nexus_dir, grouped):
    model = load_nexus(nexus_dir, torch.float32, Placement(3), RouterConfig(), grouped)
    assert all(isinstance(block.mlp, NexusMoE) for block in model.model.layers)
    assert (
        float(
            (logits(model) - logits(oracle.load(nexus_dir, torch.float32, RouterConfig())))
            .abs()
            .max()
        )
        <= 1e-6
    )


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


def test_domain_embeddings_have_no_gradient_and_are_shared_by_all_layers(nexus_dir):
    """Fact 2."""
    model = load_nexus(nexus_dir, torch.float32, Placement(3), RouterConfig(), False)
    assert not any("domain_inputs" in name for name, _ in model.named_parameters())
    first, second = (block.mlp.router.domain_inputs for block in model.model.layers)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(first, read_sidecar(nexus_dir).domain_inputs())
    model.train()
    model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
    for block in model.model.layers:
        assert all(float(p.grad.abs().sum()) > 0 for p in block.mlp.router.projection.parameters())


def test_experts_without_a_token_change_nothing_and_are_finite(nexus_dir):
    model = load_nexus(
        nexus_dir, torch.float32, Placement(3), RouterConfig(load_balance=0.1), False
    )
    model.train()
    layer = model.model.layers[0].mlp
    same = torch.ones(1, 6, 16, requires_grad=True)
    layer(same).sum().backward()
    chosen = int(layer.router.latest.selected_TK[0, 0])
    for stacked in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        norms = stacked.grad.flatten(1).norm(dim=1)
        assert bool(torch.isfinite(norms).all())
        assert [bool(n > 0) for n in norms] == [e == chosen for e in range(3)]


@pytest.mark.parametrize(
    ("experts", "size"), [(4, 1), (4, 2), (4, 4), (3, 2), (5, 4), (7, 4), (1, 2)]
)
def test_every_expert_has_one_slot_and_vacant_slots_are_spread(experts, size):
    ranks = [Placement(experts, size, rank) for rank in range(size)]
    held = [[e for e in place.local_experts() if e is not None] for place in ranks]
    assert sorted(e for local in held for e in local) == list(range(experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert len({place.slots for place in ranks}) == 1 and ranks[0].slots % size == 0
    for expert in range(experts):
        assert ranks[0].expert_at(ranks[0].slot(expert)) == expert


@pytest.mark.parametrize("trained", [0.3, -0.3])
def test_a_shared_gate_that_was_trained_elsewhere_is_refused(tmp_path, trained):
    checkpoint = make_nexus(tmp_path / "nexus")
    reader = TensorReader(checkpoint)
    overwrite(
        reader.info("model.layers.1.mlp.shared_expert_gate.weight"), torch.full((1, 16), trained)
    )
    message = r"layer 1: the shared expert's gate has weights up to 3\.0e-01.*keep shared_expert_gate frozen"
    with pytest.raises(CheckpointError, match=message):
        load_nexus(checkpoint, torch.float32, Placement(3), RouterConfig(), False)


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
        with pytest.raises(ValueError, match=r"trust_remote_code|evil"):
            load(odd)
    assert not canary.exists()
    runpy.run_path(str(odd / "evil.py"))
    assert canary.exists()


def test_a_linear_router_trains_its_own_rows(tmp_path):
    checkpoint = make_linear(tmp_path / "nexus", names=list("abcd"))
    model = load_nexus(
        checkpoint, torch.float32, Placement(4), RouterConfig(load_balance=0.1), False
    )
    reference = oracle.load(checkpoint, torch.float32, RouterConfig(load_balance=0.1))
    stock = logits(load_stock(checkpoint, torch.float32))
    assert float((logits(model) - stock).abs().max()) <= 1e-6
    assert float((logits(reference) - stock).abs().max()) <= 1e-6
    for candidate in (model, reference):
        candidate.train()
        candidate(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
    for a, b in zip(model.model.layers, reference.model.layers, strict=True):
        gradient = a.mlp.router.gate.weight.grad
        assert float(gradient.abs().sum()) > 0
        assert torch.allclose(gradient, b.mlp.router.gate.weight.grad, atol=1e-7)


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
