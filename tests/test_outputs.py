import errno
import fcntl
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from launch import file_limit, file_modes, umask

from nexus_ds.__main__ import main
from nexus_ds.errors import ConfigError, OutputBusyError, OutputExistsError
from nexus_ds.outputs import (
    ENDING,
    Ended,
    copy_file,
    create,
    exit_on_signals,
    held,
    naming,
    new_directory,
    new_file,
    refuse_existing,
    remove_left,
    unfinished,
    write_at,
    write_json,
)

HOLD = """
import sys, time
from pathlib import Path
from nexus_ds.outputs import exit_on_signals, new_directory, new_file
kind = {"directory": new_directory, "file": lambda out: new_file(out, overwrite=True)}[sys.argv[2]]
with exit_on_signals(), kind(Path(sys.argv[1])) as made:
    (made / "model" if made.is_dir() else made).write_text("whole")
    print("holding", flush=True)
    sys.stdin.readline()
"""


def start(out: Path, kind: str, **options: object) -> subprocess.Popen:
    """Start another process that is writing `out` until it is told to finish."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "holding\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def other(tmp_path: Path):
    """Another process that is writing tmp_path/out until it is told to finish."""
    process = start(tmp_path / "out", "directory")
    yield process
    end(process)


@pytest.fixture
def other_file(tmp_path: Path):
    """The same of a file."""
    process = start(tmp_path / "out", "file")
    yield process
    end(process)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_writer_is_told_who_the_first_is_and_the_first_goes_on(
    other: subprocess.Popen, tmp_path: Path
):
    since = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d(?: in SLURM job \d+)?"
    who = rf"process {other.pid} on {re.escape(socket.gethostname())} since {since}"
    advice = r"wait for it or give another output \(if .* remove .*/\.out\.lock\)"
    message = rf"/out is being written by {who}; {advice}$"
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(OutputBusyError, match=message), new_directory(tmp_path / "out"):
            raise AssertionError("both write")
    with new_directory(tmp_path / "else"):
        pass
    other.communicate("\n", timeout=60)
    assert (tmp_path / "out" / "model").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "out"]
    with (
        pytest.raises(OutputExistsError, match="out exists already"),
        new_directory(tmp_path / "out"),
    ):
        pass


def test_the_second_writer_is_told_the_job_of_the_first(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    message = r"since \d+-\d+-\d+ \d+:\d+:\d+ in SLURM job 12_3; wait for it or give another"
    with (
        held(tmp_path / "out"),
        pytest.raises(OutputBusyError, match=message),
        new_directory(tmp_path / "out"),
    ):
        raise AssertionError("both write")


def test_the_lock_of_a_killed_process_is_none(other: subprocess.Popen, tmp_path: Path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".out.lock").read_text().startswith(f"process {other.pid} on ")
    with new_directory(tmp_path / "out") as folder:
        (folder / "model").write_text("second")
    assert (tmp_path / "out" / "model").read_text() == "second"
    assert not (tmp_path / ".out.lock").exists()


# Leftovers --------------------------------------------------------------------------------------


def test_what_a_killed_writer_left_goes_with_the_next_one(other: subprocess.Popen, tmp_path: Path):
    end(other)
    assert names(tmp_path) == [".out.lock", f".out.tmp-{other.pid}"]
    with new_directory(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock", f".out.tmp-{os.getpid()}"]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_writer_left_goes_with_the_next_one_of_another_output(
    other: subprocess.Popen, tmp_path: Path
):
    """Else a model that nobody wants any more would stay for ever."""
    with new_directory(tmp_path / "else"):
        assert f".out.tmp-{other.pid}" in names(tmp_path)  # alive
    end(other)
    with held(tmp_path / "else.training"):
        assert names(tmp_path) == [".else.training.lock", "else"]


def test_a_folder_where_nobody_writes_any_more_is_told_of_and_cleared(
    other: subprocess.Popen, tmp_path: Path
):
    left = f".out.tmp-{other.pid}"
    [told] = unfinished(tmp_path)
    assert (told.path, told.size, told.gone) == (tmp_path / left, len("whole"), False)
    assert told.writer.startswith(f"process {other.pid} on {socket.gethostname()} since ")
    remove_left(tmp_path)
    assert left in names(tmp_path)  # alive
    end(other)
    (tmp_path / ".their.tmp-2").mkdir()
    (tmp_path / ".their.lock").write_text("process 2 on elsewhere since yesterday\n")
    (tmp_path / ".lost.tmp-3").mkdir()
    gone = {one.path.name: one.gone for one in unfinished(tmp_path)}
    assert gone == {left: True, ".their.tmp-2": False, ".lost.tmp-3": False}
    remove_left(tmp_path)
    assert names(tmp_path) == [".lost.tmp-3", ".their.lock", ".their.tmp-2"]
    remove_left(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_leftovers_that_no_lock_tells_of_stay(tmp_path: Path):
    """They may be anybody's."""
    for number in (1, 2, 3):
        (tmp_path / f".their.tmp-{number}").mkdir()
    here = socket.gethostname()
    (tmp_path / ".their.lock").write_text(f"process 2 on {here} since yesterday\n")
    (tmp_path / ".link.tmp-7").symlink_to(tmp_path / ".their.tmp-1")
    (tmp_path / ".link.lock").write_text(f"process 7 on {here} since yesterday\n")
    with held(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".link.lock", ".link.tmp-7", ".their.tmp-1", ".their.tmp-3"]


