import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from nexus_ds.data.encoding import _Team, beginning, load_tokenizer, packer
from nexus_ds.errors import CheckpointError, DataError
from tests.data.conftest import sentences

STARTS_WORKERS = """  # without `if __name__ == "__main__":`, which nobody may need
import psutil, sys, time
from pathlib import Path
from nexus_ds.data.encoding import load_tokenizer, packer
with packer(load_tokenizer(Path(sys.argv[1])), 2) as pack:
    def batches():
        yield "a", ["the cat"]
        yield "a", ["the cat"]
        while len(psutil.Process().children()) < 2:
            time.sleep(0.05)
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        time.sleep(60)
    list(pack(batches()))
"""


def children() -> list[psutil.Process]:
    """Return the living workers of this process, which has other children too."""
    found = psutil.Process().children()
    return [
        c
        for c in found
        if c.status() != psutil.STATUS_ZOMBIE and "import serve;" in " ".join(c.cmdline())
    ]


def test_ids_come_back_in_the_order_of_the_batches(tokenizer_dir: Path):
    tokenizer = load_tokenizer(tokenizer_dir)
    # of unequal work
    batches = [(key, sentences(i, 1 + 50 * (i % 3))) for i, key in enumerate("abcabcabcabc")]
    with packer(tokenizer, 1) as pack:
        alone = list(pack(iter(batches)))
    assert [key for key, _ in alone] == list("abcabcabcabc")
    ids = np.frombuffer(alone[1][1].ids, tokenizer.dtype)
    assert (alone[1][1].tokens, alone[1][1].documents) == (len(ids), 51)
    assert np.count_nonzero(ids == tokenizer.end) == 51 and ids[-1] == tokenizer.end
    with packer(tokenizer, 2) as pack:
        assert list(pack(iter(batches))) == alone


def with_post_processor(source: Path, out: Path, single: str) -> Path:
    """Copy a tokenizer and let it put special tokens around a text, as a Llama's does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    shutil.copytree(source, out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "<sep>"])
    pairs = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "<sep>")]
    tokenizer.post_processor = Sequence(
        [ByteLevel(), TemplateProcessing(single=single, special_tokens=pairs)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    return out


@pytest.mark.parametrize(
    ("single", "begin"),
    [("$A", []), ("<s> $A", ["<s>"]), ("<s> <sep> $A <sep>", ["<s>", "<sep>"]), ("$A <sep>", [])],
)
def test_documents_begin_as_the_tokenizer_begins_a_text(
    tokenizer_dir: Path, tmp_path: Path, single: str, begin: list
):
    from transformers import AutoTokenizer

    texts = ["the cat sat", "<s> on a mat"]  # in a document it is text, not the beginning
    source = with_post_processor(tokenizer_dir, tmp_path / "tok", single)
    stock = AutoTokenizer.from_pretrained(source)
    plain = [
        stock(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts
    ]
    first = stock.convert_tokens_to_ids(begin)
    assert stock(texts[0]).input_ids[: len(first) + 1] == [*first, plain[0][0]]
    for bos in (True, False):
        tokenizer = load_tokenizer(source, bos)
        with packer(tokenizer, 1) as pack:
            [(_, packed)] = pack(iter([("a", texts)]))
        expected = [i for ids in plain for i in [*(first if bos else []), *ids, stock.eos_token_id]]
        assert np.frombuffer(packed.ids, tokenizer.dtype).tolist() == expected
        assert packed.tokens == len(expected)


def test_only_what_a_tokenizer_puts_before_a_text_changes_its_fingerprint(
    tokenizer_dir: Path, tmp_path: Path
):
    """Token files of models without BOS stay valid."""
    opening = with_post_processor(tokenizer_dir, tmp_path / "opening", "<s> $A")
    assert load_tokenizer(opening).fingerprint != load_tokenizer(opening, bos=False).fingerprint
    plain = load_tokenizer(tokenizer_dir)
    assert plain == load_tokenizer(tokenizer_dir, bos=False)
    assert (
        plain.fingerprint == hashlib.sha256(f"{plain.definition} {plain.end}".encode()).hexdigest()
    )


def test_the_beginning_is_found_where_a_letter_is_no_token():
    from tokenizers import Tokenizer, models
    from tokenizers.processors import TemplateProcessing

    for model in (models.WordLevel({"<s>": 0, "tree": 1}), models.BPE({"<s>": 0, "t": 1}, [])):
        backend = Tokenizer(model)
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        assert beginning(backend, Path("DIR")) == (0,)


def test_what_is_put_before_a_text_must_be_a_token_and_no_padding():
    from tokenizers import Tokenizer, models
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "<pad>": 2}))
    backend.enable_padding(direction="left", pad_id=2, pad_token="<pad>", length=8)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert backend.encode("a").ids == [2] * 6 + [0, 1] and beginning(backend, Path("DIR")) == (0,)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 9)])
    with pytest.raises(
        CheckpointError,
        match="DIR: the tokenizer puts the id 9 before a text, but has no such token; mend post_",
    ):
        beginning(backend, Path("DIR"))


def test_a_post_processor_that_breaks_the_library_is_named(tokenizer_dir: Path):
    """Found by tests/guided.py: of a single text it wants the second one."""
    from tokenizers import Tokenizer

    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {},
    }
    backend = Tokenizer.from_str(json.dumps(definition))
    with pytest.raises(
        CheckpointError, match=r"DIR: the tokenizer can't encode 'a' \(.*\); mend post_processor"
    ):
        beginning(backend, Path("DIR"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_worker_is_an_error_not_a_hang(tokenizer_dir: Path, killed: int):
    def batches() -> Iterator[tuple[str, list[str]]]:
        while len(children()) < 2:  # both are needed
            yield "a", ["the cat"]
        for child in children()[:killed]:
            child.kill()
        for _ in range(1000):
            yield "a", ["the cat"]

    message = (
        "one of 2 processes that tokenise was killed, .* start again with a lower data.workers"
    )
    with pytest.raises(DataError, match=message), packer(load_tokenizer(tokenizer_dir), 2) as pack:
        list(pack(batches()))
    assert not children()


@pytest.mark.timeout(300)
def test_a_worker_killed_amid_its_answer_is_an_error_too(tokenizer_dir: Path):
    large = ["the cat " * 100_000]  # its ids fill the pipe, which nobody reads yet

    def batches() -> Iterator[tuple[str, list[str]]]:
        yield from [("a", large)] * 12
        for child in children()[:1]:
            child.kill()
        yield from [("a", large)] * 12

    with (
        pytest.raises(DataError, match="one of 2 processes"),
        packer(load_tokenizer(tokenizer_dir), 2) as pack,
    ):
        list(pack(batches()))


def ignored(process: psutil.Process) -> int:
    """Return the signals that a process ignores, a bit each."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigIgn:")), 16)


