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

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPED_KERNELS = {8: "triton", 9: "torch", 10: "torch"}
"""Major compute capability of NVIDIA's GPUs: whose kernel makes grouped products fast there.

torch's (CUTLASS) is for 9.x and 10.x; on every other GPU the same call is one product a group and a
copy of their ends to the host each time (GroupedBlas.cpp, `_scaled_mm_allowed_device`). DeepSpeed
has a Triton kernel for 8.x. 12.x (RTX 50, RTX PRO) has neither, and 7.x no bf16.
"""


def grouped_kernel(capability: tuple[int, int] | None, triton: bool) -> str | None:
    """Return whose grouped products are fast on a device; None: the loop over experts is faster.

    Args:
        capability: compute capability of a CUDA device; None for a CPU.
        triton: whether DeepSpeed's Triton kernel can be had.
    """
    kernel = GROUPED_KERNELS.get(capability[0]) if capability else None
    return None if kernel == "triton" and not triton else kernel


class Activation(NamedTuple):
    """What the gate of a feed-forward network goes through."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the values, what went in) -> gradient of what went in."""


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": Activation(_gelu, _gelu_gradient),
}
"""By the names that transformers has for them."""


class FeedForward(nn.Module):
    """Gated feed-forward network without biases: [.., H] -> [.., H].

    Args:
        hidden_size: H.
        ffn_size: F.
        activation: of the gate, one of ACTIVATIONS.
    """

    def __init__(self, hidden_size: int, ffn_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        """Return activation(gate(x)) * up(x), [.., F]."""
        activation = ACTIVATIONS[self.activation]
        gate = activation.value(self.gate_proj(x))
        return gate * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(activation(gate(x)) * up(x))."""
        return self.down_proj(self.inner(x))


class _Dispatch(torch.autograd.Function):
    """Rows of tokens in another order; indexing's own gradient would be added row by row.

    This one is a copy, and of several rows of one token their sum.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, token_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        # Spare rows copy a token's. Where none has come to this rank, there is none to copy.
        rows_TH = x_TH if len(x_TH) else x_TH.new_zeros(1, x_TH.shape[1])
        return rows_TH.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        (gradient_NH,) = gradients
        gradient_NH = gradient_NH.index_select(0, inverse_N)
        if ctx.top_k > 1:
            gradient_NH = gradient_NH.unflatten(0, (-1, ctx.top_k)).sum(1)
        return gradient_NH, None, None, None


class _Restore(torch.autograd.Function):
    """Rows in the order of tokens again; spare rows are left behind, and get zeros back."""

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N, inverse_N)
        return rows_NH.index_select(0, inverse_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        order_N, inverse_N = ctx.saved_tensors
        (gradient_NH,) = gradients
        if len(order_N) == len(inverse_N):
            return gradient_NH.index_select(0, order_N), None, None
        all_NH = gradient_NH.new_zeros(len(order_N), gradient_NH.shape[1])
        return all_NH.index_copy_(0, inverse_N, gradient_NH), None, None


class ExpertOrder:
    """Takes tokens into the order of their experts and back.

    Args:
        slots_TK: the place of each chosen expert; rows are ordered by it.
        spare: this many experts, the first ones, get one row more, which copies some token's and
            whose output goes nowhere: a kernel may need each expert to have a row.
    """

    def __init__(self, slots_TK: Tensor, spare: int = 0) -> None:
        tokens, self.top_k = slots_TK.shape
        slots_N = slots_TK.reshape(-1)
        chosen = len(slots_N)
        if spare:
            slots_N = torch.cat([slots_N, torch.arange(spare, device=slots_N.device)])
        # Stable, so that the order of rows, and of the sums over them, is always the same.
        self.order_N = torch.argsort(slots_N, stable=True)
        inverse_N = torch.empty_like(self.order_N)
        inverse_N[self.order_N] = torch.arange(len(self.order_N), device=self.order_N.device)
        self.inverse_N = inverse_N[:chosen]
        self.token_N = self.order_N
        if self.top_k > 1:
            self.token_N = self.token_N // self.top_k
        if spare:
            self.token_N = self.token_N.clamp_max(max(tokens, 1) - 1)

    def dispatch(self, x_TH: Tensor) -> Tensor:
        """Return the tokens' rows [N, H] in the order of their experts, spare ones among them."""
        return _Dispatch.apply(x_TH, self.token_N, self.inverse_N, self.top_k)

    def restore(self, rows_NH: Tensor) -> Tensor:
        """Return outputs in the order of the tokens' choices again, without the spare ones."""
        return _Restore.apply(rows_NH, self.order_N, self.inverse_N)

    def combine(self, rows_NH: Tensor, gate_TK: Tensor) -> Tensor:
        """Return the sum over a token's experts of gate value times output row, [T, H].

        Args:
            rows_NH: outputs in the order of the experts.
            gate_TK: fp32; products and sums are fp32 too, the result has the rows' dtype.
        """
        dtype = rows_NH.dtype
        rows_NH = self.restore(rows_NH)
        if self.top_k == 1:
            return (rows_NH * gate_TK).to(dtype)
        rows_TKH = rows_NH.view(*gate_TK.shape, -1)
        return (rows_TKH * gate_TK[:, :, None]).sum(1).to(dtype)


class _LoopedExperts(torch.autograd.Function):
    """y = W_2 (activation(W_1 x) * W_3 x) of each expert on its own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        w1_EFH: Tensor,
        w2_EHF: Tensor,
        w3_EFH: Tensor,
        counts: list[int],
        activation: Activation,
    ) -> Tensor:
        gate_NF = x_NH.new_empty(len(x_NH), w1_EFH.shape[1])
        up_NF = torch.empty_like(gate_NF)
        y_NH = torch.empty_like(x_NH)
        for e, rows in _stretches(counts):
            x_nH = x_NH[rows]
            gate_nF = torch.mm(x_nH, w1_EFH[e].T, out=gate_NF[rows])
            up_nF = torch.mm(x_nH, w3_EFH[e].T, out=up_NF[rows])
            inner_nF = activation.value(gate_nF).mul_(up_nF)
            torch.mm(inner_nF, w2_EHF[e].T, out=y_NH[rows])
            # else it would be there beside the next expert's
            del inner_nF
        y_NH[sum(counts) :] = 0
        ctx.counts = counts
        ctx.activation = activation
        ctx.save_for_backward(x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH)
        return y_NH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
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

            value_nF = ctx.activation.value(gate_nF)
            torch.mm(dy_nH.T, value_nF * up_nF, out=dw2_EHF[e])
            # From here on value_nF and dinner_nF are overwritten: their memory is used again.
            dinner_nF = dy_nH @ w2_EHF[e]
            dup_nF = value_nF.mul_(dinner_nF)
            dvalue_nF = dinner_nF.mul_(up_nF)
            dgate_nF = ctx.activation.gradient(dvalue_nF, gate_nF)
            torch.mm(dgate_nF.T, x_nH, out=dw1_EFH[e])
            torch.mm(dup_nF.T, x_nH, out=dw3_EFH[e])
            dx_nH = torch.mm(dgate_nF, w1_EFH[e], out=dx_NH[rows])
            dx_nH.addmm_(dup_nF, w3_EFH[e])
        return dx_NH, dw1_EFH, dw2_EHF, dw3_EFH, None, None


class GroupedProducts(NamedTuple):
    """A kernel's two products over stretches of rows that end at `ends_E`, int32 on the device."""

    by_weights: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(rows [N, X], weights [E, X, Y], ends) -> [N, Y]: each stretch by its expert's weight."""
    by_rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(rows [N, X], rows [N, Y], ends) -> [E, X, Y]: a stretch of one by that of the other."""


def _torch_by_weights(rows_NX: Tensor, weights_EXY: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(rows_NX, weights_EXY, offs=ends_E)


def _torch_by_rows(rows_NX: Tensor, rows_NY: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(rows_NX.T, rows_NY, offs=ends_E)


TORCH_PRODUCTS = GroupedProducts(_torch_by_weights, _torch_by_rows)


class Elementwise(NamedTuple):
    """What stands between the grouped products."""

    inner: Callable[[Tensor, Tensor], Tensor]
    """(gate [N, F], up [N, F]) -> activation(gate) * up."""
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(gate, up, gradient of the inner ones) -> the inner ones again, gradients of up and gate."""


@cache
def eager_elementwise(activation: str) -> Elementwise:
    """Return what stands between the products of experts with one of ACTIVATIONS."""
    value, gradient = ACTIVATIONS[activation]

    def inner(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        return value(gate_NF) * up_NF

    def gradients(
        gate_NF: Tensor, up_NF: Tensor, dinner_NF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        value_NF = value(gate_NF)
        inner_NF = value_NF * up_NF
        dup_NF = value_NF * dinner_NF
        dgate_NF = gradient(dinner_NF * up_NF, gate_NF)
        return inner_NF, dup_NF, dgate_NF

    return Elementwise(inner, gradients)


@cache
def compiled_elementwise(activation: str) -> Elementwise:
    """Return the same, compiled at its first use: each is one kernel."""
    eager = eager_elementwise(activation)
    # For any number of rows: under expert parallelism each rank and pass has its own.
    inner = torch.compile(eager.inner, dynamic=True)
    return Elementwise(inner, torch.compile(eager.gradients, dynamic=True))


class _GroupedExperts(torch.autograd.Function):
    """The same in grouped products, which read the ends of the stretches on the device.

    Every expert has a row: of one without, torch's kernels leave the weight's gradient unwritten on
    some GPUs (pytorch issue 172439).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        w1_EFH: Tensor,
        w2_EHF: Tensor,
        w3_EFH: Tensor,
        ends_E: Tensor,
        products: GroupedProducts,
        elementwise: Elementwise,
    ) -> Tensor:
        by_weights = products.by_weights
        gate_NF = by_weights(x_NH, w1_EFH.mT, ends_E)
        up_NF = by_weights(x_NH, w3_EFH.mT, ends_E)
        ctx.products = products
        ctx.elementwise = elementwise
        ctx.save_for_backward(x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH, ends_E)
        return by_weights(elementwise.inner(gate_NF, up_NF), w2_EHF.mT, ends_E)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_NH,) = gradients
        by_weights, by_rows = ctx.products
        x_NH, gate_NF, up_NF, w1_EFH, w2_EHF, w3_EFH, ends_E = ctx.saved_tensors
        dinner_NF = by_weights(dy_NH, w2_EHF, ends_E)
        inner_NF, dup_NF, dgate_NF = ctx.elementwise.gradients(gate_NF, up_NF, dinner_NF)
        dw2_EHF = by_rows(dy_NH, inner_NF, ends_E)
        # else they would be there beside the gradients of the weights
        del inner_NF, dinner_NF
        dw1_EFH = by_rows(dgate_NF, x_NH, ends_E)
        dw3_EFH = by_rows(dup_NF, x_NH, ends_E)
        dx_NH = by_weights(dgate_NF, w1_EFH, ends_E)
        dx_NH += by_weights(dup_NF, w3_EFH, ends_E)
        return dx_NH, dw1_EFH, dw2_EHF, dw3_EFH, None, None, None


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
    """A rank's experts, each on its stretch of rows.

    Args:
        stacked: a module whose parameters w1, w3 [E, F, H] and w2 [E, H, F] are taken over as they
            are.
        products: grouped ones, without a wait for the counts; None: one expert after the other.
        activation: of the gates, one of ACTIVATIONS.
    """

    def __init__(
        self,
        stacked: nn.Module,
        products: GroupedProducts | None = None,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.products = products
        self.activation = activation
        self.elementwise = eager_elementwise(activation)
        for name in ("w1", "w2", "w3"):
            setattr(self, name, getattr(stacked, name))

    def forward(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """Return expert outputs [N, H] of rows ordered by expert.

        Args:
            x_NH: rows; those beyond the sum of the counts belong to nobody and give zeros. Grouped
                products allow none.
            counts_E: rows of each expert; for grouped products none is 0.
        """
        weights = (self.w1, self.w2, self.w3)
        if self.products is not None:
            ends_E = torch.cumsum(counts_E, 0, dtype=torch.int32)
            return _GroupedExperts.apply(x_NH, *weights, ends_E, self.products, self.elementwise)
        # Lengths of slices: known on the host, which waits here for the routing.
        counts = counts_E.tolist()
        return _LoopedExperts.apply(x_NH, *weights, counts, ACTIVATIONS[self.activation])
