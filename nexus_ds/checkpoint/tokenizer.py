"""Tokenizers of checkpoints: what ids mean, whether two mean the same, and taking one along.

A tokenizer is known by what transformers makes of its files, not by the files: one vocabulary may
be stored as tokenizer.json, as vocab.json with merges.txt, or as tokenizer.model, and which class
reads it depends on config.json too.
Not covered: text to ids in bulk (`data.encoding`), training a tokenizer (`data.tokenizer`), merging
vocabularies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_ds.checkpoint.config_json import refuse_hooks
from nexus_ds.checkpoint.json_files import confined, read_json_object, require_directory
from nexus_ds.checkpoint.plain_tokenizer import plain_tokenizer
from nexus_ds.data.encoding import beginning
from nexus_ds.data.tokenizer import ANY_CLASS, CONFIG, EXTRA, for_any_class, open_tokenizer
from nexus_ds.errors import CheckpointError, IncompatibleModelsError, UnsupportedModelError
from nexus_ds.inputs import MOST_BYTES, read_bounded, require_file
from nexus_ds.outputs import copy_file, write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCABULARY_FILES = (
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"  # a folder of more
# of tokenizer_config.json, that name files
FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file")
# of config.json, by which transformers picks a class
READER_KEYS = ("model_type", "tokenizer_class", "auto_map")
ROLES = ("bos_token", "eos_token", "unk_token")  # padding is a matter of training
# where in a text an added token is found
MATCHING = ("content", "single_word", "lstrip", "rstrip", "normalized")
SHOWN = 5  # differences in a message
PROBE_TOKENS = 20  # in a text that two tokenizers are tried on
# What normalizers and pre-tokenizers differ in.
ODD_TEXT = (
    "e\u0301 \ufb01 \uff21 \u00bd \u0130",
    "1234567 3.14 007",
    " one  two   three\tfour\r\n\r\nfive \n",
    "don't WE'LL they've iPhone",
    "def f(x):\n    return x[0] != 'a_b'\n",
    "\u65e5\u672c\u8a9e "
    "\u043a\u0438\u0440\u0438\u043b\u043b\u0438\u0446\u0430 "
    "\ud55c\uad6d\uc5b4 \U0001f642",
)


@dataclass(frozen=True)
class TokenizerMeaning:
    """What a tokenizer's ids mean, and how it makes them of a text."""

    directory: Path
    backend: Tokenizer
    """That of the `tokenizers` library, without padding and truncation: both are of a training."""
    tokens: dict[int, str]
    """By id; added ones are among them."""
    splitting: dict[str, object]
    """All that decides how a text becomes tokens, as JSON by name."""
    roles: dict[str, str | None]
    """Which tokens begin, end and stand for the unknown, and what is put before a text."""
    loaded: PreTrainedTokenizerFast | None = None
    """As transformers loads it; None: it was not asked."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """It as transformers loads it, which imports transformers."""
        return self.loaded or _without_limits(open_tokenizer(self.directory))

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over ids, splitting and roles."""
        # sorted: the order of a vocabulary's entries in its file means nothing
        facts = [sorted(self.tokens.items()), self.splitting, self.roles]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """How many ids a model must embed."""
        return max(self.tokens, default=-1) + 1

    def difference(self, other: TokenizerMeaning) -> str | None:
        """Return None where the same text becomes the same ids, else the first differences."""
        ids = sorted(self.tokens.keys() | other.tokens.keys())
        here, there = self.tokens.get, other.tokens.get
        different = [index for index in ids if here(index) != there(index)]
        if different:
            pairs = []
            for index in different[:SHOWN]:
                pairs.append(f"{index} {_shown(here(index))} / {_shown(there(index))}")
            return f"{len(different)} of {len(ids)} tokens differ, the first: {'; '.join(pairs)}"
        names = []
        for name, part in self.splitting.items():
            if part != other.splitting[name]:
                names.append(name)
        return self._other_split(other, names) if names else None

    def beyond(self, smaller: TokenizerMeaning) -> str | None:
        """Return None where this tokenizer is `smaller` with more tokens, else what differs."""
        here = self.tokens.get
        different = [i for i, token in smaller.tokens.items() if here(i) != token]
        if different:
            pairs = [f"{i} {smaller.tokens[i]!r} / {_shown(here(i))}" for i in different[:SHOWN]]
            return f"{len(different)} tokens differ, the first: {'; '.join(pairs)}"
        names = []
        for name, part in smaller.splitting.items():
            if not _grew(name, part, self.splitting[name]):
                names.append(name)
        return smaller._other_split(self, names) if names else None

    def _other_split(self, other: TokenizerMeaning, names: list[str]) -> str | None:
        """Return a sentence with the first text that tokenizers of one vocabulary split apart.

        Parts of another name or form may still do the same: only what shows in a text counts.
        """
        for text in self._probe():
            mine = self._split(text)
            others = other._split(text)
            if mine == others:
                continue
            first = _first_difference(mine, others)
            shown = slice(max(first - 1, 0), first + 3)
            return (
                f"the same text becomes other tokens ({', '.join(names)}), "
                f"as {' '.join(mine[shown])!r} / {' '.join(others[shown])!r}"
            )
        return None

    def _split(self, text: str) -> list[str]:
        try:
            return self.backend.encode(text, add_special_tokens=False).tokens
        # The library has no narrower type for a vocabulary of words without one for the unknown.
        except Exception:
            return []

    def _probe(self) -> Iterator[str]:
        """Yield odd text, then all tokens, some at a time, side by side and apart."""
        yield from ODD_TEXT
        # each id on its own: some decoders join or strip what stands side by side
        single = [[index] for index in sorted(self.tokens)]
        pieces = self.backend.decode_batch(single, skip_special_tokens=False)
        for start in range(0, len(pieces), PROBE_TOKENS):
            some = pieces[start : start + PROBE_TOKENS]
            yield "".join(some)
            yield " " + " ".join(some) + " "

    def other_roles(self, other: TokenizerMeaning) -> list[str]:
        """Return in which roles another tokenizer differs, what it has there and what this one."""
        differences = []
        for role, there in other.roles.items():
            here = self.roles[role]
            if there != here:
                differences.append(f"{role} is {_shown(there)}, not {_shown(here)}")
        return differences


