"""Weights of a new model out of stored ones: a plan of pieces, done by several threads.

A piece is a tensor of the new files, or several, and one of four operations:

    Copy     the bytes of a stored tensor, as they are
    Merge    a rule over blocks of several stored tensors, in fp32; rounded once
    Fill     bytes that are made in time, or one number
    Series   bytes of several tensors that are made together, one after the other

Nothing here knows a tensor's name, role or family: a piece goes from sources, which are read in
ranges, to a range of a file, or by way of a form to several (`laid`), and the texts that it carries
are for messages.
Pieces of a `Job` are done one after the other by one thread, so that a hash over their sources
costs no second reading; jobs are done side by side, begun in the order that they are given in.

**Another way to merge** is a `Rule`: it is given the same range of all sources as fp32 blocks of
equal length, in the order of the piece's sources, and returns one such block. It may write into the
blocks. A rule belongs to one piece and may remember what it has seen; with `looks` it is shown all
blocks of its tensor before it has to answer, for thresholds and norms (`merging`). Sources may be
anything of the target's size: a seed (task vectors), Fisher information. `Mean` is one.

Memory: `BLOCK_BYTES` and a few blocks of VALUES numbers a thread, whatever the model's size.
Values are looked over as they pass: NaN and infinities are counted, all-zero tensors told.
Not covered: rules that need whole matrices (RegMean).
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from nexus_ds.checkpoint.arithmetic import (
    Bytes,
    Floats,
    Health,
    narrow,
    widen,
)
from nexus_ds.checkpoint.headers import (
    ITEM_BYTES,
    Headers,
    kept_open,
    tensor_bytes,
)
from nexus_ds.checkpoint.new_files import Target
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import write_at

BLOCK_BYTES = 1 << 20
"""That are read at once."""
VALUES = 1 << 16
"""Numbers of a tensor that are merged at once: a few such blocks fit into a core's own cache."""
MERGED = 1 << 20
"""Numbers of all sources that are merged at once: of many sources blocks are shorter."""
MOST_WORKERS = 8
"""More threads than this wait for the disk."""

Blocks = Sequence[Floats]


class Rule(ABC):
    """How several tensors become one, told on aligned blocks. See the module."""

    looks = 0
    """How often `look` is shown the whole tensor first."""

    def look(
        self,
        blocks: Blocks,
        first: int,
        turn: int,
    ) -> None:
        """Be shown the blocks at [first, first + length) of the tensors, flattened; they may be
        overwritten. `turn` counts the looks from 0."""
        assert not self.looks, "a rule that looks says what it does with what it sees"

    @abstractmethod
    def __call__(self, blocks: Blocks, first: int) -> Floats:
        """Return the merged block; `blocks` may be overwritten, one of them may be returned."""


@dataclass(frozen=True)
class Mean(Rule):
    """sum(weight * tensor) / divisor * scale, summed in the order of the sources."""

    weights: Sequence[float]
    divisor: float = 1.0
    scale: float = 1.0

    def __call__(self, blocks: Blocks, first: int) -> Floats:
        """Return the weighted mean of the blocks."""
        total = blocks[0]
        for block, weight in zip(blocks, self.weights, strict=True):
            if weight != 1.0:
                np.multiply(block, np.float32(weight), out=block)
            if block is not total:
                np.add(total, block, out=total)
        if self.divisor != 1.0:
            np.divide(total, np.float32(self.divisor), out=total)
        if self.scale != 1.0:
            np.multiply(total, np.float32(self.scale), out=total)
        return total


class Source(NamedTuple):
    """A stored tensor that is read, or a range of it."""

    dtype: str
    """As safetensors names it."""
    size: int
    """In bytes."""
    read: Callable[[int, memoryview], None]
    """Fills memory with the tensor's bytes from one on; several threads may ask at once."""
    label: str
    """Whose it is, and which: a message starts with it."""
    zeros: bool = True
    """Whether a tensor of nothing but zeros is right."""

    def part(self, first: int, stop: int) -> Source:
        """Return bytes [first, stop) of the tensor."""

        def read(start: int, view: memoryview) -> None:
            self.read(first + start, view)

        return self._replace(size=stop - first, read=read)


def stored(
    reader: Headers,
    name: str,
    label: str,
    zeros: bool = True,
) -> Source:
    """Return a tensor of a model as a source; `label` and `zeros` are its own."""
    info = reader.info(name)
    size = tensor_bytes(info.dtype, info.shape)
    return Source(
        info.dtype,
        size,
        partial(reader.read_range, name),
        label,
        zeros,
    )


@dataclass(frozen=True)
class Copy:
    """The bytes of a stored tensor; its dtype and size are the target's."""

    target: Target
    source: Source

    @property
    def sources(self) -> Sequence[Source]:
        """The one source."""
        return (self.source,)

    @property
    def targets(self) -> Sequence[Target]:
        """The one target."""
        return (self.target,)


