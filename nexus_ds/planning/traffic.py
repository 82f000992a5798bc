"""Arithmetic, bytes over the links and seconds of an optimizer step.

Collectives are taken as rings: a ring over several nodes crosses each node's link once, so what a
node sends is what one rank sends, times the rings that run side by side.

Units: bytes, seconds, floating-point operations; a machine's links are in bytes a second, its
arithmetic in TFLOPS; `width` is bytes of an element in the working precision; `length` tokens of a
sequence.
Not covered: latency of small collectives, congestion by other jobs, rails (several links a node
count as one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nexus_ds.planning import assumptions as assume
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.linear import linear_flops
from nexus_ds.planning.sizes import Sizes

FLOPS_A_WEIGHT = 6
"""Of a token: a multiplication and an addition in the forward pass, and twice that in the backward
pass, for the gradient of the input and of the weight (Kaplan et al. 2020, section 2.1)."""
TERA = 1e12


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


# These two are asked for again by every layout, and go through all parameters of the model.
@lru_cache(maxsize=256)
def _elements(sizes: Sizes, slots: int) -> tuple[int, int]:
    """Return elements of a rank's parameters: of those that are no experts, and of its experts.

    The rank has `slots` experts in each layer.
    """
    others = 0
    experts = 0
    for parameter in sizes.parameters(slots):
        if parameter.kind == "experts":
            experts += parameter.elements
        else:
            others += parameter.elements
    return others, experts


@lru_cache(maxsize=256)
def token_flops(sizes: Sizes, length: int) -> tuple[float, float]:
    """Return floating-point operations of one token, forward and backward, of all and of experts.

    Six for each active weight that multiplies (an embedding that is no output layer does not), and
    causal attention, or linear. The second number is of the routed experts alone.
    """
    counts = sizes.counts()
    weights = counts["active"] - (0 if sizes.tied else sizes.vocabulary * sizes.hidden)
    # Scores and values, each `length` x width multiply-adds a token; under a causal mask a token
    # sees half of the sequence on average: (2 + 2) / 2 operations forward, three times that in all.
    attention: float = 6 * sizes.attending * sizes.heads * sizes.head_size * length
    if sizes.linear:
        attention += 3 * len(sizes.linear_layers) * linear_flops(sizes.linear)
    routed = 0
    if sizes.experts:
        routed = FLOPS_A_WEIGHT * sizes.layers * sizes.expert * sizes.top_k
    return FLOPS_A_WEIGHT * weights + attention, routed


# Computing ---------------------------------------------------------------------------------------


def _rank_tokens(layout: Layout, length: int) -> int:
    """Return the tokens of one rank in a step."""
    return layout.micro * layout.accumulation * length


def _flops_per_second(machine: Machine) -> float:
    return machine.tflops * TERA * assume.MFU


def _recomputing(layout: Layout) -> float:
    """Return arithmetic with activation checkpointing over that without."""
    return 1.0 if layout.checkpointing == "none" else 1 + assume.RECOMPUTED


def shared_seconds(sizes: Sizes, layout: Layout, machine: Machine, length: int) -> float:
    """Return seconds of a step in the shared experts' matrix products.

    The all-to-alls travel behind them.
    """
    if not sizes.experts:
        return 0.0
    flops = FLOPS_A_WEIGHT * sizes.layers * sizes.expert * _recomputing(layout)
    return _rank_tokens(layout, length) * flops / _flops_per_second(machine)


def exposed_all_to_all(seconds: float, shared: float) -> float:
    """Return what is seen of all-to-alls that take `seconds`.

    Half of them is dispatch, half combine. The shared expert's gate and up projections (two of its
    three matrices) hide the dispatch, the third the combine (`NexusMoE.forward`).
    """
    dispatch = combine = seconds / 2
    return max(0.0, dispatch - 2 * shared / 3) + max(0.0, combine - shared / 3)


def _computing(sizes: Sizes, layout: Layout, machine: Machine, length: int) -> float:
    """Return seconds of a step in which the busiest rank computes."""
    flops, routed = token_flops(sizes, length)
    if layout.expert > 1:
        # all wait for the busiest rank
        flops += (assume.ROUTING_IMBALANCE - 1) * routed
    flops *= _recomputing(layout)
    waiting = layout.accumulation * sizes.layers * assume.LAYER_SECONDS
    return _rank_tokens(layout, length) * flops / _flops_per_second(machine) + waiting


# ZeRO --------------------------------------------------------------------------------------------


def ring_bytes(elements: float, ranks: int, sends: float) -> float:
    """Return bytes that a rank sends when `elements` are reduced or gathered over a ring.

    In each of the ranks - 1 rounds of a ring a rank passes one share of elements / ranks on
    (Thakur, Rabenseifner and Gropp 2005). `sends`: bytes of an element, times how often.
    """
    return sends * elements * (ranks - 1) / ranks


def _sends(layout: Layout) -> int:
    """Return how often a step moves a parameter over its ring.

    An all-reduce counts twice. ZeRO-1 reduces once a step, ZeRO-2 after every pass, both gather the
    new weights; ZeRO-3 gathers for the forward and for the backward pass and reduces, every time.
    """
    if layout.stage == 1:
        return 3
    if layout.stage == 2:
        return 2 * layout.accumulation + 1
    return 3 * layout.accumulation


def zero_traffic(sizes: Sizes, layout: Layout, machine: Machine, width: int) -> tuple[float, float]:
    """Return bytes of ZeRO's collectives in a step: a GPU's inside its node, a node's to others."""
    others, experts = _elements(sizes, layout.slots(sizes))
    sends = width * _sends(layout)
    dense_ring = ring_bytes(others, layout.world, sends)
    expert_ring = ring_bytes(experts, layout.replicas, sends)
    if machine.nodes == 1:
        return dense_ring + expert_ring, 0.0
    inside = 0.0
    if machine.local > 1:
        inside += dense_ring
    # Replicas of an expert are `expert` ranks apart: on one node only if it has more ranks.
    if layout.expert < machine.local:
        inside += expert_ring
    # rings of other experts share the node's link
    side_by_side = min(layout.expert, machine.local)
    return inside, dense_ring + side_by_side * expert_ring


