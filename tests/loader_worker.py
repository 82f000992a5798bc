"""One rank of a training whose rank 1 fails to read a batch (not a test).

python loader_worker.py STEP words of train.py      under the launcher's variables
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.launch import end, position
from nexus_ds.runtime import loop
from nexus_ds.train import main

STEP = int(sys.argv[1])
honest = loop.Run._batch


def broken(run, step, part):
    if step == STEP and position().rank == 1:
        raise RuntimeError("the text of rank 1 can't be read")
    return honest(run, step, part)


if __name__ == "__main__":
    loop.Run._batch = broken
    end(main(sys.argv[2:]))