@dataclass(frozen=True)
class Merge:
    """What a rule makes of stored tensors of one size, in the target's dtype."""

    target: Target
    sources: Sequence[Source]
    rule: Rule
    label: str
    """Which tensor it becomes, for the message where its values overflow."""
    who: str
    """Whose weights are too large then."""

    @property
    def targets(self) -> Sequence[Target]:
        """The one target."""
        return (self.target,)


@dataclass(frozen=True)
class Fill:
    """Bytes that are given, or made in time, or one number for all elements."""

    target: Target
    content: Callable[[], memoryview] | float

    @property
    def sources(self) -> Sequence[Source]:
        """None."""
        return ()

    @property
    def targets(self) -> Sequence[Target]:
        """The one target."""
        return (self.target,)


@dataclass(frozen=True)
class Series:
    """Bytes of several places that are made together; each is written before the next is made."""

    targets: Sequence[Target]
    make: Callable[[], Iterable[memoryview]]
    """Yields the bytes of each target."""

    @property
    def sources(self) -> Sequence[Source]:
        """None."""
        return ()


Piece = Copy | Merge | Fill | Series


@dataclass(frozen=True)
class Job:
    """Pieces that one thread does, one after the other."""

    pieces: Sequence[Piece]
    heads: Sequence[bytes] = ()
    """For each piece what the hash takes in before the bytes of its (first) source; empty: nothing
    is hashed."""


def _check_size(piece: Copy | Merge) -> None:
    """Raise CheckpointError for a source that has not as many values as the target."""
    target = piece.target
    count = target.size // ITEM_BYTES[target.dtype]
    for source in piece.sources:
        found = source.size // ITEM_BYTES[source.dtype]
        if found != count:
            raise CheckpointError(f"{source.label} has {found} values, expected {count}")


def check_health(source: Source, health: Health) -> None:
    """Raise CheckpointError for a tensor with NaN or infinities, or of zeros where these are
    wrong."""
    if health.bad:
        raise CheckpointError(
            f"{source.label} has {health.bad} values that are NaN or infinite; "
            "expected finite weights, use a sound state of that model"
        )
    if not health.nonzero and not source.zeros:
        raise CheckpointError(
            f"{source.label} has only zeros; expected trained weights, use a sound state of that "
            "model"
        )


class _Stopped(Exception):
    """Nobody waits for this job any more."""


