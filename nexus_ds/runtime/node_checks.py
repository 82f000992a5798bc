"""Checks before a job's expensive part, on all ranks at once; a failure names the node and the
cause.

Each rank looks at its own node and reports through a key-value store at MASTER_ADDR:MASTER_PORT;
rank 0 compares, names ranks that never came, and only then do all ranks try one all-reduce.
Not covered: speed of the network beyond one all-reduce, health of devices, storage that fills up
later.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.launch import Position, allotted_gpus, allotted_memory, job_name
from nexus_ds.planning import memory as space
from nexus_ds.planning.layout import Layout, share_of
from nexus_ds.planning.sizes import Sizes, sizes_of
from nexus_ds.settings import Config

COMPARED = ("torch", "deepspeed", "transformers", "safetensors", "numpy")
REDUCED_FLOATS = 1 << 20  # 4 MiB
FOLDER_SECONDS = 5.0  # a network file system may show a new file late


class PreflightError(NexusError):
    """Something that would make the job fail later; the message has one line a cause, each with its
    node."""


def versions() -> dict[str, str]:
    """Return the versions that must agree on all nodes."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in COMPARED}


def version_problems() -> list[str]:
    """Return installed packages that are not what the package asks for."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("nexus-ds") or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # used from a folder, without installation: nothing says what is wanted
    problems = []
    for requirement in wanted:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(
                f"{requirement.name} is not installed, expected {requirement}; type: make setup"
            )
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(
                f"{requirement.name} {found} found, {requirement.specifier} expected; type: make setup"
            )
    return problems


def device_problems(here: Position, visible: int, env: Mapping[str, str]) -> list[str]:
    """Compare the devices that torch sees on this node with what the job asked for and the ranks
    that share them."""
    if env.get("DS_ACCELERATOR") == "cpu":
        return []
    requested = allotted_gpus(env)
    if visible < requested:
        return [
            f"the job has {requested} GPUs on this node, torch sees {visible}: driver, container option (--nv) or a CPU "
            "build of torch? To compute on CPUs: export DS_ACCELERATOR=cpu"
        ]
    if visible and here.local_world > visible:
        return [
            f"{here.local_world} ranks share {visible} GPUs; submit with --ntasks-per-node={visible}"
        ]
    if requested > here.local_world and here.world > 1:
        return [
            f"{requested} GPUs for {here.local_world} ranks; submit with --ntasks-per-node={requested}"
        ]
    return []


def read_zero(config: Config, ds_json: str) -> dict[str, Any]:
    """Return what a DeepSpeed JSON says of ZeRO, without one the recipe's stage; training itself
    checks the file."""
    if not ds_json:
        return {"stage": config.parallel.zero_stage}
    try:
        values = json.loads(Path(ds_json).read_text(encoding="utf-8"))
        return dict(values.get("zero_optimization", {}))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{ds_json}: no DeepSpeed configuration ({error}); the project's are in ds_configs/"
        ) from error


def layout_of(config: Config, here: Position, sizes: Sizes, zero: dict[str, Any]) -> Layout:
    """Return how the stage will be spread over the ranks."""
    fitting = [
        n for n in range(1, here.local_world + 1) if here.world % n == 0 and n <= sizes.experts
    ]
    offload = "optimizer" if "offload_optimizer" in zero else "none"
    share = share_of(config.training, here.world)
    micro = config.training.micro_batch_size or share
    return Layout(
        stage=zero.get("stage", config.parallel.zero_stage),
        offload=offload + "+parameters" if "offload_param" in zero else offload,
        expert=config.parallel.expert or max(fitting, default=1),
        world=here.world,
        micro=micro,
        accumulation=share // micro,
        checkpointing=config.training.activation_checkpointing,
    )


@dataclass(frozen=True)
class Needs:
    """What a stage will take, in bytes: on disk, of one GPU, of a node's main memory."""

    disk: float = 0.0
    gpu: float = 0.0
    host: float = 0.0


def needs_of(config: Config, here: Position, ds_json: str) -> Needs:
    """Plan a training stage; a checkpoint that the job has yet to make is planned from the recipe's
    sizes.

    Raises:
        NexusError: a layout, checkpoint or DeepSpeed JSON that can't be used.
    """
    if config.model.path and not Path(config.model.path).exists():
        config = replace(config, model=replace(config.model, path=""))
    sizes, width = sizes_of(config), 2 if config.model.dtype == "bf16" else 4
    layout = layout_of(config, here, sizes, read_zero(config, ds_json))
    planned = space.memory(sizes, layout, width, config.data.sequence_length, here.local_world)
    on_disk = space.disk(sizes, width, config.training.keep_last)["total"]
    return Needs(on_disk, planned.gpu_bytes, planned.host_bytes)


