"""Training state in portable form, which knows no ranks: fp32 weights and Adam's moments.

A parameter is flattened; whoever owns elements [a, b) of it writes them into a safetensors file of
its own, under the name `KIND:a:PARAMETER` (KIND: fp32, exp_avg, exp_avg_sq). Reading takes from all
files what this rank owns now, so that any number of ranks, expert-parallel size and ZeRO stage
reads what any other wrote, and no rank ever holds more than its own. A routed expert's matrix is a
parameter of its own, under its name in a checkpoint: placement does not show, and vacant slots are
in no file.
Shapes: n elements of a flattened parameter.
Not covered: other optimizers than Adam; when files count and whether they are whole (`states`).
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from nexus_ds.checkpoint.headers import header_of
from nexus_ds.checkpoint.qwen2_moe import expert_name
from nexus_ds.checkpoint.tensors import DTYPE_NAMES, TensorReader
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import naming, write_at
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.deepspeed_internals import Engine, full_shape
from nexus_ds.runtime.engine import moe_layers
from nexus_ds.runtime.ranks import together

STACKED = tuple(internals.STACKED.items())
RNG = "rng"
PLACE = re.compile(r"[0-9]{1,18}")
"""A tensor's first element, in its name; `int` takes no more than 4,300 digits."""
CHUNK = 1 << 30  # bytes; one call of the system writes at most 2 GiB


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    sha256: str


class Piece(NamedTuple):
    """Elements [start, start + n) of a parameter in portable form."""

    name: str
    start: int
    values: dict[str, Tensor]
    """Per kind a view [n] into the optimizer's memory, fp32."""


class _Stack(NamedTuple):
    """A stack of this rank's experts."""

    names: list[str | None]
    """Per slot the name in portable form; None: vacant."""
    size: int
    """Elements of one expert's matrix."""


class _Stored(NamedTuple):
    """A tensor in a state's file: elements [start, stop) of a parameter."""

    start: int
    stop: int
    reader: TensorReader
    tensor: str


def _stacks(model: nn.Module) -> dict[int, _Stack]:
    """Return the expert stacks of a model by the id of their parameter."""
    found = {}
    for index, layer in enumerate(moe_layers(model)):
        local = layer.placement.local_experts()
        for stacked, part in STACKED:
            parameter = getattr(layer.experts, stacked)
            _, *matrix = full_shape(parameter)
            names = [
                None if expert is None else expert_name(index, expert, part) for expert in local
            ]
            found[id(parameter)] = _Stack(names, math.prod(matrix))
    return found


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return every parameter's shape in portable form, the same on all ranks of all layouts."""
    stacks = _stacks(model)
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in stacks:
            found[name] = list(full_shape(parameter))
    for index, layer in enumerate(moe_layers(model)):
        for stacked, part in STACKED:
            _, *shape = full_shape(getattr(layer.experts, stacked))
            for expert in range(layer.placement.experts):
                found[expert_name(index, expert, part)] = shape
    return found


