"""Held-out excerpts: which documents, their words, and what is refused."""

import json
import re
from collections import Counter

import pytest
from held_out_text import write_text

from nexus_ds.data import held_out as module
from nexus_ds.data.corpora import open_source
from nexus_ds.data.held_out import LEAST, MOST, held_out
from nexus_ds.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), documents=40)


def documents_of(folder, domain="alpha"):
    lines = (folder / domain / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_a_seed_draws_documents_in_the_order_of_the_text(folder):
    source = open_source(str(folder))
    every = documents_of(folder)
    found = held_out(source, "alpha", 5, seed=1).texts
    places = [every.index(text) for text in found]
    assert places == sorted(places) and len(set(places)) == 5
    assert held_out(source, "alpha", 5, seed=1).texts == found
    assert held_out(source, "alpha", 5, seed=2).texts != found
    # all of them, but for the one that is too short
    assert held_out(source, "alpha", 40, seed=1).texts == every[:40]


def test_every_document_is_drawn_equally_often(folder):
    source = open_source(str(folder))
    every = documents_of(folder)[:40]
    counts = Counter()
    for seed in range(300):
        counts.update(every.index(text) for text in held_out(source, "alpha", 10, seed).texts)
    # 75 expected, with a standard deviation of 7.5
    assert min(counts.values()) > 45 and max(counts.values()) < 105


def test_frequent_words_are_those_of_all_the_text(folder, monkeypatch):
    monkeypatch.setattr(module, "FREQUENT", 12)
    counts = Counter()
    for text in documents_of(folder):
        counts.update(re.findall(r"[a-z]{4,}", text.partition(" ")[2]))
    expected = sorted(counts, key=lambda word: (-counts[word], word))[:12]
    assert held_out(open_source(str(folder)), "alpha", 2, seed=0).frequent == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A word, some2 digits", ["word", "digits"]),
        ("first does not count, don't either", ["does", "count", "either"]),
        ("die Größe übertrifft alles", ["Größe", "übertrifft", "alles"]),
    ],
)
def test_words(text, words):
    assert module.WORD.findall(text) == words


def test_long_documents_are_cut_between_words(tmp_path):
    folder = write_text(tmp_path / "text", documents=2, words=2000)
    (text, _) = held_out(open_source(str(folder)), "alpha", 2, seed=0).texts
    whole = documents_of(folder)[0]
    assert len(text) <= MOST and whole.startswith(f"{text} ")
    assert len(text) > MOST - 12


def test_too_little_text(folder):
    with pytest.raises(DataError) as caught:
        held_out(open_source(str(folder)), "alpha", 41, seed=0)
    assert str(caught.value) == (
        f"domain 'alpha': found 40 validation documents of at least {LEAST} characters, "
        "expected 41; give more text, or fewer --documents"
    )


def test_chats_are_refused(tmp_path):
    folder = write_text(tmp_path / "text")
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "alpha" / "validation.jsonl").write_text(json.dumps(chat) + "\n")
    with pytest.raises(DataError, match=r"jsonl:1: a chat .* --measures reads no chats"):
        held_out(open_source(str(folder)), "alpha", 1, seed=0)
