"""Free memory: the least of what machine, cgroups, limits and SLURM leave; errors that mean it."""

import resource
from types import SimpleNamespace

import pytest
import torch

from nexus_ds.checkpoint import room

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes a /proc and a /sys/fs/cgroup, and their paths."""
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY,) * 2)
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {64 * GIB >> 10} kB\n")
    sizes = {"VmSize": 20 * GIB, "VmData": 3 * GIB, "VmRSS": 2 * GIB}
    (proc / "self" / "status").write_text(
        "Name:\tpython\n" + "".join(f"{name}:\t{size >> 10} kB\n" for name, size in sizes.items())
    )
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    return SimpleNamespace(proc=proc, groups=groups)


def free(machine, env=None):
    return room.host_room(machine.proc, machine.groups, env or {})


def test_without_limits_it_is_what_the_machine_has(machine):
    assert free(machine) == 64 * GIB
    (machine.proc / "self" / "cgroup").unlink()
    assert free(machine) == 64 * GIB


def test_a_cgroup_limits_and_its_page_cache_does_not_count(machine):
    # the limit may stand at any level above
    for path, limit in (("", 16), ("job", 8), ("job/step", None)):
        folder = machine.groups / path
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "memory.max").write_text(f"{limit * GIB}\n" if limit else "max\n")
        (folder / "memory.current").write_text(f"{5 * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert free(machine) == (8 - 5 + 1) * GIB


def test_a_cgroup_of_version_1_limits(machine):
    (machine.proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/\n4:memory:/job\n")
    folder = machine.groups / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(6 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(4 * GIB))
    (folder / "memory.stat").write_text("cache 5\ntotal_inactive_file 0\n")
    assert free(machine) == 2 * GIB


def test_the_limits_of_the_process_and_of_slurm(machine, monkeypatch):
    assert free(machine, {"SLURM_MEM_PER_NODE": str(10 << 10)}) == 8 * GIB
    limits = {resource.RLIMIT_AS: 25 * GIB, resource.RLIMIT_DATA: 4 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], limits[limit]))
    assert free(machine) == GIB
    # more is in use than allowed from now on
    limits[resource.RLIMIT_DATA] = 2 * GIB
    assert free(machine) == 0


def test_on_a_gpu_what_the_allocator_holds_idle_is_free(monkeypatch):
    found = {"mem_get_info": (5, 80), "memory_reserved": 30, "memory_allocated": 10}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda place, value=value: value)
    assert room.room_on(torch.device("cuda", 1)) == 25
    assert room.room_on(torch.device("cpu")) > 0


def test_lack_of_memory_is_known_in_all_its_forms():
    wrapped = OSError("transformers can't load it")
    wrapped.__cause__ = MemoryError()
    said = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    for error in (torch.OutOfMemoryError("CUDA"), said, wrapped, MemoryError()):
        assert room.is_out_of_memory(error)
    assert not room.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not room.is_out_of_memory(ValueError("out of memory"))
