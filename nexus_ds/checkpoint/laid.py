"""Where a mixture's tensors go in its files, and what becomes of their bytes there; no torch.

Tensors have the dense family's names and shapes; most forms have them as they are. A Qwen3-Next
that was a Qwen3 has columns times powers of two, and a gate of zeros between the queries' heads
(`qwen3_next` says why); one that was a Qwen3.5 has rows in another order (`qwen3_5`). Both are done
to bytes as they pass, whatever made them (`assembly`).
Not covered: reading them (`qwen3_next_headers`); tensors as torch has them (`qwen3_next`).
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.arithmetic import (
    Floats,
    narrow,
    widen,
)
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import is_norm, place_of
from nexus_ds.checkpoint.forms import reordered, translated
from nexus_ds.checkpoint.headers import (
    ITEM_BYTES,
    Headers,
    Plan,
    tensor_bytes,
)
from nexus_ds.checkpoint.new_files import (
    WHOLE,
    NewFiles,
    Place,
    Target,
    Write,
)
from nexus_ds.checkpoint.qwen3_5 import Run, runs_of
from nexus_ds.checkpoint.qwen3_next_headers import (
    NORMS,
    centred,
    stored_norm,
)
from nexus_ds.checkpoint.values import read_values

AT_ONCE = 1 << 16
"""Numbers that are multiplied at once: a few such blocks fit into a core's own cache."""


@dataclass(frozen=True)
class Laid:
    """A tensor that lies otherwise in the files than the dense family has it."""

    dtype: str
    size: int
    """In bytes, of the tensor as the dense family has it."""
    ranges: Sequence[Place]
    """All that it becomes in the files."""
    lay: Callable[[int, memoryview], Iterator[Write]]
    """Returns what becomes of its bytes from one on."""
    copies: tuple[Target, ...] = ()
    first: int = 0
    """Of the tensor's bytes, where these rows begin."""

    def writes(self, position: int, data: memoryview) -> Iterator[Write]:
        """Yield what is written of the bytes from `position` on."""
        return self.lay(self.first + position, data)

    def part(self, first: int, stop: int) -> Laid:
        """Return the place of bytes [first, stop); of a tensor that has its own size in the
        file."""
        [whole] = self.ranges
        assert whole.size == self.size, "only rows of embeddings and head have several sources"
        return replace(
            self,
            size=stop - first,
            ranges=[whole.part(first, stop)],
            first=self.first + first,
        )


# Powers of two, and gates of zeros ----------------------------------------------------------------


