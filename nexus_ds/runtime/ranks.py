"""Work that may fail on one rank: all ranks learn of it, raise the same error and end with the same exit code.

Not covered: ranks that die; the collective that the others wait in ends with them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from nexus_ds.errors import CheckpointError, NexusError


def together(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on this rank and return the results of all ranks. All must call.

    Raises:
        CheckpointError: it failed with an OSError or NexusError on some rank; the same message on all.
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
    """Run `action` on rank 0 and return its result on all ranks; if it fails, all raise the same CheckpointError."""
    return together(lambda: action() if dist.get_rank() == 0 else None)[0]


def leave(code: int) -> int:
    """End a process that failed: at once with `code` if it has peers, else return `code`.

    A rank whose process group is still up when Python is torn down is sometimes aborted, when its peer goes first: its
    exit code is then SIGABRT's and not ours. Whoever calls this has closed its files.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
