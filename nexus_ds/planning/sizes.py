"""The sizes of a model that is to be trained, without a tensor.

Its parameters one by one, in the optimizer's groups.
Shapes: E routed experts, H hidden size, F inner width, V vocabulary, M width of a domain embedding.
Not covered: families that can't be upcycled here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nexus_ds.checkpoint.families.delta_net import DeltaNet
from nexus_ds.checkpoint.families.record import LINEAR
from nexus_ds.errors import ConfigError
from nexus_ds.planning.stored_model import read_model
from nexus_ds.settings import Config

KINDS = ("matrices", "vectors", "router", "experts")
ACTIVATION_INPUTS = {"swiglu": 2, "gelu": 1, "relu": 1, "linear": 1}


class Parameter(NamedTuple):
    """One parameter of a rank."""

    kind: str
    """The optimizer's group: one of KINDS."""
    elements: int
    layer: int
    """-1: outside of the layers."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides how many parameters there are and what they cost.

    A dense model has no experts.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    tied: bool
    qkv_bias: bool = False
    layer_norms: int = 2
    """Norms of a layer over the hidden size."""
    qk_norms: tuple[int, ...] = ()
    """Elements of the norms of queries and keys of one layer."""
    scored_heads: int = 0
    """Heads whose scores stand in memory: no fused kernel computes them."""
    centred: bool = False
    """Whether norms add 1 to their weights."""
    output_gate: bool = False
    """Whether queries come with as many rows of a gate."""
    linear: DeltaNet | None = None
    """Sizes of layers with linear attention."""
    linear_layers: tuple[int, ...] = ()
    """Their numbers."""
    experts: int = 0
    top_k: int = 1
    projection: tuple[int, ...] = ()
    """Elements of each map of P in one layer; empty for a linear router."""
    context: bool = False
    """Whether routers read running means, less a vector that is trained."""
    shared: bool = True
    """Whether the shared expert computes something; without one it is zeros."""
    new: bool = False
    """Whether it is drawn before training, in fp32, instead of read."""

    @property
    def expert(self) -> int:
        """Elements of one feed-forward network: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def router(self) -> tuple[int, ...]:
        """Elements of each parameter of one layer's router.

        P's, or free rows; and the vector of the input `context`.
        """
        rows = self.projection or (self.experts * self.hidden,)
        return (*rows, self.hidden) if self.context else rows

    @property
    def attending(self) -> int:
        """Layers with keys and values of all tokens."""
        return self.layers - len(self.linear_layers)

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_size

    def _attention(self, layer: int) -> Iterator[Parameter]:
        """Yield what stands before the feed-forward networks of a layer, but for its norms."""
        if self.linear and layer in self.linear_layers:
            for shape in self.linear.shapes(self.hidden).values():
                kind = "matrices" if len(shape) > 1 else "vectors"
                yield Parameter(kind, math.prod(shape), layer)
            return
        wide = self.heads * self.head_size
        queries = 2 * wide if self.output_gate else wide
        for elements in (queries, self.kv_width, self.kv_width):
            yield Parameter("matrices", elements * self.hidden, layer)
            if self.qkv_bias:
                yield Parameter("vectors", elements, layer)
        yield Parameter("matrices", wide * self.hidden, layer)

    def _norms(self, layer: int) -> tuple[int, ...]:
        """Return the elements of each norm of one layer."""
        hidden = (self.hidden,) * self.layer_norms
        return hidden if layer in self.linear_layers else (*self.qk_norms, *hidden)

    def parameters(self, experts: int) -> Iterator[Parameter]:
        """Yield the parameters of a rank with `experts` slots for routed experts, in order."""
        yield Parameter("matrices", self.vocabulary * self.hidden, -1)
        for layer in range(self.layers):
            yield from self._attention(layer)
            if self.experts:
                for elements in self.router:
                    yield Parameter("router", elements, layer)
                # gate, up and down, of all local experts in one; a rank may have none
                for _ in range(3 if experts else 0):
                    yield Parameter("experts", experts * self.hidden * self.ffn, layer)
            for _ in range(3):
                yield Parameter("matrices", self.hidden * self.ffn, layer)
            for elements in self._norms(layer):
                yield Parameter("vectors", elements, layer)
        # the final norm
        yield Parameter("vectors", self.hidden, -1)
        if not self.tied:
            yield Parameter("matrices", self.vocabulary * self.hidden, -1)

    def counts(self) -> dict[str, int]:
        """Return elements: total and active of the finished checkpoint, trained (with P), and its
        parts.

        `total` and `active` are those that `inspect` reports: in place of P a row for each expert,
        and the shared expert's constant gate. Active counts the top-k experts that a token visits.
        """
        by_kind = dict.fromkeys(KINDS, 0)
        for parameter in self.parameters(self.experts):
            by_kind[parameter.kind] += parameter.elements
        rows = self.layers * self.hidden * (self.experts + 1 + self.context) if self.experts else 0
        # a shared expert of zeros counts as idle: no token gets anything from it
        idle = max(self.experts - self.top_k, 0) + (not self.shared)
        total = by_kind["matrices"] + by_kind["vectors"] + by_kind["experts"] + rows
        return {
            "total": total,
            "active": total - self.layers * self.expert * idle,
            "trained": sum(by_kind.values()),
            "dense": by_kind["matrices"] + by_kind["vectors"],
            "one_expert": self.layers * self.expert if self.experts else 0,
            "projection": by_kind["router"],
        }


