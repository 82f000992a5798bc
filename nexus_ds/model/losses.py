"""Losses of the router, exact under every kind of activation checkpointing.

Shapes: T tokens, E routed experts, K chosen experts a token.
Not covered: balancing across ranks; each rank balances its own micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def load_balancing_loss(probabilities_TE: Tensor, selected_TK: Tensor) -> Tensor:
    """Return E * sum_i f_i P_i (Fedus et al. 2022): 1 when routing is uniform, E when one expert
    takes all with p = 1.

    f_i is the share of the T*K assignments that go to expert i (no gradient), P_i the mean
    probability of expert i. Scalar fp32, without a coefficient.
    """
    experts = probabilities_TE.shape[1]
    chosen = selected_TK.reshape(-1)
    counts_E = probabilities_TE.new_zeros(experts).scatter_add_(
        0, chosen, probabilities_TE.new_ones(chosen.numel())
    )
    share_E = counts_E / chosen.numel()  # scatter_add, unlike bincount, waits for no GPU
    return experts * torch.sum(share_E * probabilities_TE.mean(0))


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean squared log-partition of the router logits (Zoph et al. 2022), scalar
    fp32."""
    return torch.logsumexp(logits_TE.float(), dim=-1).square().mean()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.dtype = loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        return gradient, torch.full((), ctx.scale, dtype=ctx.dtype, device=gradient.device), None


def attach_loss(carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `carrier` unchanged; its backward pass also sends the gradient `scale` into `loss`.

    A loss that is read off a layer after the forward pass loses its gradient silently under
    re-entrant activation checkpointing; one that rides on an activation can't, since recomputation
    attaches it again.
    """
    return _Attach.apply(carrier, loss, scale)
