import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ds.data import hub
from nexus_ds.data.corpora import open_source, token_files
from nexus_ds.data.rows import BadRows
from nexus_ds.data.sources import require_domains
from nexus_ds.errors import DataError
from tests.data.conftest import sentences


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
        validation=datasets.Dataset.from_list(
            [*rows[:2], {"text": "", "meta": {"redpajama_set_name": "Own"}}]
        ),
    )
    data.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set_is_split_by_its_set_names(saved: Path):
    source = open_source(f"hub:{saved}")
    assert source.domains() == ["Own", "arxiv", "books"]
    documents = list(source.documents("books", "train"))
    assert [d.text for d in documents] == [f"RedPajamaBook {i}" for i in range(3)]
    assert documents[1].where == f"hub:{saved}[train]:4"
    assert source.fingerprint("books", "train") == open_source(f"hub:{saved}").fingerprint(
        "books", "train"
    )
    assert source.fingerprint("books", "train") != source.fingerprint("arxiv", "train")
    assert source.size("books", "train") > 0


def test_rows_are_numbered_over_all_tables(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "TABLE_ROWS", 2)
    found = [document.where for document in open_source(f"hub:{saved}").documents("books", "train")]
    assert found == [f"hub:{saved}[train]:{row}" for row in (1, 4, 7)]


def test_damaged_rows_of_a_data_set_are_named(saved: Path):
    source = open_source(f"hub:{saved}")
    with pytest.raises(DataError, match=r"saved\[validation\]:2: text is empty"):
        list(source.documents("Own", "validation"))
    with pytest.raises(DataError, match="no documents"):
        list(source.documents("Own", "validation", on_bad_row="skip"))


def test_a_directory_of_parquet_files_and_a_column_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
    with pytest.raises(
        DataError, match=r"columns text, kind; expected text and meta\.redpajama_set_name"
    ):
        open_source(f"hub:{tmp_path / 'files'}")
    with pytest.raises(DataError, match=r"the column kind\.x has no field x"):
        open_source(f"hub:{tmp_path / 'files'}#kind.x").domains()


def test_a_column_of_json_text_is_parsed(tmp_path: Path):
    (tmp_path / "text").mkdir()
    metas = [json.dumps({"redpajama_set_name": name}) for name in ("RedPajamaBook", "Own")] + [
        '{"url": "x"}',
        None,
    ]
    rows = [json.dumps({"text": f"number {i}", "meta": meta}) for i, meta in enumerate(metas)]
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(rows))
    source = open_source(f"hub:{tmp_path / 'text'}")
    assert source.domains() == ["Own", "books"]
    assert [d.text for d in source.documents("books", "train")] == ["number 0"]
    (tmp_path / "text" / "train.jsonl").write_text('{"text": "a", "meta": "plain"}')
    with pytest.raises(
        DataError,
        match=r"no field redpajama_set_name; found text that is no JSON object: 'plain'; name",
    ):
        open_source(f"hub:{tmp_path / 'text'}").domains()


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": text, "kind": kind}) + "\n" for kind, text in rows),
        encoding="utf-8",
    )


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """JSON files with the rows of two domains in turns, which `corpus` has in two files."""
    pairs = zip(sentences(1, 40), sentences(3, 30) + [""] * 10, strict=True)
    rows = [
        (kind, text)
        for pair in pairs
        for kind, text in zip(("alpha", "beta"), pair, strict=True)
        if text
    ]
    write_rows(tmp_path / "mixed" / "train-00000.jsonl", rows[:50])
    write_rows(tmp_path / "mixed" / "train-00001.jsonl", rows[50:])
    return tmp_path / "mixed"


