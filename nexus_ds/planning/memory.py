"""Bytes that a rank, a node and the disk need for a layout.

Model states are counted as DeepSpeed allocates them (tests compare them with real ranks);
activations as the forward pass keeps them (likewise); buffers are read off DeepSpeed's code; what
the CUDA process and its allocator take is estimated.
Not covered: memory of other processes on the node, peaks while a checkpoint is loaded (a layer at a
time).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nexus_ds.model.head import chunk_tokens
from nexus_ds.planning import assumptions as assume
from nexus_ds.planning.layout import Layout, largest_gathered, live_elements
from nexus_ds.planning.sizes import KINDS, Parameter, Sizes


@dataclass(frozen=True)
class States:
    """Model states of one rank in bytes, on its GPU and in main memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def gpu(self) -> float:
        """All that lies on the GPU."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Memory:
    """What a layout needs, in bytes: parts by name, and their sums with the estimated overheads."""

    gpu: dict[str, float]
    """Of the fullest GPU."""
    host: dict[str, float]
    """Of a node (the first one, which checks the export)."""

    @property
    def gpu_bytes(self) -> float:
        """Peak of a GPU."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        """Peak of a node's main memory."""
        return sum(self.host.values())


def groups(own: list[Parameter], limit: int) -> list[list[Parameter]]:
    """Return the optimizer's groups: matrices, vectors, router, and the experts cut at `limit`
    elements."""
    found = [[p for p in own if p.kind == kind] for kind in KINDS[:3]]
    current: list[Parameter] = []
    for parameter in (p for p in own if p.kind == "experts"):
        if sum(p.elements for p in [*current, parameter]) > limit and current:
            found.append(current)
            current = []
        current.append(parameter)
    return [group for group in [*found, current] if group]


