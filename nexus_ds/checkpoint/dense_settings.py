"""config.json of a dense family, or of the mixture that it became, in one normal form; no torch.

What a key means, what holds where it is missing, and which of two that contradict each other
decides, is as transformers' own classes have it: tests hold this module to them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from nexus_ds.checkpoint.config_json import (
    ConfigJson,
    count,
    number,
    positive,
    refuse_in_any_form,
    refuse_odd_type,
)
from nexus_ds.checkpoint.families.delta_net import KEYS, DeltaNet
from nexus_ds.checkpoint.families.qwen2 import QWEN2
from nexus_ds.checkpoint.families.record import FULL, LINEAR, SLIDING, DenseSettings, Family
from nexus_ds.checkpoint.families.rotary import (
    FIRST_POSITIONS,
    LEAST_BASE,
    attention_factor,
    check_rope,
    over_the_whole_head,
)
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import PLAIN, QWEN3_NEXT, as_source, native_family
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.errors import CheckpointError, UnsupportedModelError


def _alternating(config: ConfigJson) -> list[str]:
    """Return the kinds of layers that a Qwen2-MoE has which does not list them; none where it does
    not say, either, where its windows end."""
    first = config["max_window_layers"] if config.get("use_sliding_window") else 0
    if first is None:
        return []
    layers = range(config["num_hidden_layers"])
    return [SLIDING if layer < first and layer % 2 == 0 else FULL for layer in layers]


_MIXTURE = Family(
    name="qwen2_moe",
    defaults=QWEN2.defaults | {"num_key_value_heads": 16, "qkv_bias": True},
    kinds=_alternating,
    window_switch="use_sliding_window",
    nulls=(),
    qkv_bias="qkv_bias",
    ffn_size="moe_intermediate_size",
)
UNIFORM = {"decoder_sparse_step": 1, "mlp_only_layers": []}
"""Keys of a mixture's config.json by which every layer has experts; also what transformers fills
in."""
_READABLE = FAMILIES | dict.fromkeys(PLAIN, _MIXTURE)

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
MOST_LAYERS = 10_000
DEFAULTS: ConfigJson = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""What every class of transformers takes where neither config.json nor the family says more."""
ROPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Kinds of RoPE and the keys that each needs."""
STRETCHED = ("dynamic", "yarn", "longrope")
"""Kinds of RoPE whose frequencies depend on max_position_embeddings."""
POSITIONED = ("yarn", "longrope", "llama3")
"""Kinds of RoPE that know how many positions the model was first trained on."""
BESIDE = ("rope_scaling", FIRST_POSITIONS)
"""What may stand beside rope_parameters, besides the base."""
BIASES = {
    "attention_bias": "a bias in o_proj (o_proj.bias)",
    "attention_out_bias": "a bias in o_proj (o_proj.bias)",
    "mlp_bias": "biases in the FFN",
    "use_bias": "biases in o_proj and the FFN",
}
"""What the keys of `Family.bias_keys` ask for."""
REASONS = {
    "qwen3_moe": "it is a mixture already, and its attention norms q and k",
    "olmo": "its norms have no weights",
    "cohere": "its attention and FFN stand side by side, as Cohere 2's, which is supported",
    "mixtral": "it is a mixture already",
    "qwen2_moe": "it is a mixture already",
    "gpt2": "it has biases and learned positions",
    "ministral3": "its queries grow with the position (llama_4_scaling_beta)",
    "nemotron": "its FFN has no gate, and its norms subtract the mean",
    "starcoder2": "its FFN has no gate but biases, and its norms subtract the mean",
    "phi": "its attention and FFN stand side by side, with biases",
}


def family_of(config: ConfigJson) -> Family:
    """Return the family of a config.json of a `model_type` among FAMILIES and MIXTURES.

    Of a mixture that is the dense family that it was made of.
    """
    config = as_source(config)
    family = _READABLE[config["model_type"]]
    if family.with_layer_types and "layer_types" in config:
        return family.with_layer_types
    return family


def filled(config: ConfigJson) -> ConfigJson:
    """Return a config.json with what transformers takes for missing keys.

    That of a mixture as the dense family's, with the mixture's keys.
    """
    return DEFAULTS | family_of(config).defaults | as_source(config)


def _number(config: ConfigJson, key: str, where: str) -> float:
    # transformers takes a whole number for others, and refuses it for an epsilon
    if key.endswith("_eps") and type(config[key]) is int:
        raise CheckpointError(f"{where}: {key} is {config[key]}, expected a fraction above 0")
    return number(config[key], f"{where}: {key}")


def _heads(config: ConfigJson, family: Family, where: str) -> None:
    """Put the sizes of attention heads into a filled config.json that leaves them open."""
    heads = config["num_attention_heads"]
    implied = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
    for key, value in implied.items():
        if key not in config or (config[key] is None and key in family.nulls):
            config[key] = value
        positive(config, key, where)


def _stated_rope(config: ConfigJson, family: Family) -> ConfigJson:
    """Return rope_parameters with what stands beside it, as transformers puts them together."""
    rope = copy.deepcopy(config.get("rope_scaling") or config.get("rope_parameters") or {})
    # of a text all three of Qwen's positions are the token's number
    rope = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    rope.setdefault("rope_theta", config["rope_theta"])
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    if family.ropes is not None:
        rope["rope_type"] = family.ropes.get(rope["rope_type"], rope["rope_type"])
    if rope["rope_type"] in POSITIONED:
        rope.setdefault(FIRST_POSITIONS, config["max_position_embeddings"])
        # The one that stands outside decides: transformers reads it last.
        if FIRST_POSITIONS in config:
            rope[FIRST_POSITIONS] = config[FIRST_POSITIONS]
    return rope


def _check_rope_object(rope: object, key: str, where: str) -> None:
    """Raise CheckpointError for RoPE that is there, and is no object with a name."""
    sound = rope is None or isinstance(rope, dict)
    kinds = [rope.get(kind) for kind in ("type", "rope_type")] if isinstance(rope, dict) else []
    if not sound or not all(isinstance(kind, str | None) for kind in kinds):
        raise CheckpointError(
            f"{where}: {key} is {str(rope)[:100]}, expected an object that names its rope_type"
        )


def _check_nested(config: ConfigJson, where: str) -> None:
    """Raise CheckpointError for a key that is no object, or no list of words, where it has to be.

    A null says as much as a key that is missing.
    """
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope_object(config.get(key), key, where)
        stated = config.get(key) or {}
        # by kinds of layers
        for kind in (FULL, SLIDING):
            _check_rope_object(stated.get(kind), f"{key}.{kind}", where)
    count(config, "max_window_layers", where)
    types = config.get("layer_types")
    words = types is None or (isinstance(types, list) and all(isinstance(t, str) for t in types))
    if not words:
        raise CheckpointError(
            f"{where}: layer_types is {str(types)[:100]}, expected a word for each layer"
        )


def _ropes_by_kind(config: ConfigJson, family: Family, where: str) -> ConfigJson:
    """Return for each kind of layer its rope_parameters in today's form, as transformers puts them
    together; `config` is filled."""
    stated = config.get("rope_parameters") or {}
    scaled = config.get("rope_scaling") or {}
    if scaled and stated and FULL not in stated:
        raise CheckpointError(
            f"{where}: rope_scaling stands beside rope_parameters without {FULL}, which "
            "transformers can't read; keep one of the two, by kinds of layers"
        )
    # what stands beside them does not count
    rest = {key: value for key, value in config.items() if key not in BESIDE}
    found = {}
    for kind, key in family.rope_bases.items():
        own = dict(stated.get(kind) or {"rope_type": "default"})
        # older files scale the layers without a window alone
        if kind == FULL:
            own |= scaled
        base = config[key] if key else family.defaults["rope_theta"]
        alone = {"rope_theta": base, "rope_parameters": own}
        found[kind], _ = _rope(rest | alone, replace(family, rope_bases={}), where)
    return found


def _needed(rope: ConfigJson, family: Family, where: str) -> tuple[str, ...]:
    """Return the keys without which RoPE of its kind computes nothing; all are there.

    Raises:
        UnsupportedModelError: a kind that can't be expressed.
        CheckpointError: keys are missing.
    """
    kind = rope["rope_type"]
    if kind not in (ROPES if family.ropes is None else family.ropes.values()):
        raise UnsupportedModelError(
            f"{where}: RoPE of type {kind!r} can't be expressed as Qwen2-MoE; "
            f"known: {', '.join(dict.fromkeys(family.ropes.values()) if family.ropes else ROPES)}"
        )
    missing = [key for key in ROPES[kind] if key not in rope]
    if missing:
        raise CheckpointError(
            f"{where}: RoPE of type {kind!r} needs {', '.join(missing)}; "
            "mend rope_parameters, or fetch or save the model again"
        )
    return (*ROPES[kind], FIRST_POSITIONS) if kind in POSITIONED else ROPES[kind]


def _rope(config: ConfigJson, family: Family, where: str) -> tuple[ConfigJson, int]:
    """Return rope_parameters in today's form, whatever form config.json has, and of how many
    channels of a head they speak.

    `config` is filled.
    """
    if family.rope_bases:
        return _ropes_by_kind(config, family, where), config["head_dim"]
    rope = _stated_rope(config, family)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError(
            f"{where}: RoPE that differs between layers can't be expressed as Qwen2-MoE"
        )
    needed = _needed(rope, family, where)
    rope["rope_theta"] = number(rope["rope_theta"], f"{where}: rope_theta", LEAST_BASE)
    turned = _turned(rope, config, family, where)
    # a share that is still there is for the mixture's class, which turns that part itself
    pairs = int(turned * rope.get("partial_rotary_factor", 1.0)) // 2
    check_rope(rope, needed, pairs, f"{where}: RoPE")
    return rope, turned


def _turned(rope: ConfigJson, config: ConfigJson, family: Family, where: str) -> int:
    """Take the share of a head that RoPE turns out of `rope`, and return its channels."""
    # Older files say it beside rope_parameters; a null there means the default, all of the head.
    stated = rope.pop("partial_rotary_factor", None)
    part = stated or config.get("partial_rotary_factor") or 1.0
    if part != 1.0 and not family.partial:
        raise UnsupportedModelError(
            f"{where}: partial_rotary_factor can't be expressed as Qwen2-MoE"
        )
    if type(part) is not float or not 0 < part <= 1:
        raise CheckpointError(
            f"{where}: partial_rotary_factor is {part!r}, expected a fraction of at most 1"
        )
    if family.mixture == PLAIN[0]:
        return int(config["head_dim"] * part)
    # the mixture's class turns what the family's own turns
    if family.partial:
        rope["partial_rotary_factor"] = part
    return config["head_dim"]


class Rotary(NamedTuple):
    """RoPE of the family's own class."""

    turned: int
    """Channels of a head that it turns."""
    factor: float
    """By what channels that turn are multiplied where others do not turn; else 1."""