def memory_problems(needs: Needs, gpu: float, host: float) -> list[str]:
    """Compare what is planned with the memory of a GPU and of the node; 0 for one that is not
    known."""
    advice = "see nexus-ds plan for a layout that fits (more ranks, offload, a smaller training.micro_batch_size)"
    found = []
    if gpu and needs.gpu > gpu:
        found.append(
            f"a rank is planned to need {size(needs.gpu)} of GPU memory, a GPU has {size(gpu)}; {advice}"
        )
    if host and needs.host > host:
        found.append(
            f"{size(needs.host)} of main memory are planned, the job has {size(host)} here; {advice}"
        )
    return found


def host_memory(env: Mapping[str, str]) -> float:
    """Return the main memory in bytes that the job has on this node: its request, else the
    machine's."""
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
        f"{run}: {size(free)} free, {size(needed)} will be written (checkpoint and training states); free some, or lower "
        "training.keep_last"
    ]


class Meeting:
    """The ranks of a job at one key-value store, which rank 0 serves.

    Raises:
        PreflightError: this rank does not reach it.
    """

    def __init__(self, here: Position, address: str, port: int, seconds: float) -> None:
        import torch.distributed as dist

        self.here, self.place, self.seconds = here, f"{address}:{port}", seconds
        try:
            self.store = dist.TCPStore(
                address,
                port,
                here.world,
                here.rank == 0,
                timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            what = "can't serve" if here.rank == 0 else "does not reach"
            raise PreflightError(
                f"{here.node}: rank {here.rank} {what} {self.place} within {seconds:.0f} s ({reason}); set "
                "NEXUS_MASTER_ADDR and GLOO_SOCKET_IFNAME/NCCL_SOCKET_IFNAME in slurm/site.sh, or look for a firewall"
            ) from error

    def tell(self, key: str, value: Any) -> None:
        """Publish a value."""
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float | None = None) -> Any:
        """Return a value as soon as it is published; None after `seconds`."""
        import torch.distributed as dist

        try:
            self.store.wait(
                [key], timedelta(seconds=self.seconds if seconds is None else max(seconds, 0.01))
            )
        except (dist.DistError, RuntimeError):
            return None
        return json.loads(self.store.get(key))


def folder_problems(meeting: Meeting, run: Path) -> list[str]:
    """Let rank 0 write a file into the run's folder and every rank read it."""
    here, probe = meeting.here, run / f".preflight-{job_name()}"
    if here.rank == 0:
        try:
            secret = uuid.uuid4().hex
            probe.write_text(secret, encoding="utf-8")
        except OSError as error:
            meeting.tell("folder", None)
            return [f"can't write into {run}: {error.strerror}"]
        meeting.tell("folder", [str(probe), secret])
        return []
    told = meeting.hear("folder")
    if told is None:
        return []  # rank 0 says why
    path, secret = Path(told[0]), told[1]
    deadline = time.monotonic() + FOLDER_SECONDS
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text(encoding="utf-8") == secret:
            return []
        time.sleep(0.1)
    return [
        f"{run} is not the folder that rank 0 sees (its new file {path.name} is not here); mount it on all nodes"
    ]


def absent(
    reports: list[dict[str, Any] | None], here: Position, place: str, seconds: float
) -> list[str]:
    """Name the ranks that did not report, with their nodes where the job's nodes are known."""
    nodes = os.environ.get("NEXUS_NODES", "").split()
    found = []
    for rank, report in enumerate(reports):
        if report is None:
            index = rank // here.local_world
            node = nodes[index] if index < len(nodes) else "unknown node"
            found.append(
                f"{node}: rank {rank} did not come to {place} within {seconds:.0f} s; did it start, is there a firewall?"
            )
    return found


def differences(reports: list[dict[str, Any]]) -> list[str]:
    """Name nodes whose versions are not those of rank 0."""
    first, found = reports[0], []
    for report in reports[1:]:
        for name, version in report["versions"].items():
            if version != first["versions"][name]:
                found.append(
                    f"{report['node']}: {name} {version}, but {first['versions'][name]} on {first['node']}"
                )
    return found


