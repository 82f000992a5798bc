"""Expert parallelism or ZeRO alone: which is faster on a link, and where the choice changes.

Not covered: links of different speeds, latency.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise

from nexus_ds.planning import traffic
from nexus_ds.planning.choose import WIDTH, judged
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.sizes import Sizes
from nexus_ds.settings import Config

STEPS_A_DECADE = 8
SPEEDS = [
    10 ** (step / STEPS_A_DECADE) / 8 for step in range(7 * STEPS_A_DECADE, 13 * STEPS_A_DECADE + 1)
]
"""10 Mb to 10 Tb (10^7 to 10^13 bits) a second, in bytes a second."""
SHARP = 1.01
"""Ratio of speeds between which a change is located."""
WAYS = {"expert_parallel": True, "zero_only": False}
"""Name of a way, and whether tokens travel to experts on other ranks."""


@dataclass(frozen=True)
class Flip:
    """A speed at which the choice changes."""

    link: float
    """Bytes a second."""
    on_faster_links: str
    """The way that is faster above it."""


def at_speed(machine: Machine, speed: float) -> Machine:
    """Return the machine with another link between its nodes, or its GPUs if it is one node."""
    return replace(machine, link=speed) if machine.nodes > 1 else replace(machine, gpu_link=speed)


class LinkAdvice:
    """Compares the fastest layout that fits with expert parallelism and the fastest without.

    However the batch is cut: many small micro-batches make ZeRO's traffic dear, not the tokens'.

    Args:
        sizes: of the model.
        machine: GPUs and links.
        config: the run's configuration.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """

    def __init__(self, sizes: Sizes, machine: Machine, config: Config) -> None:
        self.sizes = sizes
        self.machine = machine
        self.width = WIDTH[config.model.dtype]
        self.length = config.data.sequence_length
        self.layouts: dict[str, list[Layout]] = {way: [] for way in WAYS}
        for candidate in chain.from_iterable(judged(sizes, machine, config)):
            if candidate.fits:
                parallel = candidate.layout.expert > 1
                self.layouts["expert_parallel" if parallel else "zero_only"].append(
                    candidate.layout
                )

    def _seconds(self, layout: Layout, machine: Machine) -> float:
        """Return seconds of a step."""
        return traffic.step(self.sizes, layout, machine, self.width, self.length).step_seconds

    def fastest(self, way: str, speed: float) -> tuple[float, Layout]:
        """Return a way's fastest layout on a link of `speed` bytes a second, its seconds first."""
        machine = at_speed(self.machine, speed)
        timed = [(self._seconds(layout, machine), layout) for layout in self.layouts[way]]
        return min(timed, key=lambda pair: pair[0])

    def better(self, speed: float) -> str:
        """Return the faster way on a link of `speed`."""
        return min(WAYS, key=lambda way: self.fastest(way, speed)[0])

    def flips(self) -> list[Flip]:
        """Return the speeds at which the choice changes, ascending.

        There can be several: as a link gets faster, another layout can become the fastest of its
        way. Two within one step of SPEEDS are not seen.
        """
        choices = [self.better(speed) for speed in SPEEDS]
        found = []
        for (slow, choice), (fast, other) in pairwise(zip(SPEEDS, choices, strict=True)):
            if choice != other:
                found.append(Flip(self._located(slow, fast), other))
        return found

    def _located(self, below: float, above: float) -> float:
        """Return where the choice changes between two speeds, by bisection of their logarithms."""
        choice = self.better(below)
        while above / below > SHARP:
            middle = math.sqrt(below * above)
            if self.better(middle) == choice:
                below = middle
            else:
                above = middle
        return below

    def to_json(self) -> dict[str, object] | None:
        """Return the advice; None where one of the two ways does not fit."""
        if not all(self.layouts.values()):
            return None
        several = self.machine.nodes > 1
        link = self.machine.link if several else self.machine.gpu_link
        timed = {}
        for way in WAYS:
            seconds, layout = self.fastest(way, link)
            timed[way] = {"name": layout.name, "step_seconds": seconds}
        return {
            "link": link,
            "between": "nodes" if several else "GPUs",
            **timed,
            "use": self.better(link),
            "flips": [asdict(flip) for flip in self.flips()],
        }
