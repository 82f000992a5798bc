"""NexusMoE beside the plain layer: the same gates bit by bit in the working precision, the same
losses with their weights."""

import oracle
import pytest
import torch

from nexus_ds.runtime.nexus_moe import Placement, _slots_of_arrivals
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import RouterConfig

COEFFICIENTS = RouterConfig(load_balance=0.3, z_loss=0.02)


def layers(directory, dtype, experts=3):
    """Return the first layer of a checkpoint in training, as NexusMoE and as the oracle has it."""
    model = load_nexus(directory, dtype, Placement(experts), COEFFICIENTS, False)
    plain = oracle.load(directory, dtype, COEFFICIENTS)
    return model.model.layers[0].mlp.train(), plain.model.layers[0].mlp.train()


def hidden(dtype):
    return torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["token", "context"])
def test_gates_in_training_are_those_of_serving(nexus_dir, context_dir, kind, dtype):
    """Serving multiplies with a gate of the model's precision: one that stays fp32 in training
    trains another model."""
    layer, plain = layers(nexus_dir if kind == "token" else context_dir, dtype)
    x_BSH = hidden(dtype)
    layer.router.length = x_BSH.shape[1]
    gate_TK, slots_TK, counts_E = (tensor.detach() for tensor in layer.router(x_BSH.flatten(0, 1)))
    out_BSH, expected_BSH = layer(x_BSH).detach(), plain(x_BSH).detach()
    assert torch.equal(gate_TK, gate_TK.to(dtype).float())
    agreed_T = (slots_TK == plain.selected).all(dim=1)
    assert float(agreed_T.float().mean()) > 0.95  # a token between two experts may fall to either
    largest = float((gate_TK - plain.gate.detach().float()).abs()[agreed_T].max())
    assert largest <= (1e-6 if dtype == torch.float32 else 2.0**-8)  # one step of bf16 below 1
    assert counts_E.tolist() == torch.bincount(slots_TK.flatten(), minlength=3).tolist()
    difference_T = (out_BSH - expected_BSH).float().abs().amax(-1).flatten()[agreed_T]
    assert float(difference_T.max() / expected_BSH.float().abs().max()) <= (
        1e-6 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_layers_losses_ride_on_its_output_with_their_weights(nexus_dir, scale):
    """Nothing but the losses of the layer has a gradient here: that of scale * (0.3 balance + 0.02
    z)."""
    layer, plain = layers(nexus_dir, torch.float32)
    layer.router.loss_scale = scale
    x_BSH = hidden(torch.float32)
    (layer(x_BSH) * 0).sum().backward()
    plain(x_BSH)
    (plain.auxiliary * scale).backward()
    for found, expected in zip(layer.router.parameters(), plain.router.parameters(), strict=True):
        assert float(expected.grad.abs().max()) > 0
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)
    seen = layer.router.latest
    p_TE = torch.nn.functional.linear(
        x_BSH.flatten(0, 1), plain.router.rows(torch.float32).detach()
    ).softmax(-1)
    assert float(seen.load_balance) == pytest.approx(
        float(oracle.load_balancing(p_TE, plain.selected)), abs=1e-5
    )
    assert torch.equal(seen.selected_TK, plain.selected)
    torch.testing.assert_close(seen.gate_T1, p_TE.max(dim=1).values)


def test_a_layer_that_is_not_trained_carries_no_losses(nexus_dir):
    layer, _ = layers(nexus_dir, torch.float32)
    (layer.eval()(hidden(torch.float32)) * 0).sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.router.parameters())


def test_a_z_loss_that_weighs_nothing_is_not_computed(nexus_dir, monkeypatch):
    layer, _ = layers(nexus_dir, torch.float32)
    layer.router.z_loss = 0.0
    monkeypatch.setattr("nexus_ds.runtime.nexus_moe.router_z_loss", None)
    layer(hidden(torch.float32)).sum().backward()
    assert layer.router.latest.z is None


@pytest.mark.parametrize("grouped", [False, True])
def test_grouped_products_and_the_loop_are_one_layer(nexus_dir, grouped):
    """The loop is held to the oracle by tests/runtime/test_parity.py; here an expert gets no token.

    Its gradient is zero all the same: torch's grouped products would leave it unwritten on a GPU.
    """
    looped, _ = layers(nexus_dir, torch.float32)
    model = load_nexus(nexus_dir, torch.float32, Placement(3), COEFFICIENTS, grouped)
    layer = model.model.layers[0].mlp.train()
    x_BSH = hidden(torch.float32)[:1, :2]
    outputs = []
    for each in (looped, layer):
        out_BSH = each(x_BSH)
        (out_BSH**2).sum().backward()
        outputs.append(out_BSH.detach())
    torch.testing.assert_close(*outputs)
    for found, expected in zip(layer.parameters(), looped.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    unused = set(range(3)) - set(layer.router.latest.selected_TK.flatten().tolist())
    assert unused and not layer.experts.w2.grad[list(unused)].any()


def test_rows_that_arrive_are_known_by_sender_and_expert():
    """Two ranks sent 2 + 1 and 0 + 3 rows for this rank's two experts."""
    slots_N1 = _slots_of_arrivals(torch.tensor([[2, 1], [0, 3]]), 6)
    assert slots_N1.flatten().tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("experts", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_expert_has_one_slot_and_vacant_ones_are_spread(experts, size):
    ranks = [Placement(experts, size, rank) for rank in range(size)]
    slots = {rank.slots for rank in ranks}
    assert len(slots) == 1 and slots.pop() % size == 0
    held = [expert for rank in ranks for expert in rank.local_experts()]
    assert len(held) == ranks[0].slots
    assert sorted(e for e in held if e is not None) == list(range(experts))
    assert [held[ranks[0].slot(e)] for e in range(experts)] == list(range(experts))
    assert [ranks[0].expert_at(ranks[0].slot(e)) for e in range(experts)] == list(range(experts))
    counts = [sum(e is not None for e in rank.local_experts()) for rank in ranks]
    assert max(counts) - min(counts) <= 1
