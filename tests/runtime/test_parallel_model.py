"""A Nexus checkpoint as the model that trains: it computes and learns what the oracle does."""

import oracle
import pytest
import torch
from conftest import make_linear, make_nexus

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.projection_module import domain_inputs
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader, overwrite
from nexus_ds.errors import CheckpointError
from nexus_ds.runtime.nexus_moe import NexusMoE, Placement
from nexus_ds.runtime.parallel_model import load_for_training, load_nexus
from nexus_ds.settings import Config, RouterConfig

TOKENS = torch.arange(40).remainder(29).view(2, 20)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


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


def test_domain_embeddings_have_no_gradient_and_are_shared_by_all_layers(nexus_dir):
    """Fact 2."""
    model = load_nexus(nexus_dir, torch.float32, Placement(3), RouterConfig(), False)
    assert not any("domain_inputs" in name for name, _ in model.named_parameters())
    first, second = (block.mlp.router.domain_inputs for block in model.model.layers)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(first, domain_inputs(read_sidecar(nexus_dir)))
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


@pytest.mark.parametrize("trained", [0.3, -0.3])
def test_a_shared_gate_that_was_trained_elsewhere_is_refused(tmp_path, trained):
    checkpoint = make_nexus(tmp_path / "nexus")
    reader = TensorReader(checkpoint)
    overwrite(
        reader.info("model.layers.1.mlp.shared_expert_gate.weight"), torch.full((1, 16), trained)
    )
    message = (
        r"layer 1: the shared expert's gate has weights up to 3\.0e-01.*"
        "keep shared_expert_gate frozen"
    )
    with pytest.raises(CheckpointError, match=message):
        load_nexus(checkpoint, torch.float32, Placement(3), RouterConfig(), False)


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


def test_each_part_is_partitioned_once_and_as_soon_as_it_is_read(nexus_dir):
    """What a rank holds whole under ZeRO-3 is one part: the next is still on the meta device."""
    seen = []

    def partition(module):
        assert not any(parameter.is_meta for parameter in module.parameters())
        seen.append(module)

    placement = Placement(3)
    model = load_nexus(nexus_dir, torch.float32, placement, RouterConfig(), False, partition)
    tied = model.config.tie_word_embeddings
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    assert [id(module) for module in seen] == [
        id(module) for module in (parts if tied else [*parts, model.lm_head])
    ]


def test_a_dense_model_is_partitioned_whole(dense_dir):
    seen = []
    config = Config()
    config.model.path = str(dense_dir)
    config.model.dtype = "fp32"
    model = load_for_training(config, None, False, seen.append)
    assert len(seen) == 1 and seen[0] is model
