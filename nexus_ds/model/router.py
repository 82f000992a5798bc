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

NORMAL = 0.02  # standard deviation of transformers' default initialisation
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


def centre_of(vectors_EM: Tensor) -> Tensor:
    """Return the mean [M] of the unit vectors of the upcycled domains.

    It is stored, and subtracted from every later domain too: else an extension would change what P
    reads of the old ones. Zeros for a single vector: it would be its own mean, and nothing would be
    left of it.
    """
    mean_M = unit(vectors_EM.float()).mean(0)
    return mean_M if len(vectors_EM) > 1 else torch.zeros_like(mean_M)


def condition(vectors_EM: Tensor, centre_M: Tensor) -> Tensor:
    """Return what P reads: normalised, centred, normalised again; fp32 [E, M]."""
    return unit(unit(vectors_EM.float()) - centre_M.float())


def centred_norm(embeddings_EH: Tensor) -> Tensor:
    """Return the mean distance of expert embeddings from their mean (from zero for a single one).

    The mean itself adds the same to all logits of a token, which softmax does not see.
    """
    if len(embeddings_EH) > 1:
        embeddings_EH = embeddings_EH - embeddings_EH.mean(0)
    return embeddings_EH.norm(dim=-1).mean()


@torch.no_grad()
def init_projection(
    projection: Projection,
    embeddings_EM: Tensor,
    init: str,
    init_norm: float,
    generator: torch.Generator,
) -> None:
    """Fill P in place.

    balanced: every map keeps unit variance, then the expert embeddings are scaled so that centred
    ones have mean norm `init_norm`. Hidden states are RMS-normed, so the spread of the logits over
    experts starts at about `init_norm`: neither saturated nor dead whatever the embedding's width.
    normal: N(0, 0.02) everywhere (the paper names no scale).
    """
    if init == "normal":
        for linear in projection.maps:
            linear.weight.normal_(0.0, NORMAL, generator=generator)
        return
    length = float(embeddings_EM.float().norm(dim=-1).mean())
    length = length if length > 1e-6 else 1.0
    for index, linear in enumerate(projection.maps):
        fan_in = linear.weight.shape[1]
        # Norm of the map's input: as given for the first, of unit variance for the others.
        scale = length if index == 0 else math.sqrt(fan_in)
        linear.weight.normal_(0.0, 1 / scale, generator=generator)
    norm = centred_norm(projection(embeddings_EM.float()))
    if norm > 0:
        projection.scale_output(float(init_norm / norm))


@torch.no_grad()
def init_expert_embeddings(
    experts: int, hidden_size: int, init: str, init_norm: float, generator: torch.Generator
) -> Tensor:
    """Return free expert embeddings [E, H] of a linear router.

    normal: N(0, 0.02); balanced: scaled as a balanced projection's.
    """
    embeddings_EH = torch.empty(experts, hidden_size)
    embeddings_EH.normal_(0.0, NORMAL, generator=generator)
    if init == "normal":
        return embeddings_EH
    return embeddings_EH * (init_norm / centred_norm(embeddings_EH))


@torch.no_grad()
def domain_expert_embeddings(
    inputs_EM: Tensor, hidden_size: int, layer: int, norm: float
) -> Tensor:
    """Return free expert embeddings [E, H] that are the domain embeddings (FlexOlmo's way).

    Where M is not H, a random matrix puts them to that width: the same one at every extension of a
    layer, so it follows from M and the layer alone.

    Args:
        inputs_EM: conditioned domain embeddings.
        hidden_size: H.
        layer: number of the layer.
        norm: mean norm of the result.
    """
    embeddings_EH = inputs_EM.float()
    width = inputs_EM.shape[1]
    if width != hidden_size:
        map_MH = torch.randn(width, hidden_size, generator=layer_generator(width, layer))
        embeddings_EH = embeddings_EH @ map_MH
    return embeddings_EH * (norm / embeddings_EH.norm(dim=-1).mean())


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
