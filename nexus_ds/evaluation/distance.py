"""How far text that a model writes is from real text of its domain.

A document's excerpt is cut into stretches of three times STRETCH words: a prompt, what really
follows, and what follows that. The distance is the Jensen-Shannon divergence (bits, 0 to 1) between
the distributions of words in all continuations that a model wrote and in all real ones. A sample of
words is never at distance 0 from another: the third parts are as long, and their distance from the
second ones is what real text has.

A document's value is its influence on the jackknife, so that the mean of all is the divergence, and
their standard error the jackknife's.

Shapes: D documents, V words.
Not covered: the order of words, which this does not see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexus_ds.data.held_out import HeldOut
from nexus_ds.errors import DataError
from nexus_ds.evaluation.documents import PASSAGES, ByDocument

UNIT = re.compile(r"\w+|[^\w\s]")
"""A word or a mark, of small letters."""
STRETCH = 32


@dataclass(frozen=True)
class Stretch:
    """Three neighbouring parts of a document."""

    document: int
    prompt: str
    real: list[str]
    after: list[str]
    """What follows `real`."""


def units(text: str) -> list[str]:
    """Return the words and marks of a text, in small letters."""
    return UNIT.findall(text.lower())


def stretches(text: HeldOut, domain: str) -> list[Stretch]:
    """Return up to PASSAGES stretches of each document.

    Raises:
        DataError: fewer than two documents have one.
    """
    whole = 3 * STRETCH
    found = []
    for number, document in enumerate(text.texts):
        places = [match.span() for match in UNIT.finditer(document)]
        for start in range(0, len(places) - whole + 1, whole)[:PASSAGES]:
            begin = places[start][0]
            ends = [places[start + STRETCH * part - 1][1] for part in (1, 2, 3)]
            real = units(document[ends[0] : ends[1]])
            after = units(document[ends[1] : ends[2]])
            found.append(Stretch(number, document[begin : ends[0]], real, after))
    if len({stretch.document for stretch in found}) < 2:
        raise DataError(
            f"domain {domain!r}: fewer than two documents have {whole} words and marks; give "
            "longer text, or leave generation out of --measures"
        )
    return found


def written(text: str) -> list[str]:
    """Return what of a generated text is compared: STRETCH words at most, without the last one,
    which may have been cut short."""
    return units(text)[:-1][:STRETCH]


def divergence(first_V: np.ndarray, second_V: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of two vectors of counts in bits; 1 if one is empty."""
    if not first_V.sum() or not second_V.sum():
        return 1.0
    p_V = first_V / first_V.sum()
    q_V = second_V / second_V.sum()
    middle_V = (p_V + q_V) / 2
    return (_relative(p_V, middle_V) + _relative(q_V, middle_V)) / 2


def _relative(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence in bits."""
    there_V = p_V > 0
    return float((p_V[there_V] * np.log2(p_V[there_V] / q_V[there_V])).sum())


def distance(
    documents: Sequence[int], found: Sequence[Sequence[str]], real: Sequence[Sequence[str]]
) -> ByDocument:
    """Return the divergence between two samples of text, as influences [D] of the documents.

    Args:
        documents: whose each text is; of two documents at least.
        found, real: words of each text.
    """
    words: dict[str, int] = {}
    for row in [*found, *real]:
        for word in row:
            words.setdefault(word, len(words))
    first_DV = _counts(documents, found, words)
    second_DV = _counts(documents, real, words)
    first_V = first_DV.sum(axis=0)
    second_V = second_DV.sum(axis=0)
    whole = divergence(first_V, second_V)
    without = []
    for own_V, its_V in zip(first_DV, second_DV, strict=True):
        without.append(divergence(first_V - own_V, second_V - its_V))
    without_D = np.array(without)
    count = len(without)
    influence_D = (count - 1) * (without_D.mean() - without_D)
    return ByDocument(whole + influence_D, np.ones(count))


def _counts(
    documents: Sequence[int], texts: Sequence[Sequence[str]], words: dict[str, int]
) -> np.ndarray:
    """Return how often each document's texts have each word, as [D, V]."""
    rows = {document: row for row, document in enumerate(sorted(set(documents)))}
    counts_DV = np.zeros((len(rows), len(words)), dtype=np.int32)
    for document, text in zip(documents, texts, strict=True):
        for word in text:
            counts_DV[rows[document], words[word]] += 1
    return counts_DV
