"""Checks of a job's nodes before its expensive part, on all ranks at once (the verb `preflight`).

A failure names the node and the cause. Each rank looks at its own node and reports through a
key-value store at MASTER_ADDR:MASTER_PORT; rank 0 compares, names ranks that never came, and only
then do all ranks try one all-reduce.
torch is imported where it is used, so that a command may import this module and still be quick.
Not covered: speed of the network beyond one all-reduce, health of devices, storage that fills up
later.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.launch import (
    Position,
    allotted_gpus,
    allotted_memory,
    device_number,
    has_own_gpu,
    job_name,
)
from nexus_ds.planning import fitting
from nexus_ds.planning.choose import WIDTH
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.runtime.installed import version_problems, versions
from nexus_ds.settings import Config

REDUCED_FLOATS = 1 << 20  # 4 MiB
LEAVING = 30.0  # seconds that the rank which serves the store waits for the others' last word
FOLDER_SECONDS = 5.0  # a network file system may show a new file late


class PreflightError(NexusError):
    """Something that would make the job fail later.

    The message has one line a cause, each with its node; on other ranks than 0 it is empty.
    """


def device_problems(here: Position, visible: int, env: Mapping[str, str]) -> list[str]:
    """Compare the devices that torch sees on this node with the job's request and its ranks.

    Args:
        here: this rank.
        visible: GPUs that torch sees.
        env: SLURM_GPUS_ON_NODE is the request; DS_ACCELERATOR=cpu asks for none.
    """
    if env.get("DS_ACCELERATOR") == "cpu":
        return []
    requested = allotted_gpus(env)
    if visible == 1 and has_own_gpu(env):
        # Every rank of the node sees another one.
        visible = here.local_world
    if visible < requested:
        return [
            f"the job has {requested} GPUs on this node, torch sees {visible}: driver, container "
            "option (--nv) or a CPU build of torch? To compute on CPUs: export DS_ACCELERATOR=cpu"
        ]
    if visible and here.local_world > visible:
        return [
            f"{here.local_world} ranks share {visible} GPUs; "
            f"submit with --ntasks-per-node={visible}"
        ]
    if requested > here.local_world and here.world > 1:
        return [
            f"{requested} GPUs for {here.local_world} ranks; "
            f"submit with --ntasks-per-node={requested}"
        ]
    return []


def read_zero(config: Config, ds_json: str) -> Mapping[str, Any]:
    """Return what a DeepSpeed JSON says of ZeRO, without one the recipe's stage, if it has one.

    Training itself checks the file; importing what does that would take seconds here.

    Raises:
        ConfigError: no such file, or no JSON object.
    """
    if not ds_json:
        return fitting.zero_of(config)
    try:
        values = json.loads(Path(ds_json).read_text(encoding="utf-8"))
        return {"stage": fitting.stage_of(config.parallel)} | values.get("zero_optimization", {})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{ds_json}: no DeepSpeed configuration ({error}); the project's are in ds_configs/"
        ) from error


@dataclass(frozen=True)
class Needs:
    """What a stage will take, in bytes."""

    disk: float = 0.0
    gpu: float = 0.0
    """Of one GPU."""
    host: float = 0.0
    """Of a node's main memory."""
    problem: str = ""
    """Why the stage can't start with the memory that is there, '' if it can."""


@dataclass(frozen=True)
class Report:
    """What a rank says of its node."""

    node: str
    versions: dict[str, str]
    needs: Needs
    problems: list[str]
    """One line each, with the node's name."""

    @classmethod
    def of(cls, value: dict[str, Any]) -> Report:
        """Return a report that another rank sent as JSON."""
        return cls(**value | {"needs": Needs(**value["needs"])})


def machine_of(here: Position, gpu: float, host: float) -> Machine:
    """Return the job's GPUs; bytes of `gpu` of each, of `host` of a node, 0 for what is unknown."""
    nodes = here.world // here.local_world
    return Machine(gpus=here.world, nodes=nodes, gpu_memory=gpu or math.inf, host_memory=host)


def needs_of(config: Config, here: Position, ds_json: str, gpu: float, host: float) -> Needs:
    """Plan a training stage.

    A checkpoint that the job has yet to make is planned from the recipe's sizes.

    Args:
        config: of the stage.
        here: this rank.
        ds_json: path of the DeepSpeed JSON; '' for the recipe's ZeRO stage.
        gpu: bytes of a GPU; 0: not known.
        host: bytes of the node's main memory; 0: not known.

    Raises:
        NexusError: a layout, checkpoint or DeepSpeed JSON that can't be used.
    """
    if config.model.path and not Path(config.model.path).exists():
        config = replace(config, model=replace(config.model, path=""))
    sizes = sizes_of(config)
    machine = machine_of(here, gpu, host)
    found = fitting.fitted(sizes, machine, config, read_zero(config, ds_json))
    problem = ""
    if config.parallel.check_memory and not found.fits:
        problem = fitting.refusal(sizes, machine, config, found)
    on_disk = disk(sizes, WIDTH[config.model.dtype], config.training.keep_last)["total"]
    return Needs(on_disk, found.memory.gpu_bytes, found.memory.host_bytes, problem)


