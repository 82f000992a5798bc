"""New output directories and files: written under a temporary name, renamed when whole, never over something else.

An output has one writer at a time (`held`). The lock is the kernel's, so that it goes with its process, however that ends.
Not covered: two writers on two machines whose shared file system has no locks (NFS without a lock service, Lustre mounted
without `flock`): there each believes that it is alone. A machine that is lost may keep its lock on NFS for a while; the
message names the file to remove.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nexus_ds.errors import OutputBusyError, OutputExistsError


def refuse_existing(out: Path) -> None:
    """Raise OutputExistsError if `out` exists (an empty directory counts as free)."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise OutputExistsError(f"{out} exists already; give another --out or remove it first")


def _lock(path: Path, out: Path) -> IO[str]:
    """Return `path`, opened and locked if this file system can; OutputBusyError if another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise OutputBusyError(
                f"{out} is being written by {holder}; wait for it or give another output (if its machine is lost, "
                f"remove {path})"
            ) from None
        except OSError:
            return file
        try:
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()  # its holder has removed it in the meantime


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Be the only process that writes `out` inside the context; OutputBusyError, naming the other, if there is one."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    with _lock(path, out) as file:
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"process {os.getpid()} on {socket.gethostname()} since {since}", file=file, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while the lock is held, so that nobody has it


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `out` that becomes `out` when the block ends well, and vanishes when not.

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
    refuse_existing(out)  # it may have been finished a moment ago
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `out` that becomes `out` when the block ends well, and vanishes when not."""
    out = Path(out)
    if not overwrite:
        refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step."""
    with new_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