def _touched(group: list[Parameter], parts: int, part: int) -> int:
    """Return elements of the parameters of which a part of the flat group holds at least one
    element."""
    size = -(-sum(p.elements for p in group) // parts)
    first, last, offset, total = part * size, (part + 1) * size, 0, 0
    for parameter in group:
        if offset < last and offset + parameter.elements > first:
            total += parameter.elements
        offset += parameter.elements
    return total


@lru_cache(maxsize=256)
def _kept(own: tuple[Parameter, ...], world: int, expert: int, limit: int) -> int:
    fullest, found = 0, groups(list(own), limit)
    for rank in range(world):
        total = 0
        for group in found:
            alone = group[0].kind == "experts"
            parts = world // expert if alone else world
            total += _touched(group, parts, rank // expert if alone else rank)
        fullest = max(fullest, total)
    return fullest


def kept_gradients(own: list[Parameter], layout: Layout) -> int:
    """Return elements of the gradients that the fullest rank keeps under ZeRO-2.

    A gradient stays whole where a partition's edge cuts its parameter. For a large embedding that
    makes a difference; experts so large that each matrix is a group of its own keep all of their
    gradients on every rank.
    """
    return _kept(tuple(own), layout.world, layout.expert, assume.EXPERT_GROUP_ELEMENTS)


def partition(own: list[Parameter], layout: Layout) -> float:
    """Return elements of the optimizer's share of a rank: experts over their replicas, the rest
    over all ranks."""
    return sum(p.elements / (layout.replicas if p.kind == "experts" else layout.world) for p in own)


def model_states(sizes: Sizes, layout: Layout, width: int) -> States:
    """Return the model states of the fullest rank.

    Args:
        sizes: of the model.
        layout: how it is spread.
        width: bytes of an element in the working precision (bf16 2, fp32 4).
    """
    own = list(sizes.parameters(layout.slots(sizes)))
    held, share = sum(p.elements for p in own), partition(own, layout)
    weights: float = width * held
    gradients: float = width * (held if layout.stage == 1 else kept_gradients(own, layout))
    optimizer, host = assume.ADAM_BYTES * share, 0.0
    if layout.stage == 3:
        whole = sum(p.elements for p in own if p.elements <= assume.PERSISTENT_ELEMENTS)
        weights, gradients = width * (share + whole), width * share
    if layout.offload != "none":
        # fp32 gradients for the step; ZeRO-1/2 add a copy of the updated weights, ZeRO-3 has its
        # gradients there.
        host, optimizer = optimizer + (4 + width) * share, 0.0
        if layout.stage > 1:
            gradients = 0.0
        if layout.stage < 3 and layout.accumulation > 1:
            host += width * share
    if layout.offload == "optimizer+parameters":
        host, weights = (
            host + width * share,
            width * sum(p.elements for p in own if p.elements <= assume.PERSISTENT_ELEMENTS),
        )
    return States(weights, gradients, optimizer, host)


def layer_activations(sizes: Sizes, width: int, imbalance: float = 1.0) -> float:
    """Return bytes that one layer keeps for each token: norms in fp32, attention without its
    matrix, feed-forward networks.

    Args:
        sizes: of the model.
        width: bytes of an element in the working precision.
        imbalance: tokens at this rank's experts over the mean.
    """
    # the fp32 copy, the normalised one, the product with the weight
    norms = 2 * (4 + 2 * width) * sizes.hidden
    attention = 2 * width * (sizes.heads * sizes.head_size + sizes.kv_width) + 4 * sizes.heads
    ffn = 4 * width * sizes.ffn  # gate, its SiLU, up, their product
    if not sizes.experts:
        return norms + attention + ffn
    # In fp32 experts run one after the other and keep half: SiLU and product are made again
    # (nexus_ds/model/experts.py).
    inner = ffn if width == 2 else ffn / 2
    routed = sizes.top_k * (inner + 2 * width * sizes.hidden) * imbalance
    return norms + attention + ffn + routed + 16 * sizes.experts + 100


def activations(sizes: Sizes, layout: Layout, width: int, tokens: int) -> float:
    """Return bytes that the forward pass of `tokens` tokens keeps, the output layer not counted."""
    imbalance = assume.ROUTING_IMBALANCE if layout.expert > 1 else 1.0
    layer = (
        layer_activations(sizes, width, imbalance)
        if layout.checkpointing == "none"
        else width * sizes.hidden
    )
    return tokens * (sizes.layers * layer + (4 + 2 * width) * sizes.hidden)


def head(sizes: Sizes, width: int, tokens: int) -> float:
    """Return bytes that the output layer needs at once: the logits of a chunk of tokens, and its
    weight's gradient."""
    logits = min(tokens, chunk_tokens(sizes.vocabulary)) * sizes.vocabulary
    return assume.LOGITS_BYTES * logits + width * sizes.vocabulary * sizes.hidden


def _working(sizes: Sizes, layout: Layout, width: int, tokens: int) -> float:
    """Return what a layer's backward pass needs at once: gradients of activations, and recomputed
    ones."""
    recomputed = 0.0 if layout.checkpointing == "none" else 1.0
    layer = layer_activations(sizes, width, assume.ROUTING_IMBALANCE if layout.expert > 1 else 1.0)
    return tokens * layer * (recomputed + assume.BACKWARD_COPIES)


def buffers(sizes: Sizes, layout: Layout, width: int) -> dict[str, float]:
    """Return DeepSpeed's buffers on the GPU: buckets, gathered parameters, gradients on their
    way."""
    own = list(sizes.parameters(layout.slots(sizes)))
    largest = max(p.elements for p in own)
    found: dict[str, float] = {
        "gradient buckets": width * assume.BUCKET_ELEMENTS * (2 if layout.stage == 2 else 1)
    }
    if layout.stage == 3:
        gathered = largest_gathered(sizes, layout)
        found["gathered parameters"] = width * (live_elements(sizes, layout) + gathered)
        experts = sum(p.elements for p in own if p.kind == "experts" and p.layer == 0)
        # whole, and the copy that is reduced
        found["gradients in transit"] = 2 * width * max(gathered, experts)
    elif layout.stage == 2:
        found["gradients in transit"] = width * largest
        if layout.accumulation > 1 and layout.offload == "none":
            # of this pass, beside the sum
            found["gradients in transit"] += width * kept_gradients(own, layout)
    if layout.offload != "none" and layout.stage < 3:
        found["offload buffer"] = width * largest
    return found


def _update(sizes: Sizes, layout: Layout, width: int) -> float:
    """Return what an optimizer step on the GPU allocates: fp32 gradients of its largest group, and
    their flat copy."""
    if layout.offload != "none":
        return 0.0
    own = list(sizes.parameters(layout.slots(sizes)))
    shares = [partition(group, layout) for group in groups(own, assume.EXPERT_GROUP_ELEMENTS)]
    return (4 + width) * min(
        max(shares), assume.SUB_GROUP_ELEMENTS if layout.stage == 3 else float("inf")
    )


def memory(sizes: Sizes, layout: Layout, width: int, length: int, local: int) -> Memory:
    """Return what a layout needs.

    Args:
        sizes: of the model.
        layout: how it is spread.
        width: bytes of an element in the working precision.
        length: tokens of a sequence.
        local: ranks of a node.
    """
    states, tokens = model_states(sizes, layout, width), layout.micro * length
    gpu = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer states": states.optimizer,
    }
    gpu |= buffers(sizes, layout, width)
    passes = {
        "activations": activations(sizes, layout, width, tokens),
        "logits and gradient of the output layer": head(sizes, width, tokens),
        "backward pass of a layer": _working(sizes, layout, width, tokens),
    }
    smaller = min(list(passes)[1:], key=lambda name: passes[name])
    del passes[smaller]  # the logits are gone when the layers' turn comes
    update = _update(sizes, layout, width)
    gpu |= passes if sum(passes.values()) >= update else {"gradients of the update": update}
    gpu["allocator (estimated)"] = assume.FRAGMENTATION * sum(gpu.values())
    gpu["CUDA context (estimated)"] = assume.CONTEXT_BYTES
    host = {"processes (estimated)": local * assume.PROCESS_BYTES}
    host["states"] = local * states.host * (1 + assume.PINNED_WASTE)
    host["check of the export"] = float(width * sizes.counts()["total"])
    return Memory({k: v for k, v in gpu.items() if v}, {k: v for k, v in host.items() if v})


def disk(sizes: Sizes, width: int, keep_last: int) -> dict[str, float]:
    """Return bytes on disk: a training state, all that are there while one is replaced, and the
    finished checkpoint."""
    counts = sizes.counts()
    state = float(assume.ADAM_BYTES * counts["trained"])
    export = float(width * counts["total"] + 4 * counts["projection"])
    return {
        "state": state,
        "states": (keep_last + 1) * state,
        "export": export,
        "total": (keep_last + 1) * state + export,
    }