def _projection(config: Config, hidden: int, embedding_size: int) -> tuple[int, ...]:
    router = config.router
    if router.kind == "linear":
        return ()
    width = router.width or hidden
    # SwiGLU multiplies two halves: the map before it is twice as wide as what it returns
    factor = ACTIVATION_INPUTS[router.projection]
    inner = [] if router.projection == "linear" else [width] * (router.depth - 1)
    inputs = [embedding_size, *inner]
    outputs = [*(width * factor for width in inner), hidden]
    maps = tuple(a * b for a, b in zip(inputs, outputs, strict=True))
    if router.row_norm == "fixed":
        # beside its maps it trains a length, and a whitening of [H, H]
        return (1, *maps, hidden * hidden)
    return maps


def _of_checkpoint(directory: Path) -> Sizes:
    """Return the sizes of a dense, Nexus or stock Qwen2-MoE checkpoint."""
    model = read_model(directory)
    dense = model.dense
    return Sizes(
        vocabulary=dense.vocabulary,
        hidden=dense.hidden_size,
        layers=dense.layers,
        heads=dense.heads,
        kv_heads=dense.kv_heads,
        head_size=dense.head_dim,
        ffn=dense.ffn_size,
        tied=dense.tied_embeddings,
        qkv_bias=dense.qkv_bias,
        layer_norms=len(dense.norms),
        qk_norms=tuple(dense.qk_widths.values()),
        scored_heads=dense.scored_heads,
        centred=dense.centred,
        output_gate=dense.output_gate,
        linear=DeltaNet.of(dense.linear) if dense.linear else None,
        linear_layers=tuple(i for i, kind in enumerate(dense.layer_types) if kind == LINEAR),
        context=model.context,
        shared=model.shared,
        experts=model.experts,
        top_k=model.top_k,
        projection=model.projection,
    )


def sizes_of(config: Config) -> Sizes:
    """Return the sizes of what `config` trains: of the checkpoint `model.path`, else of `model.*`
    and `pipeline.*`.

    Raises:
        ConfigError: a mixture-of-experts without a list of domains.
        CheckpointError: `model.path` is no checkpoint, or a Qwen2-MoE of another form than a Nexus
            model's.
        UnsupportedModelError: `model.path` is of a family that can't be trained here.
    """
    if config.model.path:
        return _of_checkpoint(Path(config.model.path))
    model, pipe = config.model, config.pipeline
    experts = 0
    if config.stage in ("moe", "extend"):
        experts = len(pipe.domains)
    # a finetune trains the old ones, too
    if config.stage == "extend":
        experts += len(pipe.new_domains)
    if config.stage in ("moe", "extend") and not experts:
        raise ConfigError(
            "no experts to plan for: give pipeline.domains=a,b,... or a checkpoint with "
            "model.path=DIR; stage=seed plans a dense model"
        )
    if experts and config.router.top_k > experts:
        raise ConfigError(
            f"router.top_k {config.router.top_k} is more than the {experts} experts; lower it"
        )
    return Sizes(
        vocabulary=pipe.vocabulary,
        hidden=model.hidden_size,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_size=model.hidden_size // model.heads,
        ffn=model.ffn_size,
        tied=model.tied_embeddings,
        experts=experts,
        top_k=config.router.top_k,
        projection=_projection(config, model.hidden_size, pipe.embedding_size) if experts else (),
        context=bool(experts) and config.router.input == "context",
        shared=not experts or model.shared_expert == "seed",
        new=config.stage == "seed",
    )
