"""Work that may fail on one rank: all ranks learn of it and raise the same error, instead of
waiting for each other.

Not covered: ranks that die; the collective that the others wait in ends with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from nexus_ds.errors import CheckpointError, NexusError


def together(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on this rank and return the results of all ranks. All must call.

    Raises:
        CheckpointError: it failed with an OSError or NexusError on some rank; the same message on
            all.
    """
    problem, result = "", None
    try:
        result = action()
    except (OSError, NexusError) as error:
        problem = str(error) or repr(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (problem, result))
    problems = [problem for problem, _ in outcomes if problem]
    if problems:
        raise CheckpointError(problems[0])
    return [result for _, result in outcomes]


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result on all ranks; if it fails, all raise the same
    CheckpointError."""
    return together(lambda: action() if dist.get_rank() == 0 else None)[0]
