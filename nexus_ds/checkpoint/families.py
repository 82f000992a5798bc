"""Dense families (Llama, Mistral, Qwen2 and 2.5) and their names and settings as Qwen2-MoE, there
and back.

A Nexus model is stored as a stock Qwen2-MoE: norm_topk_prob false, the shared expert's constant
gate (sigmoid of about zero, exactly 1/2) undone by a doubled down_proj. `open_dense` refuses by
name what that form can't express. A config.json is read by transformers' own class: what a key
means, and what holds where two contradict, is said there.
Layout: attention and norms keep their names; model.layers.L.mlp becomes mlp.shared_expert,
mlp.experts.E and the router row mlp.gate.
Not covered: quantised models, fp16 weights, tied weights other than the embeddings, RoPE that
covers part of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

FFN_PARTS = ("gate_proj", "up_proj", "down_proj")
"""Weight of the shared expert's gate: its sigmoid is exactly 1/2, and llama.cpp's silu(x)/x stays
finite."""

MODEL_DTYPES = {"F32": "float32", "BF16": "bfloat16"}
FAMILIES = ("llama", "mistral", "qwen2")
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
KEPT = (  # keys that a Qwen2-MoE and the dense families share
    *(
        "dtype",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *(
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
        "attention_dropout",
        "head_dim",
    ),
    *(
        "initializer_range",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
    ),
)


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


def refuse_hooks(config: dict[str, Any], where: str) -> None:
    """Raise UnsupportedModelError for keys, at any depth, through which a configuration runs code
    of its own."""
    for path, key, value in _walk(config):
        harmless = value in (None, False) or (key.endswith("_implementation") and value in HARMLESS)
        if key in HOOKS and not harmless:
            raise UnsupportedModelError(
                f"{where}: {path} = {str(value)[:100]!r} asks for code that is not part of transformers; "
                "such code is never run. Remove the key if the model is one of the known families"
            )


def _positive(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def own_config(config: dict[str, Any], where: str = "config.json") -> Any:
    """Return the configuration object that transformers makes of a config.json of a known family.

    It fills in what the file leaves out, reads older keys, and decides between keys that contradict
    each other.

    Raises:
        CheckpointError: transformers can't read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    family = "qwen2_moe" if config["model_type"] == CONTEXT_MODEL else config["model_type"]
    if family == "mistral" and "layer_types" in config:
        family = "ministral"  # as AutoConfig does it
    values = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    try:
        found = CONFIG_MAPPING[family](**values)
        found.standardize_rope_params()  # as it is done once more when a model is built
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
            f"{where}: transformers can't read it as {family}: {said}; mend that key, or fetch or save the model again"
        ) from error
    return found


def _rope(own: Any, where: str) -> dict[str, Any]:
    """Return rope_parameters in today's form, whatever form config.json has."""
    rope = dict(own.rope_parameters)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError(
            f"{where}: RoPE that differs between layers can't be expressed as Qwen2-MoE"
        )
    rope.pop("type", None)
    if rope["rope_type"] not in ROPES:
        raise UnsupportedModelError(
            f"{where}: RoPE of type {rope['rope_type']!r} can't be expressed as Qwen2-MoE; known: {', '.join(ROPES)}"
        )
    if (
        rope.pop("partial_rotary_factor", None)
        or getattr(own, "partial_rotary_factor", None)
        or 1.0
    ) != 1.0:
        raise UnsupportedModelError(
            f"{where}: partial_rotary_factor can't be expressed as Qwen2-MoE"
        )
    theta = rope["rope_theta"]
    if type(theta) not in (int, float) or not theta > 0:
        raise CheckpointError(f"{where}: rope_theta is {theta!r}, expected a number above 0")
    return rope | {"rope_theta": float(theta)}


def _windows(own: Any, where: str) -> tuple[int | None, list[str]]:
    """Return the width of sliding-window attention in tokens (None: all is full), and each layer's
    kind of attention."""
    layers, window = own.num_hidden_layers, getattr(own, "sliding_window", None)
    full = ["full_attention"] * layers
    if own.model_type == "llama" or (own.model_type == "mistral" and window is None):
        return None, full
    types = ["sliding_attention"] * layers if own.model_type == "mistral" else list(own.layer_types)
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{where}: layer_types {types!r} can't be expressed as Qwen2-MoE"
        )
    if "sliding_attention" not in types:
        return None, full
    if type(window) is not int or window <= 0:
        raise CheckpointError(
            f"{where}: sliding_window is {window!r}, but layers have sliding-window attention; expected a number above 0"
        )
    return window, types