def host_memory(env: Mapping[str, str]) -> float:
    """Return the main memory in bytes that the job has here: its request, else the machine's."""
    asked = float(allotted_memory(env))
    machine = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(machine, asked) if asked else machine


def size(number: float) -> str:
    """Return bytes as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def disk_problems(run: Path, needed: float) -> list[str]:
    """Compare the free disk of the run's folder with what will be written."""
    free = shutil.disk_usage(run).free
    if free >= needed:
        return []
    return [
        f"{run}: {size(free)} free, {size(needed)} will be written (checkpoint and training "
        "states); free some, or lower training.keep_last"
    ]


class Meeting:
    """The ranks of a job at one key-value store, which rank 0 serves.

    Args:
        here: this rank.
        address, port: where rank 0 serves the store.
        seconds: that a rank waits for the others.

    Raises:
        PreflightError: this rank does not reach it.
    """

    def __init__(self, here: Position, address: str, port: int, seconds: float) -> None:
        import torch.distributed as dist

        self.here = here
        self.point = f"{address}:{port}"
        self.seconds = seconds
        try:
            self.store = dist.TCPStore(
                address,
                port,
                here.world,
                here.rank == 0,
                timedelta(seconds=seconds),
                # Rank 0 goes on at once, so that it can tell who never came.
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            what = "can't serve" if here.rank == 0 else "does not reach"
            raise PreflightError(
                f"{here.node}: rank {here.rank} {what} {self.point} within {seconds:.0f} s "
                f"({reason}); set NEXUS_MASTER_ADDR and GLOO_SOCKET_IFNAME/NCCL_SOCKET_IFNAME in "
                "slurm/site.sh, or look for a firewall"
            ) from error

    def tell(self, key: str, value: object) -> None:
        """Publish a value that JSON can hold."""
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float | None = None) -> Any:
        """Return a value as soon as it is published; None after `seconds`."""
        import torch.distributed as dist

        # 0 means to a store that there is no limit (c10d's kNoTimeout).
        limit = self.seconds if seconds is None else max(seconds, 0.01)
        try:
            self.store.wait([key], timedelta(seconds=limit))
        except (dist.DistError, RuntimeError):
            return None
        return json.loads(self.store.get(key))


def _probe() -> str:
    """Return the name of the file by which the run's folder is recognised."""
    return f".preflight-{job_name()}"


def folder_problems(meeting: Meeting, run: Path) -> list[str]:
    """Let rank 0 write a file into the run's folder and every rank read it."""
    if meeting.here.rank == 0:
        return _write_probe(meeting, run)
    told = meeting.hear("folder")
    if told is None:
        return []  # rank 0 says why
    path = Path(told[0])
    secret = told[1]
    deadline = time.monotonic() + FOLDER_SECONDS
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text(encoding="utf-8") == secret:
            return []
        time.sleep(0.1)
    return [
        f"{run} is not the folder that rank 0 sees (its new file {path.name} is not here); mount "
        "it on all nodes"
    ]


def _write_probe(meeting: Meeting, run: Path) -> list[str]:
    # The content tells the folder from another one with a probe that was left behind.
    probe = run / _probe()
    secret = uuid.uuid4().hex
    try:
        probe.write_text(secret, encoding="utf-8")
    except OSError as error:
        meeting.tell("folder", None)
        return [f"can't write into {run}: {error.strerror}"]
    meeting.tell("folder", [str(probe), secret])
    return []


def absent(
    reports: Sequence[Report | None], here: Position, point: str, seconds: float
) -> list[str]:
    """Name the ranks that did not report, with their nodes where the job's nodes are known."""
    nodes = os.environ.get("NEXUS_NODES", "").split()
    found = []
    for rank, report in enumerate(reports):
        if report is not None:
            continue
        index = rank // here.local_world
        node = nodes[index] if index < len(nodes) else "unknown node"
        found.append(
            f"{node}: rank {rank} did not come to {point} within {seconds:.0f} s; did it start, "
            "is there a firewall?"
        )
    return found


def differences(reports: Sequence[Report]) -> list[str]:
    """Name nodes whose versions are not those of rank 0."""
    first = reports[0]
    found = []
    for report in reports[1:]:
        for name, version in report.versions.items():
            if version != first.versions[name]:
                found.append(
                    f"{report.node}: {name} {version}, but {first.versions[name]} on {first.node}"
                )
    return found


