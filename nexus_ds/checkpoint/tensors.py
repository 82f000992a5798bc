"""Safetensors in and out as torch's tensors, one tensor or one slice of rows at a time.

`headers` says where they lie. Reading fills fresh tensors, without mmap, so that memory is what the
caller holds and nothing more.
Not covered: big-endian machines, packed 4- and 6-bit types, two writers of one directory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from nexus_ds.checkpoint.headers import (
    INDEX,
    SINGLE,
    Headers,
    Plan,
    TensorInfo,
    header_of,
    tensor_bytes,
)
from nexus_ds.checkpoint.views import ViewReader
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import create, naming, write_at, write_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # without it, transformers does not know whose tensors these are


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor: its own memory if it is contiguous and on the CPU."""
    contiguous = tensor.detach().cpu().contiguous()
    # numpy has no bf16 and no fp8, but bytes are bytes.
    return contiguous.reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file over `path`, a tensor at a time."""
    plan = {}
    for name, tensor in tensors.items():
        plan[name] = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    lead, _ = header_of(plan, METADATA)
    with create(path) as stream:
        stream.write(lead)
        for tensor in tensors.values():
            stream.write(bytes_of(tensor))


class TensorReader(Headers):
    """All tensors of a model directory, as torch has them; see `Headers`."""

    @classmethod
    def of(cls, headers: Headers) -> TensorReader:
        """Return a reader of what headers describe, without reading them again."""
        # one that translates what it reads goes on doing so
        if isinstance(headers, TensorReader):
            return headers
        kind = ViewedTensors if isinstance(headers, ViewReader) else cls
        reader = kind.__new__(kind)
        vars(reader).update(vars(headers))
        return reader

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor, in its stored dtype and shape."""
        return self._read(name, 0, self.info(name).shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the leading dimension of a tensor that has one."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} of shape {info.shape} "
                f"has no rows [{start}, {stop})"
            )
        row_shape = info.shape[1:]
        first = start * tensor_bytes(info.dtype, row_shape)
        return self._read(name, first, (stop - start, *row_shape))

    def overwrite(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor in its file; see the function of this name."""
        overwrite(self.info(name), tensor)

    def _read(self, name: str, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=DTYPES[self.info(name).dtype])
        self.read_range(name, start, bytes_of(tensor))
        return tensor


class ViewedTensors(TensorReader, ViewReader):
    """The tensors that a view shows, as torch has them."""


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


def _file_names(shards: list[list[str]]) -> dict[str, list[str]]:
    """Return the tensors of each file, which is named as transformers names it."""
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    numbered = enumerate(shards, start=1)
    return {f"model-{number:05}-of-{count:05}.safetensors": names for number, names in numbered}


class _Place(NamedTuple):
    """Where a planned tensor goes."""

    descriptor: int
    start: int
    """Its first byte in the file."""
    file: Path


class TensorWriter:
    """Streaming writer of a model's safetensors: first a plan, then the tensors in any order.

    Args:
        directory: existing directory without weights.
        plan: what will be written; its order is that of the files.
        max_shard_bytes: more than this are spread over shards with an index, as transformers does
            it.
        copies: planned tensors that are written with others, of which they are copies: for each
            name that of the other.

    Used as a context manager it closes itself, and checks that the plan was fulfilled if the block
    ended well.

    Raises:
        CheckpointError: not enough space on the disk, another dtype or shape than planned, a
            planned tensor that was not written (from `close`).
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        max_shard_bytes: int = 4 << 30,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.plan, self._copies = plan, dict(copies or {})
        self._missing = {name: tensor_bytes(*entry) for name, entry in plan.items()}
        """Bytes of each tensor that are still to come."""
        self._places: dict[str, _Place] = {}
        self._descriptors: list[int] = []
        total = sum(self._missing.values())
        free = shutil.disk_usage(self.directory).free
        # Before the first byte: a disk that fills up after hours costs these hours.
        if total > free:
            raise CheckpointError(
                f"{self.directory}: not enough space: need {total:,} bytes, free {free:,}; "
                "make room first"
            )
        files = _file_names(_shards(plan, max_shard_bytes))
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
        for name, (start, _) in ranges.items():
            self._places[name] = _Place(descriptor, start, path)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole planned tensor."""
        _, planned = self._planned(name)
        if tuple(tensor.shape) != planned:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, planned was {planned}"
            )
        self._write(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows [start, start + len(rows)) of a planned tensor, each row once."""
        _, planned = self._planned(name)
        stop = start + len(rows)
        if rows.shape[1:] != planned[1:] or stop > planned[0]:
            raise CheckpointError(
                f"rows {start}+{tuple(rows.shape)} do not fit into {name!r} of shape {planned}"
            )
        self._write(name, start, rows)

    def _planned(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a planned tensor."""
        if name not in self.plan:
            raise CheckpointError(
                f"tensor {name!r} was not planned; "
                f"expected one of the {len(self.plan)} planned ones"
            )
        dtype, shape = self.plan[name]
        return dtype, tuple(shape)

    def _write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        dtype, shape = self._planned(name)
        if tensor.dtype != DTYPES[dtype]:
            raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, planned was {dtype}")
        data = bytes_of(tensor)
        if self._missing[name] < len(data):
            raise CheckpointError(f"tensor {name!r} was written twice")
        copies = [copy for copy, source in self._copies.items() if source == name]
        for each in (name, *copies):
            place = self._places[each]
            position = place.start + start * tensor_bytes(dtype, shape[1:])
            write_at(place.descriptor, position, data, place.file)
            self._missing[each] -= len(data)

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

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


def overwrite(info: TensorInfo, tensor: torch.Tensor) -> None:
    """Overwrite a tensor in its file, cast to its dtype there; CheckpointError for another shape.

    Only for directories that nobody else reads yet: it is not atomic.
    """
    if tuple(tensor.shape) != info.shape:
        raise CheckpointError(
            f"{info.file}: found a tensor of shape {tuple(tensor.shape)}, the file has {info.shape}"
        )
    data = bytes_of(tensor.to(DTYPES[info.dtype]))
    with info.file.open("r+b", buffering=0) as stream:
        write_at(stream.fileno(), info.start, data, info.file)
