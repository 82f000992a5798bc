"""The Nexus router: row i of the router weight is P(d_i), domain embedding i projected (section 3).

    e_i = P(d_i) = W_2 SwiGLU(W_1 d_i)        W_1: m -> 2h, W_2: h -> h, no biases
    s   = softmax(x e_1, ..., x e_n)          over all n experts; then top-k, not renormalised

Shapes: E routed experts, M width of a domain embedding, H hidden size.
Not covered: who calls it. NexusMoE and the plain reference layer each do their own routing on these
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.errors import ConfigError


def swiglu(x: Tensor) -> Tensor:
    """Return silu(a) * b for the halves a, b of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # function, input width / output width
    "swiglu": (swiglu, 2),
    "gelu": (F.gelu, 1),
    "relu": (F.relu, 1),
    "linear": (lambda x: x, 1),
}


class Projection(nn.Module):
    """P of one MoE layer: domain embeddings [E, M] to router rows [E, H].

    Args:
        embedding_size: M.
        hidden_size: H.
        depth: linear maps; 2 is the paper's, 1 is a plain linear map.
        width: inner width; 0 means H.
        form: between the maps: swiglu | gelu | relu; linear: one matrix, whatever `depth` and
            `width`.
        row_norm: free | fixed: rows of one length, exp(log_norm), in a space that the map `out`
            leaves. A warm start puts the whitening of the router's input there, so that it is each
            row's spread of logits that is the same.

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
        width, factor = width or hidden_size, FORMS[form][1]
        inner = [] if form == "linear" else [width] * (depth - 1)
        sizes_in, sizes_out = [embedding_size, *inner], [*(w * factor for w in inner), hidden_size]
        pairs = zip(sizes_in, sizes_out, strict=True)
        self.maps: Any = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.log_norm = nn.Parameter(torch.zeros(1)) if row_norm == "fixed" else None
        self.out = nn.Linear(hidden_size, hidden_size, bias=False) if row_norm == "fixed" else None
        self.fold(None)

    def forward(self, embeddings_EM: Tensor) -> Tensor:
        """Return the router rows [E, H] in the dtype of the weights."""
        act = FORMS[self.form][0]
        x = embeddings_EM
        for index, linear in enumerate(self.maps):
            x = linear(act(x) if index else x)
        if self.log_norm is None or self.out is None:
            return x
        return self.out((unit(x.float()) * self.log_norm.float().exp()).to(x.dtype))

    @torch.no_grad()
    def fold(self, white_HH: Tensor | None) -> None:
        """Let rows that were fitted to inputs x W be applied to x: put W [H, H] behind them; None:
        W is the identity."""
        if self.out is not None:
            nn.init.eye_(self.out.weight) if white_HH is None else self.out.weight.copy_(white_HH)
        elif white_HH is not None:
            self.maps[-1].weight.copy_(white_HH @ self.maps[-1].weight)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Make every row `factor` times as long."""
        if self.log_norm is None:
            self.maps[-1].weight.mul_(factor)
        else:
            self.log_norm.add_(math.log(factor))


def unit(vectors: Tensor) -> Tensor:
    """Return `vectors` [..., M] scaled to length one."""
    return F.normalize(vectors, dim=-1)


def centre_of(vectors_EM: Tensor) -> Tensor:
    """Return the mean [M] of the unit vectors: stored at upcycling, subtracted from every later
    domain too.

    Zeros for a single vector: it would be its own mean, and nothing would be left of it.
    """
    mean_M = unit(vectors_EM.float()).mean(0)
    return mean_M if len(vectors_EM) > 1 else torch.zeros_like(mean_M)


def condition(vectors_EM: Tensor, centre_M: Tensor) -> Tensor:
    """Return what P reads: normalised, centred, normalised again; fp32 [E, M]."""
    return unit(unit(vectors_EM.float()) - centre_M.float())


def centred_norm(embeddings_EH: Tensor) -> Tensor:
    """Return the mean distance of the rows from their mean (from zero for a single row)."""
    centred = embeddings_EH - embeddings_EH.mean(0) if len(embeddings_EH) > 1 else embeddings_EH
    return centred.norm(dim=-1).mean()


@torch.no_grad()
def init_projection(
    projection: Projection,
    embeddings_EM: Tensor,
    init: str,
    init_norm: float,
    generator: torch.Generator,
) -> None:
    """Fill P in place.

    balanced: every map keeps unit variance, then the rows are scaled so that centred ones have mean
    norm `init_norm`. Hidden states are RMS-normed, so the spread of the logits over experts starts
    at about `init_norm`: neither saturated nor dead whatever the embedding's width. normal: N(0,
    0.02) everywhere (the paper names no scale).
    """
    length = float(embeddings_EM.float().norm(dim=-1).mean())
    for index, linear in enumerate(projection.maps):
        fan_in = linear.weight.shape[1]
        deviation = (
            (1 / (length if length > 1e-6 else 1.0) if index == 0 else 1 / math.sqrt(fan_in))
            if init == "balanced"
            else 0.02
        )
        linear.weight.normal_(0.0, deviation, generator=generator)
    if init == "balanced":
        norm = centred_norm(projection(embeddings_EM.float()))
        if norm > 0:
            projection.scale_output(float(init_norm / norm))


@torch.no_grad()
def init_expert_embeddings(
    experts: int, hidden_size: int, init: str, init_norm: float, generator: torch.Generator
) -> Tensor:
    """Return free router rows [E, H] of a linear router: N(0, 0.02), or scaled as the balanced
    projection's rows."""
    rows = torch.empty(experts, hidden_size).normal_(0.0, 0.02, generator=generator)
    return rows if init == "normal" else rows * (init_norm / centred_norm(rows))


@torch.no_grad()
def domain_expert_embeddings(
    inputs_EM: Tensor, hidden_size: int, layer: int, norm: float
) -> Tensor:
    """Return free rows [E, H] that are the domain embeddings themselves, of mean norm `norm`
    (FlexOlmo's way).

    Where M is not H, a random matrix puts them to that width: the same one at every extension of a
    layer.
    """
    embeddings_EH = inputs_EM.float()
    if inputs_EM.shape[1] != hidden_size:
        generator = layer_generator(inputs_EM.shape[1], layer)
        embeddings_EH = embeddings_EH @ torch.randn(
            inputs_EM.shape[1], hidden_size, generator=generator
        )
    return embeddings_EH * (norm / embeddings_EH.norm(dim=-1).mean())


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """Return the random generator of one layer's router, a pure function of (seed, layer)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


@torch.no_grad()
def expert_embeddings_in(
    projection: Projection, embeddings_EM: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the rows [E, H] as a model of `dtype` computes them: P and D rounded to `dtype` first.

    Rounding fp32 rows instead flips a few tokens per layer between training and serving.
    """
    rounded = {name: tensor.to(dtype) for name, tensor in projection.state_dict().items()}
    return torch.func.functional_call(projection, rounded, (embeddings_EM.to(dtype),))
