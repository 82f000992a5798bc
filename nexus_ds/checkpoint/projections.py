"""P of every layer, one at a time: made or read when it is asked for, and then let go.

P takes 7 MB a layer at a hidden size of 1,024 and 28 MB at 2,048: all layers' weights at once would
be most of the memory of putting models together.
Not covered: the module itself (`model.router`), what a file of them looks like (`sidecar`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nexus_ds.checkpoint.arithmetic import Floats

State = dict[str, Floats]
"""Weights of one layer's P, fp32, by the names that `model.router.Projection` has for them."""


class Projections(Sequence[State]):
    """The states of all layers' projections, in order.

    Args:
        layers: how many there are.
        make: returns a layer's state, the same one each time.
    """

    def __init__(self, layers: int, make: Callable[[int], State]) -> None:
        self._layers = layers
        self._make = make
        self._given: dict[int, State] = {}

    def __len__(self) -> int:
        return self._layers

    def __getitem__(self, layer: int) -> State:  # type: ignore[override]
        if not 0 <= layer < self._layers:
            raise IndexError(f"layer {layer} of {self._layers}")
        given = self._given.get(layer)
        return self._make(layer) if given is None else given

    def __setitem__(self, layer: int, state: State) -> None:
        """Keep a state of a layer instead of the one that would be made."""
        self._given[layer] = state

    def __iter__(self) -> Iterator[State]:
        for layer in range(self._layers):
            yield self[layer]
