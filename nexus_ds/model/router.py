"""The Nexus router: the expert embedding e_i is P(d_i), a projected domain embedding (section 3).

    e_i = P(d_i) = W_2 SwiGLU(W_1 d_i)        W_1: m -> 2h, W_2: h -> h, no biases
    s   = softmax(x e_1, ..., x e_n)          over all n experts; then top-k, not renormalised

The expert embeddings are the rows of the router's weight [E, H].
Shapes: E routed experts, M width of a domain embedding (the paper's m), H hidden size (its h).
Not covered: who calls it; NexusMoE does the routing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.errors import ConfigError

SATURATED = 0.95  # mean top-1 probability above which a router hardly learns any more


def swiglu(x: Tensor) -> Tensor:
    """Return silu(a) * b for the halves a, b of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def _identity(x: Tensor) -> Tensor:
    return x


class Form(NamedTuple):
    """What stands between two maps of P."""

    activation: Callable[[Tensor], Tensor]
    widening: int
    """Width of its input relative to that of its output."""


FORMS = {
    "swiglu": Form(swiglu, 2),
    "gelu": Form(F.gelu, 1),
    "relu": Form(F.relu, 1),
    "linear": Form(_identity, 1),
}


class Projection(nn.Module):
    """P of one MoE layer: domain embeddings [E, M] to expert embeddings [E, H].

    Args:
        embedding_size: M.
        hidden_size: H.
        depth: linear maps; 2 is the paper's, 1 is a plain linear map.
        width: inner width; 0 means H.
        form: between the maps: swiglu | gelu | relu; linear: one matrix, whatever `depth` and
            `width`.
        row_norm: free | fixed: expert embeddings of one length, exp(log_norm), in a space that the
            map `out` leaves. A warm start puts the whitening of the router's input there, so that
            the spread of its logits is the same for each expert.

    Raises:
        ConfigError: unknown form.
    """

    def __init__(
        self,
        embedding_size: int,
        hidden_size: int,
        depth: int = 2,
        width: int = 0,
        form: str = "swiglu",
        row_norm: str = "free",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ConfigError(
                f"router.projection: unknown value {form!r}; known: {', '.join(FORMS)}"
            )
        self.form = form
        inner = [] if form == "linear" else [width or hidden_size] * (depth - 1)
        sizes_in = [embedding_size, *inner]
        sizes_out = [FORMS[form].widening * size for size in inner] + [hidden_size]
        self.maps: Any = nn.ModuleList()
        for size_in, size_out in zip(sizes_in, sizes_out, strict=True):
            self.maps.append(nn.Linear(size_in, size_out, bias=False))
        fixed = row_norm == "fixed"
        self.log_norm = nn.Parameter(torch.zeros(1)) if fixed else None
        self.out = nn.Linear(hidden_size, hidden_size, bias=False) if fixed else None
        self.fold(None)

    def forward(self, embeddings_EM: Tensor) -> Tensor:
        """Return the expert embeddings [E, H] in the dtype of the weights."""
        activation = FORMS[self.form].activation
        x = embeddings_EM
        for index, linear in enumerate(self.maps):
            if index > 0:
                x = activation(x)
            x = linear(x)
        if self.log_norm is None or self.out is None:
            return x
        # In fp32: bf16 knows lengths to less than one per cent only.
        length = self.log_norm.float().exp()
        fixed_EH = unit(x.float()) * length
        return self.out(fixed_EH.to(x.dtype))

    @torch.no_grad()
    def fold(self, white_HH: Tensor | None) -> None:
        """Put W [H, H] behind P, so that what was fitted to inputs x W is applied to x.

        (x W) . e = x . (W e) for a symmetric W; None: W is the identity.
        """
        if self.out is None:
            if white_HH is not None:
                last = self.maps[-1].weight
                last.copy_(white_HH @ last)
        elif white_HH is None:
            nn.init.eye_(self.out.weight)
        else:
            self.out.weight.copy_(white_HH)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Make every expert embedding `factor` times as long."""
        if self.log_norm is None:
            self.maps[-1].weight.mul_(factor)
        else:
            self.log_norm.add_(math.log(factor))


def unit(vectors: Tensor) -> Tensor:
    """Return `vectors` [..., M] scaled to length one."""
    return F.normalize(vectors, dim=-1)


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """Return the random generator of one layer's router, a pure function of (seed, layer)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


@torch.no_grad()
def expert_embeddings_in(
    projection: Projection, embeddings_EM: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the expert embeddings [E, H] as a model of `dtype` computes them.

    P and D are rounded to `dtype` first. Rounding fp32 results instead flips a few tokens per layer
    between training and serving.
    """
    state = projection.state_dict()
    rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
    inputs = (embeddings_EM.to(dtype),)
    return torch.func.functional_call(projection, rounded, inputs)