class _Worker:
    """One thread's memory, and its way through the pieces of a job."""

    def __init__(self) -> None:
        self.raw: Bytes = np.empty(BLOCK_BYTES, np.uint8)
        self.spare = np.empty(VALUES, np.uint32)
        self.floats = np.empty((1, VALUES), np.float32)
        self.keep_on: Callable[[], bool] = bool
        """Asked before each block is written."""
        self.digest: hashlib._Hash | None = None

    def do(self, piece: Piece, digest: hashlib._Hash | None) -> None:
        """Do one piece; the (first) source's bytes go into `digest`."""
        self.digest = digest
        match piece:
            case Copy():
                _check_size(piece)
                self._copy(piece)
            case Merge():
                _check_size(piece)
                self._merge(piece)
            case Fill():
                self._fill(piece)
            case Series():
                self._series(piece)

    def _write(
        self,
        target: Target,
        position: int,
        data: memoryview,
    ) -> None:
        if not self.keep_on():
            raise _Stopped
        for each in (target, *target.copies):
            for place, start, own in each.writes(position, data):
                write_at(place.descriptor, place.start + start, own, place.file)

    def _read(
        self,
        source: Source,
        position: int,
        out: Bytes,
    ) -> None:
        source.read(position, out.data)
        if self.digest:
            self.digest.update(out.data)

    def _copy(self, piece: Copy) -> None:
        source = piece.source
        health = Health()
        for start in range(0, source.size, BLOCK_BYTES):
            block = self.raw[: min(BLOCK_BYTES, source.size - start)]
            self._read(source, start, block)
            health.see(block, source.dtype)
            self._write(piece.target, start, block.data)
        check_health(source, health)

    def _fill(self, piece: Fill) -> None:
        target, content = piece.target, piece.content
        if callable(content):
            self._write(target, 0, content())
            return
        width = ITEM_BYTES[target.dtype]
        self.floats[0] = content
        block = self.raw[: VALUES * width]
        narrow(self.floats[0, :VALUES], target.dtype, block, self.spare)
        size = target.size
        for start in range(0, size, len(block)):
            self._write(target, start, block[: size - start].data)

    def _series(self, piece: Series) -> None:
        for target, data in zip(piece.targets, piece.make(), strict=True):
            assert len(data) == target.size, f"{len(data)} bytes for {target}"
            self._write(target, 0, data)

    def _merge(self, piece: Merge) -> None:
        dtype = piece.target.dtype
        width = ITEM_BYTES[dtype]
        if piece.rule.looks:
            self._look(piece)
        healths = [Health() for _ in piece.sources]
        result = Health()
        for first, blocks in self._blocks(piece, healths):
            merged = piece.rule(blocks, first)
            out = self.raw[: len(merged) * width]
            narrow(merged, dtype, out, self.spare)
            result.see(out, dtype)
            self._write(piece.target, first * width, out.data)
        for source, health in zip(piece.sources, healths, strict=True):
            check_health(source, health)
        # sources that are finite can overflow in the sum, scaled, or in a narrower dtype
        if result.bad:
            raise CheckpointError(
                f"{piece.label}: {result.bad} values overflow {dtype}; "
                f"{piece.who} has weights too large"
            )

    def _look(self, piece: Merge) -> None:
        # what is read twice is hashed and counted once
        digest, self.digest = self.digest, None
        for turn in range(piece.rule.looks):
            for first, blocks in self._blocks(piece, [Health() for _ in piece.sources]):
                piece.rule.look(blocks, first, turn)
        self.digest = digest

    def _blocks(self, piece: Merge, healths: Sequence[Health]) -> Iterator[tuple[int, Blocks]]:
        """Yield where each range of the tensors begins, and the blocks of all sources there."""
        target = piece.target
        count = target.size // ITEM_BYTES[target.dtype]
        step = max(1, min(VALUES, MERGED // len(piece.sources)))
        if len(self.floats) < len(piece.sources):
            self.floats = np.empty((len(piece.sources), VALUES), np.float32)
        for first in range(0, count, step):
            blocks = [row[: min(step, count - first)] for row in self.floats[: len(piece.sources)]]
            self._read_blocks(piece, healths, first, blocks)
            yield first, blocks

    def _read_blocks(
        self,
        piece: Merge,
        healths: Sequence[Health],
        first: int,
        blocks: Blocks,
    ) -> None:
        hashed = self.digest
        for source, health, block in zip(piece.sources, healths, blocks, strict=True):
            dtype = source.dtype
            # fp32 needs no widening
            raw = block.view(np.uint8)
            if dtype != "F32":
                raw = self.raw[: len(block) * ITEM_BYTES[dtype]]
            self._read(source, first * ITEM_BYTES[dtype], raw)
            health.see(raw, dtype)
            if dtype != "F32":
                widen(raw, dtype, block)
            # of the first one's bytes alone
            self.digest = None
        self.digest = hashed


class _Crew:
    """What the threads share: jobs still to be done, and what came of the others."""

    def __init__(self, jobs: Sequence[Job], done: Callable[[Piece], object]) -> None:
        self.jobs = jobs
        self.done = done
        self.digests = [""] * len(jobs)
        self.errors: dict[int, Exception] = {}
        self.lock = threading.Lock()
        self.queue = iter(range(len(jobs)))
        self.end = math.inf
        """Number of the job from which on they are given up."""

    def work(self) -> None:
        """Do jobs until none is left, in one thread."""
        worker = _Worker()
        # numpy's warnings are of no use here: what overflows is counted
        with np.errstate(all="ignore"), kept_open():
            while True:
                with self.lock:
                    number = next(self.queue, len(self.jobs))
                if number >= min(self.end, len(self.jobs)):
                    return
                self._do(worker, number)

    def _do(self, worker: _Worker, number: int) -> None:
        worker.keep_on = lambda: number <= self.end
        try:
            self.digests[number] = self._digest(worker, self.jobs[number])
        except _Stopped:
            return
        except Exception as error:
            # Jobs before it go on: of several faults the same one is told every time.
            with self.lock:
                self.errors[number] = error
                self.end = min(self.end, number)

    def _digest(self, worker: _Worker, job: Job) -> str:
        digest = hashlib.sha256() if job.heads else None
        for number, piece in enumerate(job.pieces):
            if digest:
                digest.update(job.heads[number])
            worker.do(piece, digest)
            with self.lock:
                self.done(piece)
        return digest.hexdigest() if digest else ""


def assemble(
    jobs: Sequence[Job],
    done: Callable[[Piece], object] = bool,
    workers: int = 0,
) -> list[str]:
    """Do all jobs.

    Args:
        jobs: begun in this order: large ones first leave no thread at work alone at the end. No two
            of them write to the same place.
        done: called with each piece after it, by one thread at a time.
        workers: threads; 0: one for each core that this process may use, at most MOST_WORKERS.

    Returns:
        For each job the sha256 over its sources, "" where none was asked for.

    Raises:
        CheckpointError: NaN, infinite or all-zero weights, values that overflow, a file that is cut
            off; of several the same one every time.
        OSError: no space.
    """
    crew = _Crew(jobs, done)
    count = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count) as pool:
        threads = [pool.submit(crew.work) for _ in range(count)]
        try:
            for thread in threads:
                thread.result()
        except BaseException:
            # a signal, or no memory: nobody wants the rest
            crew.end = -1
            raise
    if crew.errors:
        raise crew.errors[min(crew.errors)]
    return crew.digests
