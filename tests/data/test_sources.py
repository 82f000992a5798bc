import os
from pathlib import Path

import pytest

from nexus_ds.data.sources import open_source
from nexus_ds.errors import DataError
from tests.data.conftest import bytes_read, sentences, write_jsonl

# Folders ------------------------------------------------------------------------------------------


def test_a_folder_gives_documents_by_domain_and_split_in_order(corpus: Path):
    source = open_source(str(corpus))
    assert source.name == str(corpus)
    assert source.domains() == ["alpha", "beta"]
    assert [d.text for d in source.documents("beta", "validation")] == sentences(4, 10)
    first = next(iter(source.documents("alpha", "train")))
    assert first.where == f"{corpus / 'alpha' / 'train.jsonl'}:1"
    assert source.size("alpha", "train") == (corpus / "alpha" / "train.jsonl").stat().st_size
    assert source.size("beta", "train") > (corpus / "beta" / "train.jsonl.gz").stat().st_size


def test_max_bytes_caps_the_text(corpus: Path):
    texts = [d.text for d in open_source(str(corpus)).documents("alpha", "train", max_bytes=1000)]
    assert sum(len(text.encode()) for text in texts) == 1000
    assert "".join(texts) == "".join(sentences(1, 40))[:1000]


def test_the_fingerprint_follows_the_bytes_of_the_file(corpus: Path):
    source = open_source(str(corpus))
    before = source.fingerprint("alpha", "train")
    assert (
        before == source.fingerprint("alpha", "train") != source.fingerprint("alpha", "validation")
    )
    write_jsonl(corpus / "alpha" / "train.jsonl", [*sentences(1, 39), "other"])
    assert source.fingerprint("alpha", "train") != before


def test_the_fingerprint_of_a_large_file_does_not_read_it(corpus: Path):
    with (corpus / "alpha" / "train.jsonl").open("wb") as stream:
        stream.truncate(100 << 30)
    source, read = open_source(str(corpus)), bytes_read()
    before = source.fingerprint("alpha", "train")
    assert bytes_read() - read < 1 << 20
    os.truncate(corpus / "alpha" / "train.jsonl", (100 << 30) + 1)
    assert source.fingerprint("alpha", "train") != before


def test_missing_text_is_named_with_what_is_there(corpus: Path, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"no text at .*nowhere; expected a folder with <domain>/train\.jsonl"
    ):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no domains; expected sub-folders"):
        open_source(str(corpus / "notes")).domains()
    source = open_source(str(corpus))
    with pytest.raises(DataError, match="no domain gamma; found: alpha, beta"):
        source.documents("gamma", "train")
    (corpus / "alpha" / "validation.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"no validation text; expected validation\.jsonl.*found: train\.jsonl"
    ):
        source.documents("alpha", "validation")
    write_jsonl(corpus / "alpha" / "train.jsonl.gz", ["twice"])
    with pytest.raises(DataError, match=r"several files: train\.jsonl, train\.jsonl\.gz; keep one"):
        source.documents("alpha", "train")


def test_an_empty_domain_is_an_error(corpus: Path):
    (corpus / "alpha" / "train.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"alpha/train\.jsonl: no documents"):
        list(open_source(str(corpus)).documents("alpha", "train"))
