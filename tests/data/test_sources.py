from pathlib import Path

import pytest

from nexus_ds.data.sources import open_source
from nexus_ds.errors import DataError
from tests.data.conftest import sentences, write_jsonl

# Folders -----------------------------------------------------------------------------------------------------------


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
    assert before == source.fingerprint("alpha", "train") != source.fingerprint("alpha", "validation")
    write_jsonl(corpus / "alpha" / "train.jsonl", [*sentences(1, 39), "other"])
    assert source.fingerprint("alpha", "train") != before


def test_missing_text_is_named_with_what_is_there(corpus: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"no text at .*nowhere; expected a folder with <domain>/train\.jsonl"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no domains; expected sub-folders"):
        open_source(str(corpus / "notes")).domains()
    source = open_source(str(corpus))
    with pytest.raises(DataError, match="no domain gamma; found: alpha, beta"):
        source.documents("gamma", "train")
    (corpus / "alpha" / "validation.jsonl").unlink()
    with pytest.raises(DataError, match=r"no validation text; expected validation\.jsonl.*found: train\.jsonl"):
        source.documents("alpha", "validation")
    write_jsonl(corpus / "alpha" / "train.jsonl.gz", ["twice"])
    with pytest.raises(DataError, match=r"several files: train\.jsonl, train\.jsonl\.gz; keep one"):
        source.documents("alpha", "train")


def test_an_empty_domain_is_an_error(corpus: Path):
    (corpus / "alpha" / "train.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"alpha/train\.jsonl: no documents"):
        list(open_source(str(corpus)).documents("alpha", "train"))


# The datasets library ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    import datasets

    rows = [
        {"text": f"{name} {i}", "meta": {"redpajama_set_name": name}}
        for i in range(3)
        for name in ("RedPajamaArXiv", "RedPajamaBook", "Own")
    ]
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows),
        validation=datasets.Dataset.from_list([*rows[:2], {"text": "", "meta": {"redpajama_set_name": "Own"}}]),
    )
    data.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set_is_split_by_its_set_names(saved: Path):
    source = open_source(f"hub:{saved}")
    assert source.domains() == ["Own", "arxiv", "books"]
    documents = list(source.documents("books", "train"))
    assert [d.text for d in documents] == [f"RedPajamaBook {i}" for i in range(3)]
    assert documents[1].where == f"hub:{saved}[train]:4"
    assert source.fingerprint("books", "train") == open_source(f"hub:{saved}").fingerprint("books", "train")
    assert source.fingerprint("books", "train") != source.fingerprint("arxiv", "train")
    assert source.size("books", "train") > 0


def test_damaged_rows_of_a_data_set_are_named(saved: Path):
    source = open_source(f"hub:{saved}")
    with pytest.raises(DataError, match=r"saved\[validation\]:2: text is empty"):
        list(source.documents("Own", "validation"))
    with pytest.raises(DataError, match="no documents"):
        list(source.documents("Own", "validation", on_bad_row="skip"))


def test_a_directory_of_parquet_files_and_a_column_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"{kind} {i}", "kind": kind} for i in range(2) for kind in ("law", "art")]
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "files" / "train.parquet")
    source = open_source(f"hub:{tmp_path / 'files'}#kind")
    assert source.domains() == ["art", "law"]
    assert [d.text for d in source.documents("law", "train")] == ["law 0", "law 1"]
    with pytest.raises(DataError, match="no split validation; found: train"):
        source.documents("law", "validation")
    with pytest.raises(DataError, match=r"columns text, kind; expected text and meta\.redpajama_set_name"):
        open_source(f"hub:{tmp_path / 'files'}")
    with pytest.raises(DataError, match=r"the column kind\.x has no field x"):
        open_source(f"hub:{tmp_path / 'files'}#kind.x").domains()


def test_a_data_set_that_is_not_on_this_machine():
    with pytest.raises(DataError, match=r"hub:nobody/nothing-here: the data set can't be opened .*HF_HUB_OFFLINE=0"):
        open_source("hub:nobody/nothing-here")
