"""Where this process stands in a job, and how it leaves it.

The only reader of what torchrun, deepspeed, srun and sbatch put into the environment; a test holds
that.
Not covered: other launchers, srun with a distribution of ranks other than block.
"""

from __future__ import annotations

import os
import platform
import random
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from nexus_ds.errors import ConfigError, LayoutError

# Exit code of a training or a stage that a signal stopped in order: its state is saved, and the
# same command goes on. slurm/common.sh requeues a job by it (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75
# Of the ranks of a training that lost another one, or make no progress (EX_UNAVAILABLE of
# sysexits.h). No order to go on: slurm/common.sh requeues the job only if it got further.
EXIT_LOST = 69
# Of a training that several bad batches in a row have ended (EX_DATAERR): it saved a state behind
# them, which is no progress, so that slurm/common.sh never requeues it.
EXIT_BAD_BATCHES = 65
# What makes a process a rank, besides what `launch_names` adds. torch reads the first six.
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
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
# torchrun's, of which torch reads that its agent serves the store; of an srun step.
LAUNCH_PREFIXES = ("TORCHELASTIC_", "SLURM_STEP")
NUMBER = re.compile(r"[0-9]{1,9}")
TASKS = re.compile(r"[0-9]{1,9}(\(x[0-9]{1,9}\))?(,[0-9]{1,9}(\(x[0-9]{1,9}\))?)*")
"""4(x2),3: two nodes with 4 each, one with 3."""


@dataclass(frozen=True)
class Position:
    """This rank in the job."""

    rank: int
    world: int
    local_world: int
    """Ranks on this node, and on every other."""
    node: str


def _number(env: Mapping[str, str], name: str, least: int = 0) -> int:
    """Return the whole number in a launcher's variable; LayoutError if there is none."""
    text = env.get(name, "")
    if not NUMBER.fullmatch(text) or int(text) < least:
        raise LayoutError(
            f"{name} is {text[:100]!r}, expected a whole number from {least} on, as torchrun, "
            "deepspeed and srun set it; start the ranks with one of them, or unset RANK to run one"
        )
    return int(text)


def _first_of(env: Mapping[str, str], *names: str) -> str:
    """Return the first of some names that is set to something, the last one if none is."""
    return next((name for name in names if env.get(name)), names[-1])