def all_reduce_seconds(meeting: Meeting, cuda: bool) -> float:
    """Join a process group over the store and return the time of one all-reduce of 4 MiB, the
    second one.

    Raises:
        PreflightError: it failed, or its sum is wrong.
    """
    import torch
    import torch.distributed as dist

    here = meeting.here
    device = torch.device("cuda", here.rank % here.local_world) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=here.rank,
            world_size=here.world,
            timeout=timedelta(seconds=meeting.seconds),
        )
        for _ in range(2):  # the first one connects
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


def _unique(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def local_report(
    run: Path, here: Position, visible: int, plan: Callable[[], Needs]
) -> dict[str, Any]:
    """Return what this rank says of its node: versions, needs, problems."""
    problems = version_problems() + device_problems(here, visible, os.environ)
    needs = Needs()
    try:
        run.mkdir(parents=True, exist_ok=True)
        needs = plan()
        problems += disk_problems(run, needs.disk)
        if visible:  # the plan is one for GPUs
            problems += memory_problems(needs, gpu_memory(), host_memory(os.environ))
    except OSError as error:
        problems.append(f"can't use {run}: {error.strerror}")
    except NexusError as error:
        problems.append(str(error))
    lines = [f"{here.node}: {problem}" for problem in problems]
    return {"node": here.node, "versions": versions(), "needs": asdict(needs), "problems": lines}


def gpu_memory() -> float:
    """Return the memory of this rank's GPU in bytes."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory)


def agree(meeting: Meeting, report: dict[str, Any]) -> list[str]:
    """Exchange reports; return all problems on rank 0, and [''] on others when there are any."""
    here = meeting.here
    meeting.tell(f"report {here.rank}", report)
    if here.rank:
        problems = meeting.hear("problems", 3 * meeting.seconds)
        return [""] if problems is None or problems else []
    deadline = time.monotonic() + meeting.seconds
    heard = [
        meeting.hear(f"report {rank}", deadline - time.monotonic()) for rank in range(here.world)
    ]
    present = [found for found in heard if found is not None]
    problems = absent(heard, here, meeting.place, meeting.seconds) + [
        p for r in present for p in r["problems"]
    ]
    problems = _unique(problems + differences(present))
    meeting.tell("problems", problems)
    return problems


def check(
    run: Path, here: Position, address: str, port: int, seconds: float, plan: Callable[[], Needs]
) -> str:
    """Run all checks on this rank; return what was found, in one line.

    Args:
        run: folder of the run, which all nodes must share.
        here: this rank.
        address, port: where rank 0 serves the store.
        seconds: that a rank waits for the others.
        plan: returns what the stage will take.

    Raises:
        PreflightError: on rank 0 with every problem of all nodes; elsewhere with an empty message.
    """
    import torch

    started = time.monotonic()
    visible = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    report = local_report(run, here, visible, plan)
    meeting = Meeting(here, address, port, seconds)
    report["problems"] += [f"{here.node}: {problem}" for problem in folder_problems(meeting, run)]
    try:
        problems = agree(meeting, report)
        if problems:
            raise PreflightError("\n".join(problems))
        reduced = all_reduce_seconds(meeting, visible > 0)
    finally:
        _leave(meeting, run)
    needs = Needs(**report["needs"])
    where = f"{visible} GPUs a node" if visible else "CPUs"
    memory = f" memory: {size(needs.gpu)} of {size(gpu_memory())} a GPU planned;" if visible else ""
    return (
        f"preflight: {here.world} ranks, {here.local_world} a node, on {where}; torch {torch.__version__};{memory} "
        f"disk: {size(needs.disk)} of {size(shutil.disk_usage(run).free)} free; shared folder: same; "
        f"all-reduce of 4 MiB: {1000 * reduced:.1f} ms; {time.monotonic() - started:.1f} s"
    )


def _leave(meeting: Meeting, run: Path) -> None:
    """Let the rank that serves the store go last, so that the others don't complain of a lost
    connection."""
    if meeting.here.rank:
        meeting.store.add("gone", 1)
        return
    deadline = time.monotonic() + 3
    while meeting.store.add("gone", 0) < meeting.here.world - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    for file in run.glob(f".preflight-{job_name()}"):
        file.unlink(missing_ok=True)
