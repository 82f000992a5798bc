"""The files of a new model's weights: headers first, then bytes in any order; without torch.

`tensors.TensorWriter` writes torch's tensors into them, `assembly` what it makes of stored ones.
Not covered: big-endian machines, packed 4- and 6-bit types, two writers of one directory.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from nexus_ds.checkpoint.headers import (
    INDEX,
    SINGLE,
    Plan,
    header_of,
    tensor_bytes,
)
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import (
    create,
    naming,
    write_at,
    write_json,
)

METADATA = {"format": "pt"}  # without it, transformers does not know whose tensors these are


def _shards(plan: Plan, limit: int) -> list[list[str]]:
    """Group planned tensors, in order, into shards of at most `limit` bytes or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in plan.items():
        count = tensor_bytes(dtype, shape)
        if shards[-1] and size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _file_names(shards: list[list[str]], single: str) -> dict[str, list[str]]:
    """Return the tensors of each file, which is named as transformers names it."""
    if len(shards) == 1:
        return {single: shards[0]}
    count = len(shards)
    numbered = enumerate(shards, start=1)
    return {f"model-{number:05}-of-{count:05}.safetensors": names for number, names in numbered}


def write_file(path: Path, plan: Plan, contents: Iterable[tuple[str, memoryview]]) -> None:
    """Write one safetensors file over `path`: each tensor's bytes, in the order of its plan."""
    lead, ranges = header_of(plan, METADATA)
    with create(path) as stream:
        stream.write(lead)
        for (name, data), (planned, (start, end)) in zip(contents, ranges.items(), strict=True):
            found = name, len(data)
            assert found == (planned, end - start), f"{found}, planned was {planned}"
            stream.write(data)


WHOLE = 1 << 62
"""Bytes of a file at most: one is all that readers look for."""


class Target(Protocol):
    """Where a tensor goes, or a range of it: to a place, or by way of a form (`laid`)."""

    @property
    def dtype(self) -> str:
        """As safetensors names it."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def ranges(self) -> Sequence[Place]:
        """All that it becomes in the files, but for copies."""

    @property
    def copies(self) -> tuple[Target, ...]:
        """Where the same bytes go once more."""

    def writes(self, position: int, data: memoryview) -> Iterator[Write]:
        """Yield what is written of the tensor's bytes from `position` on."""

    def part(self, first: int, stop: int) -> Target:
        """Return where its bytes [first, stop) go."""


class Place(NamedTuple):
    """Where a planned tensor goes as it is, or a range of it."""

    dtype: str
    """As safetensors names it."""
    descriptor: int
    """Of the file, open for writing."""
    start: int
    """Its first byte in the file."""
    end: int
    """The byte after its last one."""
    file: Path
    copies: tuple[Target, ...] = ()
    """Where the same bytes go once more."""

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def ranges(self) -> Sequence[Place]:
        """The one place."""
        return (self,)

    def writes(self, position: int, data: memoryview) -> Iterator[Write]:
        """Yield the bytes as they are."""
        yield self, position, data

    def part(self, first: int, stop: int) -> Place:
        """Return the place of bytes [first, stop) of the tensor."""
        copies = tuple(copy.part(first, stop) for copy in self.copies)
        return self._replace(start=self.start + first, end=self.start + stop, copies=copies)


Write = tuple[Place, int, memoryview]
"""Bytes, and where they go: a place, and the first one's number there."""


class GivenUp(Exception):
    """A file that is waited for will never be whole."""


