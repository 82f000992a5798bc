"""Signals ask for a stop; all ranks agree on it at a step boundary, or between rounds of a
validation.

Not covered: SIGKILL; signals before the first step, which end a rank at once (train.py).
"""

from __future__ import annotations

import signal
from types import FrameType

from nexus_ds.outputs import ENDING
from nexus_ds.runtime.deepspeed_internals import all_reduce_max


class StopRequest:
    """Remembers Ctrl-C and the signals of ENDING sent to this rank; the step at hand ends in order.

    SIGUSR1, among them, is what `sbatch --signal` sends ahead of a time limit.
    """

    def __init__(self) -> None:
        self.received = 0
        # What nohup has let it ignore stays so.
        ignored = [number for number in ENDING if signal.getsignal(number) is signal.SIG_IGN]
        for number in {*ENDING, signal.SIGINT}.difference(ignored):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> int:
        """Return the signal that any rank has received, 0 for none. All ranks must call.

        They get the same answer: a scheduler may signal one rank alone, or all a moment apart.
        """
        return int(all_reduce_max(float(self.received)))
