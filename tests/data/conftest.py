"""Text and a tokenizer for the tests of nexus_ds.data."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from nexus_ds.data.tokenizer import train_tokenizer

TEXT = "the cat sat on a mat while rain fell over town and every child ran home to read"
WORDS = TEXT.split(" ")


def sentences(seed: int, count: int) -> list[str]:
    return [
        " ".join(WORDS[(seed + i * (k + 3)) % len(WORDS)] for k in range(12)) + f" {seed} {i}."
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], meta: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text, "meta": meta or {}}) + "\n" for text in texts]
    content = "".join(rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_tokenizer(iter(sentences(1, 50)), 300, out)
    return out


def bytes_read() -> int:
    """Return how many bytes this process has read by system calls so far, from caches too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def save_sentencepiece(out: Path, seed: int = 1) -> Path:
    """Save a tokenizer as older Llamas have it: tokenizer.model, and no tokenizer.json.

    BOS is put before a text.
    """
    import sentencepiece

    out.mkdir(parents=True, exist_ok=True)
    with (out / "tokenizer.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(seed, 50)),
            model_writer=stream,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    return out


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    write_jsonl(root / "alpha" / "train.jsonl", sentences(1, 40))
    write_jsonl(root / "alpha" / "validation.jsonl", sentences(2, 10))
    write_jsonl(root / "beta" / "train.jsonl.gz", sentences(3, 30))
    write_jsonl(root / "beta" / "validation.jsonl.zst", sentences(4, 10))
    (root / "notes").mkdir()
    return root
