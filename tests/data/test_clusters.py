"""Clusters: known domains are found again, names are safe, the pass over the corpus is exact."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nexus_ds.data.clusters import (
    Discovery,
    Words,
    corpus_files,
    distinctive_words,
    domain_names,
    fit_clusters,
    nearest,
)
from nexus_ds.data.domains import unit
from nexus_ds.data.rows import read_rows
from nexus_ds.errors import ConfigError, DataError
from tests.data.conftest import write_jsonl

WORDS = {
    "sea": "ship sail wind port mast",
    "wood": "tree leaf root moss fern",
    "maths": "sum proof lemma axiom ring",
}
SIZES = {"sea": 60, "wood": 40, "maths": 20}


class WordEncoder:
    """One dimension a word: domains that share no word are orthogonal."""

    name, revision, max_tokens = "words", "r1", 50

    def __init__(self) -> None:
        self.calls = 0

    def windows(self, text: str, limit: int) -> list[str]:
        return [text]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.calls += len(texts)
        known = [word for words in WORDS.values() for word in words.split()]
        counts = [[text.split().count(word) for word in known] for text in texts]
        return unit(np.array(counts, dtype=np.float32))


def document(domain: str, number: int) -> str:
    words = WORDS[domain].split()
    chosen = [words[(number * step + step) % 5] for step in range(1, 30)]
    return f"{' '.join(chosen)} and the rest {number}"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two files of mixed documents (SIZES); `meta` says which is which, unseen by the program."""
    names = ["sea", "wood", "sea", "wood", "sea", "maths"] * 20
    rows = [
        json.dumps({"text": document(n, i), "meta": {"truth": n, "odd": "\ud800"}})
        for i, n in enumerate(names)
    ]
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(rows[:70]) + "\n")
    (tmp_path / "corpus" / "deep" / "b.jsonl.gz").write_bytes(
        gzip.compress("\n".join(rows[70:]).encode())
    )
    (tmp_path / "corpus" / "notes.txt").write_text("not text of the corpus")
    return tmp_path / "corpus"


def written(out: Path) -> dict[str, dict[str, list]]:
    return {
        folder.name: {
            split: list(read_rows(folder / f"{split}.jsonl.gz"))
            for split in ("train", "validation")
        }
        for folder in sorted(out.iterdir())
    }


def discover(mixed: Path, out: Path, sample: int = 60, **settings) -> tuple:
    work = Discovery(corpus_files(mixed), WordEncoder(), **settings)
    clusters = work.fit(3, sample)
    out.mkdir()
    return work, clusters, work.write(clusters, out)