# Tokens ------------------------------------------------------------------------------------------


def token_traffic(
    sizes: Sizes, layout: Layout, machine: Machine, width: int, length: int
) -> tuple[float, float]:
    """Return bytes of the all-to-alls in a step: a GPU's inside its node, a node's to the others.

    Dispatch and combine, forward and backward, and the forward ones again where activations are
    recomputed. Tokens are taken to spread evenly over the ranks.
    """
    if not sizes.experts or layout.expert == 1:
        return 0.0, 0.0
    passes = 4 if layout.checkpointing == "none" else 6
    rows = _rank_tokens(layout, length) * sizes.top_k
    every = passes * sizes.layers * rows * sizes.hidden * width
    # ranks of the group on this node; groups are consecutive ranks
    group = min(layout.expert, machine.local)
    inside = every * (group - 1) / layout.expert
    between = every * (layout.expert - group) / layout.expert
    return inside, machine.local * between


# A step ------------------------------------------------------------------------------------------


def _seconds(traffic: tuple[float, float], machine: Machine) -> float:
    inside, between = traffic
    return (inside / machine.gpu_link + between / machine.link) / assume.LINK_EFFICIENCY


def _optimizer(sizes: Sizes, layout: Layout, machine: Machine, width: int) -> dict[str, float]:
    """Return seconds of the update, and of what offload moves between GPU and main memory."""
    others, experts = _elements(sizes, layout.slots(sizes))
    share = others / layout.world + experts / layout.replicas
    if layout.offload == "none":
        return {"optimizer": share / assume.GPU_ADAM_PER_SECOND}
    # gradients down after every pass, weights up once
    moved = width * share * (layout.accumulation + 1)
    if layout.offload == "optimizer+parameters":
        # weights up for both passes
        moved += 2 * width * share * layout.accumulation
    # a node's ranks share its CPUs, but each has a link of its own to main memory
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
    # ZeRO-1 communicates in the last pass of a step only, so only that one hides anything
    passes = layout.accumulation if layout.stage == 1 else 1
    hidden = assume.OVERLAP * computing / passes
    # a link carries one thing at a time
    hidden = max(0.0, hidden - (sent - seen))
    seconds = {
        "computing": computing,
        "all_to_all": seen,
        "exposed": max(0.0, _seconds(zero, machine) - hidden),
        **_optimizer(sizes, layout, machine, width),
    }
    return Step(
        seconds,
        gpu_link_bytes=zero[0] + tokens[0],
        node_link_bytes=zero[1] + tokens[1],
        tokens=layout.world * _rank_tokens(layout, length),
    )
