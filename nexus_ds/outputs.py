"""New output directories and files: whole or not at all, and never over something else.

They are written under a temporary name, flushed to the disk, and renamed when they are whole, so
that a loss of power leaves all or nothing too, and whoever removes something older afterwards
removes nothing that is needed.

An output has one writer at a time (`held`). The lock is the kernel's, so that it goes with its
process, however that ends, and what a killed writer left under a temporary name is removed by the
next one of any output beside it (`remove_left` does that alone; `unfinished` tells of it). Every
file of an output may be read by those whom the umask allows (0666 & ~umask), whoever wrote it. A
failed write names the file, also where the system does not.
Not covered: two writers on two machines whose shared file system has no locks (NFS without a lock
service, Lustre mounted without `flock`): there each believes that it is alone. A machine that is
lost may keep its lock on NFS for a while; the message names the file to remove.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, BinaryIO

from nexus_ds.errors import (
    ConfigError,
    NexusError,
    OutputBusyError,
    OutputExistsError,
)
from nexus_ds.launch import job_words

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# Bytes that are written at once: tensors are, and network file systems pay by the call.
BUFFER = 1 << 20
# All that end a process unless it is asked: what SLURM, a terminal that is closed, limits of CPU
# time and `kill` send. Ctrl-C is KeyboardInterrupt already.
ENDING = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGQUIT,
    signal.SIGXCPU,
)
TEMPORARY_END = r"\.tmp-[0-9]+"
TEMPORARY = re.compile(r"\..+" + TEMPORARY_END)
# A full disk, a quota, a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As errors of Rust's libraries end.
IN_WORDS = re.compile(r"\(os error (\d+)\)")
# File systems that can't flush a folder, as some of network shares, say so by one of these.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# Seconds that a lock is waited for (whoever clears up beside it holds it for an instant), and
# between two looks.
PATIENCE, PAUSE = 1.0, 0.02


class Ended(SystemExit):
    """A signal asked this process to end: its exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name

    def __str__(self) -> str:
        return f"ended by {self.signal}"


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, the signals of ENDING raise `Ended`, so that `finally` removes what is unfinished.

    What was ignored (nohup) or has a handler already is left alone, and so is a handler that is set
    meanwhile, also afterwards. Further signals don't disturb the clearing up, nor does a second
    Ctrl-C.
    """
    # Python lets no other thread set handlers.
    on_main = threading.current_thread() is threading.main_thread()
    usual = dict.fromkeys(ENDING, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    mine = {
        number: handler
        for number, handler in usual.items()
        if on_main and signal.getsignal(number) is handler
    }

    def leave(number: int, frame: FrameType | None) -> None:
        for other in mine:
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(number)

    for number in mine:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in mine.items():
            if signal.getsignal(number) in (leave, signal.SIG_IGN):
                signal.signal(number, handler)


def numbered(folder: Path, start: str) -> list[int]:
    """Return the numbers of the folders in `folder` that are named `start` and a number, sorted.

    As this program writes numbers: a folder of any other name is somebody else's.
    """
    name = re.compile(re.escape(start) + r"(0|[1-9][0-9]{0,8})")
    found = (name.fullmatch(path.name) for path in folder.glob(f"{start}*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


# Writing ----------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path, size: int | None = None, full_alone: bool = False) -> Iterator[None]:
    """Let a failed write (of `size` bytes) say of which file.

    The system's error on a full disk names none; libraries in Rust tell it in the words of an error
    of their own, and numpy tells how much was written, without a number.

    Args:
        path: of the file, or of the folder where no more is known.
        size: bytes that are still to be written.
        full_alone: only where room is what lacks; other errors may be of something else.
    """
    try:
        yield
    except Exception as error:
        found = _system_error(error)
        if found is None or (full_alone and found[0] not in FULL):
            raise
        number, reason = found
        free = shutil.disk_usage(Path(path).parent).free
        needed = "" if size is None else f"need {size:,} bytes more, "
        raise OSError(number, f"{reason}: {needed}free {free:,}", str(path)) from error


def _system_error(error: Exception) -> tuple[int, str] | None:
    """Return the system's number and words of an error that names no file; None of any other."""
    if isinstance(error, OSError):
        if error.filename is not None:
            return None
        return error.errno or errno.EIO, error.strerror or str(error)
    told = None if isinstance(error, NexusError) else IN_WORDS.search(str(error))
    return (int(told[1]), os.strerror(int(told[1]))) if told else None


def write_at(
    descriptor: int,
    position: int,
    data: memoryview,
    path: Path,
    after: int = 0,
) -> None:
    """Write all of `data` (bytes).

    One call of the system writes at most 2 GiB, and less where a limit or quota is near.

    Args:
        descriptor: of the opened file.
        position: of the first byte in it.
        data: what is written.
        path: of the file.
        after: bytes that the file needs besides; only told.

    Raises:
        OSError: names `path`, what is still to be written, and what is free.
    """
    done = 0
    while done < len(data):
        with naming(path, len(data) - done + after):
            count = os.pwrite(descriptor, data[done:], position + done)
            # Without this a full disk that says so by writing nothing would be tried for ever.
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


