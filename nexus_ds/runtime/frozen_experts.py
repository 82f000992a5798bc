"""Old experts that stay as they are while the mixture learns to use a new one.

An old expert sees only its own domain's replayed text, at the rate that the new expert needs: it
pays with what it knew. A gradient of zero leaves AdamW's moments at zero, and so every bit of a
weight that does not decay, under each ZeRO stage and expert-parallel size alike.
Shapes: E experts of this rank, F inner width, H hidden size.
Not covered: optimizers that move a weight without a gradient, other than by decay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nexus_ds.checkpoint.records import is_nexus, last_extension
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.errors import ConfigError
from nexus_ds.runtime.nexus_moe import NexusMoE


def old_experts(path: str) -> frozenset[int]:
    """Return the numbers of the experts that a mixture had before its last extension.

    Raises:
        ConfigError: a dense model, a new one (''), or a mixture that was never extended.
    """
    sidecar = read_sidecar(Path(path)) if path and is_nexus(Path(path)) else None
    new = last_extension(sidecar.lineage) if sidecar else []
    if sidecar is None or not new:
        found = path or "a new model"
        raise ConfigError(
            f"training.freeze_old_experts=true: found {found}, expected a mixture that extend "
            "wrote; leave the setting out"
        )
    numbers = []
    for number, expert in enumerate(sidecar.experts):
        if expert.name not in new:
            numbers.append(number)
    return frozenset(numbers)


def _without(frozen_E11: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of stacked weights [E, F, H] or [E, H, F], zero for frozen experts."""
    # a product with zeros would make NaN of an infinity
    return gradient.masked_fill(frozen_E11.to(gradient.device), 0)


def freeze(layers: Iterable[NexusMoE], frozen: Collection[int]) -> None:
    """Let routed experts learn nothing; their weights must have no decay.

    Args:
        layers: before the engine takes them: its own hooks come after these.
        frozen: numbers of the experts in the mixture, on whatever rank they are.
    """
    for layer in layers:
        here = [number in frozen for number in layer.placement.local_experts()]
        frozen_E11 = torch.tensor(here)[:, None, None]
        for weights in layer.experts.parameters():
            weights.register_hook(partial(_without, frozen_E11))
