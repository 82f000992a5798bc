"""Safetensors in and out, one tensor or one slice of rows at a time.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes. Reading
goes through `os.preadv` into fresh tensors, not through mmap, so that memory is what the caller
holds and nothing more.
Nothing here unpickles: files of another kind are refused by name and by content, and paths in an
index stay inside the model's directory.
Not covered: big-endian machines, packed 4- and 6-bit types, two writers of one directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from nexus_ds.checkpoint.json_files import (
    confined,
    parse_json_object,
    read_json_object,
    require_directory,
)
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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
METADATA = {"format": "pt"}  # without it, transformers does not know whose tensors these are
MAX_HEADER = 100_000_000  # bytes; the format's own limit
SLICE = 1 << 22  # elements that `row_slices` allows at once
CHUNK = 1 << 23  # bytes that are hashed at once


Plan = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a file will hold: for each tensor its dtype, as safetensors names it, and its shape."""


class TensorInfo(NamedTuple):
    """Where a tensor lies."""

    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Its first byte in the file."""
    end: int
    """The byte after its last one."""


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def _is_sizes(value: object) -> bool:
    # type and not isinstance: JSON's true is an int to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _entry(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """Check one entry of a header and return where its tensor lies."""
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: expected dtype, shape and data_offsets in the header, "
            f"found {str(entry)[:200]}"
        )
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape {str(shape)[:100]} or data_offsets {str(offsets)[:100]} are no sizes"
        )
    start, end = offsets
    expected = tensor_bytes(dtype, shape)
    # also where end < start: a negative size is never what a shape needs
    if end - start != expected:
        raise CheckpointError(
            f"{where}: {end - start} bytes at [{start}, {end}), expected {expected} "
            f"for {dtype} {tuple(shape)}; the file is damaged, fetch or save it again"
        )
    return TensorInfo(dtype, tuple(shape), file, data_start + start, data_start + end)


def _read_header_bytes(file: Path, size: int) -> bytes:
    """Return the JSON header of a safetensors file of `size` bytes."""
    with file.open("rb") as stream:
        lead = stream.read(8)
        length = int.from_bytes(lead, "little")
        # Read as a header's length, the first eight bytes of a pickle are more than any file has;
        # without that, a header of 640 bytes would start like a pickle too.
        if length > size and (lead[:2] == b"PK" or lead[:1] == b"\x80"):
            raise CheckpointError(
                f"{file} is a pickle under the name of a safetensors file; it is not opened, "
                "since a pickle can run code. Save the model with safetensors"
            )
        if len(lead) < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{file} is not a safetensors file: its header would have {length} bytes "
                f"in a file of {size} (limit {MAX_HEADER}); "
                "it is cut off or of another kind, fetch or save it again"
            )
        return stream.read(length)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return where each tensor of one safetensors file lies, every claim of the header checked.

    Raises:
        CheckpointError: not safetensors (a renamed pickle for instance), oversized header, doubled
            names, unknown dtypes, byte ranges that overlap, leave gaps, or do not end at the end of
            the file.
    """
    size = file.stat().st_size
    text = _read_header_bytes(file, size)
    # the format asks for it: JSON alone would allow spaces before
    if text[:1] != b"{":
        raise CheckpointError(
            f"{file} is not a safetensors file: its header does not start with '{{'"
        )
    header = parse_json_object(text, f"{file}: the header")
    # the one entry that is no tensor
    header.pop("__metadata__", None)
    data_start = 8 + len(text)
    infos = {name: _entry(file, name, entry, data_start) for name, entry in header.items()}
    _check_cover(file, infos, data_start, size)
    return infos


def _check_cover(file: Path, infos: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Raise CheckpointError unless the tensors cover a file's data without gap or overlap.

    Else bytes could hide between them, or one tensor's be read as another's.
    """
    position = data_start
    # By the end too: an empty tensor may begin where another one does.
    ordered = sorted(infos.items(), key=lambda item: (item[1].start, item[1].end))
    for name, info in ordered:
        if info.start != position:
            kind = "overlaps another one" if info.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{file}: tensor {name!r} {kind}; the file is damaged, fetch or save it again"
            )
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{file} has {size} bytes, its header describes {position}; "
            "the file is cut off or damaged, fetch or save it again"
        )


def _weight_map(directory: Path) -> dict[str, str]:
    """Return the file of each tensor of a sharded model, as its index has it."""
    weight_map = read_json_object(directory, INDEX).get("weight_map")
    where = directory / INDEX
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: expected a weight_map from tensor names to file names")
    # JSON's keys are texts in any case, its values may be anything
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{where}: expected a weight_map from tensor names to file names")
    return weight_map


def _read_shard(directory: Path, shard: str) -> dict[str, TensorInfo]:
    file = confined(directory, shard)
    if not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{directory / INDEX}: shard {shard!r} is not a .safetensors file; only these are read"
        )
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: the shard {shard!r} of {INDEX} is missing; fetch or save the model again"
        )
    return read_header(file)


def _indexed(directory: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a sharded model, index and shards checked against each other."""
    weight_map = _weight_map(directory)
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in _read_shard(directory, shard).items():
            if name in infos:
                raise CheckpointError(
                    f"{directory}: tensor {name!r} is in {infos[name].file.name} and in {shard}; "
                    "expected one"
                )
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{directory}: tensor {name!r} is in {shard}, "
                    f"{INDEX} says {weight_map.get(name)!r}"
                )
            infos[name] = info
    missing = [name for name in weight_map if name not in infos]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors of {INDEX} are in no shard, "
            f"the first: {missing[0]!r}"
        )
    return infos


