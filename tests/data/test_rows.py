import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from nexus_ds.data.rows import MAX_LINE_BYTES, BadRows, Document, capped, read_rows
from nexus_ds.errors import DataError

GOOD = b'{"text": "good", "meta": {"a": 1}}\n'
BAD_LINES = {
    b'{"text": "caf\xe9"}': "invalid UTF-8 at byte 13 of the line",
    b'{"text": ""}': "text is empty",
    b'{"text": " \\n\\t"}': "text is empty",
    b'{"text": null}': "text is NoneType, expected a string",
    b'{"text": 5}': "text is int, expected a string",
    b'{"content": "x"}': "no key text; found: content",
    b"{}": "no key text; found: no keys",
    b'{"text": "cut of': "broken JSON",
    b'{"text": "a"} {"text": "b"}': "broken JSON (Extra data",
    b'{"text": "a", "text": "b"}': "the key 'text' stands twice",
    b'{"text": "a", "meta": {"k": 1, "k": 2}}': "the key 'k' stands twice",
    b'{"text": "lone \\ud800 half"}': "lone surrogate at character 5",
    b'{"text": "nul \\u0000 inside"}': "NUL character",
    b'["text"]': "a JSON list, expected an object",
    b'{"text": ' + b"[" * 100_000: "nested too deeply",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "broken JSON (Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:24].decode("latin1"))
def test_a_damaged_row_is_named_by_file_and_line_or_skipped_and_counted(
    tmp_path: Path, line: bytes
):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert BAD_LINES[line] in str(caught.value)
    assert "data.on_bad_row=skip" in str(caught.value)

    bad_rows = BadRows()
    kept = list(read_rows(path, "skip", bad_rows))
    assert [(d.text, d.meta, d.where) for d in kept] == [
        ("good", {"a": 1}, f"{path}:{n}") for n in (1, 3)
    ]
    assert bad_rows.count == 1
    assert bad_rows.messages[0].startswith(f"{path}:2: ")


def test_blank_lines_and_other_keys_are_ignored(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b'\n{"text": "a", "id": 7, "meta": null}\n  \n' + b'{"text": "no newline at the end"}'
    )
    assert [(d.text, d.where) for d in read_rows(path)] == [
        ("a", f"{path}:2"),
        ("no newline at the end", f"{path}:4"),
    ]


@pytest.mark.parametrize("meta", ["", "plain text", '{"a": "JSON"}', 5, ["a"], {"a": 1}])
def test_meta_is_kept_as_it_is_and_makes_no_row_damaged(tmp_path: Path, meta: object):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "a", "meta": meta}))
    assert [d.meta for d in read_rows(path)] == [meta]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_byte_order_marks_before_a_file_or_its_parts_are_passed_over(tmp_path: Path, suffix: str):
    path, mark = tmp_path / f"train.jsonl{suffix}", b"\xef\xbb\xbf"
    content = mark + GOOD * 2 + mark + GOOD + mark
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content))
    assert [(d.text, d.where) for d in read_rows(path)] == [
        ("good", f"{path}:{n}") for n in (1, 2, 3)
    ]


