"""Arithmetic, bytes over the links and seconds of an optimizer step.

Collectives are taken as rings: a ring over several nodes crosses each node's link once, so what a
node sends is what one rank sends, times the rings that run side by side.
Not covered: latency of small collectives, congestion by other jobs, rails (several links a node
count as one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nexus_ds.planning import assumptions as assume
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.sizes import Sizes


@dataclass(frozen=True)
class Step:
    """One optimizer step: seconds by cause, bytes by link, and its tokens over all ranks."""

    seconds: dict[str, float]
    """What adds up to the step: computing; all_to_all and exposed (of tokens, and of ZeRO: what
    nothing hides); optimizer; offload."""
    gpu_link_bytes: float
    """Sent by one GPU inside its node."""
    node_link_bytes: float
    """Sent by one node to the others."""
    tokens: int

    @property
    def step_seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all ranks."""
        return self.tokens / self.step_seconds


@lru_cache(maxsize=256)
def _elements(sizes: Sizes, slots: int) -> tuple[int, int]:
    """Return elements of a rank's parameters that are no experts, and of its `slots` experts of all
    layers."""
    by_kind = [(p.kind == "experts", p.elements) for p in sizes.parameters(slots)]
    experts = sum(elements for expert, elements in by_kind if expert)
    return sum(elements for _, elements in by_kind) - experts, experts


@lru_cache(maxsize=256)
def token_flops(sizes: Sizes, length: int) -> tuple[float, float]:
    """Return floating-point operations of one token, forward and backward: of everything, and of
    its routed experts.

    Six for each active weight that multiplies (an embedding that is no output layer does not), and
    causal attention.
    """
    counts = sizes.counts()
    weights = counts["active"] - (0 if sizes.tied else sizes.vocabulary * sizes.hidden)
    attention = 6 * sizes.layers * sizes.heads * sizes.head_size * length
    routed = 6 * sizes.layers * sizes.expert * sizes.top_k if sizes.experts else 0
    return 6 * weights + attention, routed


def shared_seconds(sizes: Sizes, layout: Layout, machine: Machine, length: int) -> float:
    """Return seconds of a step in the shared experts' matrix products, behind which the all-to-alls
    travel."""
    if not sizes.experts:
        return 0.0
    flops = (
        6
        * sizes.layers
        * sizes.expert
        * (1 if layout.checkpointing == "none" else 1 + assume.RECOMPUTED)
    )
    return (
        layout.micro * layout.accumulation * length * flops / (machine.tflops * 1e12 * assume.MFU)
    )


def exposed_all_to_all(seconds: float, shared: float) -> float:
    """Return what is seen of all-to-alls that take `seconds`, half of them dispatch and half of
    them combine.

    The shared expert's gate and up projections (two of its three matrices) hide the dispatch, the
    third the combine (`NexusMoE.forward`).
    """
    return max(0.0, seconds / 2 - 2 * shared / 3) + max(0.0, seconds / 2 - shared / 3)


def _computing(sizes: Sizes, layout: Layout, machine: Machine, length: int) -> float:
    flops, routed = token_flops(sizes, length)
    if layout.expert > 1:
        flops += (assume.ROUTING_IMBALANCE - 1) * routed  # all wait for the busiest rank
    if layout.checkpointing != "none":
        flops *= 1 + assume.RECOMPUTED
    tokens = layout.micro * layout.accumulation * length
    waiting = layout.accumulation * sizes.layers * assume.LAYER_SECONDS
    return tokens * flops / (machine.tflops * 1e12 * assume.MFU) + waiting


def ring_bytes(elements: float, ranks: int, sends: float) -> float:
    """Return elements that a rank sends when `elements` are reduced or gathered `sends` times over
    a ring."""
    return sends * elements * (ranks - 1) / ranks


def _sends(layout: Layout) -> float:
    """Return how often a step moves a parameter over its ring.

    An all-reduce counts twice. ZeRO-1 reduces once a step, ZeRO-2 after every pass, both gather the
    new weights; ZeRO-3 gathers for the forward and for the backward pass and reduces, every time.
    """
    if layout.stage == 1:
        return 3
    return 2 * layout.accumulation + 1 if layout.stage == 2 else 3 * layout.accumulation


