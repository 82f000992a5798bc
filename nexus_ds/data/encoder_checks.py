"""What an encoder's files may say: nothing that needs other files, other code, or more memory than
what is stored.

sentence-transformers hands options of these files on to transformers and tokenizers, builds what
they give the sizes of, and reads a module wherever it is said to lie.

Not covered: weights that are missing (`sentence_encoder` notices random vectors); the tokenizer.
"""

from __future__ import annotations

import math
from pathlib import Path

from nexus_ds.code_hooks import ELSEWHERE, TRUSTED_ONLY, code_hooks, walk
from nexus_ds.data.encoder_files import (
    CONFIG,
    MODULES,
    WEIGHTS,
    Module,
    files_of,
    kind_of,
    read_modules,
)
from nexus_ds.errors import ConfigError
from nexus_ds.inputs import MOST_BYTES, read_bounded, require_file
from nexus_ds.typed_json import parsed

TRANSFORMERS = ("Transformer", "CLIPModel")
KINDS = (
    *("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "StaticEmbedding", "WordEmbeddings"),
    *("WeightedLayerPooling", "WordWeights", "BoW", "CNN", "LSTM"),
)
"""Modules that hold no others, which would lie in folders that modules.json does not name."""
ADAPTER = "adapter_config.json"
FILES = (*ELSEWHERE, "tokenizer_name_or_path")
OPTIONS = ("model", "config", "processor", "tokenizer")
"""Of what a module's configuration may hold options: keys end in `_args` or `_kwargs`."""
KNOWN = {
    "add_pooling_layer",
    "attn_implementation",
    "do_lower_case",
    "dtype",
    "is_causal",
    "max_length",
    "max_position_embeddings",
    "model_max_length",
    "padding",
    "padding_side",
    "torch_dtype",
    "truncation",
    "truncation_side",
    "use_bidirectional_attention",
    "use_cache",
    "use_fast",
}
"""Options that name no file and change no weights."""


def _read(path: Path) -> object:
    """Return the JSON in a file.

    Raises:
        ConfigError: it is too large or damaged.
    """
    try:
        return parsed(read_bounded(path, error=ConfigError))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; fetch or save the encoder again") from error


def _refuse_foreign(path: Path, config: object) -> None:
    """Raise ConfigError for keys that ask for code or for other files."""
    asked = [(place, value) for place, key, value in code_hooks(config) if key not in TRUSTED_ONLY]
    asked += [(place, value) for place, key, value in walk(config) if key in FILES and value]
    for place, value in asked:
        raise ConfigError(
            f"{path}: {place} = {str(value)[:100]!r} asks for code or files that are not the "
            "encoder's own; remove the key, or give another encoder"
        )


def _refuse_options(path: Path, config: object) -> None:
    """Raise ConfigError for options that might name files, or replace weights."""
    if not isinstance(config, dict):
        return
    for key in (f"{name}_{end}" for name in OPTIONS for end in ("args", "kwargs")):
        given = config.get(key) or {}
        unknown = sorted(set(given) - KNOWN) if isinstance(given, dict) else [str(given)[:100]]
        if unknown:
            raise ConfigError(
                f"{path}: {key} has {', '.join(unknown[:5])!r}, which is not handed on; expected "
                f"some of {', '.join(sorted(KNOWN))}: remove it, or give another encoder"
            )


def _numbers(config: object, part: str = "") -> list[int]:
    """Return the whole numbers under keys with `part` in their name, the largest first."""
    found = [value for _, key, value in walk(config) if part in key and type(value) is int]
    return sorted(found, reverse=True)


def _check_module(directory: Path, module: Module, size: int) -> None:
    """Raise ConfigError for a module that lies elsewhere, holds others, or is too large."""
    path = Path(module["path"])
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"{directory / MODULES}: path = {module['path'][:100]!r} leads out of the encoder; "
            "expected a folder in it: give another encoder"
        )
    if kind_of(module) not in (*TRANSFORMERS, *KINDS):
        raise ConfigError(
            f"{directory / MODULES}: type = {module['type'][:100]!r}, expected a module of "
            f"sentence-transformers, one of {', '.join((*TRANSFORMERS, *KINDS))}; "
            "give another encoder"
        )
    config = directory / path / CONFIG
    # of a transformer not all numbers are sizes: `sentence_encoder` counts what it would have
    if kind_of(module) in TRANSFORMERS or not config.exists():
        return
    largest = _numbers(_read(config))[:2]
    if len(largest) == 2 and math.prod(largest) > size:
        raise ConfigError(
            f"{config}: sizes of {largest[0]} and {largest[1]}, but the weights have {size:,} "
            "bytes in all; fetch or save the encoder again"
        )


def _check_config(path: Path, tensors: int) -> None:
    """Raise ConfigError for foreign code and files, and for more layers than tensors."""
    config = _read(path)
    _refuse_foreign(path, config)
    _refuse_options(path, config)
    layers = _numbers(config, "layer")[:1]
    if layers > [tensors]:
        raise ConfigError(
            f"{path}: {layers[0]} layers, but the weights have {tensors} tensors in all; "
            "fetch or save the encoder again"
        )


def transformer_of(directory: Path) -> Path | None:
    """Return the folder of an encoder's transformer, if it has one."""
    modules = read_modules(directory)
    folders = [directory / one["path"] for one in modules if kind_of(one) in TRANSFORMERS]
    return folders[0] if folders else None if modules else directory


def check_encoder(directory: Path) -> int:
    """Look through the files of an encoder before any of them is loaded; return its weights' bytes.

    Raises:
        ConfigError: a file is damaged or too large, or says what this module's first line forbids.
        SafetensorError: weights are damaged.
    """
    from safetensors import safe_open

    files = files_of(directory)
    weights = [file for file in files if file.suffix == WEIGHTS]
    tensors, size = 0, sum(map(require_file, weights))
    for file in weights:
        with safe_open(file, "numpy") as opened:
            tensors += len(opened.keys())
    for module in read_modules(directory):
        _check_module(directory, module, size)
    for file in files:
        if file.name == ADAPTER:
            raise ConfigError(
                f"{file}: an adapter's vectors depend on a model elsewhere; merge it into that "
                "model (model.merge_and_unload()) and save the whole encoder"
            )
        if file.suffix == ".json":
            require_file(file, MOST_BYTES, ConfigError)
        if file.name == CONFIG or file.match("sentence_*_config.json"):
            _check_config(file, tensors)
    return size
