"""Hashes of a finished checkpoint's files, kept in nexus.json, and what differs from them later.

    "files": {"config.json": {"bytes": 731, "sha256": "..."},
              "model.safetensors": {"bytes": ..., "sha256": "...", "tensors": {NAME: "xxh3-128"}}}

The sha256 is that of `sha256sum`; the hash of each tensor (dtype, shape, bytes) names what a tool
has changed that wrote the file anew. Any later writing of the sidecar drops them: what they say is
of one state alone.
Not covered: somebody who hashes anew; README.md, which people and `evaluate` go on writing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, Self, TypedDict

import xxhash

from nexus_ds.checkpoint.headers import TensorInfo, read_header, read_into
from nexus_ds.checkpoint.json_files import confined, read_json_object
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.checkpoint.records import SIDECAR
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import sync, write_json
from nexus_ds.typed_json import typed

KEY = "files"
CHANGING = (SIDECAR, "README.md")
WEIGHTS = ".safetensors"
SHOWN = 10  # names in a message
BLOCK = 1 << 20  # bytes that are hashed at once: they stay in a core's cache for both hashes
MOST_WORKERS = 8


@dataclass
class FileHash:
    """What a file holds."""

    size: int
    """In bytes."""
    sha256: str
    tensors: dict[str, str] = field(default_factory=dict)
    """Of a weight file's tensors, by name."""

    def as_dict(self) -> dict[str, object]:
        """Return it as nexus.json has it."""
        own: dict[str, object] = {"bytes": self.size, "sha256": self.sha256}
        return own | ({"tensors": self.tensors} if self.tensors else {})


class _Recorded(TypedDict):
    """A file's hashes in nexus.json."""

    bytes: int
    sha256: str
    tensors: NotRequired[dict[str, str]]


def _chunks(path: Path, start: int, end: int, memory: memoryview) -> Iterator[memoryview]:
    """Yield bytes [start, end) of a file, each piece in `memory`, where the one before was."""
    while start < end:
        data = memory[: end - start]
        read_into(path, start, data)
        yield data
        start += len(data)


def _no_wait(path: Path, end: int) -> None:
    """All of a finished file is there."""


def hash_of(path: Path, wait: Callable[[Path, int], None] = _no_wait) -> FileHash:
    """Return the hashes of a file, of a weight file also its tensors'; each byte is read once.

    Args:
        path: of the file.
        wait: returns when the bytes of the file before a place in it are there.

    Raises:
        CheckpointError: a weight file that is none, or damaged.
    """
    size = path.stat().st_size
    whole = hashlib.sha256()
    found = FileHash(size, "")
    memory = memoryview(bytearray(min(BLOCK, size)))
    position = 0
    # they cover all but the header, without gap or overlap
    for name, info in _in_order(path):
        for chunk in _chunks(path, position, info.start, memory):
            whole.update(chunk)
        own = _start_of(info)
        wait(path, info.end)
        for chunk in _chunks(path, info.start, info.end, memory):
            whole.update(chunk)
            own.update(chunk)
        found.tensors[name] = own.hexdigest()
        position = info.end
    for chunk in _chunks(path, position, size, memory):
        whole.update(chunk)
    found.sha256 = whole.hexdigest()
    return found


def _tensor_hashes(path: Path) -> dict[str, str]:
    """Return the hashes of a weight file's tensors alone: a sha256 takes five times as long.

    Raises:
        CheckpointError: none, or damaged.
    """
    found = {}
    memory = memoryview(bytearray(BLOCK))
    for name, info in _in_order(path):
        found[name] = _start_of(info)
        for chunk in _chunks(path, info.start, info.end, memory):
            found[name].update(chunk)
    return {name: digest.hexdigest() for name, digest in found.items()}


def _start_of(info: TensorInfo) -> xxhash.xxh3_128:
    return xxhash.xxh3_128(f"{info.dtype} {list(info.shape)}".encode())


def _in_order(path: Path) -> list[tuple[str, TensorInfo]]:
    """Return the tensors of a weight file as they lie in it; none of any other file."""
    infos = read_header(path) if path.suffix == WEIGHTS else {}
    return sorted(infos.items(), key=lambda item: (item[1].start, item[1].end))


