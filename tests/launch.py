"""Start real ranks for tests (loopback, gloo, one thread each), and what a process may be given:
file size, umask."""

import atexit
import functools
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nexus_ds.launch import LAUNCH_VARIABLES
from nexus_ds.launch import free_port as any_free_port


def free_port():
    """Return a free port that the other processes of these tests don't draw: it is bound seconds
    later."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while (port := any_free_port()) % count != own:
        pass
    return port


def clean_environment():
    """Return this process's environment without a launcher's variables, one thread a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launched(world):
    """Return the environment of each of `world` ranks."""
    common = clean_environment() | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    ranks = map(str, range(world))
    return [
        common | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(world)}
        for rank in ranks
    ]


def start_ranks(arguments, world, cwd=None):
    """Start `world` python processes with the same arguments and the variables of a launcher."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for environment in launched(world)
    ]


def fork_ranks(arguments, world):
    """Start `world` ranks of a script of the tests as `start_ranks` does, out of a process that has
    imported all modules."""
    return [ForkedRank(arguments, environment) for environment in launched(world)]


@functools.cache
def _rank_server():
    """Start the process that forks ranks; it ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="ranks-")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("rank_server.py"), f"{folder.name}/socket"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(),
    )
    assert server.stdout.readline() == "ready\n"
    atexit.register(lambda: (server.stdin.close(), server.wait()))
    return folder, server


class ForkedRank:
    """A rank out of the rank server, with what the tests use of subprocess.Popen."""

    def __init__(self, arguments, environment):
        folder, _ = _rank_server()
        handle, self.out = tempfile.mkstemp(dir=folder.name)
        os.close(handle)
        os.umask(mask := os.umask(0))
        request = {
            "arguments": list(map(str, arguments)),
            "environment": environment,
            "folder": os.getcwd(),
            "umask": mask,
            "file_limit": resource.getrlimit(resource.RLIMIT_FSIZE),
            "out": self.out,
        }
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"{folder.name}/socket")
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        self.answers = self.socket.makefile()
        self.pid, self.returncode = int(self.answers.readline()), None

    def communicate(self, timeout):
        """Wait for the end; return what was said, and None as Popen does where both streams are
        one."""
        self.socket.settimeout(timeout)
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(int(self.answers.readline()))
            self.socket.close()
        return Path(self.out).read_text(errors="replace"), None


def finish(ranks, code=0, timeout=600):
    """Wait for all ranks; assert their exit code; return rank 0's output."""
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), "\n".join(outputs)
    return outputs[0]


@contextmanager
def file_limit(size):
    """Let no file of this process, or of one that it starts, grow beyond `size` bytes: a write
    stops there, short."""
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
    files = (
        [path for path in directory.rglob("*") if path.is_file()]
        if directory.is_dir()
        else [directory]
    )
    assert files
    return {path.stat().st_mode & 0o777 for path in files}
