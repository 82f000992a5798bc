"""Plans of pieces against plain PyTorch; what happens to the other jobs when one fails."""

import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.assembly import (
    Copy,
    Fill,
    Job,
    Mean,
    Merge,
    Rule,
    Series,
    assemble,
    stored,
)
from nexus_ds.checkpoint.headers import Headers, header_of
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.errors import CheckpointError

SHAPE = (37, 41)
KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a tensor, the last one shorter."""
    monkeypatch.setattr(assembly, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(assembly, "VALUES", 200)
    monkeypatch.setattr(assembly, "MERGED", 400)


def model(folder, seed, dtype=torch.float32, change=None):
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(SHAPE, generator=generator).to(dtype)
    if change:
        change(tensor.view(-1))
    save_file({"w": tensor}, folder / "model.safetensors")
    return tensor


def source(folder, zeros=True):
    return stored(Headers(folder), "w", f"{folder.name}: tensor w", zeros)


def written(out, plan, jobs_of, **options):
    """Do the jobs that `jobs_of` returns of each name's place; return their hashes."""
    out.mkdir()
    with NewFiles(out, plan) as files:
        digests = assemble(jobs_of(files.place), **options)
        for name in plan:
            files.wrote(name)
    return digests


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_mean_is_the_one_in_fp32_rounded_once(tmp_path, kind, workers):
    tensors = [model(tmp_path / str(i), i, KINDS[kind]) for i in range(3)]
    sources = [source(tmp_path / str(i)) for i in range(3)]
    weights = [0.7, 0.15, 0.15]
    plan = {"mean": (kind, SHAPE), "plain": (kind, SHAPE), "cast": ("F32", SHAPE)}

    def jobs(place):
        mean = Merge(place("mean"), sources, Mean(weights, 1.0, 2.0), "mean", "0")
        plain = Merge(place("plain"), sources, Mean([1.0] * 3, 3.0), "plain", "0")
        cast = Merge(place("cast"), sources[:1], Mean([1.0]), "cast", "0")
        return [Job([mean]), Job([plain, cast])]

    assert written(tmp_path / "out", plan, jobs, workers=workers) == ["", ""]
    found = load_file(tmp_path / "out" / "model.safetensors")
    total = sum(t.float() * weight for t, weight in zip(tensors, weights, strict=True))
    assert torch.equal(found["mean"], (total * 2).to(KINDS[kind]))
    assert torch.equal(found["plain"], (sum(t.float() for t in tensors) / 3).to(KINDS[kind]))
    assert torch.equal(found["cast"], tensors[0].float())


def test_copies_are_hashed_in_the_order_of_the_job_and_numbers_are_filled_in(tmp_path):
    tensors = [model(tmp_path / str(i), i, torch.bfloat16) for i in range(2)]
    plan = {"a": ("BF16", SHAPE), "b": ("F32", SHAPE), "c": ("BF16", SHAPE), "d": ("F32", (3,))}
    given = torch.tensor([1.0, 2.0, 3.0])
    done = []

    def jobs(place):
        copied = Copy(place("a"), source(tmp_path / "0"))
        cast = Merge(place("b"), [source(tmp_path / "1")], Mean([1.0]), "b", "1")
        content = given.numpy().view(np.uint8).data
        filled = Job([Fill(place("c"), 2.0**-60), Fill(place("d"), lambda: content)])
        return [filled, Job([cast, copied], [b"one", b"two"])]

    digests = written(tmp_path / "out", plan, jobs, done=done.append)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["a"], tensors[0]) and torch.equal(found["b"], tensors[1].float())
    assert torch.equal(found["c"], torch.full(SHAPE, 2.0**-60, dtype=torch.bfloat16))
    assert torch.equal(found["d"], given)
    assert [type(piece) for piece in done].count(Fill) == 2 and len(done) == 4
    own = [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors]
    assert digests == ["", hashlib.sha256(b"one" + own[1] + b"two" + own[0]).hexdigest()]


def test_a_series_is_written_as_it_is_made(tmp_path):
    """Nothing of it is made before what comes first is written."""
    plan = {"a": ("F32", (2,)), "b": ("F32", (3,))}
    made = []

    def jobs(place):
        first, second = place("a"), place("b")

        def make():
            yield np.ones(2, np.float32).view(np.uint8).data
            made.append(os.pread(os.open(first.file, os.O_RDONLY), 8, first.start))
            yield np.full(3, 2, np.float32).view(np.uint8).data

        return [Job([Series([first, second], make)])]

    assert written(tmp_path / "out", plan, jobs) == [""]
    assert made == [np.ones(2, np.float32).tobytes()]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["a"].tolist() == [1, 1] and found["b"].tolist() == [2, 2, 2]


class Trimmed(Rule):
    """Keep what is above half of the largest value: a rule that looks first, and uses places."""

    looks = 1

    def __init__(self):
        self.largest = 0.0
        self.seen = []

    def look(self, blocks, first, turn):
        assert turn == 0
        self.largest = max(self.largest, *(float(np.abs(block).max()) for block in blocks))

    def __call__(self, blocks, first):
        self.seen.append(first)
        total = blocks[0] + blocks[1]
        return np.where(np.abs(total) > self.largest / 2, total, np.float32(0))


