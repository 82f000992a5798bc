"""One rank that is watched (not a test): steps around an all-reduce, until something happens.

python watchdog_worker.py SECONDS WHAT      under the launcher's variables; SECONDS is the limit

WHAT: go on until a signal comes | done: end after step 9 | stuck: rank 1 sleeps in step 5 | error:
rank 1 ends with an error in step 5 | late: rank 0 works for longer than the limit while the others
wait for it at the store | absent:RANK: that rank stands still before it comes | serving: rank 0
does so once it serves the store
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.errors import DataError, NexusError
from nexus_ds.launch import adopt_launcher, end
from nexus_ds.runtime import ranks, watchdog


def sleep_for_ever():
    time.sleep(3600)


def step_of(rank, step, what):
    watchdog.at("a pass", step)
    if step == 5 and rank == 1:
        if what == "stuck":
            sleep_for_ever()
        if what == "error":
            raise DataError("a row is damaged")
    dist.all_reduce(torch.ones(1))
    if step == 3:
        print("going", flush=True)


def main():
    seconds, what = float(sys.argv[1]), sys.argv[2]
    here = adopt_launcher()
    if what == f"absent:{here.rank}":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "serving" and here.rank == 0:
        ranks._meet = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    with watchdog.watched(here, seconds / 60):
        if what == "late":
            watchdog.at("long work", minutes=60)
            ranks.on_rank_0(lambda: time.sleep(2 * seconds))
        # the limit is for steps, not for how long a machine takes to get there
        watchdog.at("the meeting", minutes=2)
        dist.init_process_group("gloo")
        for step in range(1, 10 if what in ("done", "late") else 10**6):
            step_of(here.rank, step, what)
            time.sleep(0.01)
    print("done", flush=True)


if __name__ == "__main__":
    try:
        main()
    except NexusError as error:
        print(f"NEXUS {error}", flush=True)
        end(1)
    end(0)