class _NamedFile(io.FileIO):
    """A file whose failed writes name it."""

    def write(self, data: Buffer) -> int:
        path = Path(os.fsdecode(self.name))
        with naming(path, memoryview(data).nbytes):
            return super().write(data)


def create(path: Path, append: bool = False) -> BinaryIO:
    """Open a file for writing, buffered; what fails, at `close` too, names the file."""
    return io.BufferedWriter(_NamedFile(path, "ab" if append else "wb"), BUFFER)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as they are).

    Half a character, which JSON can name, is written as JSON does: as \\ud800.
    """
    with create(path) as stream:
        stream.write(text.encode("utf-8", errors="backslashreplace"))


def copy_file(source: Path, target: Path) -> None:
    """Copy what a file holds; its mode and times are the copy's own.

    Not by `shutil`: of a full disk it names what was read, without need or room.

    Raises:
        OSError: it names `target`, what is still to be written of it and what is free; `source`
            where that can't be read.
    """
    with naming(target), source.open("rb", buffering=0) as old, create(target) as new:
        size = os.fstat(old.fileno()).st_size
        block = memoryview(bytearray(BUFFER))
        done = 0
        while True:
            with naming(source):
                count = old.readinto(block)
            if not count:
                return
            left = max(size - done - count, 0)
            write_at(new.fileno(), done, block[:count], target, left)
            done += count


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk.

    Raises:
        OSError: the disk has lost what was written; it names the file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


# One writer -------------------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    """Refuse an output that can't be made, before hours go into what it is made of.

    Raises:
        OutputExistsError: it exists (an empty directory counts as free, unless nothing can be
            renamed to its place).
        ConfigError: it lies in a model.
        OSError: nobody may write there.
    """
    if out.is_symlink():
        raise OutputExistsError(
            f"{out} is a link, whose place no output can take; give what it leads to "
            f"({os.path.realpath(out)}), or another --out"
        )
    if os.path.ismount(out):
        raise OutputExistsError(
            f"{out} is a mount point, whose place no output can take; give a new folder in it, "
            f"such as {out / 'out'}"
        )
    for folder in out.resolve().parents:
        if _is_model(folder):
            raise ConfigError(
                f"{out} would lie in the model {folder}, which would then be other than what was "
                "written; give an --out outside of it"
            )
    free = out.is_dir() and not any(out.iterdir())
    if not free and out.exists():
        raise OutputExistsError(f"{out} exists already; give another --out or remove it first")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"{out} can't be made in what is not a directory", str(there)
        )
    if not os.access(there, os.W_OK | os.X_OK):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        kind, need = errno.EACCES, "write permission"
        if read_only:
            kind, need = errno.EROFS, "mount its disk for writing"
        raise OSError(kind, f"{out} can't be made; give another --out, or {need}", str(there))


def _is_model(folder: Path) -> bool:
    """Return whether a folder holds a model's configuration and weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _lock(path: Path, out: Path) -> tuple[IO[str], bool]:
    """Return `path`, opened, and whether this file system could lock it.

    Raises:
        OutputBusyError: another process has it, and not just for the moment in which it looks for
            what killed writers left.
    """
    patient_until = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < patient_until:
                file.close()
                time.sleep(PAUSE)
                continue
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise OutputBusyError(
                f"{out} is being written by {holder}; wait for it or give another output (if its "
                f"machine is lost, remove {path})"
            ) from None
        except OSError:
            return file, False
        if _is_at(file, path):
            return file, True
        # Its holder has removed it in the meantime: a lock on it keeps nobody out.
        file.close()


def _is_at(file: IO[str] | IO[bytes], path: Path) -> bool:
    """Return whether `path` still is the opened file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _temporary(out: Path) -> Path:
    return out.parent / f".{out.name}.tmp-{os.getpid()}"


def _temporary_file(out: Path) -> Path:
    """Return a name that nobody else has.

    Files have several writers, and two containers may have processes of the same number.
    """
    return Path(f"{_temporary(out)}{secrets.randbelow(10**9):09}")


def _temporaries(folder: Path) -> list[Path]:
    """Return all temporary files and directories in a folder, of whatever output and process."""
    try:
        names = os.listdir(folder)
    except PermissionError:
        # A folder that may be written and not listed.
        return []
    return [folder / name for name in names if TEMPORARY.fullmatch(name)]


def _left(out: Path) -> list[Path]:
    """Return all temporary files and directories of `out`, of whatever process."""
    # What begins alike may be another output's.
    start = f".{out.name}.tmp-"
    return [
        path
        for path in _temporaries(out.parent)
        if path.name.startswith(start) and path.name.removeprefix(start).isdecimal()
    ]


def _remove_if_dead(path: Path) -> None:
    """Remove a temporary file or directory whose writer was killed; this process holds its output.

    Directories are made under the lock of their output. A file need not be: a living process that
    writes it has locked it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink()
    except OSError:
        # Alive, gone already, another user's, or a file system without locks.
        return


