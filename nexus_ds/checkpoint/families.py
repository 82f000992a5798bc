"""Dense families (Llama, Mistral, Qwen2 and 2.5): what their config.json and their tensors mean.

Each family is a record of `FAMILIES`; `settings` reads a config.json of any of them, and of the
mixture they become (`qwen2_moe`), into one normal form. A config.json is read by transformers' own
class: what a key means, and what holds where two contradict, is said there. `open_dense` refuses
by name what a Qwen2-MoE can't express.
To add a family that a Qwen2-MoE expresses: a record here, a row of KINDS in its test.
Not covered: quantised models, fp16 weights, tied weights other than the embeddings, RoPE that
covers part of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from nexus_ds.checkpoint.tensors import (
    DTYPES,
    TensorReader,
    read_json_object,
    require_directory,
    row_slices,
)
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.model.context import CONTEXT_MODEL

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ConfigJson = dict[str, Any]
"""A config.json as it was parsed: the keys are transformers', `settings` checks what is used."""

FFN_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """How one family's config.json and weights are read."""

    name: str
    """`model_type`."""
    windows: Literal["none", "all", "listed"] = "none"
    """Layers with sliding-window attention: none; all, if `sliding_window` is set; those that
    `layer_types` lists."""
    qkv_bias: bool | None = False
    """Whether q, k and v have biases; None: the configuration's own `qkv_bias` decides."""
    ffn_size: str = "intermediate_size"
    """Key of the inner width of what becomes an expert."""
    with_layer_types: Family | None = None
    """What transformers reads the file as instead where it has `layer_types`."""


_DENSE = (
    Family("llama"),
    Family("mistral", windows="all", with_layer_types=Family("ministral", windows="listed")),
    Family("qwen2", windows="listed", qkv_bias=True),
)
FAMILIES = {family.name: family for family in _DENSE}
"""The dense families that can become experts, by `model_type`."""
MIXTURES = ("qwen2_moe", CONTEXT_MODEL)
"""`model_type` of what they become."""
_MIXTURE = Family("qwen2_moe", windows="listed", qkv_bias=None, ffn_size="moe_intermediate_size")
_READABLE = FAMILIES | dict.fromkeys(MIXTURES, _MIXTURE)

MODEL_DTYPES = {"F32": "float32", "BF16": "bfloat16"}
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
MOST_LAYERS = 10_000
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
STRETCHED = ("dynamic", "yarn", "longrope")
"""Kinds of RoPE whose frequencies depend on max_position_embeddings."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
# Endings of the names of weights that some model of a known family may have, and a Qwen2-MoE can't.
HOMELESS = ("o_proj.bias", "mlp.down_proj.bias", "q_norm.weight")
REASONS = {
    "qwen3": "its attention norms q and k (q_norm, k_norm)",
    "qwen3_moe": "it is a mixture already, and its attention norms q and k",
    "olmo2": "it norms after attention and FFN, and norms q and k",
    "olmo": "its norms have no weights",
    "gemma": "its norms add 1 to their weights and its embeddings are scaled",
    "gemma2": "its norms add 1 to their weights, and it has norms after attention and FFN",
    "gemma3": "its norms add 1 to their weights, and it has norms after attention and FFN",
    "gemma3_text": "its norms add 1 to their weights, and it has norms after attention and FFN",
    "cohere": "its attention and FFN stand side by side",
    "cohere2": "its attention and FFN stand side by side",
    "phi3": "its projections are fused",
    "mixtral": "it is a mixture already",
    "qwen2_moe": "it is a mixture already",
    "gpt2": "it has biases and learned positions",
    "granite": "its embeddings, attention, residuals and logits are scaled",
}
ELSEWHERE = ("transformers_weights", "configuration_files")
"""Keys by which transformers reads other files than model.safetensors and config.json."""
HOOKS = (  # keys of a configuration that make transformers run code that is not its own
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "custom_generate",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "kernel_config",
)
HARMLESS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)
"""Implementations that transformers itself carries; anything else may be the name of a kernel on a
hub."""


def dense_ffn_name(layer: int, part: str) -> str:
    """Return the name of a dense model's FFN weight."""
    return f"model.layers.{layer}.mlp.{part}.weight"


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted path, key, value) of every key in nested JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}{key}", key, item
            yield from _walk(item, f"{path}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}{index}.")