def _grew(name: str, part: object, larger: object) -> bool:
    """Return whether a part of a tokenizer's `splitting` is the same, or the same and more."""
    if not isinstance(part, list) or not isinstance(larger, list):
        return part == larger
    if name == "added tokens":
        # a text that holds a new one splits anew, all others as before
        return set(map(json.dumps, part)) <= set(map(json.dumps, larger))
    if name == "scores":
        return larger[: len(part)] == part
    return part == larger


def _first_difference(a: list[str], b: list[str]) -> int:
    """Return the first index at which two lists differ, or one of them has ended."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def read_tokenizer(directory: Path) -> TokenizerMeaning:
    """Return what the tokenizer of a model directory means.

    Raises:
        CheckpointError: none there, one that doesn't load, or files outside the directory.
        UnsupportedModelError: a tokenizer that would run code of its own.
    """
    directory = require_directory(Path(directory))
    _check_files(directory)
    plain = plain_tokenizer(directory)
    if plain:
        return _meaning(directory, *plain)
    tokenizer = _without_limits(open_tokenizer(directory))
    roles = {role: str(getattr(tokenizer, role) or "") for role in ROLES}
    return replace(_meaning(directory, tokenizer.backend_tokenizer, roles), loaded=tokenizer)


def _without_limits(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _meaning(directory: Path, backend: Tokenizer, named: Mapping[str, str]) -> TokenizerMeaning:
    """Return what a tokenizer means; `named` are the tokens of its roles."""
    backend.no_truncation()
    backend.no_padding()
    tokens = {index: str(backend.id_to_token(index)) for index in backend.get_vocab().values()}
    roles = {role: named.get(role) or None for role in ROLES}
    before = "".join(tokens[index] for index in beginning(backend, directory))
    roles["what is put before a text"] = before or None
    return TokenizerMeaning(directory, backend, tokens, _splitting(backend), roles)


def tokenizer_fingerprint(directory: Path) -> str:
    """Return a hash that two models share whose tokenizers make the same ids; "none" without one.

    A model whose tokenizer does not load can be scored on text of another's all the same.
    """
    try:
        return read_tokenizer(directory).fingerprint
    except (CheckpointError, UnsupportedModelError):
        return "none"


def _splitting(backend: Tokenizer) -> dict[str, object]:
    """Return all that decides how a text becomes tokens, as JSON by the name in messages."""
    definition = json.loads(backend.to_str())
    model = definition["model"]
    # Taken out of the model: ids are compared as tokens, and only a unigram model's have scores.
    vocabulary = model.pop("vocab", None)
    scores = [score for _, score in vocabulary] if isinstance(vocabulary, list) else []
    added = [[token[key] for key in MATCHING] for token in definition["added_tokens"]]
    return {
        "merges": model.pop("merges", []),
        "scores": scores,
        "model": model,
        "normalizer": definition["normalizer"],
        "pre_tokenizer": definition["pre_tokenizer"],
        "added tokens": sorted(added),
    }


def _check_files(source: Path) -> None:
    """Refuse files that lie elsewhere, and a configuration that asks for code or names such."""
    for name in (*VOCABULARY_FILES, *_template_files(source)):
        confined(source, name)
    for name in ("config.json", CONFIG):
        config = _optional_json(source, name)
        refuse_hooks(config, str(source / name))
        for key in FILE_KEYS:
            named = config.get(key)
            if isinstance(named, str):
                confined(source, named)


def _optional_json(directory: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is no file."""
    return read_json_object(directory, name) if (directory / name).is_file() else {}


def same_tokenizer_files(first: Path, second: Path) -> bool:
    """Return whether two directories hold the same tokenizer byte by byte, for the same class."""
    return _tokenizer_files(Path(first)) == _tokenizer_files(Path(second))


