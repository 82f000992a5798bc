"""Signals ask for a stop; all ranks agree on it at a step boundary.

Not covered: SIGKILL.
"""

from __future__ import annotations

import signal
from types import FrameType

from nexus_ds.runtime.deepspeed_internals import all_reduce_max


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1 sent to this rank; the step at hand ends in order."""

    def __init__(self) -> None:
        self.received = 0
        # SIGUSR1 is what `sbatch --signal` sends ahead of a time limit.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> int:
        """Return the signal that any rank has received, 0 for none. All ranks must call.

        They get the same answer: a scheduler may signal one rank alone, or all a moment apart.
        """
        return int(all_reduce_max(float(self.received)))