def refuse_hooks(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for keys, at any depth, that ask for code of the checkpoint."""
    for path, key, value in _walk(config):
        if key not in HOOKS or value in (None, False):
            continue
        if key.endswith("_implementation") and value in HARMLESS:
            continue
        raise UnsupportedModelError(
            f"{where}: {path} = {str(value)[:100]!r} asks for code that is not part of "
            "transformers; such code is never run. "
            "Remove the key if the model is one of the known families"
        )


def positive(config: ConfigJson, key: str, where: str) -> int:
    """Return a size of a config.json; CheckpointError unless it is a number above 0."""
    value = config.get(key)
    # not isinstance: JSON's true is an int to Python
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def _family_of(config: ConfigJson) -> Family:
    family = _READABLE[config["model_type"]]
    if family.with_layer_types and "layer_types" in config:
        return family.with_layer_types
    return family


def own_config(config: ConfigJson, where: str = "config.json") -> PretrainedConfig:
    """Return the configuration object that transformers makes of a config.json of a known family.

    It fills in what the file leaves out, reads older keys, and decides between keys that contradict
    each other.

    Raises:
        CheckpointError: transformers can't read it.
    """
    # transformers takes a second to import, and most callers of this module never get here
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    family = _family_of(config).name
    values = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    try:
        found = CONFIG_MAPPING[family](**values)
        # Models are built from a configuration whose RoPE was standardised once more.
        found.standardize_rope_params()
    except (
        StrictDataclassError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{where}: transformers can't read it as {family}: {said}; "
            "mend that key, or fetch or save the model again"
        ) from error
    return found


def _rope(own: PretrainedConfig, where: str) -> dict[str, Any]:
    """Return rope_parameters in today's form, whatever form config.json has."""
    rope = dict(own.rope_parameters)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError(
            f"{where}: RoPE that differs between layers can't be expressed as Qwen2-MoE"
        )
    rope.pop("type", None)
    if rope["rope_type"] not in ROPES:
        raise UnsupportedModelError(
            f"{where}: RoPE of type {rope['rope_type']!r} can't be expressed as Qwen2-MoE; "
            f"known: {', '.join(ROPES)}"
        )
    # Older files say it beside rope_parameters; a null there means the default, all of the head.
    stated = rope.pop("partial_rotary_factor", None)
    part = stated or getattr(own, "partial_rotary_factor", None) or 1.0
    if part != 1.0:
        raise UnsupportedModelError(
            f"{where}: partial_rotary_factor can't be expressed as Qwen2-MoE"
        )
    theta = rope["rope_theta"]
    if type(theta) not in (int, float) or not theta > 0:
        raise CheckpointError(f"{where}: rope_theta is {theta!r}, expected a number above 0")
    return rope | {"rope_theta": float(theta)}


def _windows(
    own: PretrainedConfig, family: Family, where: str
) -> tuple[int | None, tuple[str, ...]]:
    """Return the width of sliding-window attention and each layer's kind of attention.

    The width is in tokens; None where no layer has a window.
    """
    layers = own.num_hidden_layers
    window = getattr(own, "sliding_window", None)
    full = ("full_attention",) * layers
    if family.windows == "none" or (family.windows == "all" and window is None):
        return None, full
    types = ("sliding_attention",) * layers
    if family.windows == "listed":
        types = tuple(own.layer_types)
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{where}: layer_types {list(types)!r} can't be expressed as Qwen2-MoE"
        )
    if "sliding_attention" not in types:
        return None, full
    if type(window) is not int or window <= 0:
        raise CheckpointError(
            f"{where}: sliding_window is {window!r}, but layers have sliding-window attention; "
            "expected a number above 0"
        )
    return window, types


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
    vocabulary: int
    rope: Mapping[str, Any]
    """`rope_parameters` in today's form."""
    rope_positions: int | None
    """max_position_embeddings where RoPE's frequencies depend on it (`STRETCHED`)."""
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    sliding_window: int | None
    """In tokens; None: full attention in all layers."""
    layer_types: tuple[str, ...]
    """For each layer full_attention | sliding_attention."""

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads together."""
        return self.kv_heads * self.head_dim


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
    own = own_config(config, where)
    family = _family_of(config)
    heads = own.num_attention_heads
    window, types = _windows(own, family, where)
    rope = _rope(own, where)
    stretched = rope["rope_type"] in STRETCHED
    return DenseSettings(
        hidden_size=own.hidden_size,
        layers=own.num_hidden_layers,
        heads=heads,
        kv_heads=own.num_key_value_heads or heads,
        head_dim=getattr(own, "head_dim", None) or own.hidden_size // heads,
        ffn_size=getattr(own, family.ffn_size),
        vocabulary=own.vocab_size,
        rope=rope,
        rope_positions=own.max_position_embeddings if stretched else None,
        norm_eps=float(own.rms_norm_eps),
        tied_embeddings=own.tie_word_embeddings,
        qkv_bias=own.qkv_bias if family.qkv_bias is None else family.qkv_bias,
        sliding_window=window,
        layer_types=types,
    )


def both_ropes(config: ConfigJson) -> ConfigJson:
    """Return a config.json that says its RoPE in both spellings of transformers.

    That of transformers before 5 is rope_theta and, where frequencies are scaled, rope_scaling;
    without them such a version reads the base as 10000. Today's transformers, which takes
    rope_scaling before rope_parameters, reads the same from either.
    """
    rope = dict(settings(config).rope)
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    return kept | {"rope_parameters": rope} | older


class DenseWeight(NamedTuple):
    """One weight of a dense model: its shape and its place."""

    shape: tuple[int, ...]
    layer: int = -1
    """-1: outside of the layers."""
    part: str = ""
    """Of the FFN: one of FFN_PARTS; empty for all other weights."""


def _layer_weights(settings: DenseSettings, layer: int) -> Iterator[tuple[str, DenseWeight]]:
    hidden, queries, keys = settings.hidden_size, settings.query_width, settings.kv_width
    prefix = f"model.layers.{layer}."
    yield prefix + "input_layernorm.weight", DenseWeight((hidden,), layer)
    for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{prefix}self_attn.{part}.weight", DenseWeight((rows, hidden), layer)
        if settings.qkv_bias:
            yield f"{prefix}self_attn.{part}.bias", DenseWeight((rows,), layer)
    yield prefix + "self_attn.o_proj.weight", DenseWeight((hidden, queries), layer)
    yield prefix + "post_attention_layernorm.weight", DenseWeight((hidden,), layer)
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


@dataclass(frozen=True)
class DenseModel:
    """A dense model on disk, its configuration and headers checked; no weight is in memory."""

    directory: Path
    config: ConfigJson
    """config.json as it stands on disk, but for `tie_word_embeddings`, which is as the file of
    weights has it."""
    family: str
    """A key of FAMILIES."""
    reader: TensorReader
    dtype: str
    """Of all weights, as safetensors names it: F32 | BF16."""
    settings: DenseSettings

    def ffn_names(self) -> list[str]:
        """Return the names of all FFN weights."""
        return [name for name, weight in dense_weights(self.settings).items() if weight.part]


def _refuse_unsupported(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for what a Qwen2-MoE can't express, by name."""
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
    biases = {
        "attention_bias": "a bias in o_proj (o_proj.bias)",
        "mlp_bias": "biases in the FFN",
    }
    for key, what in biases.items():
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, but a Qwen2-MoE has no place for {what}"
            )
    for key in ("quantization_config", "per_layer_config"):
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set; save the model unquantised and uniform first"
            )
    refuse_in_any_form(config, where)


