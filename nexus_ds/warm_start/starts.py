"""Which warm starts a router can have; without torch.

Not covered: what they do (`methods`).
"""

from __future__ import annotations

from nexus_ds.errors import ConfigError
from nexus_ds.settings import CHUNK_WARM_STARTS

FREE_WARM_STARTS = ("hidden_mean", "ridge", "embedding")
NO_TEXT = ("none", "embedding")
"""Those that read no text."""


def check_start(start: str, kind: str, projection: str) -> None:
    """Raise ConfigError for a warm start that a router of this kind and form of P can't have."""
    if kind == "nexus" and start in FREE_WARM_STARTS:
        raise ConfigError(
            f"router.warm_start {start} sets free rows, but this router's rows are P(d); "
            "use label_fit, chunks, closed_form or none, or router.kind linear"
        )
    if kind == "linear" and start in CHUNK_WARM_STARTS:
        raise ConfigError(
            f"router.warm_start {start} fits P, but this router has free rows; "
            "use label_fit, hidden_mean, ridge, embedding or none, or router.kind nexus"
        )
    if start == "closed_form" and projection != "linear":
        raise ConfigError(
            f"router.warm_start closed_form needs a linear P, this one is {projection}; "
            "use chunks, or router.projection linear from upcycling on"
        )
