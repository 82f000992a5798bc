"""What an encoder's files may say: nothing that needs other files, other code, or more memory than
what is stored.

sentence-transformers hands options of these files on to transformers and tokenizers, builds what
they give the sizes of, and reads a module or a shard wherever it is said to lie. So most of what is
said here is a list of what may be said.

Not covered: weights that are missing (`sentence_encoder` notices random vectors); what is in
tokenizer.json, whose library gives no bounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
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

TRANSFORMER = "Transformer"
KINDS = (
    TRANSFORMER,
    "Pooling",
    "Normalize",
    "Dense",
    "LayerNorm",
    "Dropout",
    "WeightedLayerPooling",
)
"""Modules that work on the states of a transformer, and lie in one folder each."""
MOST_MODULES = 20
ADAPTER, INDEX = "adapter_config.json", "*.safetensors.index.json"
LIBRARYS, PROCESSOR = "config_sentence_transformers.json", "processor_config.json"
FILES = (*ELSEWHERE, "tokenizer_name_or_path", "audio_tokenizer")
"""Keys by which the libraries read other files than the encoder's own."""
TEXTS = (".json", ".md", ".txt", ".model", ".jinja")
SETTINGS = "sentence_*_config.json"
TEXT_ONLY = {
    "max_seq_length",
    "do_lower_case",
    "transformer_task",
    "modality_config",
    "module_output_name",
    "unpad_inputs",
    "query_length",
    "document_length",
}
"""What a transformer's settings may have, beside options."""
OPTIONS = {
    f"{name}_{end}"
    for name in ("model", "config", "processor", "tokenizer")
    for end in ("args", "kwargs")
}
KNOWN = {
    "add_pooling_layer",
    "attn_implementation",
    "do_lower_case",
    "dtype",
    "is_causal",
    "model_max_length",
    "padding_side",
    "torch_dtype",
    "truncation_side",
    # the library takes it out, and is told what holds
    "trust_remote_code",
    "use_bidirectional_attention",
    "use_cache",
    "use_fast",
}
"""Options that name no file, give no sizes and change no weights."""
ACTIVATION = re.compile(r"torch\.nn(\.modules\.\w+)?\.[A-Z]\w*")
COUNTS = re.compile("layer|experts|groups|group_num|block_sizes|depths")
"""Keys that tell how often something is built; some models share weights among layers."""
SHARING = 8
MOST_LABELS = 100_000


def _read(path: Path) -> dict[str, object]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: it is too large, damaged, or something else.
    """
    try:
        found = parsed(read_bounded(path, error=ConfigError))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; fetch or save the encoder again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object; fetch or save the encoder again")
    return found


def _refused(path: Path, found: str) -> ConfigError:
    return ConfigError(
        f"{path}: {found[:300]} is not read, since it may name other files or code, or take any "
        "amount of memory; remove it, or give another encoder"
    )


def _numbers(config: object, keys: str | re.Pattern[str] = "") -> list[int]:
    """Return the whole numbers under keys that hold a pattern, lists' too, the largest first."""
    found: list[int] = []
    for _, key, value in walk(config):
        values = value if isinstance(value, list) else [value]
        if re.search(keys, key):
            found += [item for item in values if type(item) is int]
    return sorted(found, reverse=True)


def _check_config(path: Path, tensors: int) -> None:
    """Raise ConfigError for foreign code and files, and for more parts than the tensors make."""
    config = _read(path)
    for place, key, value in code_hooks(config):
        if key not in TRUSTED_ONLY:
            raise _refused(path, f"{place} = {str(value)[:100]!r}")
    for place, key, value in walk(config):
        if key in FILES and value:
            raise _refused(path, f"{place} = {str(value)[:100]!r}")
    bounds = (
        (COUNTS, SHARING * tensors, "layers or the like", f" for weights of {tensors} tensors"),
        ("num_labels", MOST_LABELS, "labels", ""),
    )
    for keys, most, what, reason in bounds:
        if (largest := max(_numbers(config, keys), default=0)) > most:
            raise ConfigError(
                f"{path}: found {largest} {what}, expected at most {most}{reason}; fetch or save "
                "the encoder again"
            )


def _check_settings(path: Path) -> None:
    """Raise ConfigError for what a transformer's settings need not say where text is embedded."""
    config = _read(path)
    for key, value in config.items():
        if key not in TEXT_ONLY | OPTIONS:
            raise _refused(path, f"{key} = {str(value)[:100]!r}")
        if key in OPTIONS and value and not (isinstance(value, dict) and set(value) <= KNOWN):
            raise _refused(path, f"{key} = {str(value)[:200]!r}")
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _refused(path, f"transformer_task = {config['transformer_task']!r}")
    for place, key, value in walk(config.get("modality_config")):
        if key == "method" and value != "forward":
            raise _refused(path, f"modality_config.{place} = {value!r}")


