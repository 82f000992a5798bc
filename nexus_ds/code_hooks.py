"""Keys of a configuration that make transformers run code, or read files, that are not its own.

Not covered: code in pickles (files of weights are told apart by `headers` and `encoder_files`).
"""

from __future__ import annotations

from collections.abc import Iterator

HOOKS = (
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
TRUSTED_ONLY = HOOKS[:4]
"""Those that do nothing where a library is told trust_remote_code=False."""
HARMLESS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)
"""Implementations of transformers, or of flash attention's package; anything else may be the name
of a kernel on a hub. (Without that package transformers takes its community's kernel, if `kernels`
is installed and the hub may be asked.)"""
ELSEWHERE = ("transformers_weights", "configuration_files")
"""Keys by which transformers reads other files than model.safetensors and config.json."""


def walk(value: object, path: str = "") -> Iterator[tuple[str, str, object]]:
    """Yield (dotted path, key, value) of every key in nested JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}{key}", key, item
            yield from walk(item, f"{path}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, f"{path}{index}.")


def code_hooks(config: object) -> Iterator[tuple[str, str, object]]:
    """Yield (dotted path, key, value) of the keys, at any depth, that ask for code."""
    for path, key, value in walk(config):
        if key not in HOOKS or value in (None, False):
            continue
        if key.endswith("_implementation") and value in HARMLESS:
            continue
        yield path, key, value
