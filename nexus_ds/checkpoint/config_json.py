"""A model's config.json before anything is known of its family; without torch.

Not covered: what its sizes mean (`dense_settings`), the headers of weight files (`tensors`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.json_files import read_json_object, require_directory
from nexus_ds.code_hooks import ELSEWHERE, code_hooks
from nexus_ds.errors import CheckpointError, UnsupportedModelError

ConfigJson = dict[str, Any]
"""A config.json as it was parsed: the keys are transformers', `settings` checks what is used."""

CONTEXT_MODEL = "nexus_moe"
"""`model_type` of checkpoints whose router reads a running mean (`router.input: context`): a stock
Qwen2-MoE would route by single tokens."""
ADAPTER = "adapter_config.json"
LARGEST = 1e30
"""Of numbers that a class computes with, and of their inverses: fp32 has them, and fp64 their
squares. What Python reads as JSON may be infinite."""


def refuse_hooks(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for keys, at any depth, that ask for code of the checkpoint."""
    for path, _, value in code_hooks(config):
        raise UnsupportedModelError(
            f"{where}: {path} = {str(value)[:100]!r} asks for code that is not part of "
            "transformers; such code is never run. "
            "Remove the key if the model is one of the known families"
        )


def refuse_odd_type(config: ConfigJson, where: str) -> None:
    """Raise CheckpointError for a `model_type` that is there and is not a name."""
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{where}: model_type is {str(kind)[:100]}, expected a name")


def positive(config: ConfigJson, key: str, where: str) -> int:
    """Return a size of a config.json; CheckpointError unless it is a number above 0."""
    value = config.get(key)
    # not isinstance: JSON's true is an int to Python
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def number(value: object, what: str, least: float = 1 / LARGEST) -> float:
    """Return a number that a class computes with; CheckpointError, which starts with `what`, unless
    it is one from `least` to LARGEST."""
    # JSON's true is an int to Python
    if isinstance(value, int | float) and value is not True and least <= value <= LARGEST:
        return float(value)
    raise CheckpointError(
        f"{what} is {repr(value)[:100]}, expected a number from {least:g} to {LARGEST:g}"
    )


def count(config: ConfigJson, key: str, where: str, default: int = 0) -> int:
    """Return a number of things of any config.json; `default` where it says none.

    Raises:
        CheckpointError: it is no whole number of at least 0.
    """
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a whole number of at least 0")
    return value


def refuse_in_any_form(config: ConfigJson, where: str) -> None:
    """Raise UnsupportedModelError for what neither a dense model nor a mixture may have."""
    for key in ELSEWHERE:
        if config.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is set, so transformers reads other files than this program; "
                "save the model again"
            )
    if config.get("is_causal", True) is not True:
        raise UnsupportedModelError(
            f"{where}: is_causal is {config['is_causal']!r}: "
            "attention to later tokens can't be expressed as Qwen2-MoE"
        )
    # a Gemma's, of models that embed texts
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            f"{where}: use_bidirectional_attention is set, but a mixture's attention sees no later "
            "tokens"
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
        "as --expert NAME=DIR of upcycle and extend it is merged, without a model beside it; for "
        "all else merge it first, with peft's AutoPeftModelForCausalLM.from_pretrained(DIR)"
        ".merge_and_unload().save_pretrained(OUT), save the tokenizer there too, and give OUT; "
        f"if the weights beside it are merged already, remove {ADAPTER}"
    )


def read_config(directory: Path) -> ConfigJson:
    """Return config.json of a checkpoint.

    Raises:
        CheckpointError: no such directory, no valid config.json.
        UnsupportedModelError: an adapter, or a configuration that asks for code of the checkpoint
            or of a hub.
    """
    refuse_other_weights(Path(directory))
    config = read_json_object(require_directory(Path(directory)), "config.json")
    where = str(Path(directory) / "config.json")
    refuse_hooks(config, where)
    refuse_odd_type(config, where)
    return config


def read_generation_config(source: Path) -> ConfigJson | None:
    """Return generation_config.json where there is one.

    Raises:
        UnsupportedModelError: it asks for code of its own.
    """
    name = "generation_config.json"
    if not (source / name).is_file():
        return None
    value = read_json_object(source, name)
    refuse_hooks(value, str(source / name))
    return value
