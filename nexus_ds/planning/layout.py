"""A machine, the layouts that it allows, and the DeepSpeed JSON of each.

Not covered: ZeRO stage 0 (refused by `train`), offload to NVMe, ranks that share a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from nexus_ds.errors import LayoutError
from nexus_ds.planning import assumptions
from nexus_ds.planning.sizes import Sizes
from nexus_ds.settings import ParallelConfig, TrainingConfig

OFFLOADS = ("none", "optimizer", "optimizer+parameters")
LARGEST_MICRO = 64
"""Sequences of the largest micro-batch that is tried: matrix products are large enough long before,
and fewer layouts have to be judged."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs and what connects them. Bytes, bytes a second, TFLOPS in dense bf16."""

    gpus: int
    """Of all nodes together."""
    gpu_memory: float
    nodes: int = 1
    host_memory: float = 0.0
    """Of a node; 0: not known, and every layout's need passes."""
    link: float = assumptions.DEFAULT_LINK
    """Of a node to the others."""
    gpu_link: float = assumptions.DEFAULT_GPU_LINK
    """Of a GPU to the others of its node and to main memory."""
    tflops: float = assumptions.DEFAULT_TFLOPS

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise LayoutError(
                f"{self.gpus} GPUs don't spread evenly over {self.nodes} nodes; "
                "--gpus counts those of all nodes together"
            )

    @property
    def local(self) -> int:
        """GPUs of a node."""
        return self.gpus // self.nodes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over GPUs and how a batch is cut."""

    stage: int
    offload: str
    expert: int
    """Expert-parallel size."""
    world: int
    micro: int
    """Sequences a rank and forward pass."""
    accumulation: int
    """Forward passes a step."""
    checkpointing: str
    gradient_dtype: str = "model"
    """What gradients are summed in: model | fp32."""

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.expert

    @property
    def name(self) -> str:
        """What tells it from other layouts, without the cut of the batch."""
        offload = "" if self.offload == "none" else f", {self.offload} on CPU"
        return f"ZeRO-{self.stage}, expert parallel {self.expert}{offload}"

    @property
    def overrides(self) -> list[str]:
        """Settings that go with it."""
        return [
            f"parallel.expert={self.expert}",
            f"training.micro_batch_size={self.micro}",
            f"training.activation_checkpointing={self.checkpointing}",
        ]

    def slots(self, sizes: Sizes) -> int:
        """Return the slots for routed experts on one rank; vacant ones take memory too."""
        return math.ceil(sizes.experts / self.expert)


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def expert_parallel(parallel: ParallelConfig, experts: int, local: int) -> int:
    """Return parallel.expert, or for 0 the largest useful size inside a node of `local` ranks.

    Rows for experts travel at every layer: between nodes only where somebody asks for it. Groups
    are of ranks in a row, so that those of a size that does not divide a node would span two.
    """
    return parallel.expert or max(n for n in divisors(local) if n <= max(experts, 1))