def _cut(fragment: internals.Fragment, stack: _Stack) -> Iterator[Piece]:
    """Cut a fragment of an expert stack at the borders between slots; vacant slots are left out."""
    start = fragment.start
    stop = start + len(fragment.values[internals.MASTER])
    first_slot = start // stack.size
    end_slot = -(-stop // stack.size)
    for slot in range(first_slot, end_slot):
        name = stack.names[slot]
        if name is None:
            continue
        border = slot * stack.size
        first = max(start, border)
        last = min(stop, border + stack.size)
        within = slice(first - start, last - start)
        views = {kind: view[within] for kind, view in fragment.values.items()}
        yield Piece(name, first - border, views)


def pieces(engine: Engine) -> Iterator[Piece]:
    """Yield what this rank owns, in portable form.

    The values are views: writing to them writes the optimizer.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stacks = _stacks(engine.module)
    for fragment in internals.fragments(engine):
        key = id(fragment.parameter)
        if key in stacks:
            yield from _cut(fragment, stacks[key])
        else:
            yield Piece(names[key], fragment.start, fragment.values)


# Files --------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in the CPU's memory; a copy if it lies on a device."""
    here = tensor.detach().cpu().contiguous()
    return here.view(torch.uint8).numpy().data


def _random_states() -> dict[str, Tensor]:
    found = {f"{RNG}:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found[f"{RNG}:cuda"] = torch.cuda.get_rng_state()
    return found


def write_rank(engine: Engine, path: Path, halfway: Callable[[], None]) -> FileEntry:
    """Write what this rank owns to `path` and flush it to the disk; return its size and sha256.

    Both are of what is in memory, not of what came to the disk; the hash is taken by a thread
    beside the writing. At most two chunks have left the device.

    Args:
        engine: between two optimizer steps.
        path: of the file.
        halfway: called once in the middle, for tests of what happens then.

    Raises:
        OSError: not all could be written; it names the file, what is still to be written, and what
            is free.
        CheckpointError: the file came out shorter than planned.
    """
    tensors = {}
    for piece in pieces(engine):
        for kind, view in piece.values.items():
            tensors[f"{kind}:{piece.start}:{piece.name}"] = view
    tensors |= _random_states()
    forms = {}
    for name, tensor in tensors.items():
        forms[name] = (DTYPE_NAMES[tensor.dtype], (tensor.numel(),))
    lead, places = header_of(forms)
    size = max(end for _, end in places.values())
    position = 0
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(digest.update, b"")
        for index, data in enumerate(_chunks(lead, tensors)):
            # Once the last chunk is hashed, so that no third one is held.
            hashed.result()
            hashed = beside.submit(digest.update, data)
            write_at(file.fileno(), position, data, path)
            position += len(data)
            if index == len(tensors) // 2:
                halfway()
        with naming(path, size):
            os.fsync(file.fileno())
        hashed.result()
    _check_size(path, size)
    return {"size": size, "sha256": digest.hexdigest()}


def _check_size(path: Path, size: int) -> None:
    """Raise CheckpointError unless the file is as long as its header says."""
    if (found := path.stat().st_size) != size:
        raise CheckpointError(
            f"{path}: {found:,} bytes were written, {size:,} planned; the state does not count"
        )


def _chunks(lead: bytes, tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(lead)
    for tensor in tensors.values():
        data = _bytes(tensor)
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


class StateFiles:
    """The files of one training state, read by parameter and element.

    Args:
        directory: of the state.
        files: their names.

    Raises:
        CheckpointError: a file is damaged or named otherwise than `write_rank` names tensors.
    """

    def __init__(self, directory: Path, files: list[str]) -> None:
        self.directory = directory
        self._readers = {name: TensorReader.of_file(directory, name) for name in files}
        self._index: dict[tuple[str, str], list[_Stored]] = {}
        for file, reader in self._readers.items():
            for name in reader.names():
                kind, _, rest = name.partition(":")
                if kind == RNG:
                    continue
                first, _, parameter = rest.partition(":")
                shape = reader.info(name).shape
                if not PLACE.fullmatch(first) or not parameter or len(shape) != 1:
                    raise CheckpointError(
                        f"{directory / file}: tensor {name!r} belongs to no training state"
                    )
                start = int(first)
                stop = start + shape[0]
                stored = _Stored(start, stop, reader, name)
                self._index.setdefault((kind, parameter), []).append(stored)
        for entries in self._index.values():
            entries.sort(key=lambda entry: (entry.start, entry.stop))

    def fill(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Read elements [start, start + n) of a parameter into `target` [n].

        Args:
            kind: fp32, exp_avg or exp_avg_sq.
            name: of the parameter in portable form.
            start: first element.
            target: a view into the optimizer's memory, on any device.

        Raises:
            CheckpointError: elements that no file has.
        """
        entries = self._index.get((kind, name), [])
        position = start
        stop = start + len(target)
        # The last entry that begins at or before `start` is the first that can hold it.
        after = bisect.bisect_right(entries, start, key=lambda entry: entry.start)
        for entry in entries[max(0, after - 1) :]:
            if entry.start > position or position >= stop:
                break
            if entry.stop <= position:
                continue
            last = min(entry.stop, stop)
            found = entry.reader.read_rows(entry.tensor, position - entry.start, last - entry.start)
            target[position - start : last - start].copy_(found)
            position = last
        if position < stop:
            raise CheckpointError(
                f"{self.directory}: element {position} of {kind} of {name} is in no file; the "
                "training state is incomplete"
            )

    def random_states(self, file: str) -> dict[str, Tensor]:
        """Return the random generators' states that the writer of `file` had."""
        if file not in self._readers:
            return {}
        reader = self._readers[file]
        return {
            name.partition(":")[2]: reader.read(name)
            for name in reader.names()
            if name.startswith(f"{RNG}:")
        }


def read_rank(engine: Engine, files: StateFiles, optimizer_step: int, own_file: str) -> None:
    """Fill a fresh engine: masters, moments, Adam's count, working weights and random generators.

    All ranks must call.

    Args:
        engine: fresh.
        files: of the state.
        optimizer_step: Adam's count.
        own_file: whose writer's random generators this rank goes on with; '': with its own.

    Raises:
        CheckpointError: elements that no file has.
    """
    internals.set_optimizer_step(engine, optimizer_step)

    def fill() -> None:
        for piece in pieces(engine):
            for kind, view in piece.values.items():
                files.fill(kind, piece.name, piece.start, view)

    # One whose files come slowly has more patience here than in the collectives that follow.
    together(fill)
    internals.weights_from_masters(engine)
    states = files.random_states(own_file)
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
