"""What the ids of a tokenizer mean, read from its files in any form; without transformers.

tokenizer.json, tokenizer.model (sentencepiece) and vocab.json are brought to one form, token by id,
with what added_tokens.json and tokenizer_config.json add to them. That tells whether two
vocabularies are the same or one is the other with more tokens; `tokenizer` compares how a text
becomes tokens, as transformers does it, and has the last word where models are put together.
Not covered: tokens that a class of transformers adds by itself; tiktoken files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from nexus_ds.checkpoint.json_files import (
    DIGITS,
    confined,
    read_json_object,
)
from nexus_ds.errors import CheckpointError
from nexus_ds.inputs import read_bounded

DEFINITION, PIECES, WORDS = "tokenizer.json", "tokenizer.model", "vocab.json"
CONFIG, ADDED, SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
SHOWN = 3  # differences in a message


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model's files."""

    form: str
    """The file that most of them come from."""
    tokens: dict[int, str]
    """By id; added ones are among them."""
    roles: dict[str, str]
    """Tokens by what they are for, as far as the files say it."""

    @property
    def size(self) -> int:
        """How many ids a model must embed."""
        return max(self.tokens, default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """A sha256 over ids and tokens, the same in whatever form they are stored."""
        text = json.dumps(sorted(self.tokens.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def grew_to(self, other: Vocabulary) -> bool:
        """Return whether another one has all of these, and more."""
        return len(other.tokens) > len(self.tokens) and self.tokens.items() <= other.tokens.items()

    def difference(self, other: Vocabulary) -> str | None:
        """Return None where all ids mean the same, else the first that don't."""
        ids = sorted(self.tokens.keys() | other.tokens.keys())
        differing = [i for i in ids if self.tokens.get(i) != other.tokens.get(i)]
        if not differing:
            return None
        pairs = []
        for index in differing[:SHOWN]:
            here, there = self.tokens.get(index), other.tokens.get(index)
            pairs.append(f"{index} {here!r} / {there!r}")
        return f"{len(differing)} of {len(ids)} tokens differ, the first: {'; '.join(pairs)}"


def _is_ids(value: object) -> TypeGuard[dict[str, int]]:
    # type and not isinstance: JSON's true is an int to Python
    return isinstance(value, dict) and all(type(item) is int for item in value.values())


def _damaged(path: Path, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: expected {expected}; fetch or save the tokenizer again")


def _by_id(path: Path, value: object) -> dict[int, str]:
    """Return tokens by id of a JSON object from tokens to ids."""
    if not _is_ids(value):
        raise _damaged(path, "an object from tokens to ids")
    return {index: token for token, index in value.items()}


def _of_definition(directory: Path) -> dict[int, str]:
    """Return the tokens of tokenizer.json."""
    path = directory / DEFINITION
    definition = read_json_object(directory, DEFINITION)
    model = definition.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):
        # a unigram model's are numbered as they stand
        if not all(isinstance(pair, list) and pair for pair in words):
            raise _damaged(path, "[token, score] of each piece")
        tokens = {index: str(pair[0]) for index, pair in enumerate(words)}
    else:
        tokens = _by_id(path, words)
    added = definition.get("added_tokens") or []
    try:
        return tokens | {int(entry["id"]): str(entry["content"]) for entry in added}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise _damaged(path, "id and content of each added token") from error


def _of_pieces(directory: Path) -> dict[int, str]:
    """Return the tokens of a sentencepiece model."""
    # a compiled library that most models need not have
    from sentencepiece import SentencePieceProcessor

    path = confined(directory, PIECES)
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_bounded(path))
        return {index: processor.IdToPiece(index) for index in range(processor.GetPieceSize())}
    # the library has no narrower type for what it can't parse; a piece may be no UTF-8
    except (RuntimeError, UnicodeDecodeError) as error:
        raise _damaged(path, "a sentencepiece model") from error


def _of_words(directory: Path) -> dict[int, str]:
    """Return the tokens of vocab.json."""
    return _by_id(directory / WORDS, read_json_object(directory, WORDS))


FORMS = {DEFINITION: _of_definition, PIECES: _of_pieces, WORDS: _of_words}
"""In the order in which transformers prefers them."""


def _optional(directory: Path, name: str) -> dict[str, object]:
    return read_json_object(directory, name) if (directory / name).is_file() else {}


def _content(token: object) -> str | None:
    """Return the text of a token that stands as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added(directory: Path, config: dict[str, object]) -> dict[int, str]:
    """Return the tokens that files beside the vocabulary add, by id."""
    found: dict[int, str] = {}
    if (directory / ADDED).is_file():
        found |= _by_id(directory / ADDED, read_json_object(directory, ADDED))
    listed = config.get("added_tokens_decoder")
    for index, token in listed.items() if isinstance(listed, dict) else ():
        text = _content(token)
        if text is None or not DIGITS.fullmatch(index):
            raise _damaged(directory / CONFIG, "added_tokens_decoder from ids to tokens")
        found[int(index)] = text
    return found


def _roles(sources: Iterable[dict[str, object]]) -> dict[str, str]:
    """Return the token of each role; later sources are asked first."""
    found: dict[str, str] = {}
    for source in sources:
        for role in ROLES:
            text = _content(source.get(role))
            if text:
                found[role] = text
    return found


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """Return what the ids of a model's tokenizer mean; None where there is none of a known form.

    Raises:
        CheckpointError: a damaged file, or one that lies outside the directory.
    """
    form = next((name for name in FORMS if (directory / name).is_file()), None)
    if form is None:
        return None
    tokens = FORMS[form](directory)
    config = _optional(directory, CONFIG)
    tokens |= _added(directory, config)
    roles = _roles([_optional(directory, SPECIAL), config])
    known = set(tokens.values())
    for token in roles.values():
        # transformers appends what a role names and no id means
        if token not in known:
            tokens[max(tokens, default=-1) + 1] = token
            known.add(token)
    return Vocabulary(form, tokens, roles)
