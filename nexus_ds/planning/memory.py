"""Bytes that a rank, a node and the disk need for a layout.

Model states are counted as DeepSpeed allocates them (tests compare them with real ranks);
activations as the forward pass keeps them (likewise); buffers are read off DeepSpeed's code; what
the CUDA process and its allocator take is estimated.

Units: bytes wherever nothing else is said; `width` is bytes of an element in the working precision
(bf16 2, fp32 4); master weights, moments and norms are fp32, 4 bytes.
Not covered: memory of other processes on the node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from nexus_ds.model.chunks import chunk_tokens
from nexus_ds.planning import assumptions as assume
from nexus_ds.planning.export import export_check
from nexus_ds.planning.layout import Layout, largest_gathered, largest_module, live_elements
from nexus_ds.planning.linear import linear_activations
from nexus_ds.planning.sizes import KINDS, Parameter, Sizes

FP32 = 4
"""Bytes of an fp32 element."""


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


def _elements(parameters: Iterable[Parameter]) -> int:
    return sum(p.elements for p in parameters)


def _own(sizes: Sizes, layout: Layout) -> list[Parameter]:
    """Return the parameters of a rank before ZeRO cuts them: of all experts only its own."""
    return list(sizes.parameters(layout.slots(sizes)))


# Model states ------------------------------------------------------------------------------------


def groups(own: list[Parameter], limit: int) -> list[list[Parameter]]:
    """Return the optimizer's groups of parameters.

    Matrices, vectors and router are a group each; experts are cut at `limit` elements, as
    deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer cuts them.
    """
    *others, experts = KINDS
    found = [[p for p in own if p.kind == kind] for kind in others]
    current: list[Parameter] = []
    for parameter in own:
        if parameter.kind != experts:
            continue
        # a matrix above the limit is a group of its own
        if current and _elements(current) + parameter.elements > limit:
            found.append(current)
            current = []
        current.append(parameter)
    found.append(current)
    return [group for group in found if group]


def _touched(group: list[Parameter], parts: int, part: int) -> int:
    """Return the elements of all parameters that reach into one of a flat group's `parts`."""
    size = math.ceil(_elements(group) / parts)
    first = part * size
    end = first + size
    offset = 0
    total = 0
    for parameter in group:
        if offset < end and offset + parameter.elements > first:
            total += parameter.elements
        offset += parameter.elements
    return total


