"""How many tokens' logits stand in memory at once; `plan` asks it too, so without torch."""

from __future__ import annotations

CHUNK_ELEMENTS = 2**27
"""Logits that stand in memory at once, of EAGER_BYTES each; of fewer bytes, so many more.

512 tokens of 256k: enough for a GPU's matrix products to be bound by arithmetic.
"""
EAGER_BYTES = 8
"""Bytes of a logit at the peak of `scoring.score`: itself and its log-probability, both fp32."""


def chunk_tokens(vocabulary: int, logit_bytes: int = EAGER_BYTES) -> int:
    """Return the tokens of a chunk, whose logits take `logit_bytes` each."""
    return max(1, CHUNK_ELEMENTS * EAGER_BYTES // (logit_bytes * vocabulary))
