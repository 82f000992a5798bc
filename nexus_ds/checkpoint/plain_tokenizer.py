"""Tokenizers that the `tokenizers` library alone reads as transformers does, without importing it.

That costs two seconds and 100 MB. transformers' plain class (PreTrainedTokenizerFast) takes
tokenizer.json as it stands, if nothing beside that file says more of it, the roles' tokens are
among its own, and the model is none that gets a class of its own whatever is said. Where any of
this is open, `plain_tokenizer` returns None and transformers is asked.
Not covered: what a tokenizer means (`tokenizer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import MIXTURES
from nexus_ds.checkpoint.json_files import confined, read_json_object
from nexus_ds.data.tokenizer import ANY_CLASS, CONFIG, refuse_far_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFINITION = "tokenizer.json"
OTHERS = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
"""Files that say more of a vocabulary."""
ROLE_MAP = "special_tokens_map.json"
"""Read unless tokenizer_config.json lists the added tokens."""
OWN_WAYS = ("qwen2", "mistral", "ministral")
"""Models whose tokenizers transformers reads or mends in its own way."""
ADDED = "added_tokens_decoder"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _never(value: object) -> bool:
    return False


HARMLESS: dict[str, Callable[[object], bool]] = {
    "backend": "tokenizers".__eq__,
    "chat_template": _is_text,
    "clean_up_tokenization_spaces": _is_bool,
    "model_input_names": _are_texts,
    "model_max_length": _is_number,
    "padding_side": ("left", "right").__contains__,
    "tokenizer_class": ANY_CLASS.__eq__,
}
"""Keys of tokenizer_config.json that change no id, with what they may hold."""


def plain_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, str]] | None:
    """Return a directory's tokenizer, and the tokens of its roles; None: ask transformers.

    Raises:
        CheckpointError: JSON files that are none, files that lie outside, or ids too large.
    """
    needed = ("config.json", CONFIG, DEFINITION)
    if not all((directory / name).is_file() for name in needed):
        return None
    if any((directory / name).exists() for name in OTHERS):
        return None
    model_type = read_json_object(directory, "config.json").get("model_type")
    if model_type in OWN_WAYS or model_type not in (*FAMILIES, *MIXTURES):
        return None
    config = read_json_object(directory, CONFIG)
    roles = _roles(config)
    # unless added tokens are listed, the map of roles is read too
    if roles is None or (ADDED not in config and (directory / ROLE_MAP).exists()):
        return None
    backend = _opened(confined(directory, DEFINITION))
    if backend is None or not _adds_nothing(backend, config, roles):
        return None
    refuse_far_ids(backend, directory)
    return backend, roles


def _roles(config: Mapping[str, object]) -> dict[str, str] | None:
    """Return the tokens of roles; None where tokenizer_config.json says anything unforeseen."""
    roles = {}
    if config.get("tokenizer_class") != ANY_CLASS:
        return None
    for key, value in config.items():
        if key in ROLES and isinstance(value, str):
            roles[key] = value
        elif key in ROLES and value is None:
            continue
        elif key != ADDED and not HARMLESS.get(key, _never)(value):
            return None
    return roles


def _opened(path: Path) -> Tokenizer | None:
    # a compiled library; most verbs need none of it
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    # The library has no narrower type; transformers is asked, whose words the message has.
    except Exception:
        return None


def _adds_nothing(
    backend: Tokenizer, config: Mapping[str, object], roles: Mapping[str, str]
) -> bool:
    """Return whether transformers would add no token to those of tokenizer.json."""
    own = {}
    special = set()
    for index, token in backend.get_added_tokens_decoder().items():
        own[str(index)] = {flag: getattr(token, flag) for flag in FLAGS}
        if token.special:
            special.add(token.content)
    # one without any is not what transformers saves
    return bool(own) and config.get(ADDED, own) == own and special.issuperset(roles.values())