def all_reduce_seconds(meeting: Meeting, cuda: bool) -> float:
    """Join a process group over the store; return the seconds of an all-reduce of 4 MiB.

    Raises:
        PreflightError: it failed, or its sum is wrong.
    """
    import torch
    import torch.distributed as dist

    here = meeting.here
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=here.rank,
            world_size=here.world,
            timeout=timedelta(seconds=meeting.seconds),
        )
        for _ in range(2):  # the first one connects; the second is timed
            tensor = torch.ones(REDUCED_FLOATS, device=device)
            started = time.monotonic()
            dist.all_reduce(tensor)
            total = float(tensor[-1])
            seconds = time.monotonic() - started
        dist.destroy_process_group()
    except RuntimeError as error:
        raise PreflightError(
            f"{here.node}: rank {here.rank}: the all-reduce failed: {str(error).splitlines()[0]}"
        ) from error
    if total != here.world:
        raise PreflightError(
            f"{here.node}: the all-reduce of ones over {here.world} ranks gave {total}"
        )
    return seconds


def local_report(
    run: Path, here: Position, visible: int, plan: Callable[[float, float], Needs]
) -> Report:
    """Return what this rank says of its node.

    Args:
        run: folder of the run; made if it is not there.
        here: this rank.
        visible: GPUs that torch sees.
        plan: returns what the stage will take, of the bytes of a GPU and of the node; 0: not known.
    """
    problems = version_problems() + device_problems(here, visible, os.environ)
    needs = Needs()
    try:
        run.mkdir(parents=True, exist_ok=True)
        # the plan is one for GPUs
        memory = (gpu_memory(), host_memory(os.environ)) if visible else (0.0, 0.0)
        needs = plan(*memory)
        problems += disk_problems(run, needs.disk)
        if needs.problem:
            problems.append(needs.problem)
    except OSError as error:
        problems.append(f"can't use {run}: {error.strerror}")
    except NexusError as error:
        problems.append(str(error))
    lines = [f"{here.node}: {problem}" for problem in problems]
    return Report(here.node, versions(), needs, lines)


def gpu_memory() -> float:
    """Return the memory of this rank's GPU in bytes."""
    import torch

    device = torch.cuda.current_device()
    return float(torch.cuda.get_device_properties(device).total_memory)


def agree(meeting: Meeting, report: Report) -> list[str]:
    """Exchange reports; return all problems on rank 0, and [''] on others when there are any."""
    here = meeting.here
    meeting.tell(f"report {here.rank}", asdict(report))
    if here.rank:
        problems = meeting.hear("problems", 3 * meeting.seconds)
        return [""] if problems is None or problems else []
    deadline = time.monotonic() + meeting.seconds
    reports: list[Report | None] = []
    for rank in range(here.world):
        told = meeting.hear(f"report {rank}", deadline - time.monotonic())
        reports.append(None if told is None else Report.of(told))
    present = [found for found in reports if found is not None]
    lines = absent(reports, here, meeting.point, meeting.seconds)
    for found in present:
        lines += found.problems
    # All ranks of a node say the same.
    problems = list(dict.fromkeys(lines + differences(present)))
    meeting.tell("problems", problems)
    return problems


def check(
    run: Path,
    here: Position,
    address: str,
    port: int,
    seconds: float,
    plan: Callable[[float, float], Needs],
) -> str:
    """Run all checks on this rank; return what was found, in one line.

    Args:
        run: folder of the run, which all nodes must share.
        here: this rank.
        address, port: where rank 0 serves the store.
        seconds: that a rank waits for the others.
        plan: see `local_report`.

    Raises:
        PreflightError: on rank 0 with every problem of all nodes; elsewhere with an empty message.
    """
    import torch

    started = time.monotonic()
    visible = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if visible:
        # Else every rank would ask the first GPU. Too many ranks for the GPUs are reported below.
        torch.cuda.set_device(device_number(visible) % visible)
    report = local_report(run, here, visible, plan)
    meeting = Meeting(here, address, port, seconds)
    shared = [f"{here.node}: {problem}" for problem in folder_problems(meeting, run)]
    report = replace(report, problems=report.problems + shared)
    try:
        problems = agree(meeting, report)
        if problems:
            raise PreflightError("\n".join(problems))
        reduced = all_reduce_seconds(meeting, visible > 0)
    finally:
        _leave(meeting, run)
    needs = report.needs
    where = f"{visible} GPUs a node" if visible else "CPUs"
    memory = f" memory: {size(needs.gpu)} of {size(gpu_memory())} a GPU planned;" if visible else ""
    free = shutil.disk_usage(run).free
    return (
        f"preflight: {here.world} ranks, {here.local_world} a node, on {where}; "
        f"torch {torch.__version__};{memory} disk: {size(needs.disk)} of {size(free)} free; "
        f"shared folder: same; all-reduce of 4 MiB: {1000 * reduced:.1f} ms; "
        f"{time.monotonic() - started:.1f} s"
    )


def _leave(meeting: Meeting, run: Path) -> None:
    """Let the rank that serves the store go last: others would complain of a lost connection."""
    if meeting.here.rank:
        meeting.store.add("gone", 1)
        return
    deadline = time.monotonic() + LEAVING
    while meeting.store.add("gone", 0) < meeting.here.world - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    # A folder that can't be written to has been told of already.
    with suppress(OSError):
        (run / _probe()).unlink()
