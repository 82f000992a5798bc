"""Every layout of a run with its memory and its time, the best first.

Not covered: mixing GPUs of different kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nexus_ds.planning import memory as space
from nexus_ds.planning import traffic
from nexus_ds.planning.layout import Layout, Machine, layouts
from nexus_ds.planning.sizes import Sizes
from nexus_ds.settings import Config

WIDTH = {"fp32": 4, "bf16": 2}
"""Bytes of an element in the working precision (`model.dtype`)."""
SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs and how fast it is."""

    layout: Layout
    memory: space.Memory
    step: traffic.Step
    fits: bool

    def to_json(self, tokens: int) -> dict[str, object]:
        """Return what `plan --json` says of a layout; `tokens` are those of the whole run."""
        return {
            "name": self.layout.name,
            "zero_stage": self.layout.stage,
            "offload": self.layout.offload,
            "expert_parallel": self.layout.expert,
            "micro_batch_size": self.layout.micro,
            "gradient_accumulation_steps": self.layout.accumulation,
            "activation_checkpointing": self.layout.checkpointing,
            "fits": self.fits,
            "gpu_bytes": round(self.memory.gpu_bytes),
            "host_bytes": round(self.memory.host_bytes),
            "gpu": {name: round(value) for name, value in self.memory.gpu.items()},
            "host": {name: round(value) for name, value in self.memory.host.items()},
            "gpu_link_bytes_per_step": round(self.step.gpu_link_bytes),
            "node_link_bytes_per_step": round(self.step.node_link_bytes),
            "seconds": self.step.seconds,
            "step_seconds": self.step.step_seconds,
            "tokens_per_second": self.step.tokens_per_second,
            "days": tokens / self.step.tokens_per_second / SECONDS_A_DAY,
        }


def judge(sizes: Sizes, layout: Layout, machine: Machine, config: Config) -> Candidate:
    """Return one layout with its memory and time."""
    width = WIDTH[config.model.dtype]
    length = config.data.sequence_length
    needs = space.memory(sizes, layout, width, length, machine.local)
    # 0: nobody said how much a node has
    host_memory = machine.host_memory or math.inf
    fits = needs.gpu_bytes <= machine.gpu_memory and needs.host_bytes <= host_memory
    step = traffic.step(sizes, layout, machine, width, length)
    return Candidate(layout, needs, step, fits)


def judged(sizes: Sizes, machine: Machine, config: Config) -> list[list[Candidate]]:
    """Return, for each layout, all ways to cut the batch.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """
    return [
        [judge(sizes, layout, machine, config) for layout in cuts]
        for cuts in layouts(sizes, config.training, machine.gpus)
    ]


def candidates(sizes: Sizes, machine: Machine, config: Config) -> list[Candidate]:
    """Return the best cut of the batch for each layout.

    That is the fastest that fits, else the one that needs least memory. Those that fit come first,
    the fastest of them first.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """
    return sorted((min(cuts, key=order) for cuts in judged(sizes, machine, config)), key=order)


def order(candidate: Candidate) -> tuple[bool, float]:
    """Return what puts the better candidate first."""
    if candidate.fits:
        return False, candidate.step.step_seconds
    # How fast it would be is of no use; the nearest to fitting says what is missing.
    return True, candidate.memory.gpu_bytes


def one_more_expert(sizes: Sizes, machine: Machine, config: Config, now: Candidate) -> Candidate:
    """Return the same layout with one routed expert more."""
    larger = replace(sizes, experts=sizes.experts + 1)
    return judge(larger, now.layout, machine, config)