def share_of(training: TrainingConfig, world: int) -> int:
    """Return a rank's sequences of a step; LayoutError where the batch does not come out even."""
    share, rest = divmod(training.batch_size, world)
    if rest or not share:
        near = max(1, round(training.batch_size / world)) * world
        raise LayoutError(
            f"training.batch_size {training.batch_size} does not divide over {world} GPUs; "
            f"use a multiple of {world}, for example training.batch_size={near}"
        )
    micro = training.micro_batch_size
    if micro and share % micro:
        raise LayoutError(
            f"a rank's {share} sequences a step are not a multiple of "
            f"training.micro_batch_size {micro}; change one of them"
        )
    return share


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What of a layout is there before a batch is cut; names as in `Layout`."""

    stage: int
    offload: str
    expert: int


def cuts(training: TrainingConfig, world: int, spread: Spread) -> list[Layout]:
    """Return all ways to cut a batch.

    A micro-batch or a kind of checkpointing that the configuration sets is kept.

    Raises:
        LayoutError: the batch does not come out even.
    """
    share = share_of(training, world)
    if training.micro_batch_size:
        micros = [training.micro_batch_size]
    else:
        micros = [n for n in divisors(share) if n <= LARGEST_MICRO]
    chosen = training.activation_checkpointing
    kinds = ("none", "non_reentrant") if chosen == "auto" else (chosen,)
    return [
        Layout(
            **vars(spread),
            world=world,
            micro=micro,
            accumulation=share // micro,
            checkpointing=kind,
            gradient_dtype=training.gradient_dtype,
        )
        for micro, kind in product(micros, kinds)
    ]


def spreads(gradient_dtype: str) -> Iterator[tuple[int, str]]:
    """Yield each ZeRO stage with each offload that it has, given what gradients are summed in."""
    for stage in (1, 2, 3):
        # DeepSpeed takes offload_param under ZeRO-3 only
        offloads: tuple[str, ...] = OFFLOADS if stage == 3 else OFFLOADS[:2]
        if gradient_dtype == "fp32":
            # what `train` takes (runtime/engine.py)
            offloads = () if stage == 1 else OFFLOADS[:1]
        yield from product([stage], offloads)


def layouts(sizes: Sizes, training: TrainingConfig, world: int) -> Iterator[list[Layout]]:
    """Yield, for each ZeRO stage, offload and expert-parallel size, its ways to cut the batch.

    Raises:
        LayoutError: the batch does not come out even.
    """
    # a dense model has one way to place experts, and so has one GPU
    parallel = [n for n in divisors(world) if n <= max(sizes.experts, 1)]
    for (stage, offload), expert in product(spreads(training.gradient_dtype), parallel):
        yield cuts(training, world, Spread(stage=stage, offload=offload, expert=expert))


def leaf_elements() -> int:
    """Return the elements of the largest decoder layer that ZeRO-3 gathers at once.

    One hook a layer costs the host less than one for each of its modules (docs/performance.md), and
    that many elements may be gathered ahead anyway.
    """
    return 2 * assumptions.PREFETCH_ELEMENTS


def largest_gathered(sizes: Sizes, layout: Layout) -> int:
    """Return elements of the most that ZeRO-3 makes whole at once: a small layer, or a module."""
    layers: dict[int, int] = {}
    for p in sizes.parameters(layout.slots(sizes)):
        if p.layer >= 0:
            layers[p.layer] = layers.get(p.layer, 0) + p.elements
    # with linear attention in some, they are not all alike
    layer = max(layers.values())
    module = largest_module(sizes, layout)
    return max(module, layer) if layer <= leaf_elements() else module


def largest_module(sizes: Sizes, layout: Layout) -> int:
    """Return elements of the largest module that ZeRO-3 gathers or reduces by itself.

    A module is gathered with all of its own parameters: a layer's experts together, anything else
    matrix by matrix. Experts that one rank holds alone are whole already.
    """
    own = list(sizes.parameters(layout.slots(sizes)))
    modules = [p.elements for p in own if p.kind != "experts"]
    if layout.replicas > 1:
        # all layers have the same experts: the first stands for each
        experts = sum(p.elements for p in own if p.kind == "experts" and p.layer == 0)
        modules.append(experts)
    return max(modules)


def live_elements(sizes: Sizes, layout: Layout) -> int:
    """Return the elements that ZeRO-3 may keep gathered besides the module in use."""
    return max(largest_gathered(sizes, layout), 2 * assumptions.PREFETCH_ELEMENTS)


def deepspeed_json(sizes: Sizes, layout: Layout) -> dict[str, dict[str, object]]:
    """Return the DeepSpeed JSON of a layout.

    The memory plan counts on its bucket and prefetch sizes (`memory.buffers`).
    """
    zero: dict[str, object] = {
        "stage": layout.stage,
        "reduce_bucket_size": assumptions.BUCKET_ELEMENTS,
    }
    if layout.stage > 1:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if layout.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": assumptions.PREFETCH_ELEMENTS,
            "stage3_param_persistence_threshold": assumptions.PERSISTENT_ELEMENTS,
            # DeepSpeed's 10^9 would keep a model of a billion parameters gathered
            "stage3_max_live_parameters": live_elements(sizes, layout),
            "stage3_max_reuse_distance": live_elements(sizes, layout),
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    # only pinned memory is copied while the GPU computes
    if layout.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.offload == "optimizer+parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}
