"""A tokenizer as GGUF has it, of the kinds that llama.cpp splits text with as transformers does.

llama.cpp has no tokenizer.json: it knows ways to split by name. A byte-level BPE is one of them if
its normalizer and pre-tokenizer are, step by step, those of a name (`WAYS`); one of SentencePiece's
BPE if its merges are just those that the order of its pieces gives. Any other is refused.
Not covered: words of a vocabulary alone (Unigram, WordLevel, WordPiece).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nexus_ds.checkpoint.tokenizer import (
    TokenizerMeaning,
    chat_templates,
    read_tokenizer,
)
from nexus_ds.data.encoding import beginning
from nexus_ds.errors import ServingError

Json = dict[str, object]
Step = tuple[object, ...]
"""One step before merging: its type, and what it depends on."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES: Step = ("ByteLevel", True)
"""Splits as GPT-2, and takes bytes for letters."""
ONLY_BYTES: Step = ("ByteLevel", False)
WAYS: Mapping[tuple[Step, ...], str] = {
    (BYTES,): "gpt-2",
    (("Digits", True), BYTES): "smollm",
    (("Split", CONTRACTIONS + r"\p{N}{1,3}" + REST), ONLY_BYTES): "llama-bpe",
    (("NFC",), ("Split", CONTRACTIONS + r"\p{N}" + REST), ONLY_BYTES): "qwen2",
}
"""llama.cpp's name of each way to split."""
SPACE = "\u2581"
"""Stands for a space in SentencePiece's pieces."""
LONGEST = 512
"""Characters of a piece: SentencePiece's trainer makes them of 16, and the work on one grows with
the square of its length."""
NFC = "llama.cpp makes other tokens of letters whose accents stand apart (text that is not NFC)"
SPACED = "llama.cpp puts one more space before a text that begins with one"
NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What GGUF says of a tokenizer."""

    model: str
    """gpt2 | llama."""
    way: str
    """How text is split, by llama.cpp's name."""
    tokens: list[str]
    """As many as the model embeds."""
    types: list[int]
    merges: list[str]
    """Of a byte-level BPE; empty for SentencePiece's."""
    scores: list[float]
    """Of SentencePiece's; empty for a byte-level BPE."""
    roles: dict[str, int]
    """Ids of bos, eos, unknown and padding, where there are such."""
    begins: bool
    """Whether a text begins with bos."""
    spaced: bool
    """Whether a space is put before a text."""
    template: str
    """Of chats, in Jinja; empty: none."""
    notes: list[str] = field(default_factory=list)
    """Of what texts llama.cpp makes other tokens."""


def _refused(directory: Path, what: str) -> ServingError:
    known = ", ".join(WAYS.values())
    return ServingError(
        f"{directory}: the tokenizer {what}, which llama.cpp has no way for; known are the byte-"
        f"level BPEs that split as {known}, and SentencePiece's BPE"
    )


def _parts(definition: object) -> Iterator[Json]:
    """Yield the steps of a normalizer or pre-tokenizer; one of several comes apart."""
    if not isinstance(definition, dict):
        return
    for key in ("normalizers", "pretokenizers"):
        inner = definition.get(key)
        if isinstance(inner, list):
            for each in inner:
                yield from _parts(each)
            return
    yield definition


def _step(part: Json) -> Step:
    """Return one step with all that it depends on."""
    kind = part.get("type")
    pattern = part.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    plain = part.get("behavior") == "Isolated" and not part.get("invert")
    if kind == "Split" and regex and plain:
        return "Split", regex
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "ByteLevel", part.get("use_regex", True)
    if kind == "Digits":
        return "Digits", part.get("individual_digits")
    if kind == "NFC":
        return ("NFC",)
    # whatever else it says, no name has it
    return (json.dumps(part, sort_keys=True),)


def _steps(definition: Json) -> tuple[Step, ...]:
    parts = [*_parts(definition["normalizer"]), *_parts(definition["pre_tokenizer"])]
    return tuple(_step(part) for part in parts)


