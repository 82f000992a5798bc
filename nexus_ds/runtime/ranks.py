"""Work that may fail on one rank: all learn of it and raise the same error, so that none waits.

Not covered: ranks that die; the collective that the others wait in ends with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from nexus_ds.errors import CheckpointError, NexusError

Result = TypeVar("Result")


def together(action: Callable[[], Result]) -> list[Result]:
    """Run `action` on this rank and return the results of all ranks. All must call.

    Raises:
        CheckpointError: it failed with an OSError or NexusError on some rank; the same message on
            all.
    """
    problem = ""
    result: Result | None = None
    try:
        result = action()
    except (OSError, NexusError) as error:
        # An exception without a text must count as one all the same.
        problem = str(error) or repr(error)
    outcomes: list[tuple[str, Result | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, (problem, result))
    problems = [problem for problem, _ in outcomes if problem]
    if problems:
        raise CheckpointError(problems[0])
    return [cast(Result, result) for _, result in outcomes]


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on all ranks. All must call.

    Raises:
        CheckpointError: as `together`.
    """
    results = together(lambda: action() if dist.get_rank() == 0 else None)
    return cast(Result, results[0])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; return it. A process without ranks keeps its own."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