def rotary(config: ConfigJson) -> Rotary:
    """Return what RoPE does to a head in the family's own class.

    Args:
        config: a config.json that `settings` takes.
    """
    values, family = filled(config), family_of(config)
    _heads(values, family, "config.json")
    rope, turned = _rope(values, family, "config.json")
    whole = turned == values["head_dim"]
    return Rotary(turned, 1.0 if whole else attention_factor(rope, values))


def as_its_class_has_it(config: ConfigJson) -> ConfigJson:
    """Return RoPE (`rope`) and the norms' epsilon (`norm_eps`) of the family's own class.

    They are those of `settings`, but for a family that is read through a view.

    Args:
        config: a config.json that `settings` takes.
    """
    values, family = filled(config), family_of(config)
    _heads(values, family, "config.json")
    rope, turned = _rope(values, family, "config.json")
    if turned < values["head_dim"]:
        rope["partial_rotary_factor"] = turned / values["head_dim"]
    return {"rope": rope, "norm_eps": values[family.eps_key]}


def _windows(config: ConfigJson, family: Family, where: str) -> tuple[int | None, tuple[str, ...]]:
    """Return the width of sliding-window attention and each layer's kind of attention.

    The width is in tokens; None where no layer has a window.
    """
    layers = config["num_hidden_layers"]
    full = (FULL,) * layers
    if family.kinds is None:
        return None, full
    if family.window_switch and not config[family.window_switch]:
        config = config | {"sliding_window": None}
    listed = config.get("layer_types") if family.listed else None
    types = tuple(family.kinds(config) if listed is None else listed)
    if not types:
        raise CheckpointError(
            f"{where}: layer_types is missing, expected a kind of attention for each layer"
        )
    known = {FULL, LINEAR if family.linear else SLIDING}
    if len(types) != layers or not set(types) <= known:
        raise UnsupportedModelError(
            f"{where}: layer_types {list(types)!r} can't be expressed as Qwen2-MoE"
        )
    if SLIDING not in types:
        return None, types
    window = config["sliding_window"]
    if type(window) is not int or window <= 0:
        raise CheckpointError(
            f"{where}: sliding_window is {window!r}, but layers have sliding-window attention; "
            "expected a number above 0"
        )
    return window, types


