"""Where a rank stands, from every launcher's variables: plan, preflight and training hear the
same."""

import ast
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ds import launch
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.launch import LAUNCH_VARIABLES, Position, free_port, has_launcher
from nexus_ds.train import main

# srun of 8 tasks on 2 nodes, nobody asked for --ntasks-per-node; the job itself has more.
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "16",
    "SLURM_NNODES": "4",
    "SLURMD_NODENAME": "n2",
}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "20000"}


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (SRUN, Position(5, 8, 4, "n2")),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"), Position(5, 8, 4, "n2")),
        # with --ntasks it is an upper bound
        (SRUN | {"SLURM_NTASKS_PER_NODE": "8"}, Position(5, 8, 4, "n2")),
        (
            without(SRUN, *[name for name in SRUN if "STEP_" in name and name != "SLURM_STEP_ID"]),
            Position(5, 16, 4, "n2"),
        ),
        (without(SRUN, "SLURM_STEP_ID"), Position(0, 1, 1, "n2")),  # the job script itself
        ({"SLURMD_NODENAME": "n"}, Position(0, 1, 1, "n")),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "2"}, Position(1, 2, 2, "n2")),
        (
            {"SLURMD_NODENAME": "n", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            Position(1, 4, 2, "n"),
        ),
        # deepspeed
        (
            {"SLURMD_NODENAME": "n", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
            Position(1, 4, 2, "n"),
        ),
    ],
)
def test_every_launchers_variables(env, expected):
    assert launch.position(env) == expected


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"},
            "7 ranks unevenly over 2 nodes (4,3)",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": ""},
            "7 ranks unevenly over 2 nodes (by their number)",
        ),
    ],
)
def test_ranks_that_are_spread_unevenly_are_refused(changes, found):
    with pytest.raises(LayoutError) as caught:
        launch.position(SRUN | changes)
    assert str(caught.value) == (
        f"srun spreads {found}; expected as many on each: submit with --ntasks-per-node=3"
    )


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("value", ["", "two", "-1", "1.5", "²", "9" * 5000, " 1", "1\n"])
@pytest.mark.parametrize(
    ("env", "name"),
    [
        *((TORCHRUN | MEETING, name) for name in (*list(TORCHRUN)[:2], "MASTER_PORT")),
        (SRUN, "SLURM_PROCID"),
    ],
)
def test_a_launchers_variable_that_is_no_number_is_named(env, name, value):
    """Found by tests/fuzz.py: they ended in the traceback of int()."""
    env = env | {name: value}
    with pytest.raises(LayoutError) as caught:
        launch.meeting_point(launch.position(env), env)
    assert str(caught.value).startswith(f"{name} is {value[:100]!r}, expected a whole number from")
    assert "start the ranks with one of them, or unset RANK" in str(caught.value)


def test_no_ranks_no_nodes_and_tasks_that_srun_never_wrote():
    for name, value in (("SLURM_STEP_NUM_TASKS", "0"), ("SLURM_STEP_NUM_NODES", "0")):
        with pytest.raises(LayoutError, match=rf"^{name} is '0', expected a whole number from 1"):
            launch.position(SRUN | {name: value})
    for told in ("four", "4(x", "4(x2),", "-4"):
        with pytest.raises(LayoutError, match=r"^SLURM_STEP_TASKS_PER_NODE is .* as 4\(x2\),3; "):
            launch.position(SRUN | {"SLURM_STEP_TASKS_PER_NODE": told})
    with pytest.raises(LayoutError, match=r"^LOCAL_RANK is 'x'"):
        launch.local_rank({"LOCAL_RANK": "x"})


@pytest.fixture
def environment(monkeypatch):
    """Return a function that puts this process where a launcher would have started it."""

    def start(env):
        for name in (*LAUNCH_VARIABLES, *SRUN):
            monkeypatch.setenv(name, "")  # so that what is set from now on goes with the test
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return start


def test_what_srun_does_not_say_is_completed_for_torch(environment):
    environment(SRUN | MEETING)
    assert launch.adopt_launcher() == Position(5, 8, 4, "n2")
    told = {name: launch.os.environ[name] for name in (*LAUNCH_VARIABLES[:6],)}
    assert told == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        **MEETING,
    }
    assert launch.position() == Position(5, 8, 4, "n2")  # and so it is read again


@pytest.mark.parametrize("local", ["", "x", "²", "9" * 5000, None])
def test_a_rank_of_srun_without_a_number_on_its_node_is_refused(environment, local):
    """It ended in a KeyError, or later in torch, which read what stood there."""
    said = {} if local is None else {"SLURM_LOCALID": local}
    environment(without(SRUN | MEETING, "SLURM_LOCALID") | said)
    with pytest.raises(LayoutError) as caught:
        launch.adopt_launcher()
    assert str(caught.value).startswith(
        f"SLURM_LOCALID is {(local or '')[:100]!r}, expected a whole number from 0 on, as torchrun"
    )


