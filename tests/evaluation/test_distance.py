"""Distance of text from text against sums over words, and the jackknife against its definition."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from nexus_ds.data.held_out import HeldOut
from nexus_ds.errors import DataError
from nexus_ds.evaluation.distance import (
    STRETCH,
    distance,
    divergence,
    stretches,
    units,
    written,
)
from nexus_ds.evaluation.documents import PASSAGES
from nexus_ds.report.paired import mean_loss, standard_error


def reference(first, second):
    """Return the divergence of two lists of words as entropies: H((p + q) / 2) less the mean."""

    def entropy(shares):
        return -sum(share * math.log2(share) for share in shares if share)

    p, q = Counter(first), Counter(second)
    words = p.keys() | q.keys()
    p_shares = [p[word] / len(first) for word in words]
    q_shares = [q[word] / len(second) for word in words]
    middle = [(a + b) / 2 for a, b in zip(p_shares, q_shares, strict=True)]
    return entropy(middle) - (entropy(p_shares) + entropy(q_shares)) / 2


def some_text(seed, rows=9):
    generator = np.random.default_rng(seed)
    return [[f"w{n}" for n in generator.zipf(1.5, 20) if n < 40] for _ in range(rows)]


def test_distance_and_its_jackknife():
    # documents with one, two and three texts, not in a row
    documents = [4, 4, 7, 9, 9, 9, 2, 2, 5]
    found, real = some_text(0), some_text(1)
    measured = distance(documents, found, real)
    whole = reference(list(chain(*found)), list(chain(*real)))
    assert mean_loss(measured.values, measured.weights) == pytest.approx(whole, abs=1e-12)
    without = []
    for left_out in sorted(set(documents)):
        kept = [place for place, document in enumerate(documents) if document != left_out]
        parts = [[word for place in kept for word in rows[place]] for rows in (found, real)]
        without.append(reference(*parts))
    count = len(without)
    variance = (count - 1) / count * sum((x - np.mean(without)) ** 2 for x in without)
    error = standard_error(measured.values, measured.weights)
    assert error == pytest.approx(math.sqrt(variance), abs=1e-12)


def test_ends_of_the_scale():
    same, other = np.array([3, 1, 0, 0]), np.array([0, 0, 2, 2])
    assert divergence(same, 7 * same) == 0
    assert divergence(same, other) == 1
    # a model that says nothing is as far as can be
    assert divergence(np.zeros(4), other) == 1


def test_units_and_what_is_compared():
    assert units("Don't say\n\\alpha_2, 日本!") == [
        *("don", "'", "t", "say", "\\", "alpha_2", ",", "日本", "!")
    ]
    long = " ".join(f"w{number}" for number in range(100))
    assert written(long) == units(long)[:STRETCH]
    # the end may be half a word
    assert written("one two thr") == ["one", "two"]
    assert written("") == []


def test_stretches_lie_side_by_side():
    words = [f"W{number}" for number in range(3 * STRETCH * 2 + 5)]
    many = " ".join(["x"] * (3 * STRETCH * (PASSAGES + 1)))
    found = stretches(HeldOut([" ".join(words), "short", many], []), "alpha")
    assert [stretch.document for stretch in found] == [0, 0] + [2] * PASSAGES
    second = found[1]
    start = 3 * STRETCH
    assert second.prompt == " ".join(words[start : start + STRETCH])
    low = [word.lower() for word in words]
    assert second.real == low[start + STRETCH : start + 2 * STRETCH]
    assert second.after == low[start + 2 * STRETCH : start + 3 * STRETCH]


def test_too_little_text():
    long = " ".join(["x"] * 200)
    with pytest.raises(DataError) as caught:
        stretches(HeldOut([long, "short"], []), "alpha")
    assert str(caught.value) == (
        "domain 'alpha': fewer than two documents have 96 words and marks; give longer text, or "
        "leave generation out of --measures"
    )
