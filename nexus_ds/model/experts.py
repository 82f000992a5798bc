"""Feed-forward networks: one, and the routed ones of a rank in the order of rows that they need.

Rows are put in the order of their experts once, every expert computes one stretch of them, and they
are put back. The gradients of the stacked weights are written in place: a loop over `w1[e]` would
add one gradient as large as all experts for each of them. Only gate and up projections are kept for
the backward pass; the product of the two is made again.
Shapes: T tokens, K chosen experts a token, N = T*K rows, n rows of one expert, E experts of this
rank, H hidden size, F inner width.
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
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class _Reorder(torch.autograd.Function):
    """Rows in another order; indexing's own gradient would be added row by row, this is a copy."""

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_NH.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        (gradient_NH,) = gradients
        return gradient_NH.index_select(0, inverse_N), None, None


class ExpertOrder:
    """Takes tokens into the order of their experts and back.

    Args:
        slots_TK: the place of each chosen expert; rows are ordered by it.
    """

    def __init__(self, slots_TK: Tensor) -> None:
        self.top_k = slots_TK.shape[1]
        # Stable, so that the order of rows, and of the sums over them, is always the same.
        self.order_N = torch.argsort(slots_TK.reshape(-1), stable=True)
        positions_N = torch.arange(len(self.order_N), device=self.order_N.device)
        self.inverse_N = torch.empty_like(self.order_N)
        self.inverse_N[self.order_N] = positions_N

    def dispatch(self, x_TH: Tensor) -> Tensor:
        """Return the tokens' rows [N, H] in the order of their experts."""
        rows_NH = x_TH if self.top_k == 1 else x_TH.repeat_interleave(self.top_k, 0)
        return _Reorder.apply(rows_NH, self.order_N, self.inverse_N)

    def combine(self, rows_NH: Tensor, gate_TK: Tensor) -> Tensor:
        """Return the sum over a token's experts of gate value times output row, [T, H].

        Args:
            rows_NH: outputs in the order of the experts.
            gate_TK: fp32; products and sums are fp32 too, the result has the rows' dtype.
        """
        dtype = rows_NH.dtype
        rows_NH = _Reorder.apply(rows_NH, self.inverse_N, self.order_N)
        if self.top_k == 1:
            return (rows_NH * gate_TK).to(dtype)
        rows_TKH = rows_NH.view(*gate_TK.shape, -1)
        return (rows_TKH * gate_TK[:, :, None]).sum(1).to(dtype)


class _SwiGLUExperts(torch.autograd.Function):
    """y = W_2 (silu(W_1 x) * W_3 x) of each expert on its own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        w1_EFH: Tensor,
        w2_EHF: Tensor,
        w3_EFH: Tensor,
        counts: list[int],
    ) -> Tensor:
        gate_NF = x_NH.new_empty(len(x_NH), w1_EFH.shape[1])
        up_NF = torch.empty_like(gate_NF)
        y_NH = torch.empty_like(x_NH)
        for e, rows in _stretches(counts):
            x_nH = x_NH[rows]
            gate_nF = torch.mm(x_nH, w1_EFH[e].T, out=gate_NF[rows])
            up_nF = torch.mm(x_nH, w3_EFH[e].T, out=up_NF[rows])
            inner_nF = F.silu(gate_nF).mul_(up_nF)
            torch.mm(inner_nF, w2_EHF[e].T, out=y_NH[rows])
            # else it would be there beside the next expert's
            del inner_nF
        y_NH[sum(counts) :] = 0
        ctx.counts = counts
        ctx.save_for_backward(x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH)
        return y_NH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        (dy_NH,) = gradients
        x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH = ctx.saved_tensors
        dx_NH = torch.empty_like(x_NH)
        dx_NH[sum(ctx.counts) :] = 0
        # Every expert with rows writes its gradient; only one without needs zeros to stand there.
        new = torch.empty_like if all(ctx.counts) else torch.zeros_like
        dw1_EFH = new(w1_EFH)
        dw2_EHF = new(w2_EHF)
        dw3_EFH = new(w3_EFH)
        for e, rows in _stretches(ctx.counts):
            x_nH = x_NH[rows]
            gate_nF = gate_NF[rows]
            up_nF = up_NF[rows]
            dy_nH = dy_NH[rows]

            silu_nF = F.silu(gate_nF)
            torch.mm(dy_nH.T, silu_nF * up_nF, out=dw2_EHF[e])
            # From here on silu_nF and dinner_nF are overwritten: their memory is used again.
            dinner_nF = dy_nH @ w2_EHF[e]
            dup_nF = silu_nF.mul_(dinner_nF)
            dsilu_nF = dinner_nF.mul_(up_nF)
            dgate_nF = torch.ops.aten.silu_backward(dsilu_nF, gate_nF)
            torch.mm(dgate_nF.T, x_nH, out=dw1_EFH[e])
            torch.mm(dup_nF.T, x_nH, out=dw3_EFH[e])
            dx_nH = torch.mm(dgate_nF, w1_EFH[e], out=dx_NH[rows])
            dx_nH.addmm_(dup_nF, w3_EFH[e])
        return dx_NH, dw1_EFH, dw2_EHF, dw3_EFH, None


def _stretches(counts: list[int]) -> list[tuple[int, slice]]:
    """Return (expert, its rows) for each expert that has any."""
    found = []
    first = 0
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
        """Return expert outputs [N, H] of rows ordered by expert.

        Args:
            x_NH: rows; those beyond the sum of the counts belong to nobody and give zeros.
            counts_E: rows of each expert.
        """
        # Lengths of slices: known on the host, which waits here for the routing.
        counts = counts_E.tolist()
        return _SwiGLUExperts.apply(x_NH, self.w1, self.w2, self.w3, counts)