# Asked for again by every cut of the batch, and slow: ranks x groups x parameters.
@lru_cache(maxsize=256)
def _kept(own: tuple[Parameter, ...], world: int, expert: int, limit: int) -> int:
    """Return what `kept_gradients` does, of arguments that a cache can hold."""
    found = groups(list(own), limit)
    fullest = 0
    for rank in range(world):
        total = 0
        for group in found:
            if group[0].kind == "experts":
                # only replicas of the same experts share them; they are `expert` ranks apart
                total += _touched(group, world // expert, rank // expert)
            else:
                total += _touched(group, world, rank)
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
    """Return elements of a rank's share of the optimizer.

    Experts are cut over their replicas, the rest over all ranks (ZeRO, Rajbhandari et al. 2020,
    section 5; DeepSpeed's expert data-parallel groups).
    """
    experts = _elements(p for p in own if p.kind == "experts")
    others = _elements(own) - experts
    return experts / layout.replicas + others / layout.world


def model_states(sizes: Sizes, layout: Layout, width: int) -> States:
    """Return the model states of the fullest rank.

    Args:
        sizes: of the model.
        layout: how it is spread.
        width: bytes of an element in the working precision (bf16 2, fp32 4).
    """
    own = _own(sizes, layout)
    share = partition(own, layout)
    # ZeRO-3 never cuts small parameters: gathering them would cost more than it saves
    persistent = _elements(p for p in own if p.elements <= assume.PERSISTENT_ELEMENTS)
    if layout.stage == 3:
        weights = width * (share + persistent)
        gradients = gradient_width(layout, width) * share
    else:
        weights = float(width * _elements(own))
        kept = _elements(own) if layout.stage == 1 else kept_gradients(own, layout)
        gradients = float(width * kept)
        if gradient_width(layout, width) > width:
            # ZeRO-2 then sums them in its own part of each group, and nowhere else
            gradients = FP32 * share
    optimizer = assume.ADAM_BYTES * share
    if layout.offload == "none":
        return States(weights, gradients, optimizer, host=0.0)

    host = optimizer + _offloaded_beside_adam(layout, width) * share
    if layout.stage > 1:
        # each gradient goes down as soon as it is reduced
        gradients = 0.0
    if layout.offload == "optimizer+parameters":
        weights = float(width * persistent)
        host += width * share
    return States(weights, gradients, optimizer=0.0, host=host)


def gradient_width(layout: Layout, width: int) -> int:
    """Return bytes of an element of the gradients that a rank sums over the passes of a step."""
    return FP32 if layout.gradient_dtype == "fp32" else width


def _offloaded_beside_adam(layout: Layout, width: int) -> int:
    """Return bytes that offload adds to each element of the optimizer in main memory."""
    # An fp32 gradient for the step. ZeRO-1/2 have the updated weight there, too, before it goes up
    # to the GPU; ZeRO-3 has its gradients in the working precision in that place.
    beside = FP32 + width
    if layout.stage < 3 and layout.accumulation > 1:
        # the sum of the passes' gradients so far
        beside += width
    return beside


# Activations -------------------------------------------------------------------------------------


def _norm(sizes: Sizes, width: int) -> int:
    """Return bytes that a norm keeps of an element: in fp32, normalised, times its weight."""
    # one that adds 1 to its weight multiplies in fp32
    return FP32 + (FP32 if sizes.centred else width) + width


def _attention(sizes: Sizes, width: int) -> float:
    """Return bytes that the attention of one layer keeps for each token."""
    heads_width = sizes.heads * sizes.head_size
    # queries and output, keys and values, and of each head the softmax's fp32 log-sum-exp
    kept: float = 2 * width * (heads_width + sizes.kv_width) + FP32 * sizes.heads
    if sizes.qk_norms:
        kept += _norm(sizes, width) * (heads_width + sizes.kv_width)
    if sizes.output_gate:
        # the gate's sigmoid, the output once more, and their product
        kept += 3 * width * heads_width
        # without a cast the gate's rows stay with the queries that they were computed with
        kept += FP32 * heads_width if width == FP32 else 0
    return kept


def layer_activations(
    sizes: Sizes, width: int, imbalance: float = 1.0, linear: bool = False
) -> float:
    """Return bytes that one layer keeps for each token, for its backward pass.

    Attention's matrix of scores is not among them: a fused kernel makes it again (FlashAttention,
    Dao et al. 2022), or it is counted by `scores`.

    Args:
        sizes: of the model.
        width: bytes of an element in the working precision.
        imbalance: tokens at this rank's experts over the mean.
        linear: whether it is one with linear attention.
    """
    norms = _norm(sizes, width) * sizes.layer_norms * sizes.hidden
    attention = _attention(sizes, width)
    if linear and sizes.linear:
        attention = linear_activations(sizes.linear, width)
    # gate, its SiLU, up, their product
    ffn = 4 * width * sizes.ffn
    dense = norms + attention + ffn
    if not sizes.experts:
        return dense
    # Experts keep half: SiLU and product are made again (nexus_ds/model/experts.py).
    inner = ffn / 2
    # beside it the row that goes in and the row that comes out
    routed = sizes.top_k * (inner + 2 * width * sizes.hidden) * imbalance
    # scores and probabilities of the experts, and indices of those that were chosen
    router = 16 * sizes.experts + 100
    return dense + routed + router


def _imbalance(layout: Layout) -> float:
    # A rank that has all experts computes every one of its tokens' choices, however they fall.
    return assume.ROUTING_IMBALANCE if layout.expert > 1 else 1.0


def scores(sizes: Sizes, layout: Layout, width: int, tokens: int) -> float:
    """Return bytes of attention's scores that one layer keeps for each token, where no fused kernel
    makes them again: their tanh, and their softmax in fp32 and in the working precision."""
    length = tokens / layout.micro
    return sizes.scored_heads * length * (FP32 + 2 * width)


def activations(sizes: Sizes, layout: Layout, width: int, tokens: int) -> float:
    """Return bytes that the forward pass of `tokens` tokens keeps, the output layer not counted."""
    # its input alone; the rest is made again in the backward pass
    layers: float = sizes.layers * width * sizes.hidden
    if layout.checkpointing == "none":
        every = layer_activations(sizes, width, _imbalance(layout))
        every += scores(sizes, layout, width, tokens)
        linear = layer_activations(sizes, width, _imbalance(layout), linear=True)
        layers = sizes.attending * every + len(sizes.linear_layers) * linear
    # the last norm, kept as a layer's norms are
    outside = _norm(sizes, width) * sizes.hidden
    return tokens * (layers + outside)


def head(sizes: Sizes, width: int, tokens: int) -> float:
    """Return the peak of the output layer: the logits of a chunk, and its weight's gradient."""
    logits = min(tokens, chunk_tokens(sizes.vocabulary)) * sizes.vocabulary
    gradient = width * sizes.vocabulary * sizes.hidden
    return assume.LOGITS_BYTES * logits + gradient


def _working(sizes: Sizes, layout: Layout, width: int, tokens: int) -> float:
    """Return what a layer's backward pass needs at once beside what the forward pass kept.

    That is gradients of activations, and the activations themselves where they are recomputed.
    """
    recomputed = 0.0 if layout.checkpointing == "none" else 1.0
    layer = layer_activations(sizes, width, _imbalance(layout))
    layer += scores(sizes, layout, width, tokens)
    if sizes.linear_layers:
        layer = max(layer, layer_activations(sizes, width, _imbalance(layout), linear=True))
    return tokens * layer * (recomputed + assume.BACKWARD_COPIES)


# Buffers -----------------------------------------------------------------------------------------


def buffers(sizes: Sizes, layout: Layout, width: int) -> dict[str, float]:
    """Return DeepSpeed's buffers on a GPU by name, the working memory of the update not counted.

    They are gradient buckets, gathered parameters, gradients on their way to their owner.
    Source: deepspeed/runtime/zero/stage_1_and_2.py and stage3.py, 0.19.8.
    """
    own = _own(sizes, layout)
    largest = max(p.elements for p in own)
    # under ZeRO-2 with overlap_comm one bucket is filled while the other is reduced
    buckets = 2 if layout.stage == 2 else 1
    found: dict[str, float] = {"gradient buckets": width * assume.BUCKET_ELEMENTS * buckets}
    if layout.stage == 3:
        gathered = largest_gathered(sizes, layout)
        found["gathered parameters"] = width * (live_elements(sizes, layout) + gathered)
        # a layer's experts get their gradients together
        experts = _elements(p for p in own if p.kind == "experts" and p.layer == 0)
        # whole, and the copy that is reduced
        in_transit = max(largest_module(sizes, layout), experts)
        found["gradients in transit"] = 2 * width * in_transit
    elif layout.stage == 2:
        found["gradients in transit"] = width * largest
        in_place = gradient_width(layout, width) > width
        if layout.accumulation > 1 and layout.offload == "none" and not in_place:
            # of this pass, beside the sum
            found["gradients in transit"] += width * kept_gradients(own, layout)
    if layout.offload != "none" and layout.stage < 3:
        # temp_grad_buffer_for_gpu_offload: on its way down a gradient is made whole in it
        found["offload buffer"] = width * largest
    return found


def _update(sizes: Sizes, layout: Layout, width: int) -> float:
    """Return what an optimizer step on the GPU allocates for its largest group of parameters.

    That is fp32 gradients and, in the working precision, the flat copy that they are made of.
    """
    if layout.offload != "none":
        return 0.0
    found = groups(_own(sizes, layout), assume.EXPERT_GROUP_ELEMENTS)
    largest = max(partition(group, layout) for group in found)
    if layout.stage == 3:
        # it goes through a group in pieces
        largest = min(largest, assume.SUB_GROUP_ELEMENTS)
    if gradient_width(layout, width) > width:
        # ZeRO-2 has summed them where the update reads them; ZeRO-3 copies them flat
        return 0.0 if layout.stage == 2 else FP32 * largest
    return (FP32 + width) * largest


def loading(sizes: Sizes, layout: Layout, width: int) -> float:
    """Return bytes of a rank's model in main memory, at most, on its way to the GPU.

    A mixture is read a layer at a time, its experts once more as their stack, a dense model whole.
    ZeRO-1/2 then flatten a group of the
    optimizer after the other, on the CPU where the GPU has no room for it twice: all of its
    parameters there and the flat copy.
    """
    own = _own(sizes, layout)
    if not sizes.experts:
        read = float(_elements(own) * (FP32 if sizes.new else width))
    else:
        layer = _elements(p for p in own if p.layer == 0)
        read = float(width * max(2 * layer, sizes.vocabulary * sizes.hidden))
    if layout.stage == 3:
        return read
    found = groups(own, assume.EXPERT_GROUP_ELEMENTS)
    return max(read, 2.0 * width * max(map(_elements, found)))


# All together ------------------------------------------------------------------------------------


def _peak(sizes: Sizes, layout: Layout, width: int, tokens: int) -> dict[str, float]:
    """Return what comes and goes within a step, at the moment when it is most."""
    logits = head(sizes, width, tokens)
    layer = _working(sizes, layout, width, tokens)
    peak = {"activations": activations(sizes, layout, width, tokens)}
    # never both: the logits are gone when the layers' turn comes
    if logits > layer:
        peak["logits and gradient of the output layer"] = logits
    else:
        peak["backward pass of a layer"] = layer
    # nor with the update: it starts when no activation is left
    update = _update(sizes, layout, width)
    return peak if sum(peak.values()) >= update else {"gradients of the update": update}


def memory(sizes: Sizes, layout: Layout, width: int, length: int, local: int) -> Memory:
    """Return what a layout needs.

    Args:
        sizes: of the model.
        layout: how it is spread.
        width: bytes of an element in the working precision.
        length: tokens of a sequence.
        local: ranks of a node.
    """
    states = model_states(sizes, layout, width)
    gpu = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer states": states.optimizer,
    }
    gpu |= buffers(sizes, layout, width)
    gpu |= _peak(sizes, layout, width, layout.micro * length)
    gpu["allocator (estimated)"] = assume.FRAGMENTATION * sum(gpu.values())
    gpu["CUDA context (estimated)"] = assume.CONTEXT_BYTES

    # offloaded states lie in pinned memory, which comes in blocks of powers of two
    pinned = states.host * (1 + assume.PINNED_WASTE)
    host = {
        "processes (estimated)": local * assume.PROCESS_BYTES,
        "states": local * pinned,
        # of the first node: a tensor at a time
        "check of the export": export_check(sizes, width).host_bytes,
    }
    # at the start, when nothing is exported yet
    start = local * loading(sizes, layout, width)
    if start > host["check of the export"]:
        del host["check of the export"]
        host["model on its way to the GPU"] = start
    return Memory(_above_zero(gpu), _above_zero(host))


def _above_zero(parts: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}


def disk(sizes: Sizes, width: int, keep_last: int) -> dict[str, float]:
    """Return bytes on disk of training states and of the finished checkpoint.

    `state` is one state, `states` all that are there while one is replaced, `export` the
    checkpoint, `total` the states and the checkpoint.
    """
    counts = sizes.counts()
    state = float(assume.ADAM_BYTES * counts["trained"])
    # one is written before the oldest goes
    states = (keep_last + 1) * state
    # P stays in fp32 in the sidecar
    export = float(width * counts["total"] + FP32 * counts["projection"])
    return {"state": state, "states": states, "export": export, "total": states + export}