def test_what_a_writer_on_another_machine_left_stays(tmp_path: Path):
    """Its lock is not seen from here on every file system: it may be alive."""
    (tmp_path / ".their.tmp-2").mkdir()
    (tmp_path / ".their.lock").write_text("process 2 on elsewhere since yesterday\n")
    with held(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".their.lock", ".their.tmp-2"]


def test_leftovers_of_others_stay(tmp_path: Path):
    # of out.tmp-1, of nobody, of outer
    kept = [".out.tmp-1.tmp-23", ".out.tmp-keep", ".outer.tmp-4", "out.tmp-5"]
    for name in kept:
        (tmp_path / name).mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [*kept[:3], "out", "out.tmp-5"]


def test_a_writer_that_is_refused_takes_nothing_from_the_living_one(
    other: subprocess.Popen, tmp_path: Path
):
    with pytest.raises(OutputBusyError), held(tmp_path / "out"):
        pass
    other.communicate("\n", timeout=60)
    assert (other.returncode, names(tmp_path / "out")) == (0, ["model"])


def test_a_killed_writer_of_a_file_leaves_nothing_to_the_next_one(
    other_file: subprocess.Popen, tmp_path: Path
):
    end(other_file)
    (left,) = names(tmp_path)
    assert re.fullmatch(rf"\.out\.tmp-{other_file.pid}\d{{9}}", left)
    with held(tmp_path / "out"):
        write_json(tmp_path / "out", 1)
    assert names(tmp_path) == ["out"]