def _remove_beside(out: Path) -> None:
    """Remove what killed writers of other outputs in the same folder left: whole models, maybe.

    Only a folder whose lock file is there, names its writer on this machine, and is free: anything
    else may be alive, or somebody else's. Some network file systems know the locks of one machine
    alone.
    """
    here = socket.gethostname()
    for left in _temporaries(out.parent):
        name, _, process = left.name.removeprefix(".").rpartition(".tmp-")
        if left.is_symlink() or not left.is_dir():
            continue
        lock = out.parent / f".{name}.lock"
        with suppress(OSError), lock.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.read().startswith(f"process {process} on {here} since ") and _is_at(file, lock):
                # Renamed, since the next writer of that output is refused as long as the lock is
                # held here. Whoever is killed from here on leaves something of his own.
                mine = _temporary(out)
                left.rename(mine)
                lock.unlink()
                file.close()
                shutil.rmtree(mine, ignore_errors=True)


@dataclass(frozen=True)
class Unfinished:
    """A directory that a writer has not finished, or never will."""

    path: Path
    size: int
    """Bytes of its files."""
    writer: str
    """`process 7 on HOST since ...`; empty where its lock is gone."""
    gone: bool
    """Whether that was a process of this machine and has ended."""


def unfinished(folder: Path) -> list[Unfinished]:
    """Return the temporary directories in a folder; looked at alone, without a lock."""
    found = []
    for path in sorted(_temporaries(folder)):
        if path.is_symlink() or not path.is_dir():
            continue
        name, _, process = path.name.removeprefix(".").rpartition(".tmp-")
        writer = ""
        with suppress(OSError):
            writer = (folder / f".{name}.lock").read_text("utf-8", "replace").strip()
        here = writer.startswith(f"process {process} on {socket.gethostname()} since ")
        gone = here and not _runs(int(process))
        found.append(Unfinished(path, _size(path), writer, gone))
    return found


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # Another user's.
        return True
    return True


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # It may go while it is looked at.
        with suppress(OSError):
            total += path.lstat().st_size
    return total


def remove_left(folder: Path) -> None:
    """Remove what killed writers on this machine left in a folder; others' stays.

    For a folder in which nothing may be written any more, so that no later writer does it.
    """
    if not folder.is_dir() or not _temporaries(folder):
        return
    # Another process does the same, or the folder is somebody else's.
    with suppress(OutputBusyError, OSError), held(folder / "leftovers"):
        pass


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Be the only process that writes `out` inside the context.

    Args:
        out: what is written.

    Raises:
        OutputBusyError: there is another, which the message names.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    file, locked = _lock(path, out)
    with file:
        # Without a lock there may be a living writer.
        if locked:
            for left in _left(out):
                _remove_if_dead(left)
            _remove_beside(out)
        try:
            _sign(file, path)
            yield
        finally:
            # While the lock is held, so that nobody has it.
            path.unlink(missing_ok=True)


def _sign(file: IO[str], path: Path) -> None:
    """Write into the lock file at `path` who holds it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    job = job_words()
    where = f" in {job}" if job else ""
    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}{where}\n".encode()
    file.truncate(0)
    # Not by `file`, which would try once more when it is closed.
    write_at(file.fileno(), 0, memoryview(holder), path)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `out` when the block ends well, else vanishes.

    It lies beside `out`, so that a rename moves no bytes.

    Raises:
        OutputExistsError: `out` exists.
        OutputBusyError: another process is writing it.
    """
    out = Path(out)
    refuse_existing(out)
    with held(out), _temporary_directory(out) as temporary:
        yield temporary


@contextmanager
def _temporary_directory(out: Path) -> Iterator[Path]:
    # It may have been finished a moment ago, before the lock was ours.
    refuse_existing(out)
    temporary = _temporary(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        # Libraries write here too, figures and tokenizers.
        with naming(temporary, full_alone=True):
            yield temporary
        _share(temporary)
        # An empty directory counts as free, and a rename over one fails on some systems.
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(directory: Path) -> None:
    """Give every file the mode that the umask gives, and flush all to the disk.

    Some libraries write files that their owner alone can read.
    """
    usual = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in [*directory.rglob("*"), directory]:
        # The target of a link is not this output's.
        if path.is_symlink():
            continue
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != usual:
            path.chmod(usual)
        if path.is_file() or path.is_dir():
            sync(path)


def _start_file(path: Path) -> BinaryIO:
    """Return a temporary file, empty and locked as long as it is open (if this file system can)."""
    while True:
        file = create(path)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):
            return file
        # Taken for a killed writer's, and removed, before it was locked.
        file.close()


@contextmanager
def new_file(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` when the block ends well, and else vanishes.

    The path is an empty file already; it has to be written, not replaced.
    """
    out = Path(out)
    if not overwrite:
        refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_file(out)
    with _start_file(temporary):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, out)
            sync(out.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, replacing `path` in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    with new_file(path, overwrite=True) as temporary:
        write_text(temporary, text + "\n")
