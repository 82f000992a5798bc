"""Memory and time of the check that ends a run: what runtime/export_check.py holds at once.

Units: bytes, seconds; `width` is bytes of an element in the working precision.
Not covered: a checkpoint on a file system that is slower than the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ds.planning import assumptions as assume
from nexus_ds.planning.sizes import Sizes

FP32 = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True)
class ExportCheck:
    """What the check of an export needs, on the first rank alone."""

    gpu_bytes: float
    """On its GPU, beside weights and optimizer, when activations and buffers are gone; where that
    much is not free twice over, the CPU computes and main memory holds it."""
    host_bytes: float
    """In main memory, at most, where the GPU computes."""
    seconds: float
    """Estimated."""

    def to_json(self) -> dict[str, float]:
        """Return what `plan --json` says of it."""
        return {
            "gpu_bytes": round(self.gpu_bytes),
            "host_bytes": round(self.host_bytes),
            "seconds": self.seconds,
        }


def _layer(sizes: Sizes) -> int:
    """Return the elements of one layer on disk: rows in place of P."""
    others = 0
    for parameter in sizes.parameters(sizes.experts):
        if parameter.layer == 0 and parameter.kind != "router":
            others += parameter.elements
    # a row for each expert, the shared expert's gate, and the vector of the input `context`
    rows = sizes.experts + 1 + sizes.context if sizes.experts else 0
    return others + rows * sizes.hidden


def export_check(sizes: Sizes, width: int) -> ExportCheck:
    """Return what the check of an export needs.

    Args:
        sizes: of the model.
        width: bytes of an element in the working precision.
    """
    words = sizes.vocabulary * sizes.hidden
    logits = assume.PROBE_TOKENS * sizes.vocabulary
    # a layer, the last norm, the output layer, and its logits of two rows
    on_device = _layer(sizes) + sizes.hidden + words + 2 * logits
    # the embedding, and beside it one tensor, gathered or read back
    largest = max(words, sizes.hidden * sizes.ffn)
    total = width * sizes.counts()["total"]
    if sizes.experts and sizes.tied and not sizes.context:
        # a stock mixture's file has the output layer all the same
        total += width * words
    return ExportCheck(
        gpu_bytes=float(width * on_device),
        host_bytes=float(2 * width * largest + assume.PROBE_LOGITS * FP32 * logits),
        seconds=total / assume.EXPORT_CHECK_PER_SECOND,
    )
