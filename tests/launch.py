"""Start real ranks for tests (loopback, gloo, one thread each), and what a process may be given: file size, umask."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager

from nexus_ds.pipeline import LAUNCH_VARIABLES, free_port


def clean_environment():
    """Return this process's environment without a launcher's variables, one thread a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start_ranks(arguments, world, cwd=None):
    """Start `world` python processes with the same arguments and the variables of a launcher."""
    common = clean_environment() | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(ranks, code=0, timeout=240):
    """Wait for all ranks; assert their exit code; return rank 0's output."""
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), "\n".join(outputs)
    return outputs[0]


@contextmanager
def file_limit(size):
    """Let no file of this process, or of one that it starts, grow beyond `size` bytes: a write stops there, short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def umask(value):
    """Create files, here and in processes that are started, under another umask."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def file_modes(directory):
    """Return the modes that occur among all files under a directory (or of one file)."""
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else [directory]
    assert files
    return {path.stat().st_mode & 0o777 for path in files}