@pytest.mark.timeout(120)
def test_signals_that_reach_all_processes_are_left_to_the_one_that_started_them(
    tokenizer_dir: Path,
):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    wanted = sum(1 << number - 1 for number in numbers)

    def batches() -> Iterator[tuple[str, list[str]]]:
        deadline = time.monotonic() + 60
        while len([child for child in children() if ignored(child) & wanted == wanted]) < 2:
            assert time.monotonic() < deadline, "processes that tokenise take signals themselves"
            yield "a", ["the cat"]
        for child in children():
            for number in numbers:
                child.send_signal(number)
        yield from [("b", ["the cat"])] * 50

    with packer(load_tokenizer(tokenizer_dir), 2) as pack:
        assert [key for key, _ in pack(batches())].count("b") == 50
    assert not children()


def test_a_signal_while_a_worker_imports_is_left_to_others_too(tmp_path: Path, monkeypatch, capfd):
    """Else each worker writes a traceback of KeyboardInterrupt beside the one line."""
    (tmp_path / "nexus_ds").mkdir()
    (tmp_path / "nexus_ds" / "__init__.py").write_text(
        f"import os; os.kill(os.getpid(), {int(signal.SIGINT)}); os.mkdir({str(tmp_path / 'x')!r})"
    )
    monkeypatch.syspath_prepend(tmp_path)
    team = _Team({}, 1)
    team._start()
    [(process, _)] = team.started
    process.wait(60)
    team.end()
    assert (tmp_path / "x").is_dir() and "KeyboardInterrupt" not in capfd.readouterr().err


def test_what_a_worker_raises_is_raised_here(tokenizer_dir: Path):
    with pytest.raises(TypeError), packer(load_tokenizer(tokenizer_dir), 2) as pack:
        list(pack(iter([("a", [7])])))
    assert not children()


def test_workers_end_with_the_process_that_started_them(tokenizer_dir: Path, tmp_path: Path):
    (tmp_path / "starts.py").write_text(STARTS_WORKERS)
    command = [sys.executable, str(tmp_path / "starts.py"), str(tokenizer_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 200
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
