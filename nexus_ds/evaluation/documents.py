"""What a model makes of held-out documents: bits per byte, and words that it has to choose.

Both are of the text and not of its tokens, so that models of different tokenizers compare.

**Bits per byte.** The nats of all tokens of a document, given those before it, over ln 2 and over
the document's bytes in UTF-8. The first token is given what opens a text in training: BOS, or the
end of the text before. A document longer than a window goes through in pieces; each piece begins
with the last token of the one before, so that every token is scored once.

**Cloze.** The last word of a passage is one of the domain's frequent words. The model chooses by
the summed log probability among it and CHOICES - 1 words of like frequency, of which none begins
with it or it with one; a tie is no answer.

Shapes: D documents, W windows, S tokens a window, P passages, C choices.
Not covered: tokenizers that change a text before they cut it, whose bits are those of another
text; chats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nexus_ds.checkpoint.needs import BATCH
from nexus_ds.data.encoding import Tokenizer, load_tokenizer
from nexus_ds.data.held_out import WORD, HeldOut
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import DataError
from nexus_ds.evaluation.passes import labels
from nexus_ds.evaluation.perplexity import score
from nexus_ds.progress import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

CHOICES = 10
NEAR = 30
"""Neighbours in frequency that the other choices are drawn from."""
PASSAGES = 8
"""Of a document, at most."""
CONTEXT = 160
"""Characters of a passage before its last word."""
PADDING = ~0
"""An id that is no label."""


@dataclass(frozen=True)
class ByDocument:
    """A number whose weighted mean over documents is the measure."""

    values: np.ndarray
    """[D] in the order of the text."""
    weights: np.ndarray
    """[D] what each document counts."""


@dataclass(frozen=True)
class Reader:
    """A checkpoint, and how it reads."""

    checkpoint: Path
    length: int
    """Tokens of a window."""
    batch: int = BATCH
    precision: str = "auto"
    bos: bool = True
    label: str = ""
    """What progress lines call it."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What makes ids of its text."""
        return load_tokenizer(self.checkpoint, self.bos)

    @cached_property
    def _backend(self) -> Backend:
        return self.tokenizer.backend()

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without what opens or closes it."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def nats(self, windows: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
        """Return the nats [W] of all labels of each window; every window has one.

        Args:
            windows: by domain ids [W, S+1], ~id for one that is no label.
            what: is measured, for the progress line.
        """
        title = f"{what} of {self.label or self.checkpoint.name}"
        scores = score(self.checkpoint, windows, self.batch, self.precision, title)
        found = {}
        for domain, tokens_WS in windows.items():
            found[domain] = scores.window_loss[domain] * labels(tokens_WS)
        return found


Row = tuple[Sequence[int], int]
"""Ids, and the place of the first that is a label."""


def _windows(rows: Sequence[Row]) -> np.ndarray:
    """Return rows as windows [W, S+1], as long as the longest."""
    longest = max(len(ids) for ids, _ in rows)
    windows_WS = np.full((len(rows), longest), PADDING)
    for window, (ids, first) in zip(windows_WS, rows, strict=True):
        found = np.array(ids)
        window[:first] = ~found[:first]
        window[first : len(ids)] = found[first:]
    return windows_WS


# Bits per byte -----------------------------------------------------------------------------------


def bits_per_byte(reader: Reader, texts: Mapping[str, Sequence[str]]) -> dict[str, ByDocument]:
    """Return the bits a byte of each document, which counts by its bytes, by domain.

    Says on stderr where tokens are unknown to the tokenizer, which makes the number too low.

    Args:
        reader: the model.
        texts: documents by domain.
    """
    windows = {}
    owners = {}
    for domain, documents in texts.items():
        windows[domain], owners[domain] = _pieces(reader, documents)
    _tell_unknown(reader, windows)
    found = {}
    for domain, nats_W in reader.nats(windows, "bits per byte").items():
        nats_D = np.bincount(owners[domain], nats_W)
        bytes_D = np.array([len(text.encode()) for text in texts[domain]])
        found[domain] = ByDocument(nats_D / math.log(2) / bytes_D, bytes_D)
    return found


