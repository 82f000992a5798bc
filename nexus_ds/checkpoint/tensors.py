"""Safetensors in and out as torch's tensors, one tensor or one slice of rows at a time.

`headers` says where they lie. Reading fills fresh tensors, without mmap, so that memory is what the
caller holds and nothing more.
Not covered: big-endian machines, packed 4- and 6-bit types, two writers of one directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nexus_ds.checkpoint.adapters import MergedReader
from nexus_ds.checkpoint.headers import (
    Headers,
    TensorInfo,
    tensor_bytes,
)
from nexus_ds.checkpoint.new_files import NewFiles, write_file
from nexus_ds.checkpoint.qwen3_5 import Reordered
from nexus_ds.checkpoint.qwen3_next_headers import SourceHeaders
from nexus_ds.checkpoint.views import ViewReader
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import write_at

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
    write_file(path, plan, ((name, bytes_of(tensor)) for name, tensor in tensors.items()))


class TensorReader(Headers):
    """All tensors of a model directory, as torch has them; see `Headers`."""

    @classmethod
    def of(cls, headers: Headers) -> TensorReader:
        """Return a reader of what headers describe, without reading them again."""
        if isinstance(headers, TensorReader):
            return headers
        # one that translates what it reads goes on doing so
        kind = KINDS[type(headers)]
        reader = kind.__new__(kind)
        vars(reader).update(vars(headers))
        return reader

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor, in its stored dtype and shape."""
        return self._read(name, 0, self.info(name).shape)

    def read_rows(
        self,
        name: str,
        start: int,
        stop: int,
    ) -> torch.Tensor:
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

    def _read(
        self,
        name: str,
        start: int,
        shape: tuple[int, ...],
    ) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=DTYPES[self.info(name).dtype])
        self.read_range(name, start, bytes_of(tensor))
        return tensor


class ViewedTensors(TensorReader, ViewReader):
    """The tensors that a view shows, as torch has them."""


class SourceTensors(TensorReader, SourceHeaders):
    """The tensors of a dense Qwen3, and of experts for it, out of a Qwen3-Next, as torch has
    them."""

    def overwrite(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor that lies in the file row by row; see the function of this name."""
        factors = torch.from_numpy(self.factors(name)).to(tensor.dtype)
        overwrite(self.raw.info(name), tensor * factors)


class ReorderedTensors(TensorReader, Reordered):
    """The tensors of a Qwen3.5 out of a Qwen3-Next, as torch has them."""


class MergedTensors(TensorReader, MergedReader):
    """The tensors of a base with an adapter, as torch has them."""


KINDS: dict[type[Headers], type[TensorReader]] = {
    Headers: TensorReader,
    ViewReader: ViewedTensors,
    SourceHeaders: SourceTensors,
    Reordered: ReorderedTensors,
    MergedReader: MergedTensors,
}


class TensorWriter(NewFiles):
    """Writes torch's tensors into the files of a new model, in any order.

    Raises:
        CheckpointError: also another dtype or shape than planned, a tensor that is written twice.
    """

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole planned tensor."""
        _, planned = self._planned(name)
        if tuple(tensor.shape) != planned:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, planned was {planned}"
            )
        self._write(name, 0, tensor)

    def write_rows(
        self,
        name: str,
        start: int,
        rows: torch.Tensor,
    ) -> None:
        """Write rows [start, start + len(rows)) of a planned tensor, each row once."""
        _, planned = self._planned(name)
        stop = start + len(rows)
        if rows.shape[1:] != planned[1:] or stop > planned[0]:
            raise CheckpointError(
                f"rows {start}+{tuple(rows.shape)} do not fit into {name!r} of shape {planned}"
            )
        self._write(name, start, rows)

    def _write(
        self,
        name: str,
        start: int,
        tensor: torch.Tensor,
    ) -> None:
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
