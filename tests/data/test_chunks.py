"""Chunks with embeddings of their own: embedded once, found again by text and encoder."""

import json

import pytest
import torch

from nexus_ds.data import chunks
from nexus_ds.data.chunks import embed_chunks
from nexus_ds.errors import IncompatibleModelsError

TEXTS = {"law": [f"the court finds {i}" for i in range(40)], "code": ["return x", "import os"]}
REVISION = "r" * 64


class CountingEncoder:
    """Three numbers of a text, as a unit vector."""

    embedded = 0

    def __init__(self, name):
        self.name = name

    def windows(self, text, limit):
        return [text]

    def encode(self, texts):
        type(self).embedded += len(texts)
        rows = [[len(text), text.count("i"), 1 + text.count("t")] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1).numpy()


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.setattr(CountingEncoder, "embedded", 0)
    monkeypatch.setattr(chunks, "SentenceEncoder", CountingEncoder)
    monkeypatch.setattr(chunks, "encoder_directory", lambda name: name)
    monkeypatch.setattr(chunks, "weights_hash", lambda directory: REVISION)
    return CountingEncoder


def test_every_chunk_has_a_unit_vector_in_order(encoder, tmp_path):
    found = embed_chunks(TEXTS, "enc", REVISION, tmp_path)
    assert list(found) == ["law", "code"]
    assert found["law"].shape == (40, 3) and found["law"].dtype == torch.float32
    assert torch.allclose(found["law"].norm(dim=1), torch.ones(40))
    alone = torch.from_numpy(encoder("enc").encode([TEXTS["code"][1]])[0])
    assert torch.allclose(found["code"][1], alone)


def test_text_that_was_embedded_is_not_embedded_again(encoder, tmp_path):
    first = embed_chunks(TEXTS, "enc", REVISION, tmp_path)
    assert encoder.embedded == 42
    again = embed_chunks({**TEXTS, "new": ["one more"]}, "enc", REVISION, tmp_path)
    assert encoder.embedded == 43
    assert torch.equal(again["law"], first["law"])
    # the same characters with another border between two chunks
    moved = {"code": ["return ximport os"[:7], "return ximport os"[7:]]}
    embed_chunks(moved, "enc", REVISION, tmp_path)
    assert encoder.embedded == 45


def _cut(content):
    return content[:50]


def _flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def _renamed(content):
    return content.replace(b"vectors", b"victors")


def _unknown(content):
    return content.replace(b"F32", b"F33")


def _huge(content):
    # no bytes of sizes that numpy can't have
    about = dict(dtype="F32", shape=[2**62, 0], data_offsets=[0, 0])
    header = json.dumps({"vectors": about}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("damage", [_cut, _flipped, _renamed, _unknown, _huge, lambda content: b""])
def test_a_damaged_file_is_made_again(damage, encoder, tmp_path, capsys):
    first = embed_chunks(TEXTS, "enc", REVISION, tmp_path)
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert path.read_bytes() != whole
    again = embed_chunks(TEXTS, "enc", REVISION, tmp_path)
    assert all(torch.equal(first[domain], again[domain]) for domain in TEXTS)
    assert encoder.embedded == 84
    assert capsys.readouterr().err.count("the file is damaged, or of an older version, and is") == 2
    embed_chunks(TEXTS, "enc", REVISION, tmp_path)
    assert encoder.embedded == 84


def test_another_encoder_is_refused(encoder, tmp_path):
    with pytest.raises(IncompatibleModelsError, match="revision rrrrrrrrrrrr, the domain emb"):
        embed_chunks(TEXTS, "enc", "s" * 64, tmp_path)
    assert encoder.embedded == 0