def _pieces(reader: Reader, documents: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Return windows [W, S+1] over all tokens of documents, and whose [W] each is."""
    opening = reader.tokenizer.begin or (reader.tokenizer.end,)
    rows: list[Row] = []
    owners = []
    for number, text in enumerate(documents):
        ids = [*opening, *reader.ids(text)]
        # the last token of a piece is the next one's first input
        for start in range(0, len(ids) - 1, reader.length):
            piece = ids[start : start + reader.length + 1]
            first = max(1, len(opening) - start)
            rows.append((piece, first))
            owners.append(number)
    return _windows(rows), owners


def _tell_unknown(reader: Reader, windows: Mapping[str, np.ndarray]) -> None:
    unknown = open_tokenizer(reader.checkpoint).unk_token_id
    every = np.concatenate([tokens_WS.ravel() for tokens_WS in windows.values()])
    count = int((every == unknown).sum()) if unknown is not None else 0
    if count:
        say(
            f"warning: {count:,} of {int((every >= 0).sum()):,} tokens are unknown to the "
            f"tokenizer of {reader.label or reader.checkpoint}; its bits per byte are too few"
        )


# Cloze -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """Text before a word, and words to choose from."""

    document: int
    before: str
    choices: list[str]
    """The first is the one that the text has."""


def passages(text: HeldOut, domain: str, seed: int) -> list[Passage]:
    """Return the passages of a domain's documents, the same for every model.

    Args:
        text: of the domain.
        domain: its name, for messages.
        seed: which passages of a document, and which other choices.

    Raises:
        DataError: too few frequent words to choose from, or no passage that ends with one.
    """
    ranks = {word: rank for rank, word in enumerate(text.frequent)}
    if len(ranks) <= NEAR:
        raise DataError(
            f"domain {domain!r}: found {len(ranks)} words of four letters or more in its "
            f"validation text, expected more than {NEAR}; give more text, or leave cloze out of "
            "--measures"
        )
    generator = np.random.default_rng(seed)
    found = []
    for number, document in enumerate(text.texts):
        ends = [match for match in WORD.finditer(document, CONTEXT) if match[0] in ranks]
        count = min(PASSAGES, len(ends))
        for index in sorted(generator.choice(len(ends), count, replace=False)) if count else ():
            start = ends[index].start()
            # the space before the word is the word's
            before = document[start - CONTEXT : start - 1]
            choices = _choices(text.frequent, ranks[ends[index][0]], generator)
            found.append(Passage(number, before, choices))
    if not found:
        raise DataError(
            f"domain {domain!r}: no passage of {CONTEXT} characters ends with a frequent word; "
            "give other text, or leave cloze out of --measures"
        )
    return found


def _choices(words: Sequence[str], rank: int, generator: np.random.Generator) -> list[str]:
    """Return the word of a rank, and others out of those next to it.

    Raises:
        DataError: too few that neither begin the word nor are begun by it.
    """
    right = words[rank]
    # The beginning of a word is never less likely than all of it: "some" would always win against
    # "something", and always lose against "so".
    related = [word.startswith(right) or right.startswith(word) for word in words]
    apart = [word for word, is_related in zip(words, related, strict=True) if not is_related]
    if len(apart) < CHOICES - 1:
        raise DataError(
            f"found {len(apart)} frequent words that neither begin {right!r} nor are begun by it, "
            f"expected {CHOICES - 1} or more; give more text, or leave cloze out of --measures"
        )
    place = rank - sum(related[:rank])
    low = max(0, min(place - NEAR // 2, len(apart) - NEAR))
    others = apart[low : low + NEAR]
    drawn = generator.choice(len(others), CHOICES - 1, replace=False)
    return [right, *(others[index] for index in drawn)]


def cloze(reader: Reader, found: Mapping[str, Sequence[Passage]]) -> dict[str, ByDocument]:
    """Return the share of right answers of each document with a passage, which counts by their
    number, by domain.

    Raises:
        DataError: a window is too short for a word.
    """
    windows = {}
    for domain, asked in found.items():
        rows = [row for passage in asked for row in _asked(reader, passage)]
        windows[domain] = _windows(rows)
    scores = {}
    for domain, nats_W in reader.nats(windows, "cloze").items():
        nats_PC = nats_W.reshape(-1, CHOICES)
        # a model that can't tell them apart has not chosen
        right_P = nats_PC[:, 0] < nats_PC[:, 1:].min(axis=1)
        documents_P = np.array([passage.document for passage in found[domain]])
        counts_D = np.bincount(documents_P)
        right_D = np.bincount(documents_P, right_P)
        has_D = counts_D > 0
        scores[domain] = ByDocument(right_D[has_D] / counts_D[has_D], counts_D[has_D])
    return scores


def _asked(reader: Reader, passage: Passage) -> list[Row]:
    """Return the ids of the passage with each choice.

    Labels begin at the first token that tells the choices apart: where a word's tokens begin is
    the tokenizer's affair, and what all share changes no order.
    """
    texts = [f"{passage.before} {word}" for word in passage.choices]
    ids = [reader.ids(text) for text in texts]
    shortest = min(map(len, ids))
    # a choice whose tokens begin another's needs a label too
    common = min(_common(ids), shortest - 1)
    begin = reader.tokenizer.begin
    room = reader.length + 1 - len(begin)
    # of a passage that is too long, its end, and the same of all choices
    cut = max(0, max(map(len, ids)) - room)
    first = len(begin) + common - cut
    if first < 1:
        raise DataError(
            f"windows of {reader.length} tokens are too short for the word "
            f"{passage.choices[0]!r} after other text; give a longer --length"
        )
    return [([*begin, *row[cut:]], first) for row in ids]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all rows begin with."""
    count = 0
    for ids in zip(*rows, strict=False):
        if len(set(ids)) > 1:
            break
        count += 1
    return count