def _tokenizer_files(directory: Path) -> tuple[list[object], dict[str, bytes]]:
    """Return by what transformers picks the class that reads a tokenizer, and what it reads."""
    config = _optional_json(directory, "config.json")
    names = (*VOCABULARY_FILES, *_template_files(directory))
    present = [name for name in names if (directory / name).is_file()]
    contents = {name: read_bounded(confined(directory, name)) for name in present}
    return [config.get(key) for key in READER_KEYS], contents


def check_tokenizer(directory: Path, vocabulary: int) -> None:
    """Check that a tokenizer can be taken along and suits a model.

    Args:
        directory: of the model that it comes with.
        vocabulary: token ids that the model embeds.

    Raises:
        CheckpointError: no tokenizer there, or files outside its directory.
        IncompatibleModelsError: token ids beyond `vocabulary`.
        UnsupportedModelError: a tokenizer that would run code of its own.
    """
    meaning = read_tokenizer(directory)
    # a model may embed more: many are padded to a round number
    if meaning.size > vocabulary:
        last = meaning.size - 1
        raise IncompatibleModelsError(
            f"{directory}: the tokenizer has token ids up to {last} "
            f"({meaning.tokens[last]!r}), the model embeds {vocabulary}; "
            "give the tokenizer that the model was trained with"
        )


# Chat templates -----------------------------------------------------------------------------------


def _template_files(directory: Path) -> list[str]:
    """Return the names of the files of chat templates that are there."""
    single = [name for name in TEMPLATE_FILES if (directory / name).is_file()]
    # a folder lists its files in any order
    more = sorted(path.name for path in (directory / TEMPLATES).glob("*.jinja"))
    return [*single, *(f"{TEMPLATES}/{name}" for name in more)]


def chat_templates(directory: Path) -> dict[str, Any]:
    """Return a model's chat templates by the file that holds them.

    As in transformers, files of their own come before tokenizer_config.json.
    """
    directory = Path(directory)
    found: dict[str, Any] = {}
    for name in _template_files(directory):
        if name.endswith(".json"):
            found[name] = read_json_object(directory, name).get("chat_template")
        else:
            path = confined(directory, name)
            require_file(path, MOST_BYTES)
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    if found:
        return found
    template = _optional_json(directory, CONFIG).get("chat_template")
    return {CONFIG: template} if template else {}


# Taking a tokenizer along -------------------------------------------------------------------------


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files from one model directory into another, where it means the same.

    transformers picks the class that reads them by config.json of that directory, too, and its
    versions 4 and 5 differ in what some classes do: where the copied files might be read in another
    way than in `source`, they are written so that both versions, and any class, read them right.

    Raises:
        CheckpointError: no tokenizer there, or one whose files lie outside its directory.
        UnsupportedModelError: a tokenizer that would run code of its own.
    """
    source = Path(source)
    out = Path(out)
    meaning = read_tokenizer(source)
    _copy_files(source, out, _more_files(meaning))
    # The first is the cheap proof; files that differ may still mean the same.
    if _is_for_any_class(out) and (same_tokenizer_files(source, out) or _means(out, meaning)):
        return
    _write_for_any_class(meaning.tokenizer, out)
    if not _means(out, meaning):
        raise CheckpointError(
            f"{source}: transformers reads this tokenizer in another way beside the new model's "
            "config.json; save it with tokenizer_class PreTrainedTokenizerFast in "
            "tokenizer_config.json"
        )


def _more_files(meaning: TokenizerMeaning) -> Iterable[str]:
    """Return the names of files that a tokenizer's class reads besides the usual ones."""
    # the class of a plain one has none
    return meaning.loaded.vocab_files_names.values() if meaning.loaded else ()


def _copy_files(source: Path, out: Path, more: Iterable[str]) -> None:
    """Copy what is there of the usual files, of templates, and of the `more` that a class reads."""
    names = {*VOCABULARY_FILES, *_template_files(source), *more}
    for name in sorted(names):
        if (source / name).is_file():
            # templates may lie in a folder of their own
            (out / name).parent.mkdir(exist_ok=True)
            copy_file(confined(source, name), out / name)


def _means(directory: Path, meaning: TokenizerMeaning) -> bool:
    try:
        return read_tokenizer(directory).fingerprint == meaning.fingerprint
    # Its class needs files of other names.
    except CheckpointError:
        return False


def _is_for_any_class(directory: Path) -> bool:
    config = _optional_json(directory, CONFIG)
    said = config.get("tokenizer_class") == ANY_CLASS and "model_input_names" in config
    whole = (directory / "tokenizer.json").is_file()
    return whole and said and not isinstance(config.get(EXTRA), list)


def _write_for_any_class(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write tokenizer.json, and the class that reads it as it is into tokenizer_config.json."""
    definition = tokenizer.backend_tokenizer.to_str(pretty=True)
    write_text(out / "tokenizer.json", definition)
    write_json(out / CONFIG, for_any_class(tokenizer, _optional_json(out, CONFIG)))
