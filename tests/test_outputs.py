import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ds.__main__ import main
from nexus_ds.errors import OutputBusyError, OutputExistsError
from nexus_ds.outputs import held, new_directory

HOLD = """
import sys, time
from pathlib import Path
from nexus_ds.outputs import new_directory
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "model").write_text("whole")
    print("holding", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that is writing tmp_path/out until it is told to finish."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_writer_is_told_who_the_first_is_and_the_first_goes_on(other: subprocess.Popen, tmp_path: Path):
    who = rf"process {other.pid} on {re.escape(socket.gethostname())} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    message = rf"/out is being written by {who}; wait for it or give another output \(if .* remove .*/\.out\.lock\)$"
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(OutputBusyError, match=message), new_directory(tmp_path / "out"):
            raise AssertionError("both write")
    with new_directory(tmp_path / "else"):
        pass
    other.communicate("\n", timeout=20)
    assert (tmp_path / "out" / "model").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "out"]
    with pytest.raises(OutputExistsError, match="out exists already"), new_directory(tmp_path / "out"):
        pass


def test_the_lock_of_a_killed_process_is_none(other: subprocess.Popen, tmp_path: Path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".out.lock").read_text().startswith(f"process {other.pid} on ")
    with new_directory(tmp_path / "out") as folder:
        (folder / "model").write_text("second")
    assert (tmp_path / "out" / "model").read_text() == "second"
    assert not (tmp_path / ".out.lock").exists()


def test_a_lock_file_that_its_holder_just_removed_is_not_taken_for_the_lock(tmp_path: Path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / ".out.lock"

    def late(file: object, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # between our opening and our locking it
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        held(tmp_path / "out"),
        pytest.raises(OutputBusyError, match=f"process {os.getpid()} "),
        held(tmp_path / "out"),
    ):
        raise AssertionError("both write")


def test_a_file_system_without_locks_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with new_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_demo_of_the_same_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with held(tmp_path / "run"):
        assert main(["demo", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert f"nexus-ds demo: {tmp_path / 'run'} is being written by process {os.getpid()} on " in said
    assert list(tmp_path.iterdir()) == []
