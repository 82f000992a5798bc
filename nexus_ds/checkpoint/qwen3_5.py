"""Qwen3.5 written as Qwen3-Next: rows of a few matrices in another order, no bit another; no torch.

    in_proj_qkv,  one in_proj_qkvz: for each key head its rows of q, of k, of v and of z
    in_proj_z
    in_proj_b,    one in_proj_ba: for each key head its rows of b and of a
    in_proj_a
    lm_head       a copy of tied embeddings: some serving programs never tie a Qwen3-Next

Qwen3.5's own mixture (qwen3_5_moe) is of no use: it renormalises the gates, always.
Not covered: what sees, and the layers that predict further tokens (`Family.ignored`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.delta_net import DeltaNet
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD, LINEAR, DenseSettings
from nexus_ds.checkpoint.headers import Headers, Plan, TensorInfo, tensor_bytes


class Run(NamedTuple):
    """Rows of a tensor that stand behind each other in the file, too."""

    start: int
    """The first one's number in the tensor."""
    rows: int
    name: str
    """Of the tensor in the file."""
    place: int
    """The first one's number there."""


Runs = Mapping[str, Sequence[Run]]
"""By the names of Qwen3.5, in the order of their rows."""


class _Part(NamedTuple):
    """What one tensor gives to one of the file's."""

    name: str
    start: int
    rows: int
    """Of each key head."""


def _interleaved(whole: str, parts: Sequence[_Part], heads: int) -> Iterator[tuple[str, Run]]:
    """Yield the rows of `whole`: for each head those of all parts."""
    place = 0
    for head in range(heads):
        for name, start, rows in parts:
            yield name, Run(start + head * rows, rows, whole, place)
            place += rows


def _of_layer(prefix: str, net: DeltaNet) -> Iterator[tuple[str, Run]]:
    qkv, z = f"{prefix}in_proj_qkv.weight", f"{prefix}in_proj_z.weight"
    b, a = f"{prefix}in_proj_b.weight", f"{prefix}in_proj_a.weight"
    # value heads of one key head stand together
    group = net.value_heads // net.key_heads
    values = group * net.value_dim
    projections = (
        _Part(qkv, 0, net.key_dim),
        _Part(qkv, net.keys, net.key_dim),
        _Part(qkv, 2 * net.keys, values),
        _Part(z, 0, values),
    )
    yield from _interleaved(f"{prefix}in_proj_qkvz.weight", projections, net.key_heads)
    scalars = _Part(b, 0, group), _Part(a, 0, group)
    yield from _interleaved(f"{prefix}in_proj_ba.weight", scalars, net.key_heads)


def runs_of(sizes: DenseSettings) -> Runs:
    """Return where the rows of each tensor stand that is no tensor of the file."""
    found: dict[str, list[Run]] = {}
    for layer, kind in enumerate(sizes.layer_types):
        if kind != LINEAR:
            continue
        prefix = f"model.layers.{layer}.linear_attn."
        for name, run in _of_layer(prefix, DeltaNet.of(sizes.linear)):
            found.setdefault(name, []).append(run)
    return {name: sorted(runs) for name, runs in found.items()}


def heights(runs: Runs) -> dict[str, int]:
    """Return the rows of each tensor of the file that is put together of others'."""
    found: dict[str, int] = {}
    for run in (run for own in runs.values() for run in own):
        found[run.name] = found.get(run.name, 0) + run.rows
    return found


def in_qwen3_next(plan: Plan, config: ConfigJson) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the files of a Qwen3-Next hold of tensors with the names of Qwen3.5.

    Args:
        plan: dtype and shape of each.
        config: config.json of the mixture.
    """
    runs = runs_of(settings(config))
    whole = heights(runs)
    found = {}
    for name, (dtype, shape) in plan.items():
        if name not in runs:
            found[name] = dtype, tuple(shape)
            continue
        for run in runs[name]:
            found[run.name] = dtype, (whole[run.name], *shape[1:])
    found.setdefault(HEAD, found[EMBEDDING])
    return found


class Reordered(Headers):
    """The tensors of a Qwen3.5, and of experts for it, out of a Qwen3-Next."""

    def __init__(self, raw: Headers, config: ConfigJson) -> None:
        """Read what a Qwen3-Next's files have; `config` is their config.json."""
        self.raw = raw
        self.directory = raw.directory
        sizes = settings(config)
        self.tied = sizes.tied_embeddings
        self.runs = runs_of(sizes)
        self.heights = heights(self.runs)

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted; a tied head is none."""
        whole = {*self.heights, HEAD} if self.tied else {*self.heights}
        plain = [name for name in self.raw.names() if name not in whole]
        return sorted([*plain, *(name for name in self.runs if name in self)])

    def __contains__(self, name: object) -> bool:
        if name in self.runs:
            return self.runs[str(name)][0].name in self.raw
        return name in self.raw and name not in self.heights and not (self.tied and name == HEAD)

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; of one that lies nowhere as it is, from -1 to -1."""
        if name not in self.runs:
            return self.raw.info(name)
        runs = self.runs[name]
        found = self.raw.info(runs[0].name)
        # a file of another height is told by the shape
        odd = found.shape[0] - self.heights[runs[0].name]
        rows = sum(run.rows for run in runs) + odd
        return found._replace(shape=(rows, *found.shape[1:]), start=-1, end=-1)

    def files(self) -> list[Path]:
        """Return the files that the tensors come from."""
        return self.raw.files()

    def read_range(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` (bytes) with a tensor's bytes from its byte `start` on, as Qwen3.5 has
        them."""
        if name not in self.runs:
            self.raw.read_range(name, start, view)
            return
        info = self.info(name)
        width = tensor_bytes(info.dtype, info.shape[1:])
        end = start + len(view)
        for run in self.runs[name]:
            first = run.start * width
            # a range may begin and end within a run, and within a row
            low, high = max(start, first), min(end, first + run.rows * width)
            if low < high:
                place = run.place * width + low - first
                self.raw.read_range(run.name, place, view[low - start : high - start])