def test_another_rule_sees_aligned_blocks_and_may_look_first(tmp_path):
    tensors = [model(tmp_path / str(i), i) for i in range(2)]
    rule = Trimmed()
    sources = [source(tmp_path / str(i)) for i in range(2)]

    def jobs(place):
        return [Job([Merge(place("w"), sources, rule, "w", "0")], [b""])]

    [digest] = written(tmp_path / "out", {"w": ("F32", SHAPE)}, jobs)
    total, largest = tensors[0] + tensors[1], max(t.abs().max() for t in tensors)
    expected = torch.where(total.abs() > largest / 2, total, torch.zeros(()))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], expected)
    assert rule.seen == list(range(0, tensors[0].numel(), 200))
    assert digest == hashlib.sha256(tensors[0].numpy().tobytes()).hexdigest()


def test_a_rule_that_looks_has_to_say_how():
    class Forgetful(Rule):
        looks = 1

        def __call__(self, blocks, first):
            return blocks[0]

    with pytest.raises(AssertionError, match="a rule that looks"):
        Forgetful().look([], 0, 0)


BAD = [
    (lambda t: t[5:8].fill_(torch.nan), "0: tensor w has 3 values that are NaN or infinite; exp"),
    (lambda t: t[-1:].fill_(torch.inf), "0: tensor w has 1 values that are NaN or infinite"),
    (lambda t: t.zero_(), "0: tensor w has only zeros; expected trained weights, use a sound"),
    (lambda t: t[:2].fill_(3e38), "cast: 2 values overflow F32; somebody has weights too large"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_values_are_named_and_counted(tmp_path, change, message):
    model(tmp_path / "0", 0, change=change)

    def jobs(place):
        bad = source(tmp_path / "0", zeros=False)
        doubled = Merge(place("cast"), [bad], Mean([1.0], scale=2.0), "cast", "somebody")
        return [Job([doubled])]

    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "out", {"cast": ("F32", SHAPE)}, jobs)


def test_of_several_faults_the_first_of_the_queue_is_told(tmp_path):
    for index in range(8):
        model(tmp_path / str(index), index, change=lambda t: t.fill_(torch.nan))
    plan = {str(index): ("F32", SHAPE) for index in range(8)}

    def jobs(place):
        return [Job([Copy(place(name), source(tmp_path / name))]) for name in plan]

    for turn in range(5):
        with pytest.raises(CheckpointError, match=rf"0: tensor w has {37 * 41} values"):
            written(tmp_path / f"out{turn}", plan, jobs, workers=3)


def test_who_waits_and_is_called_off_calls_off_the_threads(tmp_path, monkeypatch):
    """Here by what a signal raises in the middle of a job."""
    model(tmp_path / "0", 0)
    started, interrupted = threading.Event(), threading.Event()
    waiting = assembly.ThreadPoolExecutor.submit

    class Interrupted:
        def __init__(self, thread):
            self.thread = thread

        def result(self):
            started.wait(10)
            interrupted.set()
            raise KeyboardInterrupt

    def submit(pool, work):
        return Interrupted(waiting(pool, work))

    def slow(*_):
        started.set()
        interrupted.wait(10)

    written_at = []
    monkeypatch.setattr(assembly.ThreadPoolExecutor, "submit", submit)
    monkeypatch.setattr(assembly, "write_at", lambda *a: (written_at.append(1), slow()))
    with pytest.raises(KeyboardInterrupt):
        written(
            tmp_path / "out",
            {"a": ("F32", SHAPE)},
            lambda place: [Job([Copy(place("a"), source(tmp_path / "0"))])],
            workers=1,
        )
    # of seven blocks
    assert len(written_at) <= 2


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path):
    model(tmp_path / "0", 0)
    cut = source(tmp_path / "0")
    info = Headers(tmp_path / "0").info("w")
    with info.file.open("rb+") as file:
        file.truncate(info.end - 4)
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        written(
            tmp_path / "out",
            {"a": ("F32", SHAPE)},
            lambda place: [Job([Copy(place("a"), cut)])],
        )


def test_sources_of_another_size_are_refused(tmp_path):
    model(tmp_path / "0", 0)
    with pytest.raises(CheckpointError, match=r"0: tensor w has 1517 values, expected 4"):
        written(
            tmp_path / "out",
            {"a": ("F32", (4,))},
            lambda place: [Job([Copy(place("a"), source(tmp_path / "0"))])],
        )


MEMORY = r"""
import re, sys
from pathlib import Path
from nexus_ds.checkpoint.assembly import *
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.new_files import NewFiles
assert "torch" not in sys.modules
root, shape = Path(sys.argv[1]), (24_000, 1024)
readers = [Headers(root / str(index)) for index in range(3)]
(root / "out").mkdir()
with NewFiles(root / "out", {"a": ("F32", shape), "b": ("F32", shape)}) as files:
    sources = [stored(reader, "w", "w") for reader in readers]
    merge = Merge(files.place("a"), sources, Mean([1.0] * 3, 3.0), "a", "a")
    assemble([Job([merge]), Job([Copy(files.place("b"), sources[0])], [b""])], workers=8)
    [files.wrote(name) for name in "ab"]
assert "torch" not in sys.modules
# of this program: ru_maxrss has that of the one that started it
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Tensors of 94 MiB by eight threads; Python and numpy take 30 MiB."""
    lead, _ = header_of({"w": ("F32", (24_000, 1024))}, None)
    ones = np.ones(1024 * 100, np.float32).tobytes()
    for index in range(3):
        (tmp_path / str(index)).mkdir()
        with (tmp_path / str(index) / "model.safetensors").open("wb") as file:
            file.write(lead)
            for _ in range(240):
                file.write(ones)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 80, f"{result.stdout} MiB"