def zero_traffic(sizes: Sizes, layout: Layout, machine: Machine, width: int) -> tuple[float, float]:
    """Return bytes of ZeRO's collectives in a step: a GPU's inside its node, and a node's to the
    others."""
    (others, experts), sends = _elements(sizes, layout.slots(sizes)), width * _sends(layout)
    dense_ring = ring_bytes(others, layout.world, sends)
    expert_ring = ring_bytes(experts, layout.replicas, sends)
    if machine.nodes == 1:
        return dense_ring + expert_ring, 0.0
    side_by_side = min(layout.expert, machine.local)  # rings of other experts share the node's link
    inside = (dense_ring if machine.local > 1 else 0.0) + (
        expert_ring if layout.expert < machine.local else 0.0
    )
    return inside, dense_ring + side_by_side * expert_ring


def token_traffic(
    sizes: Sizes, layout: Layout, machine: Machine, width: int, length: int
) -> tuple[float, float]:
    """Return bytes of the all-to-alls in a step: a GPU's inside its node, and a node's to the
    others.

    Dispatch and combine, forward and backward, and the forward ones again where activations are
    recomputed.
    """
    if not sizes.experts or layout.expert == 1:
        return 0.0, 0.0
    passes = 4 if layout.checkpointing == "none" else 6
    tokens = layout.micro * layout.accumulation * length * sizes.top_k
    every = passes * sizes.layers * tokens * sizes.hidden * width
    # ranks of the group on this node; groups are consecutive ranks
    group = min(layout.expert, machine.local)
    return every * (group - 1) / layout.expert, machine.local * every * (
        layout.expert - group
    ) / layout.expert


def _seconds(traffic: tuple[float, float], machine: Machine) -> float:
    inside, between = traffic
    return (inside / machine.gpu_link + between / machine.link) / assume.LINK_EFFICIENCY


def _optimizer(sizes: Sizes, layout: Layout, machine: Machine, width: int) -> dict[str, float]:
    others, experts = _elements(sizes, layout.slots(sizes))
    share = others / layout.world + experts / layout.replicas
    if layout.offload == "none":
        return {"optimizer": share / assume.GPU_ADAM_PER_SECOND}
    # gradients down after every pass, weights up once
    moved = width * share * (layout.accumulation + 1)
    if layout.offload == "optimizer+parameters":
        moved += 2 * width * share * layout.accumulation  # weights up for both passes
    return {
        "optimizer": machine.local * share / assume.CPU_ADAM_PER_SECOND,
        "offload": moved / (machine.gpu_link * assume.LINK_EFFICIENCY),
    }


def step(sizes: Sizes, layout: Layout, machine: Machine, width: int, length: int) -> Step:
    """Return what an optimizer step of a layout takes (an estimate).

    Args:
        sizes: of the model.
        layout: how it is spread.
        machine: GPUs and links.
        width: bytes of an element in the working precision.
        length: tokens of a sequence.
    """
    zero = zero_traffic(sizes, layout, machine, width)
    tokens = token_traffic(sizes, layout, machine, width, length)
    computing = _computing(sizes, layout, machine, length)
    sent = _seconds(tokens, machine)
    seen = exposed_all_to_all(sent, shared_seconds(sizes, layout, machine, length))
    hidden = assume.OVERLAP * computing / (layout.accumulation if layout.stage == 1 else 1)
    hidden = max(0.0, hidden - (sent - seen))  # a link carries one thing at a time
    seconds = {
        "computing": computing,
        "all_to_all": seen,
        "exposed": max(0.0, _seconds(zero, machine) - hidden),
        **_optimizer(sizes, layout, machine, width),
    }
    done = layout.world * layout.micro * layout.accumulation * length
    return Step(seconds, zero[0] + tokens[0], zero[1] + tokens[1], done)
