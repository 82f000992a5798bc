import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import file_limit

from nexus_ds.data import corpora
from nexus_ds.data.corpora import TokenFile, open_source, token_files, windows
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.sealed import SEAL, seal
from tests.data.conftest import sentences, write_jsonl


def ids(file: TokenFile) -> np.ndarray:
    return file.read(0, file.tokens)


# Token files --------------------------------------------------------------------------------------


def test_documents_are_joined_with_the_end_of_text_token(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    files = token_files(
        open_source(str(corpus)), ["beta", "alpha"], "train", tokenizer_dir, tmp_path / "cache"
    )
    assert list(files) == ["beta", "alpha"]
    expected: list[int] = []
    for text in sentences(1, 40):
        expected += [
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
    file = files["alpha"]
    assert ids(file).tolist() == expected
    assert (file.tokens, file.documents, file.dtype, file.skipped) == (
        len(expected),
        40,
        "uint16",
        0,
    )
    assert file.blocks(16) == (len(expected) - 1) // 16
    assert file.block(2, 16).tolist() == expected[32:49]
    assert file.block(2, 16).dtype == np.int64
    assert json.loads(file.path.with_suffix(".json").read_text())["fingerprint"] == file.fingerprint


def test_special_tokens_in_a_document_stay_text(corpus: Path, tokenizer_dir: Path, tmp_path: Path):
    write_jsonl(corpus / "alpha" / "train.jsonl", ["a <|endoftext|> b"])
    file = token_files(open_source(str(corpus)), ["alpha"], "train", tokenizer_dir, tmp_path)[
        "alpha"
    ]
    assert ids(file).tolist().count(0) == 1
    assert ids(file)[-1] == 0


@pytest.mark.parametrize(("largest", "dtype"), [((1 << 16) - 2, "uint16"), (1 << 16, "uint32")])
def test_a_large_vocabulary_gets_four_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, largest: int, dtype: str
):
    shutil.copytree(tokenizer_dir, tmp_path / "large")
    definition = json.loads((tmp_path / "large" / "tokenizer.json").read_text())
    definition["model"]["vocab"]["~"] = largest
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(definition))
    write_jsonl(corpus / "alpha" / "train.jsonl", ["cat ~"])
    file = token_files(
        open_source(str(corpus)), ["alpha"], "train", tmp_path / "large", tmp_path / "cache"
    )["alpha"]
    assert (file.dtype, ids(file).max()) == (dtype, largest)


