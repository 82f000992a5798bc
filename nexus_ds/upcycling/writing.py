"""Writes a mixture's files in one pass: each tensor from its source to its place, side by side.

Blocks are read and written, so memory does not grow with the model; no torch. What a form makes of
the bytes on their way is `checkpoint.laid`'s.
Not covered: where tensors come from (`upcycle`, `extend`), what is checked before (`compatible`).
"""

from __future__ import annotations

import threading
from collections.abc import (
    Callable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.file_layout import in_files, repeated
from nexus_ds.checkpoint.headers import (
    Headers,
    Plan,
    tensor_bytes,
    tensor_head,
)
from nexus_ds.checkpoint.laid import (
    has_norms,
    norm_as_stored,
    targets_of,
    write_norms,
)
from nexus_ds.checkpoint.new_files import NewFiles, Target
from nexus_ds.checkpoint.qwen2_moe import planned
from nexus_ds.checkpoint.sidecar import Sidecar
from nexus_ds.checkpoint.values import encoded
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import write_json
from nexus_ds.progress import Progress
from nexus_ds.upcycling.router_file import RouterFile
from nexus_ds.upcycling.sources import (
    Blend,
    Computed,
    Rows,
    Source,
    Stack,
    source_of,
)

_COMPUTING = threading.Lock()


def _piece(
    name: str,
    blend: Blend,
    place: Target,
    rows: tuple[int, int] | None = None,
) -> assembly.Piece:
    """Return how a tensor, or some of its rows, is made of stored ones."""
    sources = [source_of(part, rows) for part in blend.parts]
    weights = [part.weight for part in blend.parts]
    as_it_is = blend.rule is None and weights == [blend.divisor] == [blend.scale] == [1.0]
    # a copy never goes through fp32 and back: it keeps every bit
    if as_it_is and sources[0].dtype == place.dtype:
        return assembly.Copy(place, sources[0])
    rule = blend.rule or assembly.Mean(weights, blend.divisor, blend.scale)
    return assembly.Merge(place, sources, rule, name, blend.parts[0].who)


def _pieces(
    name: str,
    made: Source,
    place: Target,
    entry: tuple[str, Sequence[int]],
) -> list[assembly.Piece]:
    """Return the pieces of one tensor, in the order of the file; `entry` is of the plan."""
    if isinstance(made, Blend):
        return [_piece(name, made, place)]
    if isinstance(made, float):
        return [assembly.Fill(place, made)]
    dtype, shape = entry
    if not isinstance(made, Stack):
        return [assembly.Fill(place, partial(_bytes_of, name, made, dtype, shape))]
    row = tensor_bytes(dtype, shape[1:])
    return [
        _piece(name, blend, place.part(start * row, stop * row), (start, stop))
        for start, stop, blend in made.pieces
    ]


def _bytes_of(
    name: str, given: Computed | Rows | Floats, dtype: str, shape: Sequence[int]
) -> memoryview:
    # one at a time: a layer's P is in memory meanwhile
    with _COMPUTING:
        values = given if isinstance(given, np.ndarray) else given.make()
    if values.shape != tuple(shape):
        raise CheckpointError(
            f"tensor {name!r} has shape {values.shape}, planned was {tuple(shape)}"
        )
    return encoded(values, dtype).data


@dataclass(frozen=True)
class _Making:
    """Tensors, where each comes from and where it goes."""

    plan: Plan
    """Dtype and shape of each, by the dense family's names."""
    tensors: Mapping[str, Source]
    targets: Mapping[str, Target]

    def hashed_job(self, names: Sequence[str]) -> assembly.Job:
        """Return the making of tensors, whose first sources are hashed as `sha256_of_tensors`."""
        pieces, heads = [], []
        for name in names:
            blend = self.tensors[name]
            assert isinstance(blend, Blend)
            part = blend.parts[0]
            pieces.append(_piece(name, blend, self.targets[name]))
            heads.append(tensor_head(part.name, part.reader.info(part.name)))
        return assembly.Job(pieces, heads)

    def job(self, name: str) -> assembly.Job:
        """Return the making of one tensor."""
        pieces = _pieces(name, self.tensors[name], self.targets[name], self.plan[name])
        return assembly.Job(pieces)

    def jobs(
        self, hashed: Mapping[str, Sequence[str]], router: RouterFile | None
    ) -> list[assembly.Job]:
        """Return the making of all; that of hashed ones stands first."""
        # large jobs first, and then in the order of the files, whose readers follow
        jobs = [self.hashed_job(names) for names in hashed.values()]
        elsewhere = {name for names in hashed.values() for name in names}
        if router:
            gates = {name: each for name, each in self.tensors.items() if isinstance(each, Rows)}
            places = {each.layer: (each, self.targets[name]) for name, each in gates.items()}
            jobs.append(router.job(places))
            elsewhere |= gates.keys()
        return jobs + [self.job(name) for name in self.tensors if name not in elsewhere]


def _end(target: Target) -> tuple[Path, int]:
    last = target.ranges[-1]
    return last.file, last.end


def _assembled(
    files: NewFiles,
    making: _Making,
    hashed: Mapping[str, Sequence[str]],
    progress: Progress,
    router: RouterFile | None,
) -> dict[str, str]:
    """Write what is made of stored tensors by several threads; return the hashes asked for."""
    # a tensor is done with its last rows
    ends = set(map(_end, making.targets.values()))

    def done(piece: assembly.Piece) -> None:
        for target in piece.targets:
            files.frontier.landed(target)
        if not ends.isdisjoint(map(_end, piece.targets)):
            progress.advance()

    digests = assembly.assemble(making.jobs(hashed, router), done)
    for name in files.plan:
        files.wrote(name)
    # those of the hashed ones stand first
    return dict(zip(hashed, digests, strict=False))


def _check_whole(plan: Plan, tensors: Mapping[str, Source]) -> None:
    """Raise CheckpointError for a planned tensor that comes from nowhere."""
    missing = [name for name in plan if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{len(missing)} planned tensors were not written, the first: {missing[0]!r}"
        )


def _with_norms(directory: Path, making: _Making) -> tuple[_Making, Headers]:
    """Write the norms as they were, and let those of the model be made of them."""

    def write(places: Mapping[str, Target]) -> None:
        own = replace(making, targets=places)
        assembly.assemble([own.job(name) for name in places])

    norms = write_norms(directory, making.plan, write)
    made = {name: Computed(partial(norm_as_stored, norms, name)) for name in norms.names()}
    return replace(making, tensors={**making.tensors, **made}), norms


@dataclass(frozen=True)
class Beside:
    """What is done while the tensors of a checkpoint are written."""

    sidecar: Sidecar | None = None
    """Its own, whose router's file is written meanwhile where it has a P."""
    follow: Callable[[NewFiles], object] = bool
    """Called with files that are about to be written, to be read on behind their writers."""


def write_tensors(
    directory: Path,
    plan: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Mapping[str, Source],
    label: str,
    config: ConfigJson,
    hashed: Mapping[str, Sequence[str]] | None = None,
    beside: Beside | None = None,
) -> dict[str, str]:
    """Write the model file(s) of a checkpoint, a few blocks in memory at a time.

    Args:
        directory: empty, not yet renamed.
        plan: dtype, as safetensors names it, and shape of each tensor, in file order.
        tensors: where each comes from.
        label: name in the progress line.
        config: config.json of the checkpoint, whose form decides how tensors lie in the file.
        hashed: by any name, tensors whose first sources are hashed together.
        beside: what else is done meanwhile.

    Returns:
        For each name of `hashed` the `sha256_of_tensors` of the sources.

    Raises:
        CheckpointError: NaN, infinite or all-zero weights (names model, tensor and count), no
            space, a tensor that `tensors` lacks.
    """
    hashed, beside = hashed or {}, beside or Beside()
    _check_whole(plan, tensors)
    making, norms = _Making(plan, tensors, {}), None
    if has_norms(config):
        making, norms = _with_norms(directory, making)
    with Progress(label, len(plan), "tensors") as progress, ExitStack() as stack:
        planned_files = in_files(plan, config)
        files = stack.enter_context(NewFiles(directory, planned_files, copies=repeated(config)))
        beside.follow(files)
        router = None
        if beside.sidecar and beside.sidecar.projections:
            router = stack.enter_context(
                RouterFile(directory, beside.sidecar, config["hidden_size"], files.frontier)
            )
            beside.follow(router.files)
        making = replace(making, targets=targets_of(files, plan, config, norms))
        return _assembled(files, making, hashed, progress, router)


def write_model(
    directory: Path,
    config: ConfigJson,
    dtype: str,
    tensors: Mapping[str, Source],
    label: str,
    hashed: Mapping[str, Sequence[str]],
    beside: Beside,
) -> dict[str, str]:
    """Write config.json and the model file(s) of a Nexus checkpoint.

    Args:
        config: config.json of the output.
        dtype: of its weights (`planned`), as safetensors names it.

    `directory`, `tensors`, `label`, `hashed`, `beside`, result and errors: `write_tensors`.
    """
    write_json(directory / "config.json", config)
    plan = planned(config, dtype)
    return write_tensors(directory, plan, tensors, label, config, hashed, beside)
