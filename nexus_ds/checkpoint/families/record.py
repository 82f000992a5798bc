"""What a dense family is to this program: a `Family`, one file beside this one for each.

`DenseSettings` is the normal form of its config.json, `dense_weights` the table of its tensors.
Without torch: planning and inspection read a model's sizes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.delta_net import FP32, DeltaNet

FFN_PARTS = ("gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Matrices that are stacked row by row in one tensor."""
FULL, SLIDING = "full_attention", "sliding_attention"
ATTENTION_CAP = "attn_logit_softcapping"
"""Key of the cap of attention's scores, which no fused kernel of torch computes."""
LINEAR = "linear_attention"
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
"""Norms of a layer that stand before its attention and its FFN alone."""
AFTER_FFN = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Norms over what an FFN returns: they take away by what a gate has multiplied it."""

LayerKinds = Callable[[ConfigJson], Sequence[str]]
"""Each layer's kind of attention, where config.json does not list them."""
TurnedLayers = Callable[[ConfigJson, Sequence[str]], Sequence[bool]]
"""Whether RoPE turns each layer's heads, by config.json and the layers' kinds."""


def full_by_pattern(config: ConfigJson) -> Sequence[str]:
    """Return full attention for every n-th layer, n being `sliding_window_pattern`, and windows for
    the others.

    No layers where it is no number above 0: transformers reads such a file with `layer_types` only.
    """
    every, layers = config["sliding_window_pattern"], config["num_hidden_layers"]
    if type(every) is not int or every <= 0:
        return []
    # counted from 1: the last of each n is full
    return [SLIDING if layer % every else FULL for layer in range(1, layers + 1)]


def windows_everywhere(config: ConfigJson) -> Sequence[str]:
    """Return sliding-window attention for all layers if there is a window, else none."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * config["num_hidden_layers"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's config.json and weights are read."""

    name: str
    """`model_type`."""
    defaults: ConfigJson
    """What transformers' class takes for keys that config.json leaves out."""
    nulls: tuple[str, ...] = ("num_key_value_heads", "head_dim")
    """Keys that may be null: as many as attention heads, as wide as the rest leaves."""
    kinds: LayerKinds | None = None
    """None: no layer of this family has a window, whatever config.json says."""
    listed: bool = True
    """Whether `layer_types` of config.json decides before `kinds`."""
    window_switch: str = ""
    """Key without which `sliding_window` counts for nothing; empty: there is none."""
    qkv_bias: bool | str = False
    """Whether q, k and v have biases, or the key of config.json that decides."""
    bias_keys: tuple[str, ...] = ("attention_bias", "mlp_bias")
    """Keys that ask for a bias for which no mixture has a place."""
    fused: tuple[str, ...] = ()
    """Of FUSED: projections that the file holds as one."""
    interleaved: bool = False
    """Whether RoPE turns channels 2i and 2i+1 of a head instead of i and i + half of it."""
    partial: bool = False
    """Whether `partial_rotary_factor` may leave the last channels of a head unturned."""
    ropes: Mapping[str, str] | None = None
    """The kinds of RoPE that transformers' class reads, and as what; None: every kind as itself."""
    rope_bases: Mapping[str, str] = field(default_factory=dict)
    """For RoPE that config.json states by kind of layer: each kind's key of the base beside it;
    empty: the base is the family's own."""
    turned_layers: TurnedLayers | None = None
    """None: RoPE turns heads in all layers."""
    multipliers: bool = False
    """Whether Granite's factors stand in config.json: of the embeddings, residuals, attention
    scores and logits."""
    factors: tuple[str, ...] = ()
    """Keys of other numbers that its class computes with."""
    caps: tuple[str, ...] = ()
    """Likewise, of numbers that may be null: nothing is capped then."""
    ffn_size: str = "intermediate_size"
    """Key of the inner width of what becomes an expert."""
    activation_key: str = "hidden_act"
    """Key of what the FFN's gate goes through."""
    activations: tuple[str, ...] = ("silu", "swish")
    """What may stand there; all of it means the first."""
    norms: tuple[str, ...] = PRE_NORMS
    """Norms of a layer, in the order of the file."""
    eps_key: str = "rms_norm_eps"
    """Key of the norms' epsilon."""
    qk_norm: str = ""
    """What q_norm and k_norm of the attention go over: each `head`, or `all` of them together;
    empty: there are none."""
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    linear: bool = False
    """Whether layers without full attention have linear attention (`delta_net`), not windows."""
    output_gate: bool = False
    """Whether q_proj has, behind each head's rows, those of a gate over what the head returns."""
    centred: bool = False
    """Whether norms add 1 to their weights."""
    ignored: tuple[str, ...] = ()
    """How the names of tensors begin that transformers' class passes over."""
    mixture: str = "qwen2_moe"
    """The form that its mixture has on disk, see `forms`; empty: `nexus_<family>`."""
    with_layer_types: Family | None = None
    """What transformers reads the file as instead where it has `layer_types`."""