def test_a_file_of_another_encoding_is_called_so(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    for encoding in ("utf-16-le", "utf-16-be"):
        path.write_bytes(("\ufeff" + GOOD.decode()).encode(encoding))
        with pytest.raises(
            DataError, match=r"train\.jsonl:1: the file is UTF-16, expected UTF-8; save it as UTF-8"
        ):
            list(read_rows(path))


def test_compressed_files_of_several_parts_read_as_one(tmp_path: Path):
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        path = tmp_path / name
        path.write_bytes(compress(GOOD * 2) + compress(GOOD))
        assert len(list(read_rows(path))) == 3


def test_a_long_zst_file_reads_whole(tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(
        zstandard.compress(
            b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(50_000))
        )
    )
    assert [d.text for d in read_rows(path)] == [f"row {i}" for i in range(50_000)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_cut_or_garbled_compressed_file_is_an_error_in_any_case(
    tmp_path: Path, suffix: str, on_bad_row: str
):
    rows = b"".join(
        json.dumps({"text": f"row {i * 7919 % 1000}"}).encode() + b"\n" for i in range(5000)
    )
    whole = gzip.compress(rows) if suffix == ".gz" else zstandard.compress(rows)
    for content in (whole[:-20], b"this is not compressed"):
        path = tmp_path / f"train.jsonl{suffix}"
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"train\.jsonl.*:\d+: can't be read .*copy the file again"
        ):
            list(read_rows(path, on_bad_row))


# By a limit of the process, which counts what libraries allocate behind Python's back.
BOUNDED = """
import resource, sys
from pathlib import Path
from nexus_ds.data.rows import MAX_LINE_BYTES, BadRows, read_rows

path, longest, allowed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) << 20
status = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
try:
    list(read_rows(path, max_line_bytes=longest))
except Exception as error:
    print(type(error).__name__, error)
print(len(list(read_rows(path, "skip", BadRows(), longest))))
"""


@pytest.fixture(scope="module")
def long_lines(tmp_path_factory):
    """Files of three rows, by suffix; that in the middle has 50 MB, or 200 MB in one of 20 kB."""
    folder = tmp_path_factory.mktemp("long")
    kinds = (
        (".jsonl", open, 50),
        (".jsonl.gz", gzip.open, 50),
        (".jsonl.zst", zstandard.open, 200),
    )
    for suffix, opened, megabytes in kinds:
        with opened(folder / f"train{suffix}", "wb") as stream:
            stream.write(GOOD + b'{"text": "')
            for _ in range(megabytes):
                stream.write(b"x" * (1 << 20))
            stream.write(b'"}\n' + GOOD)
    assert (folder / "train.jsonl.zst").stat().st_size < 20_000
    yield folder
    shutil.rmtree(folder)


def read_bounded(path, longest, allowed):
    """Read a file in a process that may take `allowed` MiB more than it has; return its end."""
    words = [sys.executable, "-c", BOUNDED, path, longest, allowed]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of data and /proc are Linux's")
@pytest.mark.parametrize(
    ("suffix", "longest", "allowed"),
    [
        (".jsonl", 1 << 20, 12),
        (".jsonl.gz", 1 << 20, 12),
        # a step's 16 MiB, in pieces and put together
        (".jsonl.zst", 1 << 20, 90),
        # what is set: a line of 16 MiB, in pieces and put together, and what malloc keeps
        (".jsonl", MAX_LINE_BYTES, 64),
        (".jsonl.gz", MAX_LINE_BYTES, 64),
        (".jsonl.zst", MAX_LINE_BYTES, 130),
    ],
)
def test_a_long_line_is_refused_by_a_process_of_bounded_memory(
    long_lines, suffix, longest, allowed
):
    path = long_lines / f"train{suffix}"
    done = read_bounded(path, longest, allowed)
    assert done.returncode == 0, done.stderr
    refusal, count = done.stdout.splitlines()
    assert refusal.startswith(f"DataError {path}:2: a line of more than {longest:,} bytes; split")
    assert count == "2"
    # The line as a whole would not have had room.
    whole = read_bounded(path, 1 << 30, allowed)
    assert whole.returncode == 1 and "MemoryError" in whole.stderr


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.strip() + b"\n" + GOOD.strip())
    assert len(list(read_rows(path, max_line_bytes=len(GOOD.strip())))) == 2


def test_capped_stops_at_the_byte_and_never_inside_a_character():
    documents = [Document("äöü", {}, "a:1"), Document("äöü", {}, "a:2"), Document("x", {}, "a:3")]
    assert [d.text for d in capped(iter(documents), 9)] == ["äöü", "ä"]
    assert [d.text for d in capped(iter(documents), 0)] == ["äöü", "äöü", "x"]
    assert [d.text for d in capped(iter(documents), 6)] == ["äöü"]


def test_skipped_messages_are_bounded():
    bad_rows = BadRows()
    for number in range(1000):
        bad_rows.add(str(number))
    assert bad_rows.count == 1000
    assert len(bad_rows.messages) == 10


def test_an_unreadable_file_is_a_data_error(tmp_path: Path):
    with pytest.raises(DataError, match="can't be read"):
        list(read_rows(tmp_path / "missing.jsonl"))