class Frontier:
    """How far files that are written in any order are written without a gap.

    Who reads them after their writers, to hash them, waits here for its next bytes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reached: dict[Path, int] = {}
        self._beyond: dict[Path, dict[int, int]] = {}
        """Of each file the ranges behind a gap: for each start its end."""
        self._given_up = False

    def begin(self, file: Path, written: int) -> None:
        """Begin with a file that has its first bytes."""
        self._reached[file] = written
        self._beyond[file] = {}

    def landed(self, target: Target) -> None:
        """Note that the bytes of a target, and their copies, are written; any thread may."""
        ranges = [place for one in (target, *target.copies) for place in one.ranges]
        with self._changed:
            for each in ranges:
                # an empty one would be passed for ever
                if each.size:
                    self._beyond[each.file][each.start] = each.end
                    self._pass(each.file)
            self._changed.notify_all()

    def _pass(self, file: Path) -> None:
        reached, beyond = self._reached[file], self._beyond[file]
        while reached in beyond:
            reached = beyond.pop(reached)
        self._reached[file] = reached

    def wait(self, file: Path, end: int) -> None:
        """Wait until all bytes of a file before `end` are written.

        Raises:
            GivenUp: they never will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or self._reached[file] >= end)
            if self._reached[file] < end:
                raise GivenUp

    def give_up(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()


class NewFiles:
    """A model's weight files that are being written, each of its full length from the start.

    Args:
        directory: existing directory without weights.
        plan: what will be written; its order is that of the files.
        max_shard_bytes: more than this are spread over shards with an index, as transformers does
            it.
        copies: planned tensors that are written with others, of which they are copies: for each
            name that of the other.
        single: name of a file that is the only one.
        frontier: of other files that are written with these; None: one of their own.

    Used as a context manager it closes itself, and checks that the plan was fulfilled if the block
    ended well.

    Raises:
        CheckpointError: not enough space on the disk, a planned tensor that was not written (from
            `close`).
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        max_shard_bytes: int = 4 << 30,
        copies: Mapping[str, str] | None = None,
        single: str = SINGLE,
        frontier: Frontier | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.frontier = frontier or Frontier()
        self.plan, self._copies = plan, dict(copies or {})
        self._missing = {name: tensor_bytes(*entry) for name, entry in plan.items()}
        """Bytes of each tensor that are still to come."""
        self._places: dict[str, Place] = {}
        self._descriptors: list[int] = []
        total = sum(self._missing.values())
        free = shutil.disk_usage(self.directory).free
        # Before the first byte: a disk that fills up after hours costs these hours.
        if total > free:
            raise CheckpointError(
                f"{self.directory}: not enough space: need {total:,} bytes, free {free:,}; "
                "make room first"
            )
        files = _file_names(_shards(plan, max_shard_bytes), single)
        try:
            for file, names in files.items():
                self._start_file(self.directory / file, names)
        except BaseException:
            self._close_files()
            raise
        if len(files) > 1:
            self._write_index(files, total)

    def _write_index(self, files: dict[str, list[str]], total: int) -> None:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.directory / INDEX, index)

    def _start_file(self, path: Path, names: list[str]) -> None:
        """Write the header of one file and remember where its tensors go."""
        lead, ranges = header_of({name: self.plan[name] for name in names}, METADATA)
        size = max((end for _, end in ranges.values()), default=len(lead))
        # O_EXCL: what is there already is never written over.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        write_at(descriptor, 0, memoryview(lead), path)
        # Its full length at once, so that tensors can come in any order.
        with naming(path, size):
            os.ftruncate(descriptor, size)
        self.frontier.begin(path, len(lead))
        for name, (start, end) in ranges.items():
            self._places[name] = Place(
                self.plan[name][0],
                descriptor,
                start,
                end,
                path,
            )

    def _planned(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a planned tensor."""
        if name not in self.plan:
            raise CheckpointError(
                f"tensor {name!r} was not planned; "
                f"expected one of the {len(self.plan)} planned ones"
            )
        dtype, shape = self.plan[name]
        return dtype, tuple(shape)

    def place(self, name: str) -> Place:
        """Return where a planned tensor goes; whoever writes there by itself says so (`wrote`)."""
        self._planned(name)
        copies = (self._places[each] for each, source in self._copies.items() if source == name)
        return self._places[name]._replace(copies=tuple(copies))

    def wrote(self, name: str) -> None:
        """Count a whole planned tensor, and its copies, as written at its place."""
        self._missing[name] = 0
        for copy, source in self._copies.items():
            if source == name:
                self._missing[copy] = 0

    def paths(self) -> list[Path]:
        """Return the files, in the order of the plan."""
        return list(dict.fromkeys(place.file for place in self._places.values()))

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def close(self) -> None:
        """Close the files; CheckpointError if a planned tensor was not (wholly) written."""
        self._close_files()
        missing = [name for name, count in self._missing.items() if count]
        if missing:
            raise CheckpointError(
                f"{len(missing)} planned tensors were not written, the first: {missing[0]!r}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # who waits for what was not written would wait for ever
        self.frontier.give_up()
        if kind is None:
            self.close()
        else:
            self._close_files()
