"""Work that may fail on one rank: all learn of it and raise the same error, so that none waits.

The ranks meet at torch's key-value store and not in a collective: there a GPU would spin while rank
0 tokenises or verifies, and the collectives' limit would be too short for it. So they may meet
before there is a process group. They come there one by one, each within the limit of the first.
Not covered: ranks that die or stand still; `watchdog` ends the others.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_ds.errors import BadBatchesError, CheckpointError, NexusError, TrainingError
from nexus_ds.launch import Position, meeting_point, position
from nexus_ds.progress import duration, say

Result = TypeVar("Result")
Outcome = tuple[str, bool, object]
"""What is wrong ('' for nothing), whether it is of bad batches, and the result."""
SAY_SECONDS = 60.0  # between two lines of who is waited for
LONGEST_PAUSE = 0.5  # seconds between two looks into the store
# Of one try to reach the store, and of one look into it, that count: what took longer was no
# waiting, but a job that was suspended.
LONGEST_TRY = 60.0
LONGEST_LOOK = 2.0
ABSENT = "absent"
"""Key of the ranks that did not come, as a text: the first whose time is over says who they are."""


class _Meeting:
    """The store that the ranks share, and how often they met there."""

    store: dist.Store | None = None
    calls = itertools.count()


def join(seconds: float) -> dist.Store:
    """Return the store at which the ranks of a job meet, by the launcher's variables.

    All ranks must call; a process keeps its store. Rank 0 serves it, under torchrun its agent does.

    Args:
        seconds: that this rank waits for all others.

    Raises:
        TrainingError: some did not come, and which; or another run has the port.
    """
    if _Meeting.store is None:
        here = position()
        store, waited = _reach(here, seconds)
        try:
            _meet(store, here, seconds, waited)
        except RuntimeError as error:
            raise TrainingError(
                f"rank 0, or its launcher, ended before all ranks had come ({_first_line(error)});"
                " look at its log"
            ) from error
        store.set_timeout(timedelta(seconds=seconds))
        _Meeting.store = store
    return _Meeting.store


def _first_line(error: RuntimeError) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _reach(here: Position, seconds: float) -> tuple[dist.Store, float]:
    """Return the store and the seconds that this rank has waited for it; TrainingError beyond."""
    waited = 0.0
    while True:
        began = time.monotonic()
        attempt = min(LONGEST_TRY, seconds - waited)
        try:
            # As if alone: torch would wait for the others without a word of who is missing.
            found = dist.rendezvous("env://", here.rank, 1, timeout=timedelta(seconds=attempt))
            return next(found)[0], waited + min(attempt, time.monotonic() - began)
        except RuntimeError as error:
            told = _first_line(error)
            if "EADDRINUSE" in told:
                raise TrainingError(
                    f"another run has the ranks' port on this node ({told}); give the launcher "
                    "another one: deepspeed --master_port PORT, torchrun --master-port PORT"
                ) from error
            # A name that nobody knows fails at once, and may be known soon; rank 0 fails at itself.
            ours = here.rank == 0 and time.monotonic() - began < attempt / 2
            time.sleep(LONGEST_PAUSE)
            waited += min(attempt, time.monotonic() - began)
            if ours or seconds - waited < LONGEST_PAUSE:
                who = "rank 0" if here.rank else "the ranks' store"
                raise TrainingError(_not_come(who, waited if ours else seconds, told)) from error


def _not_come(who: str, seconds: float, why: str = "") -> str:
    return (
        f"{who} did not come within {duration(seconds)}{f' ({why})' if why else ''}; look at the "
        "log there (a process that hangs before it trains, a node that is lost), or for a firewall;"
        " where ranks start that far apart, raise parallel.timeout_minutes"
    )


def names(missing: list[int]) -> str:
    """Return who is missing in words, the first eight."""
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"rank {', '.join(map(str, missing[:8]))}{more}"


def _meet(store: dist.Store, here: Position, seconds: float, waited: float) -> None:
    """Tell the others that this rank is there, and at which address rank 0 is for it; wait for
    them."""
    keys = _arrivals(here)
    store.set(keys[here.rank], _address_of_rank_0(here))
    pause, then = 1e-3, time.monotonic()
    while not store.check(keys):
        if waited > seconds and (missing := _missing(store, keys)):
            store.compare_set(ABSENT, "", _not_come(names(missing), seconds))
        if store.check([ABSENT]):
            told = store.get(ABSENT).decode()
            if here.rank == 0:
                # The store ends with this process, and the others have yet to read it.
                time.sleep(4 * LONGEST_PAUSE)
            raise TrainingError(told)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE, seconds / 40)
        now = time.monotonic()
        waited += min(now - then, LONGEST_LOOK)
        then = now


def _missing(store: dist.Store, keys: list[str]) -> list[int]:
    """Return the ranks whose key is not there: a question for each, so none for every look."""
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _arrivals(here: Position) -> list[str]:
    return [f"here/{rank}" for rank in range(here.world)]


def _address_of_rank_0(here: Position) -> str:
    """Return the number by which this rank reaches the machine of rank 0; '' on rank 0 itself.

    Names may lead elsewhere there than here: Debian gives a machine's own name 127.0.1.1.
    """
    if here.rank == 0:
        return ""
    try:
        with socket.create_connection(meeting_point(here), timeout=LONGEST_TRY) as probe:
            return str(probe.getpeername()[0])
    except OSError:
        return ""


def addresses_of_rank_0(here: Position) -> list[str]:
    """Return the addresses by which the other ranks reach rank 0's machine, in their order; '' of
    one that does not know. After `join`."""
    store = _Meeting.store
    assert store is not None, "ranks.join comes first"
    return [address.decode() for address in store.multi_get(_arrivals(here)[1:])]


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
        missing = _missing(store, keys)
        if missing and here.rank == (1 if 0 in missing else 0):
            say(f"waiting for {names(missing)}, {duration(now - started)} now")


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
