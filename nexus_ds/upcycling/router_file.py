"""The router's file of a new mixture, written while the model's files are (`writing`).

A layer's P is made once, by one thread: its numbers go into this file, and what it gives of the
domain embeddings into the model's. It is let go before the next layer's is made: one layer's P is
in memory, whatever the model's size.
Not covered: nexus.json, linear routers (`checkpoint.sidecar`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.expert_rows import shapes_of
from nexus_ds.checkpoint.new_files import WHOLE, Frontier, NewFiles, Target
from nexus_ds.checkpoint.records import ROUTER
from nexus_ds.checkpoint.sidecar import Sidecar, check_parts, checked_layer, router_plan
from nexus_ds.checkpoint.values import encoded
from nexus_ds.upcycling.sources import Rows


class RouterFile:
    """The router's file of a mixture whose router has a P, being written.

    Args:
        directory: of the checkpoint, not yet renamed.
        sidecar: its own.
        hidden_size: of the model.
        frontier: of the model's files.

    Raises:
        CheckpointError: a sidecar whose parts contradict each other, no space.
    """

    def __init__(
        self, directory: Path, sidecar: Sidecar, hidden_size: int, frontier: Frontier
    ) -> None:
        check_parts(sidecar, directory)
        self._sidecar, self._directory = sidecar, directory
        self._form = shapes_of(sidecar.router, sidecar.vectors.shape[1], hidden_size)
        path = directory / ROUTER
        path.parent.mkdir(exist_ok=True)
        plan = router_plan(sidecar, self._form)
        self.files = NewFiles(path.parent, plan, WHOLE, single=path.name, frontier=frontier)

    def job(self, rows: Mapping[int, tuple[Rows, Target]]) -> assembly.Job:
        """Return the making of all that the file has.

        Args:
            rows: for layers whose rows are P(D) where these go in the model's files.
        """
        named = {"vectors": self._sidecar.vectors, "centre": self._sidecar.centre}
        pieces: list[assembly.Piece] = []
        for name, values in named.items():
            pieces.append(assembly.Fill(self.files.place(name), partial(_bytes_of, values)))
        for layer in range(len(self._sidecar.projections)):
            names = [f"layers.{layer}.{own}" for own in self._form]
            places: list[Target] = [self.files.place(name) for name in names]
            own_rows, place = rows.get(layer, (None, None))
            if place:
                places.append(place)
            pieces.append(assembly.Series(places, partial(self._layer, layer, own_rows)))
        return assembly.Job(pieces)

    def _layer(self, layer: int, rows: Rows | None) -> Iterator[memoryview]:
        """Make one layer's P; yield its weights' bytes, and those of the rows that it gives."""
        state = self._sidecar.projections[layer]
        for _, values in checked_layer(self._sidecar, layer, state, self._directory):
            yield encoded(values, "F32").data
        if rows:
            yield encoded(rows.of(state), rows.dtype).data

    def __enter__(self) -> Self:
        self.files.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # an error before the end is the one that is told; without any, all of the job was done
        for name in self.files.plan:
            self.files.wrote(name)
        self.files.__exit__(kind, error, trace)


def _bytes_of(values: Floats) -> memoryview:
    return encoded(values, "F32").data