def names_of(directory: Path) -> list[str]:
    """Return the names of all files of a checkpoint that stay as they are, sorted."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in paths]
    return sorted(name for name in names if name not in CHANGING)


class Hashing:
    """The hashing of a checkpoint's files, side by side with what is still done to others.

    Used as a context manager; each file by a thread of its own: hashing leaves the interpreter
    free. Meanwhile files go to the disk, for which a finished checkpoint would wait.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = Path(directory)
        # one more, which waits for the disk
        self._pool = ThreadPoolExecutor(1 + min(MOST_WORKERS, len(os.sched_getaffinity(0))))
        self._begun: dict[str, Future[FileHash]] = {}
        self._flushed: dict[str, Future[None]] = {}

    def follow(self, files: NewFiles) -> None:
        """Begin with files that are being written, and read on behind their writers."""
        for path in files.paths():
            name = path.relative_to(self._directory).as_posix()
            self._begun[name] = self._pool.submit(hash_of, path, files.frontier.wait)

    def begin(self) -> None:
        """Begin with all files that there are; none of them may change any more."""
        names = names_of(self._directory)
        for name in names:
            if name not in self._begun:
                self._begun[name] = self._pool.submit(hash_of, self._directory / name)
        for name in names:
            if name not in self._flushed:
                self._flushed[name] = self._pool.submit(sync, self._directory / name)

    def record(self) -> None:
        """Write the hashes of all other files into nexus.json; the last thing done to a checkpoint.

        Raises:
            CheckpointError: a weight file that is none, or damaged.
            OSError: the disk has lost what was written.
        """
        self.begin()
        for flushed in self._flushed.values():
            flushed.result()
        value = read_json_object(self._directory, SIDECAR)
        files = {name: found.result().as_dict() for name, found in sorted(self._begun.items())}
        write_json(self._directory / SIDECAR, value | {KEY: files})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def record_hashes(directory: Path) -> None:
    """Write into nexus.json the hashes of all other files; the last thing done to a checkpoint."""
    with Hashing(directory) as hashing:
        hashing.record()


def recorded(directory: Path) -> dict[str, FileHash] | None:
    """Return the hashes that nexus.json has; None where it was written without.

    Raises:
        CheckpointError: a damaged record, or one of a file outside of the checkpoint.
    """
    value = read_json_object(directory, SIDECAR).get(KEY)
    if value is None:
        return None
    try:
        known = typed(value, dict[str, _Recorded])
    except TypeError as error:
        raise CheckpointError(
            f"{directory / SIDECAR}: {error}; expected bytes and sha256 of each file under "
            f"{KEY!r}; the sidecar is damaged"
        ) from error
    for name in known:
        # of a stranger's: not even whether there is such a file elsewhere is told
        confined(directory, name)
    return {
        name: FileHash(each["bytes"], each["sha256"], each.get("tensors", {}))
        for name, each in known.items()
    }


@dataclass
class Difference:
    """What is other than it was."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def differences(directory: Path, before: Mapping[str, FileHash]) -> Difference:
    """Compare a checkpoint's files with their hashes; every byte is read.

    What a tool changed that saved the weights anew is named by tensor, in whatever files they lie.
    """
    found = Difference()
    old_tensors: dict[str, str] = {}
    new_tensors: dict[str, str] = {}
    for name, old in before.items():
        path = directory / name
        old_tensors |= _placed(name, old.tensors)
        if not path.is_file():
            if not old.tensors:
                found.problems.append(f"{name} is missing")
            continue
        if not old.tensors and hash_of(path).sha256 != old.sha256:
            found.problems.append(f"{name} was changed")
    for name in names_of(directory):
        if name.endswith(WEIGHTS):
            new_tensors |= _placed(name, _tensor_hashes(directory / name))
        if name not in before:
            found.notes.append(f"{name} was added")
    _compare_tensors(old_tensors, new_tensors, found)
    return found


def _placed(file: str, tensors: Mapping[str, str]) -> dict[str, str]:
    """Return tensors by their names, with the folder that their file lies in.

    A mixture may keep a tensor of the same name, in another form, in a folder of its own.
    """
    folder = file.rpartition("/")[0]
    return {f"{folder}/{name}" if folder else name: value for name, value in tensors.items()}


def _compare_tensors(old: Mapping[str, str], new: Mapping[str, str], found: Difference) -> None:
    changed = [name for name in old if name in new and new[name] != old[name]]
    missing = [name for name in old if name not in new]
    added = [name for name in new if name not in old]
    for names, said in ((changed, "were changed"), (missing, "are missing"), (added, "were added")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            found.problems.append(f"{len(names)} tensors {said}: {', '.join(names[:SHOWN])}{more}")