def test_a_stream_makes_the_same_token_files_as_a_folder(
    mixed: Path,
    corpus: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    arguments = (["beta", "alpha"], "train", tokenizer_dir)
    streamed = token_files(open_source(f"hub:{mixed}#kind"), *arguments, tmp_path / "cache")
    assert capsys.readouterr().err.count("tokenise ") == 1  # one pass
    folder = token_files(open_source(str(corpus)), *arguments, tmp_path / "cache")
    for name in ("alpha", "beta"):
        assert streamed[name].path != folder[name].path
        assert streamed[name].path.read_bytes() == folder[name].path.read_bytes()
    again = token_files(open_source(f"hub:{mixed}#kind"), *arguments, tmp_path / "cache")
    assert again == streamed
    os.utime(mixed / "train-00001.jsonl", (1, 1))
    assert (
        open_source(f"hub:{mixed}#kind").fingerprint("alpha", "train")
        != streamed["alpha"].fingerprint
    )


def test_a_broken_stream_leaves_nothing_and_is_not_read_further_than_needed(
    mixed: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "TABLE_ROWS", 10)
    monkeypatch.setattr(hub, "HEAD_TABLES", 2)
    whole = (mixed / "train-00001.jsonl").read_text()
    (mixed / "train-00001.jsonl").write_text('{"text": "cut off')
    arguments = (["alpha", "beta"], "train", tokenizer_dir, tmp_path / "cache")
    message = (
        r"mixed#kind\[train\]: the stream broke after row 50 \(.*; "
        r"no part .*hf download .* give hub:DIR"
    )
    with pytest.raises(DataError, match=message):
        token_files(open_source(f"hub:{mixed}#kind"), *arguments)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    capped = token_files(open_source(f"hub:{mixed}#kind"), *arguments, max_bytes=500)
    assert all(0 < file.documents < 25 for file in capped.values())
    (mixed / "train-00001.jsonl").write_text(whole)
    assert token_files(open_source(f"hub:{mixed}#kind"), *arguments)["alpha"].documents == 40


def test_a_domain_may_come_late_in_a_stream(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_rows(tmp_path / "late" / "train.jsonl", [("early", "cat")] * 1100 + [("late", "mat")])
    source = open_source(f"hub:{tmp_path / 'late'}#kind")
    assert source.domains() == ["early"]
    assert (
        token_files(source, ["late"], "train", tokenizer_dir, tmp_path / "cache")["late"].documents
        == 1
    )
    assert (
        "no domain late; found: early in the first rows; the stream is read on"
        in capsys.readouterr().err
    )
    require_domains(source, ["never"])
    with pytest.raises(
        DataError, match="split train, domain never: no documents; found: early in the first rows"
    ):
        token_files(source, ["early", "never"], "train", tokenizer_dir, tmp_path / "cache")


def test_a_data_set_in_the_cache_of_the_library_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    write_rows(tmp_path / "thing" / "train.jsonl", [("law", "one"), ("art", "two")])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.load_dataset(str(tmp_path / "thing"))
    (tmp_path / "cache" / "thing").rename(tmp_path / "cache" / "nobody___thing")
    assert [d.text for d in open_source("hub:nobody/thing#kind").documents("art", "train")] == [
        "two"
    ]


def test_streaming_takes_no_more_memory_for_more_text(tmp_path: Path):
    row = json.dumps({"text": "cat " * 5000, "kind": "a"}) + "\n"
    sizes = {"small": 1500, "large": 9000}  # rows: 30 and 180 MB
    for name, rows in sizes.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "train.jsonl").open("w") as stream:
            stream.writelines(row for _ in range(rows))
    code = (
        "from nexus_ds.data.sources import open_source\n"
        "for name in ('small', 'large'):\n"
        "    documents = open_source(f'hub:{name}#kind').documents('a', 'train')\n"
        "    print(sum(len(d.text) for d in documents))\n"
        "    status = open('/proc/self/status')\n"
        "    print(next(line.split()[1] for line in status if line.startswith('VmHWM')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    small, before, large, after = map(int, out.stdout.split())
    assert (small, large) == (1500 * 20_000, 9000 * 20_000)
    assert after - before < 60_000, (before, after)  # kB


def test_a_data_set_that_is_not_on_this_machine():
    with pytest.raises(
        DataError, match=r"hub:nobody/nothing-here: the data set can't be opened .*HF_HUB_OFFLINE=0"
    ):
        open_source("hub:nobody/nothing-here")


def parquet(folder: Path, **columns: object) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def raw_texts(*contents: bytes) -> object:
    """Return an arrow array of texts, whatever their bytes are."""
    import pyarrow as pa

    data = pa.array(contents, pa.binary())
    return pa.StringArray.from_buffers(len(contents), *data.buffers()[1:])


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("kind", [["law"], ["art"]], "Unsupported cast from list"),
        ("kind", [{"x": "law"}, {"x": "art"}], "Unsupported cast from struct"),
        ("kind.x", [{"x": ["law"]}, {"x": ["art"]}], "Unsupported cast from list"),
        ("kind.x", ['{"x": "\\ud800"}'] * 2, "surrogates not allowed"),
        ("kind", [b"\xff", b"law"], "Invalid UTF8 payload"),
        ("kind", raw_texts, "Invalid UTF8 sequence"),
    ],
)
def test_a_column_of_domains_that_is_no_text(tmp_path: Path, column, values, said):
    values = values(b"\xff", b"law") if callable(values) else values
    source = open_source(f"hub:{parquet(tmp_path / 'odd', text=['a', 'b'], kind=values)}#{column}")
    message = (
        rf"odd#{column}: the column {column} can't be read as text \(.*{said}.*\); name the column "
        r"that holds the domain with hub:NAME#COLUMN, or a field of it with hub:NAME#COLUMN\.FIELD"
    )
    for read in (source.domains, lambda: list(source.documents("law", "train"))):
        with pytest.raises(DataError, match=message):
            read()


def test_a_table_without_any_domain_has_no_documents(tmp_path: Path):
    """Found by tests/fuzz.py: nothing to look for had no type."""
    source = open_source(f"hub:{parquet(tmp_path / 'odd', text=['a'], kind=[None])}#kind")
    assert source.domains() == []
    assert list(source.stream([], "train", "error", 0, {})) == []


def test_a_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path):
    texts = raw_texts(b"a", b"\xff", "\u00e9".encode())
    name = f"hub:{parquet(tmp_path / 'odd', text=texts, kind=['law'] * 3)}"
    source = open_source(f"{name}#kind")
    with pytest.raises(DataError, match=r"odd.*\[train\]:1: text is bytes, expected a string"):
        list(source.documents("law", "train"))
    bad = BadRows()
    found = source.documents("law", "train", "skip", bad_rows=bad)
    assert [document.text for document in found] == ["a", "\u00e9"] and bad.count == 1
