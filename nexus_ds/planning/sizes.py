"""The sizes of a model that is to be trained, without a tensor.

Its parameters one by one, in the optimizer's groups.
Shapes: E routed experts, H hidden size, F inner width, V vocabulary, M width of a domain embedding.
Not covered: families whose parameters are not those of Llama, Mistral, Qwen2 or Qwen2-MoE (they
can't be upcycled here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nexus_ds.checkpoint.families import (
    FAMILIES,
    MIXTURES,
    SIZES,
    ConfigJson,
    DenseSettings,
    settings,
)
from nexus_ds.checkpoint.loading import read_config
from nexus_ds.checkpoint.qwen2_moe import UNIFORM
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.errors import CheckpointError, ConfigError, UnsupportedModelError
from nexus_ds.model.context import CONTEXT_MODEL
from nexus_ds.settings import Config

KINDS = ("matrices", "vectors", "router", "experts")
MIXTURE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
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
    experts: int = 0
    top_k: int = 1
    projection: tuple[int, ...] = ()
    """Elements of each map of P in one layer; empty for a linear router."""
    context: bool = False
    """Whether routers read running means, less a vector that is trained."""
    shared: bool = True
    """Whether the shared expert computes something; without one it is zeros."""

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
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_size

    def parameters(self, experts: int) -> Iterator[Parameter]:
        """Yield the parameters of a rank with `experts` slots for routed experts, in order."""
        wide = self.heads * self.head_size
        yield Parameter("matrices", self.vocabulary * self.hidden, -1)
        for layer in range(self.layers):
            for elements in (wide, self.kv_width, self.kv_width):
                yield Parameter("matrices", elements * self.hidden, layer)
                if self.qkv_bias:
                    yield Parameter("vectors", elements, layer)
            yield Parameter("matrices", wide * self.hidden, layer)
            if self.experts:
                for elements in self.router:
                    yield Parameter("router", elements, layer)
                for _ in range(3 if experts else 0):
                    yield Parameter("experts", experts * self.hidden * self.ffn, layer)
            for _ in range(3):
                yield Parameter("matrices", self.hidden * self.ffn, layer)
            for _ in range(2):
                yield Parameter("vectors", self.hidden, layer)
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


def _check_form(found: ConfigJson, where: str) -> None:
    """Refuse a Qwen2-MoE that is not counted by one layer times their number.

    That is one whose layers are not all alike, or whose shared expert has another width than the
    routed ones.
    """
    form = UNIFORM | found
    expected = UNIFORM | {"shared_expert_intermediate_size": found["moe_intermediate_size"]}
    for key, value in expected.items():
        if form.get(key) != value:
            raise CheckpointError(
                f"{where}: {key} is {form.get(key)!r}; "
                f"plan needs a Qwen2-MoE that has {value!r} there"
            )


def _read(found: ConfigJson, where: str) -> DenseSettings:
    """Return a config.json in the normal form that training reads it in (`families.settings`)."""
    kind = found.get("model_type")
    if kind not in (*FAMILIES, *MIXTURES):
        raise UnsupportedModelError(
            f"{where}: model_type {kind!r} can't be planned; "
            f"plan knows {', '.join(FAMILIES)}, Nexus and Qwen2-MoE checkpoints"
        )
    needed = (*SIZES, *MIXTURE_SIZES) if kind in MIXTURES else SIZES
    for key in needed:
        value = found.get(key)
        if type(value) is not int or value <= 0:
            raise CheckpointError(
                f"{where}: {key} is {value!r}, expected a number above 0; "
                "plan needs a dense model, a Nexus or a Qwen2-MoE checkpoint"
            )
    if kind in MIXTURES:
        _check_form(found, where)
    return settings(found, where)


def _of_checkpoint(config: Config, directory: Path) -> Sizes:
    """Return the sizes of a dense, Nexus or stock Qwen2-MoE checkpoint; P's are read from the
    sidecar where there is one."""
    from nexus_ds.checkpoint.records import is_nexus

    found = read_config(directory)
    read = _read(found, str(directory / "config.json"))
    moe = found["model_type"] in MIXTURES
    maps: tuple[int, ...] = ()
    shared = True
    if is_nexus(directory):
        sidecar = read_sidecar(directory)
        # a linear router has no P
        if sidecar.projections:
            maps = tuple(weight.numel() for weight in sidecar.projections[0].values())
        shared = sidecar.shared_expert == "seed"
    return Sizes(
        vocabulary=read.vocabulary,
        hidden=read.hidden_size,
        layers=read.layers,
        heads=read.heads,
        kv_heads=read.kv_heads,
        head_size=read.head_dim,
        ffn=read.ffn_size,
        tied=read.tied_embeddings,
        qkv_bias=read.qkv_bias,
        context=found["model_type"] == CONTEXT_MODEL,
        shared=shared,
        experts=found["num_experts"] if moe else 0,
        top_k=found["num_experts_per_tok"] if moe else 1,
        projection=maps,
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
        return _of_checkpoint(config, Path(config.model.path))
    model, pipe = config.model, config.pipeline
    experts = 0
    if config.stage in ("moe", "extend"):
        experts = len(pipe.domains)
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
    )