def test_plain_python_is_a_single_rank_with_a_port_of_its_own(environment):
    # a job script's, whose port belongs to the ranks of srun
    environment({"SLURMD_NODENAME": "n", **MEETING})
    assert launch.adopt_launcher() == Position(0, 1, 1, "n")
    told = {name: launch.os.environ[name] for name in LAUNCH_VARIABLES[:4]}
    assert told == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert (
        launch.os.environ["MASTER_ADDR"] == "127.0.0.1"
        and launch.os.environ["MASTER_PORT"] != "20000"
    )


def test_runs_of_one_rank_do_not_meet_each_other_at_their_launchers_port(environment):
    """DeepSpeed's launcher says 29500 to each; torchrun's agent serves the store at its own."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CROSS_RANK": "0", **MEETING}
    environment(told)
    launch.adopt_launcher()
    assert launch.os.environ["MASTER_PORT"] != "20000"
    assert launch.os.environ["MASTER_ADDR"] == "127.0.0.1"
    environment(told | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    launch.adopt_launcher()
    assert launch.os.environ["MASTER_PORT"] == "20000"
    environment(told | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    launch.adopt_launcher()
    assert launch.os.environ["MASTER_PORT"] != "20000"


def test_what_a_launcher_set_stays(environment):
    theirs = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **MEETING}
    environment(SRUN | theirs)
    launch.adopt_launcher()
    assert theirs.items() <= launch.os.environ.items()


@pytest.mark.parametrize("missing", [MEETING, ["MASTER_PORT"]])
def test_ranks_that_can_not_meet_are_refused_instead_of_training_alone(
    missing, environment, capsys
):
    message = (
        "8 ranks, but not both of MASTER_ADDR and MASTER_PORT are set; export the first node's "
        "name and a port"
    )
    environment(without(SRUN | MEETING, *missing))
    with pytest.raises(ConfigError, match=message):
        launch.meeting_point(launch.position())
    assert main(["stage=seed"]) == 1
    assert f"train.py: rank 5: {message}" in capsys.readouterr().err


def test_a_port_is_free_and_none_that_the_kernel_gives_out_by_itself(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        port = taken.getsockname()[1]
        assert 10_000 <= port < 20_000
        other = free_port()
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, ports, count: [port, other])
        assert free_port() == other
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, ports, count: [port])
        with pytest.raises(LayoutError, match="no free TCP port from 10000 to 19999"):
            free_port()


def test_two_runs_that_were_seeded_alike_meet_at_different_ports():
    ports = []
    for _ in range(4):
        random.seed(0)
        ports.append(free_port())
    assert len(set(ports)) > 1


def names_read(tree):
    """Yield the constants that a module looks up: x["NAME"], x.get("NAME"), "NAME" in x."""
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            found = node.slice
        elif isinstance(node, ast.Call) and node.args:
            found = node.args[0]
        elif isinstance(node, ast.Compare):
            found = node.left
        if isinstance(found, ast.Constant):
            yield found.value


def test_nothing_else_reads_a_launchers_variables():
    """srun of 8 tasks on 2 nodes was 4 ranks a node for one reader and 8 for another."""
    package = Path(launch.__file__).parent
    readers = {}
    for file in package.rglob("*.py"):
        names = [str(name) for name in names_read(ast.parse(file.read_text(encoding="utf-8")))]
        found = {name for name in names if name in LAUNCH_VARIABLES or name.startswith("SLURM")}
        if found:
            readers[str(file.relative_to(package))] = found
    assert readers.keys() == {"launch.py"}


def test_a_launch_inside_of_a_launch_inherits_nothing_that_makes_a_rank():
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURMD_NODENAME": "n2", "HOME": "/"}
    torchrun = {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
    step = {"SLURM_STEPID": "0"} | {name: "1" for name in SRUN if name.startswith("SLURM_STEP")}
    srun = step | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert launch.launch_names(job | torchrun | srun) == [*torchrun, *srun]


@pytest.mark.parametrize(
    ("env", "name", "first"),
    [
        ({}, "0", True),
        ({"SLURM_PROCID": "3"}, "3", False),
        ({"RANK": "0", "SLURM_PROCID": "3"}, "0", True),
    ],
)
def test_who_speaks_for_all_ranks(env, name, first):
    assert (launch.rank_name(env), launch.first_rank(env)) == (name, first)


def test_what_slurm_gave_the_job():
    given = {"SLURM_GPUS_ON_NODE": "4", "SLURM_MEM_PER_NODE": "2048", "LOCAL_RANK": "1"}
    assert launch.allotted_gpus(given) == 4 and launch.allotted_memory(given) == 2 << 30
    assert launch.allotted_gpus({}) == launch.allotted_memory({"SLURM_MEM_PER_NODE": "all"}) == 0
    by_core = {"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "8"}
    assert launch.allotted_memory(by_core) == 4 << 30
    assert (launch.local_rank(given), launch.local_rank({})) == (1, 0)
    named = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert (launch.job_name(named), launch.array_task(named), launch.array_task({})) == (
        "12",
        "3",
        "",
    )
    assert launch.job_name({}).isdecimal()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "15"}, "SLURM job 15"),
        ({"SLURM_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}, "SLURM job 15"),
        (
            {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"},
            "SLURM job 12_3",
        ),
        ({"SLURM_JOB_ID": "15\nprocess 1"}, ""),
        ({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12"}, ""),
    ],
)
def test_a_job_is_told_as_the_cluster_names_it(given, words):
    assert launch.job_words(given) == words


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (launch.allotted_gpus, "SLURM_GPUS_ON_NODE"),
        (launch.allotted_memory, "SLURM_MEM_PER_NODE"),
    ],
)
def test_more_than_any_machine_has_is_refused_by_name(read, name):
    """int() takes no more than 4,300 digits: it ended in its traceback."""
    for told in ("9" * 5000, "1" * 10, "٣"):
        with pytest.raises(LayoutError) as caught:
            read({name: told})
        assert str(caught.value) == (
            f"{name} is {told[:100]!r}, expected a whole number of at most 9 digits, as sbatch "
            "sets it; unset it, or set what this job has on a node"
        )
    # a word says nothing, as before
    assert read({name: "²"}) == 0


@pytest.mark.parametrize(("visible", "number"), [(8, 3), (4, 3), (1, 0), (2, 3)])
def test_a_rank_that_sees_one_gpu_has_that_one(environment, visible, number):
    """Too few are left to fail: two ranks would share one in silence."""
    environment({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"})
    assert launch.device_number(visible) == number
    assert launch.os.environ["LOCAL_RANK"] == "3"
    assert launch.tell_device_number(visible) == number
    assert launch.os.environ["LOCAL_RANK"] == str(number)  # where DeepSpeed reads it


@pytest.mark.parametrize(
    ("env", "own"),
    [
        ({}, False),
        ({"SLURM_GPUS_PER_TASK": "1"}, True),
        ({"SLURM_GPU_BIND": "single:1"}, True),
        ({"SLURM_GPU_BIND": "per_task:1"}, True),
        ({"SLURM_GPU_BIND": "none"}, False),
    ],
)
def test_what_tells_that_each_rank_sees_a_gpu_of_its_own(env, own):
    assert launch.has_own_gpu(env) == own


CHOICES = [
    ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
    ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
]


def choices(env):
    return {name: value for name, value in env.items() if name.endswith("_ALLOC_CONF")}


@pytest.mark.parametrize(("given", "expected"), CHOICES)
def test_memory_grows_in_pieces_unless_the_user_chose_otherwise(monkeypatch, given, expected):
    monkeypatch.setattr(launch.os, "environ", dict(given))
    launch.let_memory_grow()
    assert launch.os.environ == expected


@pytest.mark.parametrize(("given", "expected"), CHOICES)
def test_so_it_is_in_every_job(given, expected):
    common = Path(__file__).parents[1] / "slurm" / "common.sh"
    command = f"source {common} && exec env"
    env = {"PATH": launch.os.environ["PATH"], **given}
    told = subprocess.run(
        ["bash", "-c", command], env=env, check=True, capture_output=True, text=True
    )
    assert choices(dict(line.split("=", 1) for line in told.stdout.splitlines())) == expected


def test_a_training_says_how_memory_grows_before_it_loads_torch():
    """torch reads it once."""
    program = (
        "import os, sys\n"
        "from nexus_ds import train\n"
        "def load(*args):\n"
        "    print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules)\n"
        "    sys.exit()\n"
        "train.load_config = load\n"
        "train.main([])\n"
    )
    kept = {n: v for n, v in launch.os.environ.items() if not choices({n: v})}
    told = subprocess.run(
        [sys.executable, "-c", program], env=kept, check=True, capture_output=True, text=True
    )
    assert told.stdout.split() == ["expandable_segments:True", "False"]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "0", "CROSS_RANK": "0"}, True),
        # By hand, as the tests start ranks; srun; a shell.
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, False),
        ({}, False),
    ],
)
def test_who_has_a_launcher_that_may_be_killed(env, expected):
    assert has_launcher(env) is expected
