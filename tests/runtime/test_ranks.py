"""One rank's failure is everybody's, with one message."""

import re
import socket
import subprocess
import sys

import pytest
from launch import clean_environment, start_ranks

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
