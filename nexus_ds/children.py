"""Processes that end with the one that started them, however that ends.

A process that is killed can't end what it has started. So the kernel does it (Linux): whatever is
tied gets SIGTERM at the death of its parent, and clears up as for any SIGTERM; a training saves its
state. Run as a file this ties itself and becomes the command that it is given: that needs nothing
between fork and exec, where a process with threads may hang.
`deepspeed` starts its launcher as a process of its own, which lives on when it is killed: ranks
look after both.
Not covered: other systems, where children of a killed process go on; a `deepspeed` that is killed
in its first seconds, before its ranks look for it; one over several nodes (pdsh, mpirun).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
"""The outer process of DeepSpeed's launcher: its console scripts, and its module."""
LOOK_SECONDS = 1.0


def tie_to_parent(parent: int = 0) -> None:
    """Let this process get SIGTERM when its parent dies; at once if that is dead already.

    Args:
        parent: its process id, where it is known; 0: whoever is the parent now.
    """
    if sys.platform != "linux":
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    # It may have died before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(process: int) -> int:
    """Return a process's parent; OSError if there is no such process."""
    # behind the name, which may hold spaces and brackets: the state, then the parent
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _is_runner(process: int) -> bool:
    words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    # an interpreter and its options come first; what follows are the user's words
    return any(os.path.basename(word) in RUNNERS for word in words[:4])


def tie_to_runner() -> None:
    """Let this process get SIGTERM when the `deepspeed` that started its parent dies.

    The kernel tells of a parent's death alone. Any other grandparent may go: a shell whose user
    logs out of it, of a launcher that is to go on.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    # gone, or a system that does not show it
    with suppress(OSError):
        runner = _parent_of(parent)
        if _is_runner(runner):
            watch = threading.Thread(target=_outlive, args=[parent, runner], daemon=True)
            watch.start()


def _outlive(parent: int, runner: int) -> None:
    """End this process once its parent has got another parent than `runner`."""
    # When the parent itself is dead, the kernel has said so.
    with suppress(OSError):
        while _parent_of(parent) == runner:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)


def tied(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` as a process that ends with this one.

    To be started by this process's main thread: the kernel looks at that thread.
    """
    if sys.platform != "linux":
        return list(command)
    # -S and -I: this file needs the standard library alone.
    return [sys.executable, "-S", "-I", str(Path(__file__)), str(os.getpid()), *command]


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