def test_a_living_writer_of_a_file_keeps_it(other_file: subprocess.Popen, tmp_path: Path):
    with held(tmp_path / "out"):
        write_json(tmp_path / "out", 1)
    temporary, out = names(tmp_path)
    assert temporary.startswith(f".out.tmp-{other_file.pid}") and out == "out"
    other_file.communicate("\n", timeout=60)
    assert (other_file.returncode, (tmp_path / "out").read_text()) == (0, "whole")
    assert names(tmp_path) == ["out"]


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch):
    flock = fcntl.flock

    def late(file: object, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        next(tmp_path.glob(".out.tmp-*")).unlink()  # between our opening and our locking it
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_json(tmp_path / "out", 1)
    assert (tmp_path / "out").read_text() == "1\n"


def test_two_writers_of_a_file_whose_processes_have_one_number_do_not_meet(tmp_path: Path):
    """As of two containers; a thread's is that of its process too."""
    out = tmp_path / "out"
    with new_file(out, overwrite=True) as first:
        first.write_text("first")
        second = threading.Thread(target=write_json, args=(out, 2), daemon=True)
        second.start()
        second.join(20)
        assert not second.is_alive() and out.read_text() == "2\n"
        assert first.read_text() == "first"
    assert out.read_text() == "first" and names(tmp_path) == ["out"]


def test_a_lock_that_another_start_has_for_an_instant_is_waited_for(tmp_path: Path):
    """Whoever clears up beside an output locks its lock file for a moment."""
    lock = (tmp_path / ".out.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.3, lock.close).start()
    with held(tmp_path / "out"):
        pass


# The disk ---------------------------------------------------------------------------------------


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    """What a loss of power takes can't be tried here; what is asked of the kernel can be seen."""
    seen = []

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((path.name, (tmp_path / "out").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    with new_directory(tmp_path / "out") as made:
        (made / "model").write_text("whole")
        (made / "parts").mkdir()
        (made / "parts" / "one").write_text("whole")
        (made / "elsewhere").symlink_to("/dev/null")
    temporary = f".out.tmp-{os.getpid()}"
    before = {"model", "parts", "one", temporary}
    assert {name for name, there in seen if not there} == before
    assert seen[-1] == (tmp_path.name, True)
    assert seen[-2][0] == temporary  # the folder itself after all that it names
    seen.clear()
    write_json(tmp_path / "figures.json", 1)
    (written, _), (folder, _) = seen
    assert written.startswith(f".figures.json.tmp-{os.getpid()}") and folder == tmp_path.name


def test_a_disk_that_loses_what_was_written_is_told_and_the_old_file_stays(
    tmp_path: Path, monkeypatch
):
    write_json(tmp_path / "out", "old")

    def lost(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match=r"quota exceeded: free [\d,]+: '.*/\.out\.tmp-\d+'"):
        write_json(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == '"old"\n'
    assert names(tmp_path) == ["out"]


def test_a_share_that_can_not_flush_folders_does_without(tmp_path: Path, monkeypatch):
    fsync = os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with new_directory(tmp_path / "out") as made:
        (made / "model").write_text("whole")
    assert names(tmp_path) == ["out"]


# Signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, kind: str):
    # Tests that are started under nohup would hand their ignored SIGHUP down.
    heeding = partial(signal.signal, number, signal.SIG_DFL)
    process = start(tmp_path / "out", kind, preexec_fn=heeding)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert names(tmp_path) == []


def test_nohup_stays(tmp_path: Path):
    process = start(
        tmp_path / "out",
        "directory",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    process.communicate("\n", timeout=60)
    assert (process.returncode, names(tmp_path)) == (0, ["out"])


def test_a_second_signal_does_not_disturb_the_clearing_up_and_handlers_come_back():
    cleared = False
    with pytest.raises(Ended) as ended, exit_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            cleared = True
    assert (cleared, ended.value.code, ended.value.signal) == (True, 143, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_is_set_meanwhile_stays():
    def own(number, frame):
        pass

    try:
        with exit_on_signals():
            signal.signal(signal.SIGUSR1, own)
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_second_ctrl_c_does_not_disturb_the_clearing_up_either(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), exit_on_signals(), new_directory(tmp_path / "out"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_every_file_of_an_output_has_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int):
    with umask(mask):
        with new_directory(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "own").write_text("as open makes it")
            (folder / "private").touch(0o600)  # as some libraries do
            (folder / "open").touch()
            (folder / "open").chmod(0o666)
        with new_file(tmp_path / "file") as temporary:
            temporary.write_text("x")
    assert file_modes(tmp_path / "out") == file_modes(tmp_path / "file") == {mode}


# Short writes -----------------------------------------------------------------------------------


def test_a_write_that_stops_short_goes_on_or_names_file_need_and_free(tmp_path: Path):
    said = r"\[Errno 27\] File too large: need 600 bytes more, free [\d,]+: '.*/raw'$"
    with (
        (tmp_path / "raw").open("wb", buffering=0) as file,
        file_limit(1000),
        pytest.raises(OSError, match=said),
    ):
        write_at(file.fileno(), 600, memoryview(b"x" * 1000), tmp_path / "raw")
    assert (tmp_path / "raw").stat().st_size == 1000


@pytest.mark.parametrize("at_close", [True, False])
def test_a_buffered_write_names_the_file_at_once_or_when_it_is_closed(
    tmp_path: Path, at_close: bool
):
    said = r"\[Errno 27\] File too large: need [\d,]+ bytes more, free [\d,]+: '.*/text'$"
    with file_limit(1000), pytest.raises(OSError, match=said), create(tmp_path / "text") as stream:
        stream.write(b"x" * (1500 if at_close else 3 << 20))
        assert at_close, "larger than the buffer"


def test_a_copy_that_stops_short_names_what_it_writes_with_the_need_of_the_whole_file(
    tmp_path: Path,
):
    source, target = tmp_path / "shard", tmp_path / "copy"
    source.write_bytes(os.urandom((5 << 20) + 7))
    # In the middle of the third block of a MiB.
    said = rf"^\[Errno 27\] File too large: need 2,621,447 bytes more, free [\d,]+: '{target}'$"
    with file_limit(5 << 19), pytest.raises(OSError, match=said):
        copy_file(source, target)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    source.write_bytes(b"")
    copy_file(source, target)
    assert target.read_bytes() == b""


def test_what_can_not_be_read_for_a_copy_is_named_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a disk that loses blocks the system's error names no file."""
    lost = tmp_path / "lost"
    lost.write_bytes(b"x")

    def opened(*_: object, **__: object) -> object:
        return LostBlocks(lost)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match=rf"^\[Errno 5\] Input/output error: .*: '{lost}'$"):
        copy_file(lost, tmp_path / "copy")


class LostBlocks(io.FileIO):
    def readinto(self, *_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_json_that_does_not_fit_leaves_the_old_one(tmp_path: Path):
    write_json(tmp_path / "a.json", [1])
    with (
        file_limit(1000),
        pytest.raises(OSError, match=r"File too large: need .*/\.a\.json\.tmp-\d+'$"),
    ):
        write_json(tmp_path / "a.json", ["x" * 2000])
    assert (tmp_path / "a.json").read_text() == "[\n  1\n]\n" and names(tmp_path) == ["a.json"]


# One writer -------------------------------------------------------------------------------------


def test_a_lock_file_that_its_holder_just_removed_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch
):
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
    (tmp_path / ".out.tmp-1").mkdir()
    (tmp_path / ".out.tmp-2").touch()
    with new_directory(tmp_path / "out"):
        pass
    write_json(tmp_path / "file", 1)
    # what may be a living writer's stays
    assert names(tmp_path) == [".out.tmp-1", ".out.tmp-2", "file", "out"]


def test_a_second_demo_of_the_same_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with held(tmp_path / "run"):
        assert main(["demo", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert (
        f"nexus-ds demo: {tmp_path / 'run'} is being written by process {os.getpid()} on " in said
    )
    assert list(tmp_path.iterdir()) == []


# Before the work --------------------------------------------------------------------------------


def as_nobody(action: Callable[[], object]) -> str:
    """Return the error of an action that is done by a user who owns nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            action()
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_an_output_where_nobody_may_write_is_refused_before_the_work():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        out = Path(folder) / "a" / "b" / "out"
        said = as_nobody(lambda: refuse_existing(out))
        advice = "give another --out, or write permission"
        assert said == f"[Errno 13] {out} can't be made; {advice}: '{folder}'"
        refuse_existing(out)


def test_an_output_whose_place_can_not_be_taken_is_refused_before_the_work(
    tmp_path: Path, monkeypatch
):
    (tmp_path / "real").mkdir()
    for target in ("real", "nowhere"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(tmp_path / target)
        said = f"to-{target} is a link, .*; give what it leads to \\({tmp_path / target}\\), or ano"
        with pytest.raises(OutputExistsError, match=said):
            refuse_existing(link)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "real")
    said = "real is a mount point, .*; give a new folder in it, such as .*/real/out$"
    with pytest.raises(OutputExistsError, match=said):
        refuse_existing(tmp_path / "real")


def test_an_output_in_a_model_is_refused_for_the_models_sake(tmp_path: Path):
    """Its files are all that lie in it: it would not be what was written any more."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    refuse_existing(model / "out")  # no model, but some project's folder
    (model / "model.safetensors").write_text("")
    (tmp_path / "link").symlink_to(model)
    for out in (model / "out", tmp_path / "link" / "more" / "out"):
        said = f"{out} would lie in the model {model}, which .*; give an --out outside of it"
        with pytest.raises(ConfigError, match=said), new_directory(out):
            raise AssertionError("hours of work")
    refuse_existing(tmp_path / "out")
    assert names(model) == ["config.json", "model.safetensors"]


def test_an_output_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"out can't be made in what is not a directory: "):
        refuse_existing(tmp_path / "file" / "out")


def test_a_library_that_finds_the_disk_full_gets_the_folder_named(tmp_path: Path):
    with (
        pytest.raises(OSError, match=r"File too large: free [\d,]+: '.*/\.out\.tmp-\d+'"),
        new_directory(tmp_path / "out") as made,
        file_limit(1000),
    ):
        (made / "figure.png").write_bytes(bytes(2000))
    with pytest.raises(OSError, match=r"^\[Errno 111\] refused$"), new_directory(tmp_path / "out"):
        raise OSError(errno.ECONNREFUSED, "refused")


def save_tensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(500)}, folder / "model.safetensors")


def save_words(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(word): word for word in range(500)})).save(
        str(folder / "words")
    )


@pytest.mark.parametrize("save", [save_tensors, save_words])
def test_a_library_that_tells_the_full_disk_in_words_of_its_own_gets_the_folder_named(
    tmp_path: Path, save: Callable[[Path], None]
):
    said = r"^\[Errno 27\] File too large: free [\d,]+: '.*/\.out\.tmp-\d+'$"
    with (
        pytest.raises(OSError, match=said),
        new_directory(tmp_path / "out") as made,
        file_limit(1000),
    ):
        save(made)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match=r"^x \(os error 2\)$"), new_directory(tmp_path / "out"):
        raise ValueError("x (os error 2)")


def test_a_short_write_of_numpy_names_the_file(tmp_path: Path):
    path = tmp_path / "numbers"
    said = rf"written: free [\d,]+: '{path}'$"
    with (
        file_limit(5000),
        pytest.raises(OSError, match=said),
        path.open("wb") as file,
        naming(path),
    ):
        np.zeros(100_000, np.uint8).tofile(file)


def test_a_lock_file_that_does_not_fit_is_named_and_goes(tmp_path: Path):
    said = r"^\[Errno 27\] File too large: need \d+ bytes more, free [\d,]+: '.*/\.out\.lock'$"
    with file_limit(10), pytest.raises(OSError, match=said), held(tmp_path / "out"):
        raise AssertionError("nobody could be told of this writer")
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["é", "half a character: \ud800 é"])
def test_json_of_a_stranger_is_written_as_it_was(tmp_path: Path, text: str):
    write_json(tmp_path / "a.json", {"a": text})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": text}
    assert "é" in (tmp_path / "a.json").read_text()
