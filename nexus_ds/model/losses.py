"""Losses of the router, exact under every kind of activation checkpointing.

Shapes: T tokens, E routed experts, K chosen experts a token.
Not covered: balancing across ranks; each rank balances its own micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def load_balancing_loss(probabilities_TE: Tensor, counts_E: Tensor, top_k: int) -> Tensor:
    """Return E * sum_i f_i P_i (Fedus et al. 2022), scalar fp32, without a coefficient.

    1 when routing is uniform, E when one expert takes all with p = 1. f_i is the share of all
    assignments that go to expert i (no gradient), P_i the mean probability of expert i.

    Args:
        probabilities_TE: fp32.
        counts_E: assignments to each expert, integers.
        top_k: assignments of each token.
    """
    tokens, experts = probabilities_TE.shape
    # Exact: fp32 counts to 2^24, and no rank makes as many assignments in one pass.
    assigned_E = counts_E.to(probabilities_TE.dtype)
    f_times_p = torch.dot(assigned_E, probabilities_TE.mean(0))
    return f_times_p * (experts / (tokens * top_k))


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean squared log-partition of router logits (Zoph et al. 2022), scalar fp32."""
    log_partition_T = torch.logsumexp(logits_TE.float(), dim=-1)
    return log_partition_T.square().mean()


class _Attach(torch.autograd.Function):
    """The identity of `carrier` that sends the gradient `scale` into `loss`."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.dtype = loss.dtype
        # A view, since an input that is returned as it is would count as changed in place.
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        loss_gradient = torch.full((), ctx.scale, dtype=ctx.dtype, device=gradient.device)
        return gradient, loss_gradient, None


def attach_loss(carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `carrier` unchanged; its backward pass also sends the gradient `scale` into `loss`.

    A loss that is read off a layer after the forward pass loses its gradient silently under
    re-entrant activation checkpointing; one that rides on an activation can't, since recomputation
    attaches it again.
    """
    return _Attach.apply(carrier, loss, scale)
