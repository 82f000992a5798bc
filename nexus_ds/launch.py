"""Where this process stands in a job, read from the variables of torchrun, deepspeed or srun, and
how it leaves it.

Not covered: other launchers, srun with a distribution of ranks other than block.
"""

from __future__ import annotations

import os
import platform
import random
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from nexus_ds.errors import ConfigError, LayoutError


@dataclass(frozen=True)
class Position:
    """This rank in the job."""

    rank: int
    world: int
    local_world: int
    """Ranks on this node, and on every other."""
    node: str


def _ranks_a_node(env: Mapping[str, str], world: int) -> int:
    """Return the ranks of every node of an srun step; SLURM_NTASKS_PER_NODE is set only where
    somebody asked for it."""
    told = env.get("SLURM_STEP_TASKS_PER_NODE", "")  # 4(x2),3: two nodes with 4 each, one with 3
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    counts = (
        {int(part.partition("(")[0]) for part in told.split(",")}
        if told
        else {world // nodes, -(-world // nodes)}
    )
    if len(counts) > 1:
        near = max(1, world // nodes)
        raise LayoutError(
            f"srun spreads {world} ranks unevenly over {nodes} nodes ({told or 'by their number'}); expected as many on "
            f"each: submit with --ntasks-per-node={near}"
        )
    return counts.pop()


def position(env: Mapping[str, str] = os.environ) -> Position:
    """Read the launcher's variables: RANK and the rest, else srun's, else a single rank.

    Raises:
        LayoutError: srun spread the ranks unevenly over the nodes.
    """
    node = env.get("SLURMD_NODENAME") or platform.node()
    if "RANK" in env:
        world = int(env["WORLD_SIZE"])
        return Position(
            int(env["RANK"]),
            world,
            int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world),
            node,
        )
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        world = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
        return Position(int(env["SLURM_PROCID"]), world, _ranks_a_node(env, world), node)
    return Position(0, 1, 1, node)


def meeting_point(here: Position, env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the address and port at which the ranks of a job meet; a single rank gets a free port
    of its own.

    Raises:
        ConfigError: there are other ranks, and the job script did not say where they meet.
    """
    if here.world == 1:
        return "127.0.0.1", free_port()
    if not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise ConfigError(
            f"{here.world} ranks, but not both of MASTER_ADDR and MASTER_PORT are set; export the first node's name and a "
            "port that is free there before srun, as the templates in slurm/ do"
        )
    return env["MASTER_ADDR"], int(env["MASTER_PORT"])


def adopt_launcher() -> Position:
    """Set the variables that torch and DeepSpeed read where the launcher (srun, plain python) does
    not; return the position.

    Raises:
        ConfigError, LayoutError: srun's ranks can't meet, or are spread unevenly.
    """
    env, here = os.environ, position()
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        address, port = meeting_point(here)
        env.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    if "RANK" not in env:
        local = env["SLURM_LOCALID"] if here.world > 1 else "0"
        env.update(RANK=str(here.rank), LOCAL_RANK=local, WORLD_SIZE=str(here.world))
        env["LOCAL_WORLD_SIZE"] = str(here.local_world)
    return here


def end(code: int) -> NoReturn:
    """End this process, whose files are closed, with `code`, and without Python's teardown.

    DeepSpeed keeps the process groups in its modules, so gloo's threads outlive
    `destroy_process_group`. One that drops the tensors of a finished collective while Python is
    torn down asks for the interpreter's lock, is ended there amidst a destructor, and aborts the
    process ("terminate called without an active exception"): the launcher would see SIGABRT of a
    rank that has done its work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


LAUNCH_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
    "TORCHELASTIC_RUN_ID",
    "CROSS_RANK",
    "CROSS_SIZE",
    "LOCAL_SIZE",
)


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago.

    It is none of those that the kernel gives out by itself (from 32768): gloo asks for several a
    rank, and one of another run would get it before this run's first rank binds it. SLURM's
    templates use 20000 to 29999.
    """
    # not of the generator that runs seed
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LayoutError(
        "no free TCP port from 10000 to 19999 on the loopback interface; end what holds them"
    )


def devices() -> int:
    """Return CUDA devices of this machine, 0 without any."""
    import torch

    return torch.cuda.device_count()
