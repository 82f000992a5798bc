"""One rank that times saving and resuming against a plain copy of the same bytes (not a test).

python speed_worker.py CHECKPOINT STATES OUT KEY=VALUE ...      under the launcher's variables

OUT.json: parameters, bytes, and seconds of each round: save, resume (verified), copy (each rank its
own file, flushed to the disk) and read (each rank its own file).
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from parity import start, train_step

from nexus_ds.launch import end
from nexus_ds.runtime import states
from nexus_ds.runtime.portable_state import shapes

ROUNDS = 3


def timed(action):
    """Return the seconds until all ranks are through."""
    dist.barrier()
    started = time.monotonic()
    action()
    dist.barrier()
    return time.monotonic() - started


def copy(source, target):
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    target.unlink()


def main():
    checkpoint, folder, out, *words = sys.argv[1:]
    engine, config, batch, _ = start(checkpoint, words)
    folder = Path(folder)
    windows = torch.randint(
        100, (config.training.batch_size, 13), generator=torch.Generator().manual_seed(0)
    )
    train_step(engine, config, batch, windows)
    description = {"layout": "timed", "config": {}}
    seconds = {"save": [], "resume": [], "copy": [], "read": []}
    for turn in range(1, ROUNDS + 1):
        seconds["save"].append(
            timed(lambda turn=turn: states.save(engine, folder, turn, description, 1))
        )
        seconds["resume"].append(timed(lambda: states.resume(engine, folder, description)))
        mine = folder / f"step_{turn}" / f"rank_{dist.get_rank():05}.safetensors"
        seconds["copy"].append(
            timed(lambda mine=mine: copy(mine, folder / f"copy_{dist.get_rank()}"))
        )
        seconds["read"].append(timed(mine.read_bytes))
    size = sum(p.stat().st_size for p in (folder / f"step_{ROUNDS}").iterdir())
    found = {
        "parameters": sum(math.prod(s) for s in shapes(engine.module).values()),
        "bytes": size,
        "seconds": seconds,
    }
    if dist.get_rank() == 0:
        Path(f"{out}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
