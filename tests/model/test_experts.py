"""The routed experts' own forward and backward pass against autograd's, and the order of rows."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from nexus_ds.model.experts import (
    TORCH_PRODUCTS,
    ExpertOrder,
    FeedForward,
    RoutedExperts,
    eager_elementwise,
    grouped_kernel,
)

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
E, F_SIZE, H = 3, 16, 8  # grouped products want rows of 16 bytes


class Stacked(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("w1", (E, F_SIZE, H)), ("w2", (E, H, F_SIZE)), ("w3", (E, F_SIZE, H))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype) / 3))


def activated(name, x):
    """Return what transformers computes under a name."""
    return ACT2FN[name](x)


def plain(stacked, x, counts, activation="silu"):
    """Return what autograd differentiates by itself: each expert on its rows, zeros for rows beyond
    the counts."""
    outputs, first = [], 0
    for e, count in enumerate(counts):
        rows = x[first : first + count]
        inner = activated(activation, rows @ stacked.w1[e].T) * (rows @ stacked.w3[e].T)
        outputs.append(inner @ stacked.w2[e].T)
        first += count
    return torch.cat([*outputs, torch.zeros_like(x[first:])])


@pytest.mark.parametrize("counts", [[4, 3, 5], [0, 9, 0], [2, 0, 1], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients_equal_autograds(activation, dtype, counts):
    x = torch.randn(12, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.randn(12, H, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for kind in ("own", "plain"):
        stacked, rows = Stacked(dtype), x.clone().requires_grad_()
        own = RoutedExperts(stacked, activation=activation)
        assert own.w2 is stacked.w2
        if kind == "own":
            out = own(rows, torch.tensor(counts))
        else:
            out = plain(stacked, rows, counts, activation)
        (out * weight).sum().backward()
        found.append(
            [out.detach(), rows.grad, *(w.grad for w in (stacked.w1, stacked.w2, stacked.w3))]
        )
    for a, b in zip(*found, strict=True):
        assert torch.allclose(
            a.float(), b.float(), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 3e-2
        )
        assert bool((a == 0).all()) == bool((b == 0).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_stands_between_grouped_products_is_autograds(activation):
    generator = torch.Generator().manual_seed(0)
    gate, up, weight = (torch.randn(12, F_SIZE, generator=generator) for _ in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    expected = activated(activation, gate) * up
    elementwise = eager_elementwise(activation)
    assert torch.equal(elementwise.inner(gate, up), expected)
    inner, dup, dgate = elementwise.gradients(gate.detach(), up.detach(), weight)
    assert torch.equal(inner, expected)
    gradients = torch.autograd.grad((expected * weight).sum(), (gate, up))
    assert torch.allclose(dgate, gradients[0], atol=1e-6) and torch.equal(dup, gradients[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_network_has_its_activation(activation):
    torch.manual_seed(0)
    ffn, x = FeedForward(H, F_SIZE, activation), torch.randn(5, H)
    gate, up, down = (weight.detach() for weight in ffn.parameters())
    expected = (activated(activation, x @ gate.T) * (x @ up.T)) @ down.T
    assert torch.allclose(ffn(x), expected, atol=1e-6)


def test_only_gate_and_up_projections_are_kept():
    stacked, kept = Stacked(torch.float32), []
    own, x = RoutedExperts(stacked), torch.randn(12, H, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        own(x, torch.tensor([4, 4, 4]))
    assert [tuple(t.shape) for t in kept] == [
        (12, H),
        (12, F_SIZE),
        (12, F_SIZE),
        *(w.shape for w in own.parameters()),
    ]
    assert all(any(t is w for t in kept) for w in own.parameters()), (
        "a view would keep weights that ZeRO-3 gathered"
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_rows_go_to_their_experts_and_back(top_k):
    slots = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2]])[:, :top_k]
    gate = torch.rand(5, top_k, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    order = ExpertOrder(slots)
    rows = order.dispatch(x)
    places = slots.reshape(-1).sort(stable=True).values
    expected = torch.stack(
        [x[t] for s in range(3) for t in range(5) for k in range(top_k) if slots[t, k] == s]
    )
    assert torch.equal(rows, expected)
    out = order.combine(rows * (places[:, None] + 1), gate)  # expert s multiplies by s + 1
    by_hand = (x[:, None] * (slots + 1)[:, :, None] * gate[:, :, None]).sum(1)
    assert torch.allclose(out, by_hand, atol=1e-6)
    weight = torch.randn(5, H, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((out * weight).sum(), (x, gate))
    for a, b in zip(found, torch.autograd.grad((by_hand * weight).sum(), (x, gate)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("tokens", "activation"), [(0, "silu"), *((5, a) for a in ACTIVATIONS)])
def test_grouped_products_equal_the_loop_where_an_expert_has_no_token(
    tokens, activation, top_k, dtype
):
    """Spare rows give each expert one, and leave no trace in outputs and gradients."""
    slots_TK = torch.tensor([[2, 0], [2, 2], [0, 2], [2, 0], [0, 0]])[:tokens, :top_k]
    counts_E = torch.bincount(slots_TK.flatten(), minlength=E).int()
    assert counts_E[1] == 0
    x_TH = torch.randn(5, H, generator=torch.Generator().manual_seed(1)).to(dtype)[:tokens]
    weight_NH = torch.randn(tokens * top_k, H, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for grouped in (False, True):
        stacked, tokens_TH = Stacked(dtype), x_TH.clone().requires_grad_()
        order = ExpertOrder(slots_TK, spare=E if grouped else 0)
        experts = RoutedExperts(stacked, TORCH_PRODUCTS if grouped else None, activation)
        rows_NH = experts(order.dispatch(tokens_TH), counts_E + 1 if grouped else counts_E)
        out_NH = order.restore(rows_NH)
        assert len(rows_NH) == len(out_NH) + E * grouped
        (out_NH * weight_NH).sum().backward()
        gradients = [w.grad for w in (stacked.w1, stacked.w2, stacked.w3)]
        found.append([out_NH.detach(), tokens_TH.grad, *gradients])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for looped, in_groups in zip(*found, strict=True):
        assert looped.shape == in_groups.shape
        torch.testing.assert_close(in_groups, looped, rtol=1e-5, atol=tolerance)
    assert not found[1][2][1].any()


@pytest.mark.parametrize(
    ("capability", "triton", "expected"),
    [
        ((7, 5), True, None),
        ((8, 0), True, "triton"),
        ((8, 6), True, "triton"),
        ((8, 9), True, "triton"),
        ((8, 6), False, None),
        ((9, 0), False, "torch"),
        ((9, 0), True, "torch"),
        ((10, 0), False, "torch"),
        ((12, 0), True, None),
        ((12, 0), False, None),
        (None, False, None),
    ],
    ids=str,
)
def test_grouped_products_are_taken_where_a_kernel_is_fast(capability, triton, expected):
    assert grouped_kernel(capability, triton) == expected