def _locate(directory: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a model directory, single file or sharded."""
    require_directory(directory)
    # where both are there, transformers reads the single file too
    if (directory / SINGLE).exists():
        return read_header(confined(directory, SINGLE))
    if (directory / INDEX).exists():
        return _indexed(directory)
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds only {', '.join(pickles[:5])}: pickled weights are not read, "
            "since a pickle can run code. "
            f"Save the model with safetensors ({SINGLE}, or shards with {INDEX})"
        )
    raise CheckpointError(f"{directory} has no weights; expected {SINGLE}, or shards with {INDEX}")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor: its own memory if it is contiguous and on the CPU."""
    contiguous = tensor.detach().cpu().contiguous()
    # numpy has no bf16 and no fp8, but bytes are bytes.
    return contiguous.reshape(-1).view(torch.uint8).numpy().data


def header_of(
    plan: Plan, metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return what a safetensors file begins with, and the bytes [start, end) of each tensor in it.

    Args:
        plan: the tensors, in the order of the file.
        metadata: transformers asks for {"format": "pt"}.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name, (dtype, shape) in plan.items():
        end = position + tensor_bytes(dtype, shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            # counted from the end of the header, whose length nobody knows yet
            "data_offsets": [position, end],
        }
        offsets[name] = position, end
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded, so that the tensors' bytes are aligned for whoever maps the file into memory.
    text += b" " * (-len(text) % 8)
    lead = len(text).to_bytes(8, "little") + text
    first = len(lead)
    ranges = {name: (first + start, first + end) for name, (start, end) in offsets.items()}
    return lead, ranges


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file over `path`, a tensor at a time."""
    plan = {}
    for name, tensor in tensors.items():
        plan[name] = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    lead, _ = header_of(plan, METADATA)
    with create(path) as stream:
        stream.write(lead)
        for tensor in tensors.values():
            stream.write(_bytes_of(tensor))


class TensorReader:
    """All tensors of a model directory: a single model.safetensors, or an index with its shards.

    Opening reads the headers only. Each read opens its file anew, so no descriptor is held.

    Raises:
        CheckpointError: see `read_header`; also missing shards, tensors that stand in two shards,
            index entries that lead out of the directory or nowhere, and directories with pickled
            weights only.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._infos = _locate(self.directory)

    @classmethod
    def of_file(cls, directory: Path, name: str) -> TensorReader:
        """Open one safetensors file of a directory; CheckpointError if it is missing or damaged."""
        reader = cls.__new__(cls)
        reader.directory = Path(directory)
        file = confined(reader.directory, name)
        if not file.is_file():
            raise CheckpointError(f"{directory} has no {name}; the checkpoint is incomplete")
        reader._infos = read_header(file)
        return reader

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; CheckpointError if there is none of this name."""
        if name not in self._infos:
            raise CheckpointError(
                f"{self.directory}: no tensor {name!r} among its {len(self._infos)}; "
                "the model is incomplete"
            )
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor, in its stored dtype and shape."""
        info = self.info(name)
        return self._read(info, info.start, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the leading dimension of a tensor that has one."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} of shape {info.shape} "
                f"has no rows [{start}, {stop})"
            )
        row_shape = info.shape[1:]
        first = info.start + start * tensor_bytes(info.dtype, row_shape)
        return self._read(info, first, (stop - start, *row_shape))

    def _read(self, info: TensorInfo, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=DTYPES[info.dtype])
        view = _bytes_of(tensor)
        with info.file.open("rb", buffering=0) as stream:
            done = 0
            # One call reads at most 2 GiB.
            while done < len(view):
                count = os.preadv(stream.fileno(), [view[done:]], start + done)
                if not count:
                    raise CheckpointError(
                        f"{info.file} ends at byte {start + done}; it was cut off while it was read"
                    )
                done += count
        return tensor


def row_slices(shape: tuple[int, ...], limit: int = SLICE) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) ranges of the leading dimension: `limit` elements at most, or one row."""
    rows = shape[0] if shape else 1
    row_size = max(1, math.prod(shape[1:]))
    step = max(1, limit // row_size)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


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
    ) -> None:
        self.directory = Path(directory)
        self.plan = plan
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
        data = _bytes_of(tensor)
        if self._missing[name] < len(data):
            raise CheckpointError(f"tensor {name!r} was written twice")
        place = self._places[name]
        position = place.start + start * tensor_bytes(dtype, shape[1:])
        write_at(place.descriptor, position, data, place.file)
        self._missing[name] -= len(data)

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
    data = _bytes_of(tensor.to(DTYPES[info.dtype]))
    with info.file.open("r+b", buffering=0) as stream:
        write_at(stream.fileno(), info.start, data, info.file)


def sha256_of_tensors(reader: TensorReader, names: Iterable[str]) -> str:
    """Return a hash over names, dtypes, shapes and bytes of some tensors, in any order."""
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        info = reader.info(name)
        digest.update(f"{name}\n{info.dtype}\n{info.shape}\n".encode())
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.start)
            left = info.end - info.start
            while left:
                chunk = stream.read(min(CHUNK, left))
                if not chunk:
                    raise CheckpointError(f"{info.file} was cut off while it was read")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
