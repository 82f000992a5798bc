"""How many tokens' logits stand in memory at once; `plan` asks it too, so without torch."""

from __future__ import annotations

CHUNK_ELEMENTS = 2**27
"""Logits that stand in memory at once.

512 tokens of 256k: enough for a GPU's matrix products to be bound by arithmetic.
"""


def chunk_tokens(vocabulary: int) -> int:
    """Return the tokens of a chunk."""
    return max(1, CHUNK_ELEMENTS // vocabulary)
