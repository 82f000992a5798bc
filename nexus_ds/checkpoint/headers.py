"""Where the tensors of safetensors files lie, and their bytes; without torch.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes. Every
claim of a header is checked; reading goes through `os.preadv`, not through mmap, so that memory is
what the caller holds and nothing more.
Nothing here unpickles: files of another kind are refused by name and by content, and paths in an
index stay inside the model's directory.
Not covered: tensors as torch has them (`tensors`), their values (`values`), packed 4- and 6-bit
types.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from nexus_ds.checkpoint.json_files import (
    confined,
    parse_json_object,
    read_json_object,
    require_directory,
)
from nexus_ds.errors import CheckpointError
from nexus_ds.inputs import require_file

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one element, by the dtype's name in safetensors."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MOST_DIMENSIONS = 64  # torch has no tensor of more; a product of a million numbers takes hours
SLICE = 1 << 22  # elements that `row_slices` allows at once
CHUNK = 1 << 20  # bytes that are hashed at once
MOST_KEPT = 64  # files that a thread keeps open: a process may have a thousand


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
    return math.prod(shape) * ITEM_BYTES[dtype]


def _is_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS:
        return False
    # type and not isinstance: JSON's true is an int to Python.
    return all(type(item) is int and item >= 0 for item in value)


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
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}")
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
    size = require_file(file)
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
    # unlike pathlib's, it says no of a name that is too long for a file's
    if not os.path.isfile(file):
        raise CheckpointError(
            f"{directory}: the shard {shard[:200]!r} of {INDEX} is missing; "
            "fetch or save the model again"
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


class Headers:
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
    def of_file(cls, directory: Path, name: str) -> Self:
        """Open one safetensors file of a directory; CheckpointError if it is missing or damaged."""
        reader = cls.__new__(cls)
        reader.directory = Path(directory)
        file = confined(reader.directory, name)
        if not file.is_file():
            raise CheckpointError(f"{directory} has no {name}; the checkpoint is incomplete")
        reader._infos = read_header(file)
        return reader

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return a reader of some tensors under other names: for each new one that of the file."""
        reader = type(self).__new__(type(self))
        reader.directory = self.directory
        reader._infos = {new: self._infos[name] for new, name in names.items()}
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

    def files(self) -> list[Path]:
        """Return the files that the tensors lie in, sorted."""
        return sorted({info.file for info in self._infos.values()})

    def read_range(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` (bytes) with a tensor's bytes from its byte `start` on.

        All reading comes through here but for who copies ranges of files, and takes those of a
        tensor that lies in none for wrong (`adapters`).
        """
        info = self.info(name)
        read_into(info.file, info.start + start, view)

    def items(self, name: str, first: int, count: int) -> bytearray:
        """Return the bytes of `count` elements of a tensor, counted in the order of the file."""
        item = ITEM_BYTES[self.info(name).dtype]
        data = bytearray(count * item)
        self.read_range(name, first * item, memoryview(data))
        return data

    def chunks(self, name: str, limit: int = CHUNK) -> Iterator[bytearray]:
        """Yield the bytes of a tensor, at most `limit` at once."""
        info = self.info(name)
        size = tensor_bytes(info.dtype, info.shape)
        for start in range(0, size, limit):
            data = bytearray(min(limit, size - start))
            self.read_range(name, start, memoryview(data))
            yield data


class _Kept(threading.local):
    """What one thread keeps open; None outside of `kept_open`."""

    files: dict[Path, int] | None = None


_KEPT = _Kept()


@contextmanager
def kept_open() -> Iterator[None]:
    """Inside, this thread opens a file once, however often it reads from it.

    For files that nobody replaces meanwhile. To open one takes as long as reading 100 KB of it.
    """
    if _KEPT.files is not None:
        yield
        return
    _KEPT.files = {}
    try:
        yield
    finally:
        for descriptor in _KEPT.files.values():
            os.close(descriptor)
        _KEPT.files = None


def read_into(file: Path, start: int, view: memoryview) -> None:
    """Fill `view` (bytes) with what a file has from byte `start` on.

    Raises:
        CheckpointError: the file ends before.
    """
    kept = _KEPT.files
    descriptor = None if kept is None else kept.get(file)
    if descriptor is not None:
        _read(descriptor, file, start, view)
    elif kept is not None and len(kept) < MOST_KEPT:
        kept[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        _read(kept[file], file, start, view)
    else:
        with file.open("rb", buffering=0) as stream:
            _read(stream.fileno(), file, start, view)


def _read(descriptor: int, file: Path, start: int, view: memoryview) -> None:
    done = 0
    # One call reads at most 2 GiB.
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if not count:
            raise CheckpointError(
                f"{file} ends at byte {start + done}; it was cut off while it was read"
            )
        done += count


def row_slices(shape: tuple[int, ...], limit: int = SLICE) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) ranges of the leading dimension: `limit` elements at most, or one row."""
    rows = shape[0] if shape else 1
    row_size = max(1, math.prod(shape[1:]))
    step = max(1, limit // row_size)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def read_by_rows(
    info: TensorInfo,
    start: int,
    view: memoryview,
    rows: Callable[[int, int], memoryview],
    limit: int = SLICE,
) -> None:
    """Fill `view` (bytes) from byte `start` on of a tensor that lies in no file as it is.

    Args:
        info: its dtype and shape.
        start: byte that comes first.
        view: filled.
        rows: returns the bytes of rows [first, stop); asked for some rows at a time.
        limit: elements of them, or one row.
    """
    width = tensor_bytes(info.dtype, info.shape[1:])
    end = start + len(view)
    above = start // width
    touched = -(-end // width) - above
    for first, stop in row_slices((touched, *info.shape[1:]), limit):
        position = (above + first) * width
        block = rows(above + first, above + stop)
        # a range may begin and end within a row
        low, high = max(start, position), min(end, position + len(block))
        view[low - start : high - start] = block[low - position : high - position]


def tensor_head(name: str, info: TensorInfo) -> bytes:
    """Return what `sha256_of_tensors` takes in before the bytes of a tensor."""
    return f"{name}\n{info.dtype}\n{info.shape}\n".encode()


def sha256_of_tensors(reader: Headers, names: Iterable[str]) -> str:
    """Return a hash over names, dtypes, shapes and bytes of some tensors, in any order."""
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        digest.update(tensor_head(name, reader.info(name)))
        for chunk in reader.chunks(name):
            digest.update(chunk)
    return digest.hexdigest()