def _multiply(values: Floats, factors_H: Floats, first: int) -> None:
    """Multiply values of rows of H by the factors of their columns; `first` is the first one's
    number."""
    width = len(factors_H)
    begin = first % width
    lead = values[: (width - begin) % width]
    lead *= factors_H[begin : begin + len(lead)]
    rest = values[len(lead) :]
    rows = rest[: len(rest) // width * width].reshape(-1, width)
    rows *= factors_H
    tail = rest[rows.size :]
    tail *= factors_H[: len(tail)]


@dataclass(frozen=True)
class _Scaled:
    """Columns times powers of two, which is exact."""

    place: Place
    factors: Floats
    """[1], or one for each column."""
    head: int
    """Bytes of a head's rows, after which as many zeros stand; 0: none do."""

    def __call__(self, position: int, data: memoryview) -> Iterator[Write]:
        item = ITEM_BYTES[self.place.dtype]
        step = AT_ONCE * item
        for start in range(0, len(data), step):
            block = data[start : start + step]
            yield from self._gated(position + start, self._times(block, (position + start) // item))

    def _times(self, data: memoryview, first: int) -> memoryview:
        dtype = self.place.dtype
        raw = np.frombuffer(data, np.uint8)
        values = np.empty(len(raw) // ITEM_BYTES[dtype], np.float32)
        widen(raw, dtype, values)
        _multiply(values, self.factors, first)
        out = np.empty(len(raw), np.uint8)
        narrow(values, dtype, out, np.empty(len(values), np.uint32))
        return out.data

    def _gated(self, position: int, data: memoryview) -> Iterator[Write]:
        if not self.head:
            yield self.place, position, data
            return
        while data:
            whole, done = divmod(position, self.head)
            # to the end of this head: the gate's rows come between it and the next, and a new file
            # is of zeros
            own = data[: self.head - done]
            yield self.place, 2 * whole * self.head + done, own
            data, position = data[len(own) :], position + len(own)


def write_norms(
    directory: Path, plan: Plan, write: Callable[[Mapping[str, Place]], object]
) -> Headers:
    """Write the norms as they were beside a Qwen3-Next, and return them.

    Args:
        directory: of the checkpoint.
        plan: of all tensors.
        write: writes those that it gets the places of.
    """
    path = directory / NORMS
    path.parent.mkdir(exist_ok=True)
    norms = {name: entry for name, entry in plan.items() if is_norm(name)}
    with NewFiles(path.parent, norms, WHOLE, single=path.name) as files:
        write({name: files.place(name) for name in norms})
        for name in norms:
            files.wrote(name)
    return Headers.of_file(directory, NORMS)


def norm_as_stored(norms: Headers, name: str) -> Floats:
    """Return the numbers of a norm as a Qwen3-Next has it, of the norms as they were."""
    return stored_norm(name, lambda one: read_values(norms, one), norms.info(name).dtype)


def _in_qwen3_next(
    files: NewFiles, plan: Plan, config: ConfigJson, norms: Headers
) -> dict[str, Target]:
    head_dim = settings(config).head_dim

    @cache
    def powers(norm: str) -> Floats:
        _, powers_H = centred(read_values(norms, norm), norms.info(norm).dtype)
        return powers_H

    def target(name: str, dense: str) -> Target:
        place, form = files.place(name), place_of(name, head_dim)
        if is_norm(name) or (not form.norm and form.scale == 1.0):
            return place
        factors = powers(form.norm) if form.norm else np.array([form.scale], np.float32)
        dtype, shape = plan[dense]
        head = form.head * tensor_bytes(dtype, shape[1:])
        size = tensor_bytes(dtype, shape)
        return Laid(dtype, size, [place], _Scaled(place, factors, head))

    found = {name: target(name, name) for name in plan}
    if HEAD not in plan:
        # a copy with the last norm's powers
        head = target(HEAD, EMBEDDING)
        found[EMBEDDING] = files.place(EMBEDDING)._replace(copies=(head,))
    return found


# Rows in another order ----------------------------------------------------------------------------


def _in_runs(files: NewFiles, runs: Sequence[Run], row: int) -> Laid:
    """Return how a tensor with `row` bytes a row lies in several places."""
    places = {run.name: files.place(run.name) for run in runs}

    def lay(position: int, data: memoryview) -> Iterator[Write]:
        stop = position + len(data)
        for run in runs:
            begin = run.start * row
            first, last = max(position, begin), min(stop, begin + run.rows * row)
            if first < last:
                own = data[first - position : last - position]
                yield places[run.name], run.place * row + first - begin, own

    ranges = [places[run.name].part(run.place * row, (run.place + run.rows) * row) for run in runs]
    return Laid(ranges[0].dtype, sum(one.size for one in ranges), ranges, lay)


def targets_of(
    files: NewFiles, plan: Plan, config: ConfigJson, norms: Headers | None
) -> dict[str, Target]:
    """Return where each tensor goes.

    Args:
        files: that are being written, of a plan that `in_files` has made of `plan`.
        plan: dtype and shape of each tensor, by the dense family's names.
        config: config.json of the mixture.
        norms: of a Qwen3-Next as they were, see `write_norms`; None of every other form.
    """
    if norms is not None:
        return _in_qwen3_next(files, plan, config, norms)
    runs = runs_of(settings(config)) if reordered(config) else {}
    found: dict[str, Target] = {}
    for name, (dtype, shape) in plan.items():
        own = runs.get(name)
        row = tensor_bytes(dtype, shape[1:])
        found[name] = _in_runs(files, own, row) if own else files.place(name)
    if reordered(config) and HEAD not in plan:
        head = files.place(HEAD)
        found[EMBEDDING] = files.place(EMBEDDING)._replace(copies=(head,))
    return found


def has_norms(config: ConfigJson) -> bool:
    """Return whether a mixture's form changes norms, which then lie beside it as they were."""
    return translated(config) and not reordered(config)