def _linear(values: ConfigJson, family: Family, where: str) -> dict[str, int]:
    """Return the sizes of linear attention; none where the family has none."""
    if not family.linear:
        return {}
    sizes = {key: positive(values, key, where) for key in KEYS}
    net = DeltaNet.of(sizes)
    if net.value_heads % net.key_heads:
        raise CheckpointError(
            f"{where}: linear_num_value_heads is {net.value_heads}, expected a multiple of "
            f"linear_num_key_heads, {net.key_heads}"
        )
    return sizes


def _ropes_of(rope: ConfigJson) -> list[ConfigJson]:
    """Return the RoPE of each kind of layer, or the one of all."""
    return [rope] if "rope_type" in rope else list(rope.values())


def _positions(rope: ConfigJson, values: ConfigJson) -> int | None:
    """Return how many positions there are where RoPE depends on it."""
    stretched = [one for one in _ropes_of(rope) if one["rope_type"] in STRETCHED]
    return values["max_position_embeddings"] if stretched else None


def _turned_layers(
    family: Family, values: ConfigJson, types: Sequence[str], where: str
) -> tuple[bool, ...]:
    """Return whether RoPE turns the heads of each layer."""
    if family.turned_layers is None:
        return (True,) * len(types)
    found = tuple(family.turned_layers(values, types))
    if len(found) != len(types):
        raise CheckpointError(
            f"{where}: no_rope_layers and no_rope_layer_interval say of {len(found)} layers "
            f"whether RoPE turns their heads, expected {len(types)}: 0 or 1 for each layer"
        )
    return found