def settings(config: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Return what a model of a known family (or a Nexus model's Qwen2-MoE) computes, in one normal
    form.

    Two models whose settings are equal can be averaged and can share experts. `where` starts the
    messages.

    Raises:
        CheckpointError: sizes that are missing or no numbers, anything else that transformers can't
            read.
        UnsupportedModelError: RoPE or attention that can't be expressed.
    """
    for key in SIZES:
        _positive(config, key, where)
    if config["num_hidden_layers"] > MOST_LAYERS:
        raise CheckpointError(
            f"{where}: num_hidden_layers is {config['num_hidden_layers']}, expected at most {MOST_LAYERS}"
        )
    own = own_config(config, where)
    heads, moe = own.num_attention_heads, own.model_type == "qwen2_moe"
    window, types = _windows(own, where)
    rope = _rope(own, where)
    return {
        "hidden_size": own.hidden_size,
        "layers": own.num_hidden_layers,
        "heads": heads,
        "kv_heads": own.num_key_value_heads or heads,
        "head_dim": getattr(own, "head_dim", None) or own.hidden_size // heads,
        "ffn_size": own.moe_intermediate_size if moe else own.intermediate_size,
        "vocabulary": own.vocab_size,
        "rope": rope,
        "rope_positions": own.max_position_embeddings if rope["rope_type"] in STRETCHED else None,
        "norm_eps": float(own.rms_norm_eps),
        "tied_embeddings": own.tie_word_embeddings,
        "qkv_bias": own.qkv_bias if moe else own.model_type == "qwen2",
        "sliding_window": window,
        "layer_types": types,
    }


def both_ropes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that says its RoPE in today's spelling and in that of transformers
    before 5.

    The older one is rope_theta and, where frequencies are scaled, rope_scaling; without them such a
    version reads the base as 10000. Today's transformers, which takes rope_scaling before
    rope_parameters, reads the same from either.
    """
    rope = settings(config)["rope"]
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    return kept | {"rope_parameters": rope} | older


def dense_config(config: dict[str, Any], family: str | None = None) -> dict[str, Any]:
    """Return the config.json of one expert of a Nexus model as a dense model (the way back).

    Args:
        config: config.json of the Nexus model.
        family: llama | mistral | qwen2; None chooses the family that has the needed features.

    Raises:
        UnsupportedModelError: the family can't express the model (biases of q, k, v; sliding
            window).
    """
    s = settings(config)
    sliding = s["sliding_window"] is not None
    family = family or ("qwen2" if s["qkv_bias"] else "mistral" if sliding else "llama")
    uniform = len(set(s["layer_types"])) == 1
    if (family == "qwen2") != s["qkv_bias"] or (sliding and family == "llama"):
        raise UnsupportedModelError(
            f"a {family} can't express qkv_bias={s['qkv_bias']} with sliding window {sliding}"
        )
    if sliding and family == "mistral" and not uniform:
        raise UnsupportedModelError(
            "a mistral has one kind of attention in all layers; this model mixes two"
        )
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[
        family
    ] + "ForCausalLM"
    dense = {key: config[key] for key in KEPT if key in config}
    dense |= {
        "architectures": [architecture],
        "model_type": family,
        "intermediate_size": s["ffn_size"],
    }
    if family == "mistral":
        dense["sliding_window"] = s["sliding_window"]
    if family == "qwen2":
        dense |= {
            "use_sliding_window": sliding,
            "sliding_window": s["sliding_window"],
            "layer_types": s["layer_types"],
        }
    return both_ropes(dense)


def ffn_place(name: str) -> tuple[int, str | None]:
    """Return (layer, part) of a dense FFN weight's name, (-1, None) for any other name."""
    words = name.split(".")
    if len(words) == 6 and words[3] == "mlp" and words[4] in FFN_PARTS:
        return int(words[2]), words[4]
    return -1, None


def dense_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all weights of the dense model (or of one expert of a Nexus
    model), in file order."""
    s = settings(config)
    h, f = s["hidden_size"], s["ffn_size"]
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (s["vocabulary"], h)}
    for layer in range(s["layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (h,)
        for part, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{prefix}self_attn.{part}.weight"] = (rows, h)
            if s["qkv_bias"]:
                shapes[f"{prefix}self_attn.{part}.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (h, q)
        shapes[prefix + "post_attention_layernorm.weight"] = (h,)
        for part in FFN_PARTS:
            shapes[dense_ffn_name(layer, part)] = (h, f) if part == "down_proj" else (f, h)
    shapes["model.norm.weight"] = (h,)
    if not s["tied_embeddings"]:
        shapes[HEAD] = (s["vocabulary"], h)
    return shapes


@dataclass(frozen=True)
class DenseModel:
    """A dense model on disk whose configuration and tensor headers were checked; no weight is in
    memory."""

    directory: Path
    config: dict[str, Any]
    """config.json as it stands on disk, but for `tie_word_embeddings`, which is as the file of
    weights has it."""
    family: str
    """llama | mistral | qwen2."""
    reader: TensorReader
    dtype: str
    """Of all weights, as safetensors names it: F32 | BF16."""
    settings: dict[str, Any]
    """The normal form of the configuration, see `settings`."""

    def ffn_names(self) -> list[str]:
        """Return the names of all FFN weights."""
        return [
            dense_ffn_name(layer, part)
            for layer in range(self.settings["layers"])
            for part in FFN_PARTS
        ]

    def averaged_names(self) -> list[str]:
        """Return the names of all other weights: those that are averaged over experts."""
        return [name for name in dense_shapes(self.config) if ffn_place(name)[1] is None]


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
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
            f"{where}: model_type {family!r} can't become a Qwen2-MoE: {reason}; supported: {', '.join(FAMILIES)}"
        )
    for key, what in (
        ("attention_bias", "a bias in o_proj (o_proj.bias)"),
        ("mlp_bias", "biases in the FFN"),
    ):
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, but a Qwen2-MoE has no place for {what}"
            )
    for key in ("quantization_config", "per_layer_config"):
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set; save the model unquantised and uniform first"
            )
    _refuse_in_any_form(config, where)


def _refuse_in_any_form(config: dict[str, Any], where: str) -> None:
    """Raise UnsupportedModelError for what neither a dense model nor a mixture may have."""
    for key in ELSEWHERE:
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, so transformers reads other files than this program; save the model again"
            )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{where}: hidden_act {config['hidden_act']!r}; only silu (SwiGLU) is supported"
        )
    if config.get("is_causal", True) is not True:
        raise UnsupportedModelError(
            f"{where}: is_causal is {config['is_causal']!r}: attention to later tokens can't be expressed as Qwen2-MoE"
        )
    for key in ("text_config", "decoder", "generator", "text_encoder"):
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, it wraps a model within a model; save the language model on its own first"
            )


def refuse_other_weights(directory: Path) -> None:
    """Raise UnsupportedModelError where other weights than model.safetensors decide: an adapter's,
    or shards of ranks."""
    shards = sorted(path.name for path in directory.glob("shard-*-model-*-of-*.safetensors"))
    if shards:
        raise UnsupportedModelError(
            f"{directory} holds shards that ranks have saved ({shards[0]}), which transformers reads before "
            "model.safetensors: save the model whole, or remove them"
        )
    if not (directory / ADAPTER).is_file():
        return
    adapter = read_json_object(directory, ADAPTER)
    kind, base = (
        str(adapter.get(key) or "?")[:200] for key in ("peft_type", "base_model_name_or_path")
    )
    raise UnsupportedModelError(
        f"{directory} holds an adapter ({ADAPTER}: {kind} of {base}), not a whole model: merge it first, with peft's "
        "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT), save the tokenizer there "
        f"too, and give OUT; if the weights beside it are merged already, remove {ADAPTER}"
    )


def as_stored(config: dict[str, Any], reader: TensorReader) -> dict[str, Any]:
    """Return config.json with embeddings that are tied only if no other head is in the file:
    transformers keeps that."""
    if not config.get("tie_word_embeddings") or not {EMBEDDING, HEAD} <= set(reader.names()):
        return config
    embedding, head = reader.info(EMBEDDING), reader.info(HEAD)
    same = embedding.shape == head.shape and embedding.dtype == head.dtype
    equal = same and all(
        torch.equal(reader.read_rows(EMBEDDING, *rows), reader.read_rows(HEAD, *rows))
        for rows in row_slices(head.shape)
    )
    return config if equal else config | {"tie_word_embeddings": False}


def _check_tensors(reader: TensorReader, shapes: dict[str, tuple[int, ...]], tied: bool) -> str:
    """Check names, shapes and dtypes of a model's tensors against its configuration; return the one
    dtype."""
    where = reader.directory
    ignored = {HEAD} if tied else set()  # a tied model may repeat it; transformers ignores it too
    extra = [
        n
        for n in reader.names()
        if n not in shapes and n not in ignored and not n.endswith("rotary_emb.inv_freq")
    ]
    biases = [
        name
        for name in extra
        if name.endswith(("o_proj.bias", "mlp.down_proj.bias", "q_norm.weight"))
    ]
    if biases:
        raise UnsupportedModelError(
            f"{where}: a Qwen2-MoE has no place for {biases[0]} and {len(biases) - 1} like it"
        )
    missing = [name for name in shapes if name not in reader]
    if missing or extra:
        parts = [
            f"{len(n)} {kind}: {', '.join(n[:5])}"
            for kind, n in (("missing", missing), ("unknown", extra))
            if n
        ]
        raise CheckpointError(
            f"{where}: the tensors are not those of its config.json; {'; '.join(parts)}"
        )
    wrong = [
        f"{n} {reader.info(n).shape}, expected {shape}"
        for n, shape in shapes.items()
        if reader.info(n).shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors have another shape than config.json says: {'; '.join(wrong[:5])}"
        )
    dtypes = {reader.info(name).dtype: name for name in shapes}
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
    """Open a dense model and check that it can become an expert, from its config.json and tensor
    headers alone.

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
    dtype = _check_tensors(reader, dense_shapes(config), normal["tied_embeddings"])
    return DenseModel(directory, config, config["model_type"], reader, dtype, normal)
