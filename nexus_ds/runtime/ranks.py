"""Work that may fail on one rank: all learn of it and raise the same error, so that none waits.

The ranks meet at torch's key-value store and not in a collective: there a GPU would spin while rank
0 tokenises or verifies, and the collectives' limit would be too short for it. So they may meet
before there is a process group.
Not covered: ranks that die or stand still; `watchdog` ends the others.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_ds.errors import BadBatchesError, CheckpointError, NexusError, TrainingError
from nexus_ds.launch import Position, position
from nexus_ds.progress import duration, say

Result = TypeVar("Result")
Outcome = tuple[str, bool, object]
"""What is wrong ('' for nothing), whether it is of bad batches, and the result."""
SAY_SECONDS = 60.0  # between two lines of who is waited for
LONGEST_PAUSE = 0.5  # seconds between two looks into the store


class _Meeting:
    """The store that the ranks share, and how often they met there."""

    store: dist.Store | None = None
    calls = itertools.count()


def join(seconds: float) -> dist.Store:
    """Return the store at which the ranks of a job meet, by the launcher's variables.

    All ranks must call; a process keeps its store. Rank 0 serves it, under torchrun its agent does.

    Args:
        seconds: that this rank waits for the server, and rank 0 for the others.

    Raises:
        TrainingError: they did not come, or another run has the port.
    """
    if _Meeting.store is None:
        try:
            _Meeting.store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            if "EADDRINUSE" in told:
                raise TrainingError(
                    f"another run has the ranks' port on this node ({told}); give the launcher "
                    "another one: deepspeed --master_port PORT, torchrun --master-port PORT"
                ) from error
            raise TrainingError(
                f"the ranks did not meet within {duration(seconds)} ({told});"
                " look at the log of the one that is missing, or for a firewall"
            ) from error
    return _Meeting.store


def together(action: Callable[[], Result]) -> list[Result]:
    """Run `action` on this rank and return the results of all ranks. All must call.

    Results are what JSON can hold. How long they may take is the watchdog's to say.

    Raises:
        CheckpointError: it failed with an OSError or NexusError on some rank; the same message on
            all.
        BadBatchesError: so it was there; its exit code is another.
    """
    problem, bad = "", False
    result: Result | None = None
    try:
        result = action()
    except (OSError, NexusError) as error:
        # An exception without a text must count as one all the same.
        problem = str(error) or repr(error)
        bad = isinstance(error, BadBatchesError)
    outcomes = _exchanged((problem, bad, result), position())
    for problem, bad, _ in outcomes:
        if problem:
            raise BadBatchesError(problem) if bad else CheckpointError(problem)
    return [cast(Result, result) for *_, result in outcomes]


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on all ranks. All must call.

    Raises:
        CheckpointError, BadBatchesError: as `together`.
    """
    results = together(lambda: action() if position().rank == 0 else None)
    return cast(Result, results[0])


def _exchanged(mine: Outcome, here: Position) -> list[Outcome]:
    """Return the outcomes of all ranks in their order."""
    if here.world == 1:
        return [mine]
    store = _Meeting.store
    assert store is not None, "ranks.join comes first"
    number = next(_Meeting.calls)
    keys = [f"together/{number}/{rank}" for rank in range(here.world)]
    read = [f"{key}/read" for key in keys]
    store.set(keys[here.rank], json.dumps(mine))
    _wait(store, keys, here)
    found = [tuple(json.loads(told)) for told in store.multi_get(keys)]
    store.set(read[here.rank], "")
    if here.rank == 0:
        # The store ends with this process, which what it has just read may tell to end.
        _wait(store, read, here)
        for key in keys + read:
            store.delete_key(key)
    return found


def _wait(store: dist.Store, keys: list[str], here: Position) -> None:
    """Wait until all keys are there; the first rank that can says who is missing."""
    started = said = time.monotonic()
    pause = 1e-3
    # Not `store.wait`, which holds up signals and writes a warning of its own at each try.
    while not store.check(keys):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
        now = time.monotonic()
        if now - said < SAY_SECONDS:
            continue
        said = now
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing and here.rank == (1 if 0 in missing else 0):
            names = ", ".join(map(str, missing[:8]))
            say(f"waiting for rank {names}, {duration(now - started)} now")


def use_cores() -> None:
    """Let this rank's tensors on the host be computed by all cores that are its own. All must call.

    Cores are shared evenly with the ranks of its node that may run on the same ones; torchrun's
    OMP_NUM_THREADS=1 would leave an offloaded optimizer to one core a rank, the deepspeed launcher
    would give each rank all of them.
    """
    cores = sorted(os.sched_getaffinity(0))
    mine = [platform.node(), cores]
    everyone = together(lambda: mine)
    torch.set_num_threads(max(1, len(cores) // everyone.count(mine)))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; return it. A process without ranks keeps its own."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