def _norm_eps(values: ConfigJson, family: Family, where: str) -> float:
    """Return the epsilon of all norms, for a residual stream without a multiplier.

    The stream is read divided by Granite's, which norms do not see but for their epsilon.
    """
    eps = _number(values, family.eps_key, where)
    if not family.multipliers:
        return eps
    for key in ("embedding_multiplier", "attention_multiplier", "logits_scaling"):
        _number(values, key, where)
    return eps / _number(values, "residual_multiplier", where) ** 2


def _factors(values: ConfigJson, family: Family, where: str) -> ConfigJson:
    """Return the numbers that a family's class computes with, by key."""
    found: ConfigJson = {key: _number(values, key, where) for key in family.factors}
    for key in family.caps:
        found[key] = None if values[key] is None else _number(values, key, where)
    return found


def refuse_activation(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for an FFN's gate that goes through something else than the
    family's.

    Args:
        config: of a `model_type` among FAMILIES and MIXTURES.
        where: start of the message.
    """
    family = family_of(as_source(config, where))
    first = family.activations[0]
    keys = {family.activation_key}
    if native_family(config["model_type"]):
        # what its experts are built by
        keys.add("hidden_act")
    for key in sorted(keys):
        found = config.get(key, first)
        if found not in family.activations:
            raise UnsupportedModelError(
                f"{where}: {key} {found!r}; of {family.name} only {first} is supported"
            )


def settings(config: ConfigJson, where: str = "config.json") -> DenseSettings:
    """Return what a config.json of a known family, or of their mixture, says in one normal form.

    Args:
        config: of a `model_type` among FAMILIES and MIXTURES.
        where: start of the messages.

    Raises:
        CheckpointError: sizes that are missing or no numbers, anything else that transformers can't
            read.
        UnsupportedModelError: RoPE or attention that can't be expressed.
    """
    for key in SIZES:
        positive(config, key, where)
    # a false number would fill the memory with layers' names before a tensor is missed
    if config["num_hidden_layers"] > MOST_LAYERS:
        raise CheckpointError(
            f"{where}: num_hidden_layers is {config['num_hidden_layers']}, "
            f"expected at most {MOST_LAYERS}"
        )
    config = as_source(config, where)
    refuse_odd_type(config, where)
    if config.get("model_type") not in _READABLE:
        raise CheckpointError(
            f"{where}: model_type is {config.get('model_type')!r}, expected one of "
            f"{', '.join(_READABLE)}"
        )
    _check_nested(config, where)
    family = family_of(config)
    values = filled(config)
    _heads(values, family, where)
    for key in ("max_position_embeddings", family.ffn_size):
        positive(values, key, where)
    window, types = _windows(values, family, where)
    rope, turned = _rope(values, family, where)
    if turned < values["head_dim"]:
        rope = over_the_whole_head(rope, values, turned, where)
    biased = family.qkv_bias
    return DenseSettings(
        hidden_size=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        ffn_size=values[family.ffn_size],
        activation=family.activations[0],
        factors=_factors(values, family, where),
        vocabulary=values["vocab_size"],
        rope=rope,
        rope_positions=_positions(rope, values),
        norm_eps=_norm_eps(values, family, where),
        # embeddings and head take different multipliers
        tied_embeddings=bool(values["tie_word_embeddings"]) and not family.multipliers,
        qkv_bias=bool(values[biased] if isinstance(biased, str) else biased),
        norms=family.norms,
        qk_norm=family.qk_norm,
        qk_names=family.qk_names,
        sliding_window=window,
        layer_types=types,
        turned_layers=_turned_layers(family, values, types, where),
        output_gate=family.output_gate,
        centred=family.centred,
        linear=_linear(values, family, where),
    )


def both_ropes(config: ConfigJson) -> ConfigJson:
    """Return a config.json that says its RoPE in both spellings of transformers.

    That of transformers before 5 is rope_theta and, where frequencies are scaled, rope_scaling;
    without them such a version reads the base as 10000. Today's transformers, which takes
    rope_scaling before rope_parameters, reads the same from either.
    """
    if settings(config).head_dim > rotary(config).turned:
        # what it is read as is another class's; its own has no older spelling
        return config
    rope = dict(settings(config).rope)
    if "rope_type" not in rope:
        # each kind of layer has its own
        return config
    # a Qwen3-Next's own default is a quarter of the head
    if config.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    older: ConfigJson = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope["rope_type"] == "longrope":
        # there it is no part of rope_scaling
        older[FIRST_POSITIONS] = rope[FIRST_POSITIONS]
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    return kept | {"rope_parameters": rope} | older


def cached_positions(config: ConfigJson) -> int | None:
    """Return up to how many tokens a mixture generates with a cache what it does without.

    Beyond them longrope has other frequencies, but a cache keeps the keys that it has; Phi-3's own
    class computes them anew. None: any number.
    """
    first = []
    for rope in _ropes_of(settings(config).rope):
        if rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"]:
            first.append(rope[FIRST_POSITIONS])
    return min(first, default=None)


def refuse_unsupported(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for all that a Qwen2-MoE can't express, by name."""
    refuse_odd_type(config, where)
    problems = Problems()
    family = config.get("model_type")
    if family not in FAMILIES:
        unknown = "its computation is not known to be the same"
        if isinstance(config.get("text_config"), dict):
            inner = config["text_config"].get("model_type")
            unknown = (
                f"it wraps a language model ({inner!r}), which has to be saved on its own first"
            )
        reason = REASONS.get(str(family), unknown)
        raise UnsupportedModelError(
            f"{where}: model_type {family!r} can't become a Qwen2-MoE: {reason}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    for key in FAMILIES[family].bias_keys:
        if config.get(key):
            problems.add(
                UnsupportedModelError(
                    f"{where}: {key} is set, but a mixture has no place for {BIASES[key]}"
                )
            )
    if FAMILIES[family].mixture == QWEN3_NEXT and config.get("use_sliding_window"):
        problems.add(
            UnsupportedModelError(
                f"{where}: use_sliding_window is set, but a Qwen3-Next has no sliding windows; "
                "set it to false if no text is longer than the window"
            )
        )
    for key in ("quantization_config", "per_layer_config"):
        if config.get(key):
            problems.add(
                UnsupportedModelError(
                    f"{where}: {key} is set; save the model unquantised and uniform first"
                )
            )
    with problems.collected():
        refuse_activation(config, where)
    with problems.collected():
        refuse_in_any_form(config, where)
    problems.refuse()
