"""Excerpts of a domain's held-out documents, and its most frequent words.

Not covered: chats; languages that put no space between words, of which no words are found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nexus_ds.data.rows import Document
from nexus_ds.data.sources import Source
from nexus_ds.errors import DataError

LEAST = 600
"""Characters of a document that is long enough."""
MOST = 4000
"""Characters that are read of one."""
FREQUENT = 500
"""Words of a domain, at most."""
WORD = re.compile(r"(?<= )[^\W\d_]{4,}(?!\w)")
"""At least four letters and nothing else, after a space."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out text of one domain."""

    texts: list[str]
    """Beginnings of documents, in the order of the text."""
    frequent: list[str]
    """The most frequent words of all held-out text, most frequent first."""


def held_out(
    source: Source, domain: str, count: int, seed: int, on_bad_row: str = "error"
) -> HeldOut:
    """Return excerpts of `count` documents, drawn from the validation text under a seed.

    Args:
        source: the text.
        domain: whose text.
        count: documents, each of LEAST characters or more.
        seed: of the draw; it does not depend on other domains.
        on_bad_row: error | skip.

    Raises:
        DataError: no such domain, fewer such documents, or chats.
    """
    generator = np.random.default_rng(seed)
    words: Counter[str] = Counter()
    kept: list[tuple[int, str]] = []
    seen = 0
    for text in _texts(source.documents(domain, "validation", on_bad_row)):
        words.update(WORD.findall(text))
        if len(text) < LEAST:
            continue
        # a sample of a stream of unknown length: Vitter's algorithm R
        place = seen if seen < count else int(generator.integers(seen + 1))
        if place < count:
            kept[place : place + 1] = [(seen, _excerpt(text))]
        seen += 1
    if seen < count:
        raise DataError(
            f"domain {domain!r}: found {seen} validation documents of at least {LEAST} "
            f"characters, expected {count}; give more text, or fewer --documents"
        )
    texts = [text for _, text in sorted(kept)]
    # by name where counts are equal, so that the order of the text decides nothing
    ranked = sorted(words, key=lambda word: (-words[word], word))
    return HeldOut(texts, ranked[:FREQUENT])


def _texts(documents: Iterator[Document]) -> Iterator[str]:
    for document in documents:
        if document.chat:
            raise DataError(
                f"{document.where}: a chat (messages), expected text; --measures reads no chats"
            )
        yield document.text


def _excerpt(text: str) -> str:
    if len(text) <= MOST:
        return text
    # without the word that is cut through
    return text[:MOST].rsplit(maxsplit=1)[0]