def _ranks_a_node(env: Mapping[str, str], world: int) -> int:
    """Return the ranks of every node of an srun step; SLURM_NTASKS_PER_NODE is set only where
    somebody asked for it."""
    told = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    if told and not TASKS.fullmatch(told):
        raise LayoutError(
            f"SLURM_STEP_TASKS_PER_NODE is {told[:100]!r}, expected what srun sets, as 4(x2),3; "
            "start the ranks with srun"
        )
    nodes_of = _first_of(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    nodes = _number(env, nodes_of, least=1) if nodes_of in env else 1
    counts = {int(part.partition("(")[0]) for part in told.split(",") if part}
    if not told:
        counts = {world // nodes, -(-world // nodes)}
    if len(counts) > 1:
        near = max(1, world // nodes)
        raise LayoutError(
            f"srun spreads {world} ranks unevenly over {nodes} nodes "
            f"({told or 'by their number'}); expected as many on each: submit with "
            f"--ntasks-per-node={near}"
        )
    return counts.pop()


def position(env: Mapping[str, str] = os.environ) -> Position:
    """Read the launcher's variables: RANK and the rest, else srun's, else a single rank.

    Raises:
        LayoutError: srun spread the ranks unevenly over the nodes.
    """
    node = env.get("SLURMD_NODENAME") or platform.node()
    if "RANK" in env:
        world = _number(env, "WORLD_SIZE", least=1)
        # torchrun's name for it, deepspeed's, or all on this node
        local = _first_of(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
        return Position(_number(env, "RANK"), world, _number(env, local, least=1), node)
    # A job script has SLURM_PROCID too; only what srun has started is a rank.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        world = _number(env, _first_of(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), least=1)
        return Position(_number(env, "SLURM_PROCID"), world, _ranks_a_node(env, world), node)
    return Position(0, 1, 1, node)


def launch_names(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of all that makes this process a rank of a launch, whichever launcher's.

    A launch inside of a launch must not inherit it: it would take itself for that rank, or wait for
    a store that nobody serves.
    """
    return [name for name in env if name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES)]


def meeting_point(here: Position, env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the address and port at which the ranks of a job meet.

    A single rank gets a free port of its own.

    Raises:
        ConfigError: there are other ranks, and the job script did not say where they meet.
    """
    if here.world == 1:
        return "127.0.0.1", free_port()
    if not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise ConfigError(
            f"{here.world} ranks, but not both of MASTER_ADDR and MASTER_PORT are set; export the "
            "first node's name and a port that is free there before srun, as the templates in "
            "slurm/ do"
        )
    return env["MASTER_ADDR"], _number(env, "MASTER_PORT")


def adopt_launcher() -> Position:
    """Set the variables that torch and DeepSpeed read; return the position.

    torchrun and deepspeed have set them; srun and plain python have not.

    Raises:
        ConfigError, LayoutError: srun's ranks can't meet, are spread unevenly, or have no number
            on their node.
    """
    env = os.environ
    here = position()
    # A lone rank has nobody to meet: with a port of its own, runs of one GPU each may share a node,
    # where every `deepspeed` command says 29500. At torchrun's, its agent serves the store.
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    lone = here.world == 1 and not served
    if lone or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        address, port = meeting_point(here)
        env.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    if "RANK" not in env:
        local = _number(env, "SLURM_LOCALID") if here.world > 1 else 0
        env.update(
            RANK=str(here.rank),
            LOCAL_RANK=str(local),
            WORLD_SIZE=str(here.world),
        )
        env["LOCAL_WORLD_SIZE"] = str(here.local_world)
    return here


def first_rank(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is rank 0, also where `position` refuses how ranks are spread."""
    return rank_name(env) == "0"


def has_launcher(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether the parent of this process is torchrun's or deepspeed's launcher.

    Under srun it is SLURM's, which ends ranks itself; in a shell the user's.
    """
    return "RANK" in env and not env.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "CROSS_RANK"))


def rank_name(env: Mapping[str, str] = os.environ) -> str:
    """Return the rank as the launcher wrote it, for a message."""
    return env.get("RANK") or env.get("SLURM_PROCID", "0")


def local_rank(env: Mapping[str, str] = os.environ) -> int:
    """Return this rank's number on its node, which is that of its device."""
    # srun's own, where nobody has called `adopt_launcher`
    name = _first_of(env, "LOCAL_RANK", "SLURM_LOCALID")
    return _number(env, name) if env.get(name) else 0


def device_number(visible: int, env: Mapping[str, str] = os.environ) -> int:
    """Return the number of this rank's device among the `visible` ones.

    A rank that sees one alone (srun's --gpus-per-task, --gpu-bind=single) has that one, whatever
    its own number.
    """
    return 0 if visible == 1 else local_rank(env)


def has_own_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether SLURM lets each rank see one GPU alone (--gpus-per-task, --gpu-bind)."""
    bound = env.get("SLURM_GPU_BIND", "").startswith(("single", "per_task"))
    return bound or bool(env.get("SLURM_GPUS_PER_TASK"))


def tell_device_number(visible: int) -> int:
    """Return `device_number`, and leave it where DeepSpeed looks for it: in LOCAL_RANK."""
    number = device_number(visible)
    os.environ["LOCAL_RANK"] = str(number)
    return number


def let_memory_grow() -> None:
    """Have torch's memory on a GPU grow piece by piece, unless the user chose otherwise.

    Rows of a new size in every pass would break it into pieces that nothing fits into, and the
    plan does not count those. To be called before torch looks: before its first use of a device.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def array_task(env: Mapping[str, str] = os.environ) -> str:
    """Return the digits of this task's index in a SLURM array; '' outside of one."""
    text = env.get("SLURM_ARRAY_TASK_ID", "")
    return text if NUMBER.fullmatch(text) else ""


def job_words(env: Mapping[str, str] = os.environ) -> str:
    """Return this process's SLURM job as `squeue` and `scancel` name it, in words; '' for none."""
    array = ["SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"]
    names = array if array[0] in env else ["SLURM_JOB_ID"]
    numbers = [env.get(name, "") for name in names]
    if not all(NUMBER.fullmatch(number) for number in numbers):
        return ""
    return f"SLURM job {'_'.join(numbers)}"


def job_name(env: Mapping[str, str] = os.environ) -> str:
    """Return what tells this job's temporary files from another's, the same on all of its ranks."""
    # Outside of SLURM a check has one rank.
    return env.get("SLURM_JOB_ID", str(os.getpid()))


def _allotted(env: Mapping[str, str], name: str) -> int:
    """Return a number that SLURM gave; 0 for none, or a word; LayoutError if no machine has it."""
    text = env.get(name, "")
    if text.isdecimal() and not NUMBER.fullmatch(text):
        raise LayoutError(
            f"{name} is {text[:100]!r}, expected a whole number of at most 9 digits, as sbatch "
            "sets it; unset it, or set what this job has on a node"
        )
    return int(text) if text.isdecimal() else 0


def allotted_gpus(env: Mapping[str, str] = os.environ) -> int:
    """Return the GPUs that SLURM gave this job on this node; 0 if it does not say.

    Raises:
        LayoutError: it says more than any machine has.
    """
    return _allotted(env, "SLURM_GPUS_ON_NODE")


def allotted_memory(env: Mapping[str, str] = os.environ) -> int:
    """Return the main memory in bytes that this job asked for on each node; 0 if it did not.

    Raises:
        LayoutError: it says more than any machine has.
    """
    # MiB; 0 means all
    by_core = _allotted(env, "SLURM_MEM_PER_CPU") * _allotted(env, "SLURM_CPUS_ON_NODE")
    return (_allotted(env, "SLURM_MEM_PER_NODE") or by_core) << 20


def end(code: int) -> NoReturn:
    """End this process, whose files are closed, with `code`, and without Python's teardown.

    DeepSpeed keeps the process groups in its modules, so gloo's threads outlive
    `destroy_process_group`. One that drops the tensors of a finished collective while Python is
    torn down asks for the interpreter's lock, is ended there amidst a destructor, and aborts the
    process ("terminate called without an active exception"): the launcher would see SIGABRT of a
    rank that has done its work.
    """
    for stream in (sys.stdout, sys.stderr):
        # None where it was closed from the start; the reader of a pipe may have gone.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago.

    It is none of those that the kernel gives out by itself (from 32768): gloo asks for several a
    rank, and one of another run would get it before this run's first rank binds it. SLURM's
    templates use 20000 to 29999.
    """
    # Not of the generator that runs seed: runs with the same seed would try the same ports.
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LayoutError(
        "no free TCP port from 10000 to 19999 on the loopback interface; end what holds them"
    )


def devices() -> int:
    """Return CUDA devices of this machine, 0 without any."""
    # Here: `status` and `stage --show` import this module and need no torch.
    import torch

    return torch.cuda.device_count()
