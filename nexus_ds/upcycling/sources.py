"""Where a tensor of a new model comes from.

Shapes: n routed experts, h hidden size.
Not covered: how it is written (`blend`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.projections import State
from nexus_ds.checkpoint.sidecar import Sidecar, rows_of


@dataclass(frozen=True)
class Part:
    """One summand of a tensor: `weight` times the tensor `name` of a model."""

    who: str
    """Names the model in messages."""
    reader: Headers
    name: str
    weight: float = 1.0
    zeros: bool = False
    """Whether only zeros are right: the shared expert of a mixture without one."""


@dataclass(frozen=True)
class Blend:
    """sum(weight * tensor) / divisor * scale over the parts, in fp32.

    A lone part of weight 1 is copied as it is, or cast; where `scale` is a power of two, scaling it
    loses no bit.
    """

    parts: Sequence[Part]
    divisor: float = 1.0
    scale: float = 1.0
    rule: assembly.Rule | None = None
    """Another way to merge the parts, instead of the sum; see `checkpoint.assembly`."""


@dataclass(frozen=True)
class Stack:
    """Rows of one tensor from several blends, below each other."""

    pieces: tuple[tuple[int, int, Blend], ...]
    """(start, stop, blend): rows [start, stop) come from the blend's rows of these numbers."""


@dataclass(frozen=True)
class Computed:
    """Numbers that are computed as they are written, by whichever thread writes them."""

    make: Callable[[], Floats]


@dataclass(frozen=True)
class Rows:
    """P(D) of one layer: computed where its P is made anyway, for the router's file."""

    sidecar: Sidecar
    layer: int
    dtype: str
    """Of the mixture, as safetensors names it."""

    def of(self, state: State) -> Floats:
        """Return the rows [n, h] that a P gives."""
        return rows_of(self.sidecar, self.layer, self.dtype, state)

    def make(self) -> Floats:
        """Return the rows of a P that is made for them alone."""
        return rows_of(self.sidecar, self.layer, self.dtype)


Source = Blend | Stack | Computed | Rows | Floats | float
"""Where a tensor of the output comes from: stored ones, numbers, or one number for all."""


def mean_of(parts: Sequence[Part]) -> Blend:
    """Return the arithmetic mean of tensors (paper section 2.1)."""
    return Blend(parts, divisor=float(len(parts)))


def source_of(part: Part, rows: tuple[int, int] | None = None) -> assembly.Source:
    """Return a summand as the engine reads it, whole or some of its rows."""
    # A bias of zeros is how Qwen2 starts; a weight of zeros was never trained or never written.
    zeros = part.zeros or not part.name.endswith(".weight")
    label = f"{part.who} ({part.reader.directory}): tensor {part.name}"
    whole = assembly.stored(part.reader, part.name, label, zeros)
    if rows is None:
        return whole
    row = whole.size // part.reader.info(part.name).shape[0]
    return whole.part(rows[0] * row, rows[1] * row)
