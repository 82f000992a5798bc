"""Free memory of a device, of this machine and of this process, whatever limits it.

Not covered: swap, memory that other processes of the job are about to take, NUMA nodes.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from nexus_ds.launch import allotted_memory

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# Limit, usage, and what of the usage is page cache that gives way: cgroup v2, and v1.
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Of a process limit, the line of /proc/self/status that counts towards it.
LIMITED = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
# In messages of those that raise no type of their own.
SAID = ("can't allocate memory", "cannot allocate memory", "std::bad_alloc", "out of memory")


def _sizes(text: str) -> dict[str, int]:
    """Return lines like `MemAvailable:  123 kB` in bytes by name."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB" and number.isdecimal():
            found[name] = int(number) << 10
    return found


def _number(path: Path) -> int | None:
    """Return the number in a file; None without the file, or where it holds a word (`max`)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _groups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of the memory cgroups that this process is in, the innermost first."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    # 0::/a/b in v2, 4:memory:/a/b in v1; a container may show less of the tree than it says
    for line in lines or ["0::/"]:
        _, kinds, inside = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = cgroups / "memory" if kinds else cgroups
        folder = root / inside.lstrip("/")
        yield folder
        for parent in folder.parents:
            if root == parent or root in parent.parents:
                yield parent


def _group_room(folder: Path) -> int | None:
    """Return what one cgroup leaves; None where it sets no limit."""
    for limit_name, usage_name, cache_name in CGROUP_FILES:
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or usage is None:
            continue
        stat = (folder / "memory.stat").read_text(encoding="ascii").split()
        stats = dict(zip(stat[::2], stat[1::2], strict=True))
        return limit - usage + int(stats.get(cache_name, 0))
    return None


def host_room(
    proc: Path = PROC, cgroups: Path = CGROUPS, env: Mapping[str, str] | None = None
) -> int:
    """Return bytes of main memory that this process can still take.

    That is the least of what the machine, its cgroups, its own limits (RLIMIT_AS, RLIMIT_DATA) and
    SLURM's allotment leave.

    Args:
        proc, cgroups: where the kernel tells of them.
        env: variables of the job; default this process's.
    """
    own = _sizes((proc / "self" / "status").read_text(encoding="ascii"))
    machine = _sizes((proc / "meminfo").read_text(encoding="ascii"))
    rooms = [machine["MemAvailable"]]
    for limit, counted in LIMITED:
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            rooms.append(soft - own[counted])
    asked = allotted_memory() if env is None else allotted_memory(env)
    if asked:
        rooms.append(asked - own["VmRSS"])
    found = (_group_room(folder) for folder in _groups(proc, cgroups))
    rooms += [room for room in found if room is not None]
    return max(0, min(rooms))


def room_on(place: torch.device) -> int:
    """Return bytes that this process can still take on a device."""
    if place.type != "cuda":
        return host_room()
    free, _ = torch.cuda.mem_get_info(place)
    # What the allocator of this process holds without need is free, too.
    return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it comes from, is a lack of memory on a device or here."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        said = str(error).lower()
        if isinstance(error, RuntimeError | OSError) and any(words in said for words in SAID):
            return True
        error = error.__cause__ or error.__context__
    return False
