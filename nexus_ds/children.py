"""Processes that end with the one that started them, however that ends.

A process that is killed can't end what it has started. So the kernel does it (Linux): whatever is
tied gets SIGTERM at the death of its parent, and clears up as for any SIGTERM; a training saves its
state. Run as a file this ties itself and becomes the command that it is given: that needs nothing
between fork and exec, where a process with threads may hang.
Not covered: other systems, where children of a killed process go on; a launcher of DeepSpeed whose
own outer process is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


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