def _check_module(directory: Path, module: Module, size: int) -> None:
    """Raise ConfigError for a module that lies elsewhere, is of another kind, or is too large."""
    path = Path(module["path"])
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"{directory / MODULES}: path = {module['path'][:100]!r} leads out of the encoder; "
            "expected a folder in it: give another encoder"
        )
    if kind_of(module) not in KINDS:
        raise ConfigError(
            f"{directory / MODULES}: type = {module['type'][:100]!r}, expected a module of "
            f"sentence-transformers, one of {', '.join(KINDS)}; give another encoder"
        )
    config = directory / path / CONFIG
    # of a transformer not all numbers are sizes: `sentence_encoder` counts what it would have
    if kind_of(module) == TRANSFORMER or not config.exists():
        return
    facts = _read(config)
    activation = facts.get("activation_function")
    if activation is not None and not ACTIVATION.fullmatch(str(activation)):
        raise _refused(config, f"activation_function = {str(activation)[:100]!r}")
    largest = _numbers(facts)[:2]
    if math.prod(largest) > size:
        raise ConfigError(
            f"{config}: sizes of {' and '.join(map(str, largest))}, but the weights have {size:,} "
            "bytes in all; fetch or save the encoder again"
        )


def _check_modules(directory: Path, modules: list[Module], size: int) -> None:
    """Raise ConfigError for modules that can't be, or are repeated."""
    for module in modules[:MOST_MODULES]:
        _check_module(directory, module, size)
    kinds = [kind_of(module) for module in modules]
    places = {Path(module["path"]) for module in modules}
    if modules and (kinds.count(TRANSFORMER), kinds[0]) != (1, TRANSFORMER):
        found = f"{kinds.count(TRANSFORMER)} of {len(kinds)} modules are transformers"
    elif len(places) < len(modules) or len(modules) > MOST_MODULES:
        found = f"{len(modules)} modules in {len(places)} folders"
    else:
        return
    raise ConfigError(
        f"{directory / MODULES}: {found}; expected one transformer, and at most {MOST_MODULES - 1} "
        "others behind it, each in a folder of its own: give another encoder"
    )


def _check_index(path: Path) -> None:
    """Raise ConfigError for shards that are not safetensors files beside their index."""
    shards = _read(path).get("weight_map")
    names: Iterable[object] = shards.values() if isinstance(shards, dict) else ()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != WEIGHTS:
            raise _refused(path, f"{str(name)[:100]!r} in weight_map")


def _check_folder(folder: Path, tensors: int) -> None:
    """Raise ConfigError for what the library would read, or wait for, in one folder."""
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            continue
        # the library reads text whole, and waits for a pipe for ever
        if file.exists():
            require_file(file, MOST_BYTES if file.suffix in TEXTS else None, ConfigError)
        if file.name == ADAPTER:
            raise ConfigError(
                f"{file}: an adapter's vectors depend on a model elsewhere; merge it into that "
                "model (model.merge_and_unload()) and save the whole encoder"
            )
        if file.name in (CONFIG, PROCESSOR):
            _check_config(file, tensors)
        elif file.match(SETTINGS):
            _check_config(file, tensors)
            _check_settings(file)
        elif file.match(INDEX):
            _check_index(file)


def check_encoder(directory: Path) -> int:
    """Look through the files of an encoder before any of them is loaded; return its weights' bytes.

    Raises:
        ConfigError: a file is damaged or too large, or says what this module's first line forbids.
        SafetensorError: weights are damaged.
    """
    from safetensors import safe_open

    weights = [file for file in files_of(directory) if file.suffix == WEIGHTS]
    tensors, size = 0, sum(map(require_file, weights))
    for file in weights:
        with safe_open(file, "numpy") as opened:
            tensors += len(opened.keys())
    if (own := directory / LIBRARYS).exists():
        kind = _read(own).get("model_type", "SentenceTransformer")
        if kind != "SentenceTransformer":
            # which the library would make of the transformer alone
            raise _refused(own, f"model_type = {str(kind)[:100]!r}")
    modules = read_modules(directory)
    _check_modules(directory, modules, size)
    for folder in {directory, *(directory / module["path"] for module in modules)}:
        if folder.is_dir():
            _check_folder(folder, tensors)
    return size


def transformer_of(directory: Path) -> Path:
    """Return the folder of a checked encoder's transformer."""
    modules = read_modules(directory)
    return directory / modules[0]["path"] if modules else directory
