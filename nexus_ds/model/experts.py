"""Feed-forward networks: one, and the routed ones of a rank in the order of rows that they need.

Rows are put in the order of their experts once, every expert computes one stretch of them, and they
are put back. The gradients
of the stacked weights are written in place: a loop over `w1[e]` would add one gradient as large as
all experts for each of them. Only gate and up projections are kept for the backward pass; the
product of the two is made again.
Shapes: N rows, T tokens, E experts of this rank, K chosen experts a token, H hidden size, F inner
width.
Not covered: choosing experts (NexusRouter), rows that travel between ranks, second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """SwiGLU feed-forward network without biases: [.., H] -> [.., H]."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient takes the way back by a copy, where indexing would add
    row by row."""

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_NH.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse_N), None, None


class ExpertOrder:
    """Takes tokens into the order of their experts and back.

    Args:
        slots_TK: the place of each chosen expert; rows are ordered by it.
    """

    def __init__(self, slots_TK: Tensor) -> None:
        self.top_k = slots_TK.shape[1]
        self.order_N = torch.argsort(slots_TK.reshape(-1), stable=True)
        self.inverse_N = torch.empty_like(self.order_N)
        self.inverse_N[self.order_N] = torch.arange(len(self.order_N), device=self.order_N.device)

    def dispatch(self, x_TH: Tensor) -> Tensor:
        """Return the tokens' rows [T*K, H] in the order of their experts."""
        rows_NH = x_TH if self.top_k == 1 else x_TH.repeat_interleave(self.top_k, 0)
        return _Reorder.apply(rows_NH, self.order_N, self.inverse_N)

    def combine(self, rows_NH: Tensor, gate_TK: Tensor) -> Tensor:
        """Return [T, H]: the sum over the chosen experts of gate value (fp32) times output row, in
        the rows' dtype."""
        rows_NH = _Reorder.apply(rows_NH, self.inverse_N, self.order_N)
        if self.top_k == 1:
            return (rows_NH * gate_TK).to(rows_NH.dtype)
        return (rows_NH.view(*gate_TK.shape, -1) * gate_TK[:, :, None]).sum(1).to(rows_NH.dtype)


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, w1_EFH: Tensor, w2_EHF: Tensor, w3_EFH: Tensor, counts: list[int]
    ) -> Tensor:
        gate_NF, up_NF = (x_NH.new_empty(len(x_NH), w1_EFH.shape[1]) for _ in range(2))
        out_NH = torch.empty_like(x_NH)
        for e, rows in _stretches(counts):
            gate_nF = torch.mm(x_NH[rows], w1_EFH[e].T, out=gate_NF[rows])
            up_nF = torch.mm(x_NH[rows], w3_EFH[e].T, out=up_NF[rows])
            torch.mm(F.silu(gate_nF).mul_(up_nF), w2_EHF[e].T, out=out_NH[rows])
        out_NH[sum(counts) :] = 0
        ctx.counts = counts
        ctx.save_for_backward(x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH)
        return out_NH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        out_grad_NH = gradients[0]
        x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH = ctx.saved_tensors
        x_grad_NH = torch.empty_like(x_NH)
        x_grad_NH[sum(ctx.counts) :] = 0
        grads = [
            torch.empty_like(w) if all(ctx.counts) else torch.zeros_like(w)
            for w in (w1_EFH, w2_EHF, w3_EFH)
        ]
        for e, rows in _stretches(ctx.counts):
            x_nH, gate_nF, up_nF, out_grad_nH = (
                x_NH[rows],
                gate_NF[rows],
                up_NF[rows],
                out_grad_NH[rows],
            )
            silu_nF = F.silu(gate_nF)
            torch.mm(out_grad_nH.T, silu_nF * up_nF, out=grads[1][e])
            inner_grad_nF = out_grad_nH @ w2_EHF[e]
            up_grad_nF = silu_nF.mul_(inner_grad_nF)
            gate_grad_nF = torch.ops.aten.silu_backward(inner_grad_nF.mul_(up_nF), gate_nF)
            torch.mm(gate_grad_nF.T, x_nH, out=grads[0][e])
            torch.mm(up_grad_nF.T, x_nH, out=grads[2][e])
            torch.mm(gate_grad_nF, w1_EFH[e], out=x_grad_NH[rows]).addmm_(up_grad_nF, w3_EFH[e])
        return x_grad_NH, grads[0], grads[1], grads[2], None


def _stretches(counts: list[int]) -> list[tuple[int, slice]]:
    """Return (expert, its rows) for each expert that has any."""
    found, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(first, first + count)))
        first += count
    return found


class RoutedExperts(nn.Module):
    """A rank's experts, one after the other, each on its stretch of rows.

    Args:
        stacked: a module whose parameters w1, w3 [E, F, H] and w2 [E, H, F] are taken over as they
            are.
    """

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        for name in ("w1", "w2", "w3"):
            setattr(self, name, getattr(stacked, name))

    def forward(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """Return expert outputs [N, H] of rows ordered by expert; rows beyond the sum of the counts
        give zeros."""
        return _SwiGLUExperts.apply(x_NH, self.w1, self.w2, self.w3, counts_E.tolist())