def test_a_second_call_reads_the_cache_and_any_change_misses_it(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    source = open_source(str(corpus))

    def ask(**options: object) -> TokenFile:
        return token_files(
            source, ["alpha"], "train", tokenizer_dir, tmp_path / "cache", **options
        )["alpha"]

    first = ask()
    written = first.path.stat().st_mtime_ns
    assert ask() == first
    assert first.path.stat().st_mtime_ns == written
    assert ask(max_bytes=500).fingerprint != first.fingerprint
    assert ask(max_bytes=500).tokens < first.tokens
    assert ask(max_bytes=500).made_from == first.made_from
    write_jsonl(corpus / "alpha" / "train.jsonl", sentences(9, 40))
    changed = ask()
    assert changed.fingerprint != first.fingerprint
    assert changed.made_from.keys() == first.made_from.keys() == {"text", "tokenizer"}
    assert changed.made_from["text"] != first.made_from["text"]
    assert changed.made_from["tokenizer"] == first.made_from["tokenizer"]


def test_validation_files_hold_the_whole_validation_text(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    tokenizer, source = AutoTokenizer.from_pretrained(tokenizer_dir), open_source(str(corpus))
    texts = {"alpha": sentences(2, 10), "beta": sentences(4, 10)}
    for options in ({}, {"max_bytes": 10}):
        files = token_files(
            source, ["beta", "alpha"], "validation", tokenizer_dir, tmp_path, **options
        )
        for domain, file in files.items():
            expected = [
                [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts[domain]
            ]
            assert (file.documents, ids(file).tolist()) == (
                10,
                [i for document in expected for i in document],
            )


def test_a_damaged_cache_is_made_again(corpus: Path, tokenizer_dir: Path, tmp_path: Path):
    def ask() -> TokenFile:
        return token_files(
            open_source(str(corpus)), ["alpha"], "train", tokenizer_dir, tmp_path / "cache"
        )["alpha"]

    first = ask()
    content = first.path.read_bytes()
    first.path.write_bytes(content[:-2])
    assert ask().path.read_bytes() == content
    manifest = first.path.with_suffix(".json")
    sound = json.loads(manifest.read_text())
    wrong = ["{", "null", "[" * 100_000, json.dumps(sound | {"dtype": []})]
    wrong += [json.dumps({key: sound[key] for key in sound if key != gone}) for gone in sound]
    # with a hash of its own: by whoever computed it anew
    fields = {key: sound[key] for key in sound if key != SEAL}
    others = [{key: value} for key in fields for value in (None, [], {}, "x", 1.5, True)]
    others = [other for other in others if not isinstance(fields[next(iter(other))], str)]
    others += [{"skipped": {"count": "x", "first": []}}, {"skipped": {"count": 0, "first": [1]}}]
    others += [{"sha256": None}, {"dtype": "float64"}, {"labels": 1}, {"labels": {"count": 1}}]
    wrong += [seal(fields | other) for other in others]
    for text in wrong:
        manifest.write_text(text)
        assert corpora._existing(first.path) is None, text[:300]
    assert ask().path.read_bytes() == content
    assert json.loads(manifest.read_text()) == sound


def test_much_that_is_hashed_at_a_start_is_told(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys, monkeypatch
):
    def ask() -> str:
        source = open_source(str(corpus))
        token_files(source, ["alpha", "beta"], "train", tokenizer_dir, tmp_path / "cache")
        return capsys.readouterr().err

    ask()
    assert "check token files" not in ask()
    monkeypatch.setattr(corpora, "TOLD_BYTES", 1)
    assert "check token files" in ask()


@pytest.mark.parametrize("harm", ["one bit", "all ids alike", "an id beyond the vocabulary"])
def test_ids_that_are_not_what_was_made_are_named_and_made_again(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys, harm: str
):
    """The size is right, and each of them would train, or end on a GPU with an assertion."""

    def ask(**options: object) -> TokenFile:
        source = open_source(str(corpus))
        return token_files(
            source, ["alpha"], "train", tokenizer_dir, tmp_path / "cache", **options
        )["alpha"]

    path = ask().path
    content = path.read_bytes()
    harmed = bytearray(content)
    if harm == "one bit":
        harmed[len(harmed) // 2 & ~1] ^= 1
    elif harm == "all ids alike":
        harmed[::2] = bytes([5]) * (len(harmed) // 2)
        harmed[1::2] = bytes(len(harmed) // 2)
    else:
        harmed[-1] = 255
    path.write_bytes(harmed)
    capsys.readouterr()
    assert ask(verify=False).path.read_bytes() == harmed
    assert ask().path.read_bytes() == content
    said = capsys.readouterr().err
    hashes = [hashlib.sha256(data).hexdigest()[:12] for data in (harmed, content)]
    assert said.startswith(
        f"{path}: found sha256 {hashes[0]}, expected {hashes[1]}; the file is damaged and is made "
        "again\n"
    )
    assert ask().path.read_bytes() == content
    assert capsys.readouterr().err == ""


def test_damaged_rows_stop_or_are_counted(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with (corpus / "alpha" / "train.jsonl").open("ab") as stream:
        stream.write(b'{"text": \n')
    source, cache = open_source(str(corpus)), tmp_path / "cache"
    with pytest.raises(DataError, match=r"alpha/train\.jsonl:41: broken JSON"):
        token_files(source, ["alpha"], "train", tokenizer_dir, cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]
    file = token_files(source, ["alpha"], "train", tokenizer_dir, cache, on_bad_row="skip")["alpha"]
    assert (file.skipped, file.documents) == (1, 40)
    assert json.loads(file.path.with_suffix(".json").read_text())["skipped"]["first"][0].startswith(
        str(corpus)
    )
    assert "alpha/train: 1 damaged rows skipped" in capsys.readouterr().err


def test_token_files_refuses_what_it_can_not_do(corpus: Path, tokenizer_dir: Path, tmp_path: Path):
    source = open_source(str(corpus))
    with pytest.raises(DataError, match="no domain gamma; found: alpha, beta"):
        token_files(source, ["alpha", "gamma"], "train", tokenizer_dir, tmp_path / "cache")
    with pytest.raises(ConfigError, match="split 'test'"):
        token_files(source, ["alpha"], "test", tokenizer_dir, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*nowhere"):
        token_files(source, ["alpha"], "train", tmp_path / "nowhere", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no tokenizer that can be loaded"):
        token_files(source, ["alpha"], "train", tmp_path / "empty", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_an_end_of_text_token_is_refused(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(CheckpointError, match="no end-of-text token"):
        token_files(
            open_source(str(corpus)), ["alpha"], "train", tmp_path / "endless", tmp_path / "cache"
        )


def test_a_token_file_that_was_cut_short_is_named(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    file = token_files(
        open_source(str(corpus)), ["alpha"], "train", tokenizer_dir, tmp_path / "cache"
    )["alpha"]
    os.truncate(file.path, 40)
    assert file.block(0, 16).shape == (17,)
    with pytest.raises(
        DataError,
        match=r"alpha-train-\w+\.bin: found 8 bytes at 32, expected 34; .* remove it, and it is",
    ):
        file.block(1, 16)


def test_a_full_disk_names_the_file_and_leaves_nothing(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    source, cache = open_source(str(corpus)), tmp_path / "cache"
    said = (
        r"\[Errno 27\] File too large: need [\d,]+ bytes more, free [\d,]+: "
        r"'.*/\.beta-train-\w+\.bin\.tmp-\d+'$"
    )
    with file_limit(1000), pytest.raises(OSError, match=said):
        token_files(source, ["beta"], "train", tokenizer_dir, cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]
    assert token_files(source, ["beta"], "train", tokenizer_dir, cache)["beta"].documents == 30


def test_a_token_file_pickles_without_its_content(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    file = token_files(
        open_source(str(corpus)), ["alpha"], "train", tokenizer_dir, tmp_path / "cache"
    )["alpha"]
    content = ids(file).tolist()
    pickled = pickle.dumps(file)
    assert len(pickled) < 1000
    assert ids(pickle.loads(pickled)).tolist() == content


@pytest.mark.slow
def test_several_processes_may_ask_at_once(corpus: Path, tokenizer_dir: Path, tmp_path: Path):
    code = (
        "from pathlib import Path; from nexus_ds.data.corpora import open_source, token_files; "
        f"f = token_files(open_source({str(corpus)!r}), ['alpha', 'beta'], 'train', "
        f"Path({str(tokenizer_dir)!r}), "
        "Path('cache')); print(sum(int(x.read(0, x.tokens).sum()) for x in f.values()))"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(3)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    # one made it, the others read it
    assert sum(err.count("tokenise alpha/train: ") for _, err in results) == 1
    names = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert names == ["", ".bin", ".bin", ".json", ".json"]


def test_the_files_are_the_same_for_any_number_of_processes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpora, "BATCH_CHARACTERS", 300)  # many batches, some of one document
    write_jsonl(
        corpus / "alpha" / "train.jsonl", [*sentences(1, 40), "long " * 500, *sentences(5, 40)]
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    made = {}
    for workers in (1, 3):
        cache = tmp_path / str(workers)
        options = {"workers": workers, "max_bytes": 6000}
        token_files(
            open_source(str(corpus)), ["alpha", "beta"], "train", tokenizer_dir, cache, **options
        )
        made[workers] = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert made[1] == made[3]
    assert len(made[1]) == 5  # two files, their manifests and the lock
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    assert multiprocessing.active_children() == []


def test_what_a_killed_process_left_is_removed_and_files_of_the_user_stay(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    half = f"alpha-train-{'0' * 16}"
    for suffix in ("bin", "labels", "json"):
        (tmp_path / f".{half}.{suffix}.tmp-1").write_bytes(b"half")
    mine = [
        ".train.labels.tsv",
        ".run.labels.txt",
        ".x.bin.tmp-backup",
        ".x.bin.tmp-1",
        f".{half}.bin.tmp-backup",
        f"{half}.bin.tmp-1",
    ]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    file = token_files(open_source(str(corpus)), ["alpha"], "train", tokenizer_dir, tmp_path)
    path = file["alpha"].path
    made = [".lock", path.name, path.with_suffix(".json").name]
    there = sorted(path.name for path in tmp_path.iterdir() if path != corpus)
    assert there == sorted([*mine, *made])


@pytest.mark.parametrize("meanwhile", ["the wait", "the reading"])
def test_text_that_changes_under_way_makes_no_token_file_of_the_old_name(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch, meanwhile: str
):
    cache = tmp_path / "cache"
    place, name = {
        "the wait": (corpora, "_remove_leftovers"),
        "the reading": (corpora, "_check_documents"),
    }[meanwhile]
    real = getattr(place, name)

    def change(given: object) -> None:
        write_jsonl(corpus / "alpha" / "train.jsonl", ["new text"])
        real(given)

    monkeypatch.setattr(place, name, change)
    said = (
        r"text: the train text of alpha was changed while it waited or was read: found "
        r"fingerprint \w{12}, expected \w{12}; start again when nobody writes it any more$"
    )
    with pytest.raises(DataError, match=said):
        token_files(open_source(str(corpus)), ["alpha"], "train", tokenizer_dir, cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


# Windows ------------------------------------------------------------------------------------------


@pytest.fixture
def counting(tmp_path: Path) -> TokenFile:
    np.arange(1001, dtype=np.uint16).tofile(tmp_path / "count.bin")
    return TokenFile(tmp_path / "count.bin", "uint16", 1001, 1, 0, "f")


def test_windows_lie_evenly_over_the_text(counting: TokenFile):
    assert counting.blocks(100) == 10
    chosen = windows(counting, 4, 100)
    assert chosen.shape == (4, 101)
    assert chosen.dtype == np.int64
    assert chosen[:, 0].tolist() == [0, 200, 500, 700]
    assert (np.diff(chosen, axis=1) == 1).all()
    assert windows(counting, 10, 100)[:, 0].tolist() == list(range(0, 1000, 100))


def test_seeded_windows_are_distinct_and_repeatable(counting: TokenFile):
    chosen = windows(counting, 20, 20, seed=3)
    assert len(set(chosen[:, 0])) == 20
    assert (chosen == windows(counting, 20, 20, seed=3)).all()
    assert (chosen != windows(counting, 20, 20, seed=4)).any()


def test_too_little_text_for_windows(counting: TokenFile):
    with pytest.raises(
        DataError,
        match=r"count\.bin: 1,001 tokens make 10 windows of 100, expected 11; give more text",
    ):
        windows(counting, 11, 100)
