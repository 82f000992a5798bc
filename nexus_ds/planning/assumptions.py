"""Every number of the plan that no file and no option gives, with its reason.

Change one here, and all of the plan follows. Facts were read off the code that allocates (DeepSpeed
0.19.8, torch 2.13) and are tested against real ranks; estimates are rules of thumb that no test
here confirms on a GPU. Units stand in the names or the first words: bytes, elements of a tensor,
seconds, shares of 1.
Not covered: differences between kinds of GPUs other than memory, arithmetic and links.
"""

from __future__ import annotations

# The table has it, too.
from nexus_ds.checkpoint.needs import PROBE_TOKENS as PROBE_TOKENS

# Facts ------------------------------------------------------------------------------------------

ADAM_BYTES = 12
"""Bytes of a parameter's fp32 master weight and two fp32 moments, 4 each (Rajbhandari et al. 2020,
ZeRO, section 3.1); a training state saves these too."""
EXPERT_GROUP_ELEMENTS = 178_956_971
"""DeepSpeed cuts the optimizer's groups of experts at this many elements (max_group_size in
deepspeed/moe/utils.py; no setting changes it)."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""ZeRO-3 steps the optimizer over at most this many elements at once (sub_group_size, which the
plan leaves at DeepSpeed's default)."""
PREFETCH_ELEMENTS = 50_000_000
"""ZeRO-3 gathers this many elements ahead (stage3_prefetch_bucket_size)."""
PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps smaller parameters whole on every rank, as ds_configs/z3.json says."""
LOGITS_BYTES = 8
"""Bytes of a logit at the peak of the cross-entropy: itself and its log-probability, both fp32
(`scoring.score`)."""
PROBE_LOGITS = 6
"""Copies of their logits in main memory there: two rows, three times over, in fp32."""

# Choices in the DeepSpeed JSON that the plan writes ---------------------------------------------

BUCKET_ELEMENTS = 50_000_000
"""Gradients are reduced in buckets of this size: DeepSpeed's 500M would take 1-2 GB, and links are
saturated long before."""

# Estimates --------------------------------------------------------------------------------------

CONTEXT_BYTES = 1.2e9
"""CUDA context, cuBLAS workspaces and NCCL's buffers of a process: 0.8-1.6 GB are usual."""
FRAGMENTATION = 0.06
"""Share that the caching allocator loses between blocks, with expandable segments; 5-10% are
usual."""
ROUTING_IMBALANCE = 1.25
"""Load of the busiest rank's experts over the mean, with a trained load-balancing loss."""
BACKWARD_COPIES = 0.5
"""Gradients of activations that are alive at once, over what the same layer keeps for its backward
pass."""
PROCESS_BYTES = 4e9
"""Main memory of a rank before any tensor: Python, torch and CUDA's libraries, tokenised text in
the page cache not counted."""
PINNED_WASTE = 0.15
"""Share that pinned main memory loses: its allocator rounds blocks up to powers of two."""
MFU = 0.35
"""Model FLOPs utilisation: share of a GPU's peak in bf16 that eager training reaches on matrix
products of this size (Chowdhery et al. 2022, PaLM, appendix B)."""
RECOMPUTED = 1 / 3
"""Extra arithmetic of activation checkpointing: one more forward pass to a forward and a backward
pass, which is twice as much."""
LAYER_SECONDS = 2e-3
"""Forward and backward pass of an MoE layer that computes nothing: kernel launches and one wait for
the token counts."""
LINK_EFFICIENCY = 0.7
"""Share of a link's nominal speed that large collectives reach."""
OVERLAP = 0.5
"""Share of the computing time behind which ZeRO's communication can hide; all-to-alls hide behind
the shared expert."""
GPU_ADAM_PER_SECOND = 1.5e10
"""Parameters a GPU's fused AdamW updates in a second: 30 bytes each at about 450 GB/s."""
CPU_ADAM_PER_SECOND = 1e9
"""Parameters a node's CPUs update in a second: 52 bytes each (gradient to fp32, norm, clipping,
torch's fused AdamW, master to bf16) at 50 GB/s. One core of an EPYC alone did 0.68e9
(tests/adam_speed.py); main memory limits more of them."""
EXPORT_CHECK_PER_SECOND = 2e8
"""Bytes of a finished checkpoint that one thread compares in a second: hashed in the engine and on
disk, read once more for the probe; 3e8 were measured on an EPYC core with SHA instructions."""
DEFAULT_TFLOPS = 100.0
"""Peak of a GPU in dense bf16 where --gpu-tflops is not given: between an RTX 3090 (71) and a 4090
(165)."""
DEFAULT_GPU_LINK = 200e9 / 8
"""Bytes a second between the GPUs of a node where --gpu-link is not given: PCIe 4 x16."""
DEFAULT_LINK = 100e9 / 8
"""Bytes a second between nodes where --link is not given."""


def table() -> dict[str, float]:
    """Return all numbers by name, as `plan --json` prints them."""
    # read anew at every call: tests change the module's numbers
    numbers = {name: value for name, value in globals().items() if name.isupper()}
    return {name: float(value) for name, value in numbers.items()}
