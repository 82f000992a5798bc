"""One rank of a training that tells what each step was given, and stops when it is asked to (not a
test).

python resume_worker.py LOG STOP section.key=value ...      under the launcher's variables; writes
LOG-<rank>

The log gets a line a step that was done, [step, samples], a sample as its domain and tokens. After
step STOP rank 1 sends itself SIGUSR1, as a scheduler does. With SLOW_SAVE=STEP in the environment
rank 1 needs a minute for the middle of its file of that step's state.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from nexus_ds.config import load_config
from nexus_ds.launch import position
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import loop, states
from nexus_ds.train import end


class Watched(loop.Run):
    """Notes what the passes of a step take, made ahead or not."""

    def _take(self, step, part):
        tokens, domains = super()._take(step, part)
        self.taken += [[int(d), *row] for d, row in zip(domains, tokens.tolist(), strict=True)]
        return tokens, domains

    def _step(self, step, tally):
        self.taken = []
        norm = super()._step(step, tally)
        with Path(f"{sys.argv[1]}-{self.rank}").open("a") as file:
            file.write(json.dumps([step + 1, self.taken]) + "\n")
        if self.rank == 1 and step + 1 == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGUSR1)
        return norm


def slowly(point, step):
    """Stand for a disk that is slow: what is written so far is there, and not all of it."""
    if (point, f"{step}", position().rank) == ("during_file", os.environ.get("SLOW_SAVE"), 1):
        time.sleep(60)


if __name__ == "__main__":
    states._fault = slowly
    loop.Run = Watched
    end(loop.train(resolve(load_config("demo", sys.argv[3:])), "", position()))
