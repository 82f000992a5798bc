"""Tokenizers of checkpoints: what their ids mean, whether two mean the same, and taking one from
model to model.

A tokenizer is known by what transformers makes of its files, not by the files: one vocabulary may
be stored as tokenizer.json, as vocab.json with merges.txt, or as tokenizer.model, and which class
reads it depends on config.json too.
Not covered: text to ids in bulk (`data.encoding`), training a tokenizer (`data.tokenizer`), merging
vocabularies.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.families import refuse_hooks
from nexus_ds.checkpoint.tensors import confined, read_json_object, require_directory
from nexus_ds.data.encoding import beginning
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import CheckpointError, IncompatibleModelsError
from nexus_ds.outputs import write_json

CONFIG = "tokenizer_config.json"
VOCABULARY_FILES = (
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
TEMPLATE_FILES, TEMPLATES = (
    ("chat_template.jinja", "chat_template.json"),
    "additional_chat_templates",
)
FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file")
# of config.json, by which transformers picks a class
READER_KEYS = ("model_type", "tokenizer_class", "auto_map")
ROLES = ("bos_token", "eos_token", "unk_token")  # padding is a matter of training
# where in a text an added token is found
MATCHING = ("content", "single_word", "lstrip", "rstrip", "normalized")
SHOWN, PROBE_TOKENS = 5, 20
ODD_TEXT = (  # what normalizers and pre-tokenizers differ in
    "e\u0301 \ufb01 \uff21 \u00bd \u0130",
    "1234567 3.14 007",
    " one  two   three\tfour\r\n\r\nfive \n",
    "don't WE'LL they've iPhone",
    "def f(x):\n    return x[0] != 'a_b'\n",
    "\u65e5\u672c\u8a9e \u043a\u0438\u0440\u0438\u043b\u043b\u0438\u0446\u0430 \ud55c\uad6d\uc5b4 \U0001f642",
)


@dataclass(frozen=True)
class TokenizerMeaning:
    """What a tokenizer's ids mean, and how it makes them of a text."""

    tokenizer: Any
    """As transformers loads it."""
    tokens: dict[int, str]
    """By id; added ones are among them."""
    splitting: dict[str, Any]
    """All that decides how a text becomes tokens, as JSON by name."""
    roles: dict[str, str | None]
    """Which tokens begin, end and stand for the unknown, and what is put before a text."""

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over ids, splitting and roles."""
        facts = [sorted(self.tokens.items()), self.splitting, self.roles]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def size(self) -> int:
        """How many ids a model must embed."""
        return max(self.tokens, default=-1) + 1

    def difference(self, other: TokenizerMeaning) -> str | None:
        """Return None where the same text becomes the same ids, else a sentence with the first
        differences."""
        ids = sorted(self.tokens.keys() | other.tokens.keys())
        pairs = [
            (i, self.tokens.get(i), other.tokens.get(i))
            for i in ids
            if self.tokens.get(i) != other.tokens.get(i)
        ]
        if pairs:
            shown = "; ".join(f"{i} {_shown(a)} / {_shown(b)}" for i, a, b in pairs[:SHOWN])
            return f"{len(pairs)} of {len(ids)} tokens differ, the first: {shown}"
        names = [name for name, part in self.splitting.items() if part != other.splitting[name]]
        return self._other_split(other, names) if names else None

    def _other_split(self, other: TokenizerMeaning, names: list[str]) -> str | None:
        """Return a sentence with the first text that two tokenizers of one vocabulary split in
        different ways."""
        for text in self._probe():
            a, b = self._split(text), other._split(text)
            if a != b:
                first = next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                    min(len(a), len(b)),
                )
                shown = [" ".join(x[max(first - 1, 0) : first + 3]) for x in (a, b)]
                return f"the same text becomes other tokens ({', '.join(names)}), as {shown[0]!r} / {shown[1]!r}"
        return None

    def _split(self, text: str) -> list[str]:
        try:
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens
        except Exception:  # a vocabulary of words that has none for the unknown
            return []

    def _probe(self) -> Iterator[str]:
        """Yield odd text, then all tokens, some at a time, side by side and apart."""
        yield from ODD_TEXT
        backend = self.tokenizer.backend_tokenizer
        pieces = backend.decode_batch([[i] for i in sorted(self.tokens)], skip_special_tokens=False)
        for start in range(0, len(pieces), PROBE_TOKENS):
            for between in ("", " "):
                yield between + between.join(pieces[start : start + PROBE_TOKENS]) + between

    def other_roles(self, other: TokenizerMeaning) -> list[str]:
        """Return in which roles another tokenizer differs, and what stands in them there and
        here."""
        return [
            f"{role} is {_shown(there)}, not {_shown(self.roles[role])}"
            for role, there in other.roles.items()
            if there != self.roles[role]
        ]


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
    tokenizer = open_tokenizer(directory)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both are of the training that saved it
    backend.no_padding()
    definition = json.loads(backend.to_str())
    model = definition["model"]
    vocabulary = model.pop("vocab", None)
    splitting = {
        "merges": model.pop("merges", []),
        "scores": [score for _, score in vocabulary] if isinstance(vocabulary, list) else [],
        "model": model,
        "normalizer": definition["normalizer"],
        "pre_tokenizer": definition["pre_tokenizer"],
        "added tokens": sorted(
            [token[key] for key in MATCHING] for token in definition["added_tokens"]
        ),
    }
    tokens = {index: str(backend.id_to_token(index)) for index in tokenizer.get_vocab().values()}
    roles = {role: getattr(tokenizer, role) and str(getattr(tokenizer, role)) for role in ROLES}
    roles["what is put before a text"] = "".join(tokens[i] for i in beginning(backend)) or None
    return TokenizerMeaning(tokenizer, tokens, splitting, roles)


def _check_files(source: Path) -> None:
    """Refuse files that lie elsewhere, and a configuration that asks for code or names files
    outside its directory."""
    for name in (*VOCABULARY_FILES, *_template_files(source)):
        confined(source, name)
    for name in ("config.json", CONFIG):
        if (source / name).is_file():
            config = read_json_object(source, name)
            refuse_hooks(config, str(source / name))
            for key in FILE_KEYS:
                if isinstance(config.get(key), str):
                    confined(source, config[key])


def same_tokenizer_files(first: Path, second: Path) -> bool:
    """Return whether two directories hold the same tokenizer byte by byte, read by the same class
    of transformers."""

    def facts(directory: Path) -> list[Any]:
        config = (
            read_json_object(directory, "config.json")
            if (directory / "config.json").is_file()
            else {}
        )
        names = (*VOCABULARY_FILES, *_template_files(directory))
        files = {name: confined(directory, name) for name in names if (directory / name).is_file()}
        return [
            [config.get(key) for key in READER_KEYS],
            {name: path.read_bytes() for name, path in files.items()},
        ]

    return facts(Path(first)) == facts(Path(second))


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
    if meaning.size > vocabulary:
        raise IncompatibleModelsError(
            f"{directory}: the tokenizer has token ids up to {meaning.size - 1} "
            f"({meaning.tokens[meaning.size - 1]!r}), the model embeds {vocabulary}; "
            "give the tokenizer that the model was trained with"
        )


# Chat templates ----------------------------------------------------------------------------------------------------


def _template_files(directory: Path) -> list[str]:
    """Return the names of the files of chat templates that are there."""
    more = sorted(f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).glob("*.jinja"))
    return [*(name for name in TEMPLATE_FILES if (directory / name).is_file()), *more]


def chat_templates(directory: Path) -> dict[str, Any]:
    """Return a model's chat templates by the file that holds them; files of their own come before
    tokenizer_config.json."""
    directory = Path(directory)
    found: dict[str, Any] = {}
    for name in _template_files(directory):
        found[name] = (
            read_json_object(directory, name).get("chat_template")
            if name.endswith(".json")
            else confined(directory, name).read_text(encoding="utf-8", errors="replace")
        )
    if not found and (directory / CONFIG).is_file():
        template = read_json_object(directory, CONFIG).get("chat_template")
        found = {CONFIG: template} if template else {}
    return found


# Taking a tokenizer along -------------------------------------------------------------------------------------------


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files from one model directory into another, where it means the same.

    transformers picks the class that reads them by config.json of that directory, too: where the
    copied files would be read in another way than in `source`, they are written so that any class
    reads them right.

    Raises:
        CheckpointError: no tokenizer there, or one whose files lie outside its directory.
        UnsupportedModelError: a tokenizer that would run code of its own.
    """
    source, out = Path(source), Path(out)
    meaning = read_tokenizer(source)
    names = {
        *VOCABULARY_FILES,
        *meaning.tokenizer.vocab_files_names.values(),
        *_template_files(source),
    }
    for name in sorted(names):
        if (source / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(confined(source, name), out / name)
    if same_tokenizer_files(source, out) or _means(out, meaning):
        return
    _write_for_any_class(meaning.tokenizer, out)
    if not _means(out, meaning):
        raise CheckpointError(
            f"{source}: transformers reads this tokenizer in another way beside the new model's config.json; save it with "
            "tokenizer_class PreTrainedTokenizerFast in tokenizer_config.json"
        )


def _means(directory: Path, meaning: TokenizerMeaning) -> bool:
    try:
        return read_tokenizer(directory).fingerprint == meaning.fingerprint
    except CheckpointError:  # its class needs files of other names
        return False


def _write_for_any_class(tokenizer: Any, out: Path) -> None:
    """Write tokenizer.json, and the class that reads it as it is into tokenizer_config.json."""
    (out / "tokenizer.json").write_text(
        tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8"
    )
    config = read_json_object(out, CONFIG) if (out / CONFIG).is_file() else {}
    roles = {role: getattr(tokenizer, role) for role in (*ROLES, "pad_token")}
    config |= {
        role: str(token)
        for role, token in roles.items()
        if token is not None and not config.get(role)
    }
    write_json(out / CONFIG, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
