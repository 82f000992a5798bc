"""One rank's failure is everybody's, with one message."""

import re
import socket
import subprocess
import sys

import pytest
from launch import clean_environment, start_ranks

from nexus_ds.errors import TrainingError
from nexus_ds.launch import Position
from nexus_ds.runtime import ranks

RANK = """
import torch.distributed as dist
from nexus_ds.errors import BadBatchesError, CheckpointError
from nexus_ds.runtime.ranks import join, on_rank_0, together

join(240)
dist.init_process_group("gloo")
rank = dist.get_rank()
assert together(lambda: rank * 10) == [0, 10]
assert on_rank_0(lambda: f"seen by {rank}") == "seen by 0"

def fail():
    if rank == 1:
        raise OSError(28, "No space left on device", "rank_00001.safetensors")

try:
    together(fail)
except CheckpointError as error:
    print(error, flush=True)

def bad():
    raise BadBatchesError("3 batches in a row")

try:
    on_rank_0(bad)
except BadBatchesError as error:
    print(error, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


CORES = """
import os
import torch
import torch.distributed as dist
from nexus_ds.runtime import ranks

ranks.join(240)
dist.init_process_group("gloo")
rank = dist.get_rank()
# three ranks share four cores of a node, another has two of its own
os.sched_getaffinity = lambda _: {8, 9} if rank == 3 else {0, 1, 2, 3}
ranks.use_cores()
print(torch.get_num_threads(), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


TAKEN = """
from nexus_ds.errors import TrainingError
from nexus_ds.runtime.ranks import join

try:
    join(5)
except TrainingError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_port_that_another_run_has_is_told_with_what_to_do():
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        meeting = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said = subprocess.run(
            [sys.executable, "-c", TAKEN],
            env=clean_environment() | meeting,
            capture_output=True,
            text=True,
        )
    message = (
        rf"another run has the ranks' port on this node \(.*port: {port}.*\); give the launcher"
    )
    assert re.match(message, said.stdout), said.stderr


class Store:
    """What ranks meet at, seen by one of them, and a clock that goes on while it sleeps."""

    def __init__(self, monkeypatch, here):
        self.kept, self.now, self.slept = dict.fromkeys(here, ""), 0.0, []
        monkeypatch.setattr(ranks.time, "sleep", self.sleep)
        monkeypatch.setattr(ranks.time, "monotonic", lambda: self.now)

    def set(self, key, value):
        self.kept[key] = value

    def compare_set(self, key, expected, value):
        self.kept.setdefault(key, value)

    def get(self, key):
        return self.kept[key].encode()

    def check(self, keys):
        return self.kept.keys() >= set(keys)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


NINTH = Position(0, 12, 12, "node")
COME = ["here/3", "here/11"]


def test_who_did_not_come_is_named_when_the_time_of_the_first_is_over(monkeypatch):
    store = Store(monkeypatch, COME)
    with pytest.raises(TrainingError) as caught:
        ranks._meet(store, NINTH, 90.0, 30.0)
    assert str(caught.value) == (
        "rank 1, 2, 4, 5, 6, 7, 8, 9 and 1 more did not come within 1m30s; look at the log there "
        "(a process that hangs before it trains, a node that is lost), or for a firewall; where "
        "ranks start that far apart, raise parallel.timeout_minutes"
    )
    # rank 0 serves the others until they have read it
    assert 60 < store.now < 63 + 1 and store.slept[-1] == 4 * ranks.LONGEST_PAUSE


def test_what_the_first_has_said_is_what_all_say(monkeypatch):
    store = Store(monkeypatch, COME)
    store.set(ranks.ABSENT, "rank 7 did not come")
    monkeypatch.setattr(ranks, "_address_of_rank_0", lambda here: "")
    with pytest.raises(TrainingError, match="rank 7 did not come"):
        ranks._meet(store, Position(1, 12, 12, "node"), 90.0, 0.0)
    assert store.slept == []


def test_a_job_that_is_suspended_while_its_ranks_come_is_not_ended(monkeypatch):
    store = Store(monkeypatch, COME)

    def sleep(seconds):
        store.now += 3600
        store.slept.append(seconds)
        if len(store.slept) == 20:
            store.kept |= {f"here/{rank}": "" for rank in range(12)}

    monkeypatch.setattr(ranks.time, "sleep", sleep)
    ranks._meet(store, NINTH, 90.0, 0.0)
    assert len(store.slept) == 20


def joined(monkeypatch, rank, rendezvous, seconds=100.0):
    """Return the error with which a rank's coming ends."""
    monkeypatch.setattr(ranks._Meeting, "store", None)
    monkeypatch.setattr(ranks, "position", lambda: Position(rank, 2, 2, "node"))
    monkeypatch.setattr(ranks.dist, "rendezvous", rendezvous)
    with pytest.raises(TrainingError) as caught:
        ranks.join(seconds)
    return str(caught.value)


def test_who_finds_no_store_tries_for_its_time_and_says_who_is_missing(monkeypatch):
    tries, store = [], Store(monkeypatch, [])

    def refused(url, rank, world, timeout):
        tries.append(timeout.total_seconds())
        # a name that is not known fails at once
        store.now += 0.0 if len(tries) < 3 else tries[-1]
        raise RuntimeError("connection refused\nmore")

    assert joined(monkeypatch, 1, refused).startswith(
        "rank 0 did not come within 1m40s (connection refused); look at the log there"
    )
    assert len(tries) == 4 and tries[0] == ranks.LONGEST_TRY and 99 < store.now < 102
    store.now = 0.0
    tries.clear()
    assert "the ranks' store did not come within 0s (connection refused)" in joined(
        monkeypatch, 0, refused
    )
    assert len(tries) == 1


def test_a_store_that_ends_while_the_ranks_come_is_told(monkeypatch):
    store = Store(monkeypatch, [])
    monkeypatch.setattr(ranks, "_address_of_rank_0", lambda here: "")

    def gone(keys):
        raise RuntimeError("Connection reset by peer\nmore")

    store.check = gone
    assert joined(monkeypatch, 1, lambda *_, timeout: iter([(store, 1, 1)])) == (
        "rank 0, or its launcher, ended before all ranks had come (Connection reset by peer); look "
        "at its log"
    )


@pytest.mark.slow
def test_cores_are_shared_with_the_ranks_that_may_run_on_the_same_ones():
    ranks = start_ranks(["-c", CORES], 4)
    assert [rank.communicate(timeout=240)[0].strip() for rank in ranks] == ["1", "1", "1", "2"]


@pytest.mark.slow
def test_a_rank_ends_with_its_own_code_whatever_the_teardown_does():
    teardown = (
        "import atexit, os; atexit.register(os.abort); "
        "from nexus_ds.launch import end; print('said'); end(3)"
    )
    for world in (1, 2):  # a single rank has gloo's threads, too
        ranks = start_ranks(["-c", teardown], world)
        assert [rank.communicate(timeout=240)[0] for rank in ranks] == ["said\n"] * world
        assert [rank.returncode for rank in ranks] == [3] * world


@pytest.mark.slow
def test_a_failure_of_one_rank_reaches_all():
    ranks = start_ranks(["-c", RANK], 2)
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert all(
        "[Errno 28] No space left on device: 'rank_00001.safetensors'\n3 batches in a row\n" in text
        for text in said
    )
