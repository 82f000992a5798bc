"""A run on the machine that it finds: the cut of its batch that fits, or why none does and what
would.

Deterministic: every rank that is given the same machine finds the same.
Not covered: memory that other processes hold, links other than the plan's defaults, bucket sizes
that a DeepSpeed JSON sets itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nexus_ds.errors import LayoutError
from nexus_ds.planning import choose
from nexus_ds.planning.choose import Candidate
from nexus_ds.planning.layout import Layout, Machine, Spread, cuts, expert_parallel, spreads
from nexus_ds.planning.memory import model_states
from nexus_ds.planning.sizes import Sizes
from nexus_ds.planning.units import short
from nexus_ds.settings import Config, ParallelConfig

DEFAULT_STAGE = 2
"""ZeRO stage of `parallel.zero_stage: 0` where nothing is planned."""
SPARE = 0.05
"""Share of a GPU that a run leaves free, if it can, where it chooses: the plan's own error."""
MOST_TIMES = 64
"""The largest multiple of a machine in which a remedy is looked for."""
OVERRIDE = "parallel.check_memory=false starts all the same"


def zero_of(config: Config) -> dict[str, Any]:
    """Return `zero_optimization` of a run without a DeepSpeed JSON; nothing where plan chooses."""
    stage = config.parallel.zero_stage
    return {"stage": stage} if stage else {}


def stage_of(parallel: ParallelConfig) -> int:
    """Return the ZeRO stage where a DeepSpeed JSON has none, or nothing is planned."""
    return parallel.zero_stage or DEFAULT_STAGE


def offload_of(zero: Mapping[str, Any]) -> str:
    """Return the offload of a DeepSpeed JSON's `zero_optimization` as a layout names it."""

    def there(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    # Parameters alone are planned as if they stayed on the GPU: at most too much.
    if not there("offload_optimizer"):
        return "none"
    return "optimizer+parameters" if there("offload_param") else "optimizer"


def fitted(sizes: Sizes, machine: Machine, config: Config, zero: Mapping[str, Any]) -> Candidate:
    """Return the fastest layout that fits of those that recipe and JSON leave open.

    It leaves SPARE of a GPU free unless nothing fits then. Where none fits at all
    it is the one that needs least of a GPU.

    Args:
        sizes: of the model.
        machine: what there is; `math.inf` for a GPU memory that is not known.
        config: the run's.
        zero: `zero_optimization` of the DeepSpeed JSON; without a stage all are open.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """
    expert = expert_parallel(config.parallel, sizes.experts, machine.local)
    ways = spreads(config.training.gradient_dtype)
    if "stage" in zero:
        ways = iter([(zero["stage"], offload_of(zero))])
    open_layouts = [
        layout
        for stage, offload in ways
        for layout in cuts(
            config.training, machine.gpus, Spread(stage=stage, offload=offload, expert=expert)
        )
    ]
    spared = replace(machine, gpu_memory=machine.gpu_memory * (1 - SPARE))
    for there in (spared, machine):
        judged = [choose.judge(sizes, layout, there, config) for layout in open_layouts]
        found = min(judged, key=choose.order)
        if found.fits:
            break
    return found


def host_refusal(sizes: Sizes, layout: Layout, local: int, memory: float, width: int) -> str:
    """Return why a run on CPUs can't fit for certain, '' where it may.

    Only weights, gradients and optimizer states count, which are known exactly.

    Args:
        sizes: of the model.
        layout: how it is spread.
        local: ranks of this node.
        memory: bytes of its main memory.
        width: bytes of an element in the working precision.
    """
    states = model_states(sizes, layout, width)
    needed = local * (states.gpu + states.host)
    if needed <= memory:
        return ""
    return (
        f"weights, gradients and optimizer states of {local} ranks on this node take "
        f"{short(needed)}B of main memory, it has {short(memory)}B; use more nodes, ZeRO-3 "
        f"(ds_configs/z3.json), or a smaller model; {OVERRIDE}"
    )


# Refusals -----------------------------------------------------------------------------------------


def refusal(sizes: Sizes, machine: Machine, config: Config, found: Candidate) -> str:
    """Return one sentence: what a layout needs, what there is, and what to change."""
    needs = found.memory
    lacking = []
    if needs.gpu_bytes > machine.gpu_memory:
        lacking.append(
            f"a rank is planned to need {short(needs.gpu_bytes)}B of GPU memory, "
            f"a GPU has {short(machine.gpu_memory)}B ({_parts(needs.gpu)})"
        )
    if machine.host_memory and needs.host_bytes > machine.host_memory:
        lacking.append(
            f"{short(needs.host_bytes)}B of main memory are planned for a node, "
            f"it has {short(machine.host_memory)}B ({_parts(needs.host)})"
        )
    return (
        f"{found.layout.name}, {_cut(found.layout)}: {', and '.join(lacking)}; "
        f"{remedy(sizes, machine, config)}; {OVERRIDE}"
    )


def _parts(memory: Mapping[str, float]) -> str:
    """Return what memory goes to, the most first; all that is less than a hundredth is left out."""
    least = sum(memory.values()) / 100
    parts = sorted(memory.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {short(size)}B" for name, size in parts if size >= least)


def _cut(layout: Layout) -> str:
    return f"micro-batch {layout.micro}, activation checkpointing {layout.checkpointing}"


def _best(sizes: Sizes, machine: Machine, config: Config) -> Candidate | None:
    """Return the fastest of all layouts that fit; None where none does."""
    try:
        found = choose.candidates(sizes, machine, config)[0]
    except LayoutError:
        # this many GPUs don't divide the batch
        return None
    return found if found.fits else None


def remedy(sizes: Sizes, machine: Machine, config: Config) -> str:
    """Return what to change so that a run fits: what `plan` proposes for these GPUs, else more
    memory a node, else more GPUs."""
    free = replace(
        config,
        training=replace(config.training, micro_batch_size=0, activation_checkpointing="auto"),
    )
    best = _best(sizes, machine, free)
    if best:
        return f"what fits is {_proposal(best)}"
    ways = []
    best = _best(sizes, replace(machine, host_memory=0.0), free)
    if best:
        ways.append(
            f"with {short(best.memory.host_bytes)}B of main memory a node {_proposal(best)}"
        )
    times = 2
    while times <= MOST_TIMES:
        more = replace(machine, gpus=times * machine.gpus, nodes=times * machine.nodes)
        best = _best(sizes, more, free)
        if best:
            ways.append(f"on {more.gpus} GPUs {_proposal(best)}")
            break
        times *= 2
    if ways:
        return f"nothing fits {machine.gpus} such GPUs; what fits is {', or '.join(ways)}"
    return (
        f"nothing fits {machine.gpus} such GPUs nor {MOST_TIMES} times as many; use GPUs with more "
        "memory, or lower data.sequence_length"
    )


def _proposal(best: Candidate) -> str:
    """Return a layout as settings, and how its DeepSpeed JSON comes about."""
    layout = best.layout
    return (
        f"{layout.name} with {' '.join(layout.overrides)} (nexus-ds plan --write ds.json writes "
        "its DeepSpeed JSON, for --deepspeed)"
    )
