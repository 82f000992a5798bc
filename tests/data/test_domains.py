import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nexus_ds.data.corpora import open_source
from nexus_ds.data.domains import (
    DomainEmbeddings,
    cosine_table,
    embed_domains,
    near_duplicates,
    read_domain_embeddings,
    sample_documents,
    unit,
    write_domain_embeddings,
)
from nexus_ds.data.rows import Document
from nexus_ds.errors import ConfigError, DataError, OutputExistsError
from tests.data.conftest import sentences


class LetterEncoder:
    """Counts letters: small, exact, and different for different text."""

    name, revision, max_tokens = "letters", "r1", 20

    def windows(self, text: str, limit: int) -> list[str]:
        return [text[start : start + 20] for start in range(0, len(text), 20)][:limit]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        counts = [
            [text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz 0123456789."]
            for text in texts
        ]
        return unit(np.asarray(counts, dtype=np.float32))


def embeddings(vectors: np.ndarray, names: list[str]) -> DomainEmbeddings:
    return DomainEmbeddings(
        names=names,
        vectors=vectors.astype(np.float32),
        encoder="letters",
        revision="r1",
        max_tokens=20,
        windows=2,
        documents=dict.fromkeys(names, 5),
        seed=0,
        data="demo",
    )


# Sampling and averaging ---------------------------------------------------------------------------


def test_the_sample_is_uniform_seeded_and_in_reading_order():
    documents = [Document(str(i), {}, f"f:{i}") for i in range(50)]
    one = sample_documents(iter(documents), 10, 0, "a")
    assert one == sample_documents(iter(documents), 10, 0, "a")
    assert one != sample_documents(iter(documents), 10, 1, "a")
    assert one != sample_documents(iter(documents), 10, 0, "b")
    assert [int(d.text) for d in one] == sorted(int(d.text) for d in one)
    assert sample_documents(iter(documents), 99, 0, "a") == documents
    drawn = np.zeros(50)
    for seed in range(400):
        for document in sample_documents(iter(documents), 10, seed, "a"):
            drawn[int(document.text)] += 1
    assert drawn.sum() == 4000
    assert (abs(drawn - 80) < 45).all()  # 5.6 standard deviations


def test_a_domains_vector_is_the_mean_of_unit_document_vectors(corpus: Path):
    encoder = LetterEncoder()
    made = embed_domains(
        open_source(str(corpus)), ["beta", "alpha"], encoder, documents=1000, windows=2
    )
    assert made.names == ["beta", "alpha"]
    assert made.documents == {"beta": 30, "alpha": 40}
    assert made.vectors.dtype == np.float32
    expected = [
        unit(encoder.encode(encoder.windows(text, 2)).mean(axis=0)) for text in sentences(1, 40)
    ]
    np.testing.assert_allclose(made.vector("alpha"), np.mean(expected, axis=0), atol=1e-6)
    assert (made.encoder, made.revision, made.dimension, made.data) == (
        "letters",
        "r1",
        38,
        str(corpus),
    )


def test_few_documents_are_a_seeded_sample(corpus: Path):
    source = open_source(str(corpus))
    first = embed_domains(source, ["alpha"], LetterEncoder(), documents=5, seed=1)
    assert first.documents == {"alpha": 5}
    assert (
        first.vectors
        == embed_domains(source, ["alpha"], LetterEncoder(), documents=5, seed=1).vectors
    ).all()
    assert (
        first.vectors
        != embed_domains(source, ["alpha"], LetterEncoder(), documents=5, seed=2).vectors
    ).any()


def test_embedding_refuses_bad_requests(corpus: Path):
    source = open_source(str(corpus))
    with pytest.raises(ConfigError, match="at least 1, found 0 and 2"):
        embed_domains(source, ["alpha"], LetterEncoder(), documents=0)
    with pytest.raises(ConfigError, match="each once, found alpha, alpha"):
        embed_domains(source, ["alpha", "alpha"], LetterEncoder())
    with pytest.raises(DataError, match="no domain gamma"):
        embed_domains(source, ["gamma"], LetterEncoder())


# The file -----------------------------------------------------------------------------------------


def test_the_file_round_trips_and_is_not_overwritten(tmp_path: Path):
    made = embeddings(np.random.default_rng(0).normal(size=(2, 4)), ["a", "ä"])
    write_domain_embeddings(tmp_path / "d.safetensors", made)
    read = read_domain_embeddings(tmp_path / "d.safetensors")
    assert (read.vectors == made.vectors).all()
    assert {**vars(read), "vectors": 0} == {**vars(made), "vectors": 0}
    with pytest.raises(OutputExistsError):
        write_domain_embeddings(tmp_path / "d.safetensors", made)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_unknown_domains_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no embedding of the domain 'c'; the file has: a, b"):
        embeddings(np.ones((2, 4)), ["a", "b"]).vector("c")


def facts(**changes: object) -> dict[str, str]:
    made = {**vars(embeddings(np.ones((2, 4)), ["a", "b"])), **changes}
    del made["vectors"]
    return {"nexus_domains": json.dumps(made)}


@pytest.mark.parametrize(
    ("vectors", "metadata", "message"),
    [
        (np.ones((2, 4), np.float32), {}, "holds vectors, not domain embeddings"),
        (
            np.ones((2, 4), np.float32),
            {"nexus_domains": "{"},
            "its description of the domains is damaged",
        ),
        (np.ones((2, 4), np.float32), facts(other=1), "its description of the domains is damaged"),
        (
            np.ones((3, 4), np.float32),
            facts(),
            r"vectors are float32 \[3, 4\], expected float32 \[2, dimension\]",
        ),
        (np.ones((2, 4), np.float64), facts(), "vectors are float64"),
        (np.ones((2, 4), np.float32), facts(names=["a", "a"]), "a domain stands twice: a, a"),
        (
            np.array([[1.0, 2], [np.nan, 1]], np.float32),
            facts(),
            "the vector of b is zero or has values",
        ),
        (np.array([[0.0, 0], [2, 1]], np.float32), facts(), "the vector of a is zero"),
        (
            np.ones((2, 4), np.float32),
            facts(documents={"a": 5}),
            "d.safetensors: documents has no number for b, expected one for each domain; embed",
        ),
        (
            np.ones((2, 4), np.float32),
            facts(text_documents=[]),
            r"is damaged \(text_documents: found '\[\]', expected an object\); make it with: nexus",
        ),
        (
            np.ones((2, 4), np.float32),
            facts(text_bytes={"a": "x"}),
            r"is damaged \(text_bytes.a: found 'x', expected a whole number\); make it with",
        ),
        (
            np.ones((2, 4), np.float32),
            facts(text_documents={"a": float("inf")}),
            r"is damaged \(text_documents.a: found 'inf', expected a whole number\)",
        ),
        (
            np.ones((2, 4), np.float32),
            facts(names=["a", 1]),
            r"is damaged \(names\[1\]: found '1', expected text\)",
        ),
        (
            np.ones((2, 4), np.float32),
            facts(windows=True),
            r"is damaged \(windows: found 'True', expected a whole number\)",
        ),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, vectors: np.ndarray, metadata: dict, message: str
):
    save_file({"vectors": vectors}, tmp_path / "d.safetensors", metadata=metadata)
    with pytest.raises(DataError, match=message):
        read_domain_embeddings(tmp_path / "d.safetensors")


def test_files_of_other_kinds_are_refused(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"no domain embeddings at .*; make it with: nexus-ds embed"
    ):
        read_domain_embeddings(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="is not a safetensors file"):
        read_domain_embeddings(tmp_path / "text")


# What the vectors say -----------------------------------------------------------------------------


def test_cosine_table_and_near_duplicates():
    made = embeddings(np.array([[1.0, 0, 0], [0, 2, 0], [0.1, 3, 0]]), ["one", "second", "third"])
    assert cosine_table(made).splitlines() == [
        "          one  second  third",
        "one      1.00    0.00   0.03",
        "second   0.00    1.00   1.00",
        "third    0.03    1.00   1.00",
    ]
    [(first, second, cosine)] = near_duplicates(made)
    assert (first, second) == ("second", "third")
    assert cosine == pytest.approx(3 / (9.01**0.5))
    assert near_duplicates(made, 0.9999) == []
