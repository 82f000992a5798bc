"""The router's losses and how they ride on an activation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nexus_ds.model.losses import attach_loss, load_balancing_loss, router_z_loss


def test_uniform_routing_has_loss_one():
    p = torch.full((8, 4), 0.25)
    counts = torch.full((4,), 2)
    assert float(load_balancing_loss(p, counts, 1)) == pytest.approx(1.0)


def test_collapse_on_one_expert_has_loss_n():
    p = torch.zeros(8, 4)
    p[:, 2] = 1.0
    assert float(load_balancing_loss(p, torch.tensor([0, 0, 8, 0]), 1)) == pytest.approx(4.0)


def test_top_two_counts_every_assignment():
    """Of four assignments expert 0 has two, experts 1 and 2 one each."""
    p = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.1, 0.3]])
    expected = 3 * (0.5 * 0.55 + 0.25 * 0.25 + 0.25 * 0.2)
    assert float(load_balancing_loss(p, torch.tensor([2, 1, 1]), 2)) == pytest.approx(expected)


def test_the_share_of_tokens_is_a_constant_and_the_probabilities_learn():
    """The gradient by p of expert i, of any token, is E f_i / T: nothing flows through who was
    chosen."""
    p = torch.tensor(
        [[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], requires_grad=True
    )
    load_balancing_loss(p, torch.tensor([3, 1, 0]), 1).backward()
    assert torch.allclose(p.grad, (3 * torch.tensor([0.75, 0.25, 0.0]) / 4).expand(4, 3))


def test_the_z_loss_pushes_the_log_partition_down():
    """Mean of lse^2 over tokens: each logit gets 2 lse softmax / T."""
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]], requires_grad=True)
    router_z_loss(logits).backward()
    with torch.no_grad():
        partition = logits.exp().sum(-1, keepdim=True)
        expected = 2 * partition.log() * (logits.exp() / partition) / 2
    assert torch.allclose(logits.grad, expected)


def test_z_loss_is_the_mean_squared_log_partition():
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    expected = (
        torch.tensor(2.0).log() ** 2 + torch.logsumexp(torch.tensor([1.0, 2.0]), 0) ** 2
    ) / 2
    assert float(router_z_loss(logits)) == pytest.approx(float(expected))


def body(x, weight, scale):
    h = x * weight
    return attach_loss(h, (weight**2).sum(), scale) * 3


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non_reentrant"])
def test_an_attached_loss_is_exact_under_every_kind_of_checkpointing(mode):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = torch.tensor([0.5, -1.0], requires_grad=True)
    if mode == "plain":
        out = body(x, weight, 0.25)
    else:
        out = checkpoint(body, x, weight, 0.25, use_reentrant=mode == "reentrant")
    out.sum().backward()
    assert torch.allclose(x.grad, 3 * weight.detach())
    assert torch.allclose(weight.grad, 3 * x.detach() + 0.25 * 2 * weight.detach())