def _pairs(merges: object) -> list[tuple[str, str]]:
    """Return the merges, whichever way tokenizer.json has them."""
    found = []
    for merge in merges if isinstance(merges, list) else []:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _bpe(directory: Path, definition: Json) -> tuple[Json, dict[str, int]]:
    """Return the model and vocabulary of a BPE without odd habits; ServingError for another."""
    model = definition["model"]
    assert isinstance(model, dict)
    if model.get("type") != "BPE":
        raise _refused(directory, f"is of type {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(directory, f"has {key} {model[key]!r}")
    return model, dict(model["vocab"])


# SentencePiece ------------------------------------------------------------------------------------


def _spaced(directory: Path, definition: Json) -> bool:
    """Return whether SentencePiece's BPE puts a space before a text; ServingError for another."""
    parts = [*_parts(definition["normalizer"]), *_parts(definition["pre_tokenizer"])]
    kinds = [part.get("type") for part in parts]
    if kinds in (["Prepend", "Replace"], ["Replace"]):
        whole = parts[-1].get("content") == SPACE and parts[-1].get("pattern") == {"String": " "}
        prepends = len(parts) == 2
        if whole and (not prepends or parts[0].get("prepend") == SPACE):
            return prepends
    if kinds == ["Metaspace"]:
        only = parts[0]
        if only.get("replacement") == SPACE and not only.get("split", True):
            return only.get("prepend_scheme") != "never"
    shown = ", ".join(map(str, kinds)) or "nothing"
    raise _refused(directory, f"takes {shown} before its pieces")


def _check_order(directory: Path, merges: list[tuple[str, str]], vocab: dict[str, int]) -> None:
    """Raise ServingError unless merges follow from the order of the pieces, as llama.cpp has it.

    No piece may be longer than LONGEST.
    """
    longest = max(vocab, key=len, default="")
    if len(longest) > LONGEST:
        raise ServingError(
            f"{directory}: the tokenizer has a piece of {len(longest):,} characters "
            f"({longest[:20]!r}..), expected at most {LONGEST}; mend the vocabulary in its "
            "tokenizer.json"
        )
    # a score is the place in the vocabulary: merges have to come in that order
    ranks = [vocab[left + right] for left, right in merges]
    known = set(merges)
    # llama.cpp merges whatever gives a piece, tokenizer.json what it lists
    missing = [
        piece
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and (piece[:cut], piece[cut:]) not in known
    ]
    # pieces that are tokens whole, such as <s>, are never made of others
    made = {left + right for left, right in merges}
    if ranks != sorted(ranks) or made.intersection(missing):
        raise _refused(directory, "merges pieces in another order than that of their ids")


# Both ---------------------------------------------------------------------------------------------


def _types(
    tokens: Mapping[int, str], added: Sequence[Json], size: int, byte_pieces: bool
) -> list[int]:
    """Return the type of each id that the model embeds."""
    # models embed more than there are tokens: sizes are padded to round numbers
    types = [NORMAL if index in tokens else UNUSED for index in range(size)]
    for index, token in tokens.items():
        if byte_pieces and len(token) == 6 and token.startswith("<0x"):
            types[index] = BYTE
    for entry in added:
        place = entry["id"]
        assert isinstance(place, int)
        types[place] = CONTROL if entry.get("special") else OWN
    return types


def _refuse_homeless(meaning: TokenizerMeaning, size: int) -> None:
    """Raise ServingError for tokens that a model does not embed: the file has no place for them."""
    last = meaning.size - 1
    if last >= size:
        raise ServingError(
            f"{meaning.directory}: the tokenizer has token ids up to {last} "
            f"({meaning.tokens[last][:100]!r}), the model embeds {size}; give it the tokenizer "
            "that it was trained with"
        )


def _template(directory: Path) -> str:
    """Return the chat template, the one by default where there are several; empty: none."""
    # a dictionary of several is nothing that llama.cpp reads
    for found in chat_templates(directory).values():
        if isinstance(found, str):
            return found
    return ""


def read_words(directory: Path, size: int) -> Words:
    """Return a checkpoint's tokenizer as GGUF has it.

    Args:
        directory: of the checkpoint.
        size: ids that the model embeds.

    Raises:
        CheckpointError: no tokenizer there.
        ServingError: one that llama.cpp splits text otherwise with, or that has other tokens than
            the model embeds.
    """
    meaning = read_tokenizer(directory)
    _refuse_homeless(meaning, size)
    backend = meaning.backend
    definition: Json = json.loads(backend.to_str())
    model, vocab = _bpe(directory, definition)
    merges = _pairs(model.get("merges"))
    pieces = bool(model.get("byte_fallback"))
    spaced = False
    way = "default"
    # pieces of bytes are SentencePiece's
    if pieces:
        spaced = _spaced(directory, definition)
        _check_order(directory, merges, vocab)
    else:
        way = _way(directory, definition, model)
    added = definition["added_tokens"]
    assert isinstance(added, list)
    types = _types(meaning.tokens, added, size, pieces)
    roles = _roles(directory, meaning.roles, backend.get_vocab())
    if pieces and "unknown" in roles:
        types[roles["unknown"]] = UNKNOWN
    # what transformers puts before a text, llama.cpp has to put there too
    opening = beginning(backend, directory)
    if opening not in ((), (roles.get("bos"),)):
        raise _refused(directory, f"puts the ids {list(opening)} before a text")
    return Words(
        model="llama" if pieces else "gpt2",
        way=way,
        tokens=[meaning.tokens.get(index, f"[PAD{index}]") for index in range(size)],
        types=types,
        merges=[] if pieces else [" ".join(pair) for pair in merges],
        scores=[-float(index) for index in range(size)] if pieces else [],
        roles=roles,
        begins=bool(opening),
        spaced=spaced,
        template=_template(directory),
        notes=_notes(definition),
    )


def _notes(definition: Json) -> list[str]:
    """Return of what texts llama.cpp makes other tokens."""
    steps = _steps(definition)
    parts = list(_parts(definition["pre_tokenizer"]))
    # the normalizer of older files puts one there in any case
    kept = [part.get("prepend_scheme") != "never" for part in parts if part["type"] == "Metaspace"]
    notes = [NFC] if ("NFC",) in steps else []
    return notes + ([SPACED] if any(kept) else [])


def _way(directory: Path, definition: Json, model: Json) -> str:
    """Return llama.cpp's name of a byte-level BPE; ServingError where it has none."""
    steps = _steps(definition)
    way = WAYS.get(steps)
    if way is None:
        raise _refused(directory, f"splits text in these steps: {steps!r:.300}")
    # of Llama 3: a word of the vocabulary is never merged from parts
    whole = way == "llama-bpe"
    if bool(model.get("ignore_merges")) != whole:
        raise _refused(directory, f"splits as {way}, but has ignore_merges {not whole}")
    return way


def _roles(
    directory: Path, roles: Mapping[str, str | None], ids: Mapping[str, int]
) -> dict[str, int]:
    """Return the ids of tokens with a role; ServingError where nothing ends a text."""
    found = {}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token")):
        token = roles.get(key)
        if token is not None:
            found[name] = ids[token]
    if "eos" not in found:
        raise _refused(directory, "has no eos_token")
    return found