def test_what_a_writer_has_not_finished_is_no_text(tmp_path: Path):
    corpus = tmp_path / ".corpus"  # hidden itself, as given
    for name in ("a.jsonl", "deep/b.jsonl", ".found.tmp-9/d/train.jsonl", "deep/.c.jsonl"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(corpus / name, ["text"])
    assert corpus_files(corpus) == [corpus / "a.jsonl", corpus / "deep" / "b.jsonl"]


def test_known_domains_are_found_again(mixed: Path, tmp_path: Path):
    work, clusters, facts = discover(mixed, tmp_path / "out")
    found = written(tmp_path / "out")
    truth = {
        name: {d.meta["truth"] for split in splits.values() for d in split}
        for name, splits in found.items()
    }
    assert sorted(map(sorted, truth.values())) == [["maths"], ["sea"], ["wood"]]
    # largest first
    assert [next(iter(truth[name])) for name in clusters.names] == ["sea", "wood", "maths"]
    for name in found:
        (domain,) = truth[name]
        assert set(name.split("-")) <= set(WORDS[domain].split())
        splits = found[name]
        assert facts[name].train == len(splits["train"])
        assert facts[name].validation == len(splits["validation"])
        assert len(splits["train"]) + len(splits["validation"]) == SIZES[domain]
    assert clusters.silhouette > 0.7
    assert (work.documents, len(work.known), work.skipped) == (120, 60, 0)


def test_every_document_is_written_once_in_order_and_unchanged(mixed: Path, tmp_path: Path):
    discover(mixed, tmp_path / "out")
    original = [(d.text, d.meta) for file in corpus_files(mixed) for d in read_rows(file)]
    copies = [
        (d.text, d.meta)
        for splits in written(tmp_path / "out").values()
        for s in splits.values()
        for d in s
    ]
    assert (
        sorted(map(str, copies)) == sorted(map(str, original)) and original[0][1]["odd"] == "\ud800"
    )
    for splits in written(tmp_path / "out").values():
        for documents in splits.values():
            numbers = [int(d.text.rsplit(" ", 1)[1]) for d in documents]
            assert numbers == sorted(numbers)


def test_chats_stay_chats(mixed: Path, tmp_path: Path):
    """And plain text beside them plain text."""
    rows = (mixed / "a.jsonl").read_text().splitlines()
    for number in range(0, len(rows), 2):
        row = json.loads(rows[number])
        question, answer = row["text"].split(" and ")
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows[number] = json.dumps({"messages": talk, "meta": row["meta"]})
    (mixed / "a.jsonl").write_text("\n".join(rows))
    discover(mixed, tmp_path / "out")
    original = [d for file in corpus_files(mixed) for d in read_rows(file)]
    copies = [
        document
        for splits in written(tmp_path / "out").values()
        for documents in splits.values()
        for document in documents
    ]
    seen = [
        sorted(str((d.text, d.meta, d.chat)) for d in documents) for documents in (original, copies)
    ]
    assert seen[0] == seen[1] and sum(d.chat is not None for d in copies) == 35


def test_the_same_seed_gives_the_same_bytes_and_another_another_split(mixed: Path, tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        discover(mixed, tmp_path / name, seed=seed)
    files = {name: sorted((tmp_path / name).rglob("*.gz")) for name in ("one", "two", "three")}
    assert [f.read_bytes() for f in files["one"]] == [f.read_bytes() for f in files["two"]]
    held = [
        {d.text for s in written(tmp_path / n).values() for d in s["validation"]}
        for n in ("one", "three")
    ]
    assert held[0] != held[1]


def test_words_alone_part_what_the_encoder_takes_for_the_same(mixed: Path, tmp_path: Path):
    class Blind(WordEncoder):
        def encode(self, texts: Sequence[str]) -> np.ndarray:
            return np.ones((len(texts), 1), dtype=np.float32)

    work = Discovery(corpus_files(mixed), Blind())
    clusters = work.fit(3, 60)
    (tmp_path / "out").mkdir()
    facts = work.write(clusters, tmp_path / "out")
    sizes = [facts[name].train + facts[name].validation for name in clusters.names]
    assert sizes == [60, 40, 20]


def test_words_of_a_document():
    texts = ["ship sail", "sail ship", "tree leaf", "leaf tree"] * 2 + ["ship tree"]
    vectors = Words(texts, 0).vectors([*texts[:3], "lemma"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0])
    np.testing.assert_allclose(vectors[0], vectors[1])
    assert vectors[0] @ vectors[2] < 0.5
    for nothing in ([], ["a", "b"], ["ship"] * 9):  # no text, no word, one word that all have
        assert not Words(nothing, 0).vectors(["ship"]).any()


def test_a_large_sample_is_clustered_in_batches(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("nexus_ds.data.clusters.LARGE", 50)
    _, clusters, facts = discover(mixed, tmp_path / "out")
    sizes = [facts[name].train + facts[name].validation for name in clusters.names]
    assert sizes == [60, 40, 20]


@pytest.mark.parametrize("every", [2, 7, 20])
def test_validation_is_a_part_of_every_domain(mixed: Path, tmp_path: Path, every: int):
    _, _, facts = discover(mixed, tmp_path / "out", every=every)
    for found in facts.values():
        total = found.train + found.validation
        assert found.train >= 1 and 0 <= found.validation - total // every <= 1


def test_a_domain_of_less_than_one_stretch_has_one_document_for_validation(
    mixed: Path, tmp_path: Path
):
    _, _, facts = discover(mixed, tmp_path / "out", every=1000)
    counts = sorted((found.train, found.validation) for found in facts.values())
    assert counts == [(19, 1), (39, 1), (59, 1)]


def test_documents_of_the_sample_are_embedded_once(mixed: Path, tmp_path: Path):
    work, _, _ = discover(mixed, tmp_path / "out", sample=60)
    assert work.encoder.calls == 120


def test_damaged_rows(mixed: Path, tmp_path: Path):
    with (mixed / "a.jsonl").open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:71: broken JSON"):
        discover(mixed, tmp_path / "out")
    work, _, _ = discover(mixed, tmp_path / "again", on_bad_row="skip")
    assert work.skipped == 1 and work.documents == 120


def test_what_can_not_be_clustered(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"no text at .*nowhere: nothing there; expected files of one"
    ):
        corpus_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match="none in it"):
        corpus_files(tmp_path)
    (tmp_path / "book.txt").write_text("words")
    with pytest.raises(DataError, match="a file of another kind"):
        corpus_files(tmp_path / "book.txt")
    write_jsonl(tmp_path / "few.jsonl", ["a ship", "a tree", "a sum"])
    with pytest.raises(
        DataError, match="found 3 documents for 2 domains; expected two for each: ask for fewer"
    ):
        Discovery(corpus_files(tmp_path / "few.jsonl"), WordEncoder()).fit(2, 10)
    vectors = unit(np.array([[1.0, 0.0]] * 9 + [[0.0, 1.0]]))
    with pytest.raises(
        DataError,
        match=r"one of the 2 domains has 1 of the 10 sampled documents, expected two or more",
    ):
        fit_clusters(["text"] * 10, vectors, 2, 0)
    with pytest.raises(
        ConfigError, match="one document of 1 for validation: expected one of 2 or more"
    ):
        Discovery([], WordEncoder(), every=1)


def test_a_tiny_domain_may_fall_through_the_silhouettes_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nexus_ds.data.clusters.SILHOUETTE_SAMPLE", 1)
    vectors = np.repeat(np.eye(2), [8, 2], axis=0)
    assert fit_clusters(["tree"] * 8 + ["ship"] * 2, vectors, 2, 0).silhouette == 0.0


def test_nearest_is_the_euclidean_one():
    generator = np.random.default_rng(0)
    vectors, centres = generator.normal(size=(40, 5)), generator.normal(size=(4, 5))
    distances = np.linalg.norm(vectors[:, None] - centres[None], axis=-1)
    assert (nearest(vectors, centres) == distances.argmin(axis=1)).all()


def test_names_are_safe_and_differ():
    words = [["theorem", "proof"], ["proof", "lemma", "axiom"], ["москва", "река"], ["x" * 80], []]
    assert domain_names(words) == [
        "theorem-proof",
        "lemma-axiom",
        "domain-3",
        "domain-4",
        "domain-5",
    ]
    labels = np.array([0, 0, 1, 1])
    texts = ["the Café opens, café 12", "café table", "../usr passwd", "the usr-file"]
    found = distinctive_words(texts, labels, 2)
    assert found[0][0] == "cafe" and found[1][0] == "usr"
    assert distinctive_words(["1 2", "3"], np.array([0, 1]), 2) == [[], []]


def test_memory_does_not_grow_with_the_corpus(mixed: Path, tmp_path: Path):
    """While writing no more than one batch of documents is alive; the files grow as it goes on."""
    work = Discovery(corpus_files(mixed), WordEncoder())
    clusters = work.fit(3, 60)
    alive: list[int] = []
    features = work._features
    work._features = lambda batch: (alive.append(len(batch)), features(batch))[1]  # type: ignore[method-assign]
    (tmp_path / "out").mkdir()
    work.write(clusters, tmp_path / "out")
    assert max(alive) == 32 and sum(alive) == 120 and len(work.known) == 60
    assert os.path.getsize(tmp_path / "out" / clusters.names[0] / "train.jsonl.gz") > 0
