"""Expert parallelism or ZeRO alone: which is faster on a link, and at which speed of the link the
choice changes.

Not covered: links of different speeds, latency.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nexus_ds.planning import traffic
from nexus_ds.planning.choose import WIDTH, judged
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.sizes import Sizes
from nexus_ds.settings import Config

SPEEDS = [10 ** (exponent / 8) / 8 for exponent in range(7 * 8, 13 * 8 + 1)]
"""10 Mb to 10 Tb a second, in bytes a second."""
SHARP = 1.01
"""Ratio of speeds between which a change is located."""
WAYS = {"expert_parallel": True, "zero_only": False}


def at_speed(machine: Machine, speed: float) -> Machine:
    """Return the machine with another link: between its nodes, or between its GPUs where there is
    one node."""
    return replace(machine, link=speed) if machine.nodes > 1 else replace(machine, gpu_link=speed)


class LinkAdvice:
    """Compares the fastest layout that fits with expert parallelism and the fastest without,
    however the batch is cut.

    Args:
        sizes: of the model.
        machine: GPUs and links.
        config: the run's configuration.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """

    def __init__(self, sizes: Sizes, machine: Machine, config: Config) -> None:
        fitting = [c.layout for ways in judged(sizes, machine, config) for c in ways if c.fits]
        self.layouts = {
            way: [x for x in fitting if (x.expert > 1) == parallel]
            for way, parallel in WAYS.items()
        }
        self.sizes, self.machine = sizes, machine
        self.width, self.length = WIDTH[config.model.dtype], config.data.sequence_length

    def fastest(self, way: str, speed: float) -> tuple[float, Layout]:
        """Return seconds of a step and the fastest layout of a way on a link of `speed` bytes a
        second."""
        machine = at_speed(self.machine, speed)
        timed = [
            (
                traffic.step(self.sizes, layout, machine, self.width, self.length).step_seconds,
                layout,
            )
            for layout in self.layouts[way]
        ]
        return min(timed, key=lambda pair: pair[0])

    def better(self, speed: float) -> str:
        """Return the faster way on a link of `speed`."""
        return min(WAYS, key=lambda way: self.fastest(way, speed)[0])

    def flips(self) -> list[dict[str, Any]]:
        """Return the speeds at which the choice changes, and what is faster on faster links."""
        choices, found = [self.better(speed) for speed in SPEEDS], []
        for index in range(len(SPEEDS) - 1):
            if choices[index] != choices[index + 1]:
                below, above = SPEEDS[index : index + 2]
                while above / below > SHARP:
                    middle = math.sqrt(below * above)
                    below, above = (
                        (middle, above)
                        if self.better(middle) == choices[index]
                        else (below, middle)
                    )
                found.append({"link": below, "on_faster_links": choices[index + 1]})
        return found

    def to_json(self) -> dict[str, Any] | None:
        """Return the advice; None where one of the two ways does not fit."""
        if not all(self.layouts.values()):
            return None
        several = self.machine.nodes > 1
        link = self.machine.link if several else self.machine.gpu_link
        timed = {way: self.fastest(way, link) for way in WAYS}
        return {
            "link": link,
            "between": "nodes" if several else "GPUs",
            **{
                way: {"name": layout.name, "step_seconds": seconds}
                for way, (seconds, layout) in timed.items()
            },
            "use": self.better(link),
            "flips": self.flips(),
        }
