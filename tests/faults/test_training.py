"""Faults that hit a whole training under its launcher: torchrun or deepspeed, two ranks, real
files."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DOMAINS
from launch import clean_environment, finish, free_port, start_ranks

from nexus_ds.runtime.states import steps_saved

pytestmark = pytest.mark.slow
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
TRAIN = Path(__file__).parents[2] / "nexus_ds" / "train.py"


def words(nexus, text, out, *more):
    return [
        *(str(TRAIN), "--config", "demo"),
        f"model.path={nexus}",
        f"model.tokenizer={nexus}",
        f"data.path={text}",
        f"output={out}",
        f"data.cache={out.parent / 'tokens'}",
        f"data.domains=[{','.join(DOMAINS)}]",
        f"data.validation_domains=[{','.join(DOMAINS)}]",
        "data.sequence_length=16",
        "parallel.expert=2",
        "training.tokens=0",
        "training.steps=4000",
        "training.lr=1e-3",
        "training.batch_size=4",
        "training.log_every=1",
        "training.save_every=5",
        "training.eval_windows=2",
        "pipeline.run=unused",
        *more,
    ]


def ranks_of(out):
    """Return the process ids of the ranks that train `out`, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"output={out}".encode() in command and b"torch.distributed.run" not in command:
            rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank)] = int(folder.name)
    return found


def until(happened, seconds=600):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def launched(*command):
    """Start a launcher; what it and its ranks say goes into one pipe."""
    said = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=clean_environment(), **said)


def test_a_launcher_that_is_killed_takes_its_ranks_along_and_the_run_goes_on(
    tmp_path, nexus_dir, text_folder
):
    out = tmp_path / "out"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    meeting = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    launcher = launched(*torchrun, *meeting, *words(nexus_dir, text_folder, out))
    states = tmp_path / "out.training" / "states"
    try:
        until(lambda: states.is_dir() and len(steps_saved(states)) >= 2)
        ranks = ranks_of(out)
        assert sorted(ranks) == [0, 1]
        os.kill(launcher.pid, signal.SIGKILL)
        until(lambda: not ranks_of(out), 60)
    finally:
        # whatever was not so: nobody trains on beside all later tests
        launcher.kill()
        for rank in ranks_of(out).values():
            os.kill(rank, signal.SIGKILL)
    launcher.communicate()
    assert not out.exists()
    saved = steps_saved(states)[-1]
    # As an interrupted saving leaves it, of the size of a state.
    for name in ("partial_9_0123abcd", "partial"):
        (states / name).mkdir(exist_ok=True)
        (states / name / "rank_00000.safetensors").write_bytes(b"half")
    # A disk flips one bit of an id while nothing runs.
    file = sorted((tmp_path / "tokens").glob("*-train-*.bin"))[0]
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    process = start_ranks(words(nexus_dir, text_folder, out), 2)
    until(lambda: steps_saved(states)[-1] > saved)
    # What some clusters send; one rank alone is told, all agree.
    process[0].send_signal(signal.SIGUSR2)
    said = finish(process, code=75)
    assert re.search(
        rf"{file}: found sha256 \w+, expected \w+; the file is damaged and is made", said
    )
    assert f", resumed after step {saved}" in said
    assert "stopped by signal 12 after step" in said
    assert file.read_bytes() != content
    assert sorted(path.name for path in states.iterdir()) == [
        "latest",
        *(f"step_{step}" for step in steps_saved(states)),
    ]


def test_a_deepspeed_that_is_killed_takes_its_ranks_along(tmp_path, nexus_dir, text_folder):
    """Its launcher is a process of its own, which went on with the ranks and the lock."""
    out = tmp_path / "out"
    options = ("--num_gpus", "2", "--master_port", str(free_port()))
    runner = launched(DEEPSPEED, *options, *words(nexus_dir, text_folder, out))
    states = tmp_path / "out.training" / "states"
    try:
        until(lambda: states.is_dir() and steps_saved(states))
        assert sorted(ranks_of(out)) == [0, 1]
        os.kill(runner.pid, signal.SIGKILL)
        until(lambda: not ranks_of(out), 60)
    finally:
        runner.kill()
        for rank in ranks_of(out).values():
            os.kill(rank, signal.SIGKILL)
    # the launcher has the pipe too, and ends with its ranks
    said = runner.communicate(timeout=60)[0]
    assert "stopped by signal 15 after step" in said, said