def dense_ffn_name(layer: int, part: str) -> str:
    """Return the name of a dense model's FFN weight."""
    return f"model.layers.{layer}.mlp.{part}.weight"


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """What a dense model computes, or a mixture outside of its experts, in one normal form.

    Two models whose settings are equal can be averaged and can share experts.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    """Inner width of one FFN: the dense model's, or one expert's."""
    activation: str
    """What the FFN's gate goes through, as transformers names it."""
    factors: ConfigJson
    """Of `Family.factors` and `Family.caps`."""
    vocabulary: int
    rope: ConfigJson
    """`rope_parameters` in today's form; for some families one for each kind of layer."""
    rope_positions: int | None
    """max_position_embeddings where RoPE's frequencies depend on it (`STRETCHED`)."""
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    norms: tuple[str, ...]
    """As `Family.norms`."""
    qk_norm: str
    """As `Family.qk_norm`."""
    qk_names: tuple[str, str]
    """As `Family.qk_names`."""
    sliding_window: int | None
    """In tokens; None: full attention in all layers."""
    layer_types: tuple[str, ...]
    """For each layer full_attention | sliding_attention | linear_attention."""
    turned_layers: tuple[bool, ...]
    """Whether RoPE turns a layer's heads."""
    output_gate: bool
    """As `Family.output_gate`."""
    centred: bool
    """As `Family.centred`."""
    linear: Mapping[str, int]
    """Sizes of linear attention by their keys in config.json; empty where a family has none."""

    @property
    def scored_heads(self) -> int:
        """Heads of which all scores stand in memory at once."""
        return self.heads if ATTENTION_CAP in self.factors else 0

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def qk_widths(self) -> dict[str, int]:
        """Elements of the norms of queries and keys, by name."""
        if not self.qk_norm:
            return {}
        widths = self.query_width, self.kv_width
        if self.qk_norm == "head":
            widths = self.head_dim, self.head_dim
        return dict(zip(self.qk_names, widths, strict=True))


class DenseWeight(NamedTuple):
    """One weight of a dense model: its shape and its place."""

    shape: tuple[int, ...]
    layer: int = -1
    """-1: outside of the layers."""
    part: str = ""
    """Of the FFN: one of FFN_PARTS; empty for all other weights."""
    fp32: bool = False
    """Whether it may stand in fp32 beside others in bf16, and is written so."""


def _attention_weights(settings: DenseSettings, layer: int) -> Iterator[tuple[str, DenseWeight]]:
    hidden, queries, keys = settings.hidden_size, settings.query_width, settings.kv_width
    prefix = f"model.layers.{layer}.self_attn."
    gated = 2 * queries if settings.output_gate else queries
    for part, rows in (("q_proj", gated), ("k_proj", keys), ("v_proj", keys)):
        yield f"{prefix}{part}.weight", DenseWeight((rows, hidden), layer)
        if settings.qkv_bias:
            yield f"{prefix}{part}.bias", DenseWeight((rows,), layer)
    yield prefix + "o_proj.weight", DenseWeight((hidden, queries), layer)
    for part, width in settings.qk_widths.items():
        yield f"{prefix}{part}.weight", DenseWeight((width,), layer)


def _linear_weights(settings: DenseSettings, layer: int) -> Iterator[tuple[str, DenseWeight]]:
    prefix = f"model.layers.{layer}.linear_attn."
    for name, shape in DeltaNet.of(settings.linear).shapes(settings.hidden_size).items():
        yield prefix + name, DenseWeight(shape, layer, fp32=name in FP32)


def _layer_weights(settings: DenseSettings, layer: int) -> Iterator[tuple[str, DenseWeight]]:
    hidden = settings.hidden_size
    prefix = f"model.layers.{layer}."
    first, *others = settings.norms
    yield f"{prefix}{first}.weight", DenseWeight((hidden,), layer)
    linear = settings.layer_types[layer] == LINEAR
    yield from (_linear_weights if linear else _attention_weights)(settings, layer)
    for part in others:
        yield f"{prefix}{part}.weight", DenseWeight((hidden,), layer)
    for part in FFN_PARTS:
        inward = (settings.ffn_size, hidden)
        shape = (hidden, settings.ffn_size) if part == "down_proj" else inward
        yield dense_ffn_name(layer, part), DenseWeight(shape, layer, part)


def dense_weights(settings: DenseSettings) -> dict[str, DenseWeight]:
    """Return all weights of a dense model by name, in file order."""
    vocabulary = DenseWeight((settings.vocabulary, settings.hidden_size))
    weights = {EMBEDDING: vocabulary}
    for layer in range(settings.layers):
        weights.update(_layer_weights(settings, layer))
    weights["model.norm.weight"] = DenseWeight((settings.hidden_size,))
    if not settings.tied_embeddings:
        weights[HEAD] = vocabulary
    return weights