def refuse_in_any_form(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for what neither a dense model nor a mixture may have."""
    for key in ELSEWHERE:
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, so transformers reads other files than this program; "
                "save the model again"
            )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{where}: hidden_act {config['hidden_act']!r}; only silu (SwiGLU) is supported"
        )
    if config.get("is_causal", True) is not True:
        raise UnsupportedModelError(
            f"{where}: is_causal is {config['is_causal']!r}: "
            "attention to later tokens can't be expressed as Qwen2-MoE"
        )
    for key in ("text_config", "decoder", "generator", "text_encoder"):
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, it wraps a model within a model; "
                "save the language model on its own first"
            )


def refuse_other_weights(directory: Path) -> None:
    """Raise UnsupportedModelError where other weights than model.safetensors decide.

    Those are an adapter's, or shards that ranks have saved.
    """
    shards = sorted(path.name for path in directory.glob("shard-*-model-*-of-*.safetensors"))
    if shards:
        raise UnsupportedModelError(
            f"{directory} holds shards that ranks have saved ({shards[0]}), "
            "which transformers reads before model.safetensors: "
            "save the model whole, or remove them"
        )
    if not (directory / ADAPTER).is_file():
        return
    adapter = read_json_object(directory, ADAPTER)
    # foreign text in a message: cut to a bearable length
    kind = str(adapter.get("peft_type") or "?")[:200]
    base = str(adapter.get("base_model_name_or_path") or "?")[:200]
    raise UnsupportedModelError(
        f"{directory} holds an adapter ({ADAPTER}: {kind} of {base}), not a whole model: "
        "merge it first, with peft's AutoPeftModelForCausalLM.from_pretrained(DIR)"
        ".merge_and_unload().save_pretrained(OUT), save the tokenizer there too, and give OUT; "
        f"if the weights beside it are merged already, remove {ADAPTER}"
    )


def as_stored(config: ConfigJson, reader: TensorReader) -> ConfigJson:
    """Return config.json with embeddings tied only if no other head is in the file.

    A head that differs from the embeddings is what transformers computes with, whatever
    config.json says.
    """
    if not config.get("tie_word_embeddings") or not {EMBEDDING, HEAD} <= set(reader.names()):
        return config
    embedding, head = reader.info(EMBEDDING), reader.info(HEAD)
    same = embedding.shape == head.shape and embedding.dtype == head.dtype
    # a slice of rows at a time: whole, both may be larger than memory
    equal = same and all(
        torch.equal(reader.read_rows(EMBEDDING, *rows), reader.read_rows(HEAD, *rows))
        for rows in row_slices(head.shape)
    )
    return config if equal else config | {"tie_word_embeddings": False}


def check_tensors(reader: TensorReader, shapes: dict[str, tuple[int, ...]], tied: bool) -> str:
    """Check names, shapes and dtypes of a model's tensors against its configuration.

    Args:
        reader: the model's tensors.
        shapes: what the configuration makes of them.
        tied: whether the embeddings are the head, too.

    Returns:
        The one dtype of all, as safetensors names it.

    Raises:
        UnsupportedModelError: weights that a Qwen2-MoE has no place for, or of several or of other
            dtypes.
        CheckpointError: tensors that are missing, unknown or of another shape.
    """
    _check_names(reader, shapes, tied)
    wrong = []
    for name, shape in shapes.items():
        found = reader.info(name).shape
        if found != shape:
            wrong.append(f"{name} {found}, expected {shape}")
    if wrong:
        raise CheckpointError(
            f"{reader.directory}: {len(wrong)} tensors have another shape than config.json says: "
            f"{'; '.join(wrong[:5])}"
        )
    return _one_dtype(reader, shapes)


def _check_names(reader: TensorReader, shapes: Mapping[str, object], tied: bool) -> None:
    where = reader.directory
    # A tied model may repeat its head, and older files hold RoPE's frequencies: transformers reads
    # neither.
    ignored = {HEAD} if tied else set()
    extra = []
    for name in reader.names():
        if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            extra.append(name)
    homeless = [name for name in extra if name.endswith(HOMELESS)]
    if homeless:
        raise UnsupportedModelError(
            f"{where}: a Qwen2-MoE has no place for {homeless[0]} and {len(homeless) - 1} like it"
        )
    missing = [name for name in shapes if name not in reader]
    parts = []
    for kind, names in (("missing", missing), ("unknown", extra)):
        if names:
            parts.append(f"{len(names)} {kind}: {', '.join(names[:5])}")
    if parts:
        raise CheckpointError(
            f"{where}: the tensors are not those of its config.json; {'; '.join(parts)}"
        )


def _one_dtype(reader: TensorReader, names: Iterable[str]) -> str:
    where = reader.directory
    dtypes = {reader.info(name).dtype: name for name in names}
    if len(dtypes) > 1:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise UnsupportedModelError(
            f"{where}: weights of several dtypes: {listed}; save the model in one, fp32 or bf16"
        )
    dtype = next(iter(dtypes))
    if dtype not in MODEL_DTYPES:
        raise UnsupportedModelError(
            f"{where}: weights are {dtype} ({DTYPES[dtype]}); save the model in fp32 or bf16 first"
        )
    return dtype


def open_dense(directory: Path) -> DenseModel:
    """Open a dense model and check that it can become an expert.

    Its config.json and tensor headers alone are read.

    Raises:
        CheckpointError: not a model directory, damaged, or its tensors are not those that
            config.json describes.
        UnsupportedModelError: a family, bias, activation, dtype or code hook that a Qwen2-MoE can't
            express.
    """
    directory = require_directory(Path(directory))
    refuse_other_weights(directory)
    config = read_json_object(directory, "config.json")
    where = str(directory / "config.json")
    refuse_hooks(config, where)
    _refuse_unsupported(config, where)
    reader = TensorReader(directory)
    config = as_stored(config, reader)
    normal = settings(config, where)
    dtype = check_tensors(
        reader,
        {name: weight.shape for name, weight in dense_weights(normal).items()},
        normal.tied_embeddings,
    )
    return DenseModel(directory, config, config["model_type"], reader, dtype, normal)
