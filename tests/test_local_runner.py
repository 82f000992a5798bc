"""Tasks that run side by side: what waits for what, what a failure takes with it, and what each
finds in its environment."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nexus_ds.errors import BadBatchesError, NexusError
from nexus_ds.launch import EXIT_BAD_BATCHES
from nexus_ds.local_runner import Runner, Task, run_steps, slot_environment
from nexus_ds.pipeline import Step


def step(tmp_path, name, needs=(), seconds=0.0, code=0, wide=False):
    body = f"import pathlib, sys, time; time.sleep({seconds})\n"
    body += f"p = pathlib.Path({str(tmp_path)!r}); (p / {name!r}).touch()\n"
    body += f"(p / 'log').open('a').write({name!r} + ' ')\nsys.exit({code})"
    return Step(name, tmp_path / name, [sys.executable, "-c", body], needs=tuple(needs), wide=wide)


def test_stages_wait_for_what_they_need_and_wide_ones_run_alone(tmp_path, capfd):
    todo = [
        step(tmp_path, "first", seconds=0.3),
        step(tmp_path, "free"),
        step(tmp_path, "second", needs=["first"]),
        step(tmp_path, "wide", needs=["free"], wide=True),
    ]
    run_steps(todo, 2)
    order = (tmp_path / "log").read_text().split()
    assert order.index("first") < order.index("second")
    assert set(order) == {"first", "free", "second", "wide"}
    assert "== second done in" in capfd.readouterr().err


def test_a_failing_stage_ends_the_others(tmp_path):
    with pytest.raises(NexusError, match=r"stage bad failed \(exit 3\); its message stands above"):
        run_steps([step(tmp_path, "slow", seconds=60), step(tmp_path, "bad", code=3)], 2)
    assert not (tmp_path / "slow").exists()  # nobody waited until it was there


def test_bad_batches_of_a_stage_stay_bad_batches(tmp_path):
    with pytest.raises(BadBatchesError, match=r"stage bad failed \(exit 65\); its message stands"):
        run_steps([step(tmp_path, "bad", code=EXIT_BAD_BATCHES)])


def test_nothing_runs_beside_a_wide_stage(tmp_path):
    def meeting(name, other, wide=False):
        """Note a start, wait for the other's where there is one to meet, note the end."""
        body = f"import pathlib, time; p = pathlib.Path({str(tmp_path)!r})\n"
        body += "log = (p / 'log').open('a', buffering=1)\n"
        body += f"log.write('+{name} '); log.flush(); (p / 'here {name}').touch()\n"
        body += f"while {other!r} and not (p / 'here {other}').exists(): time.sleep(0.01)\n"
        body += f"log.write('-{name} '); log.flush(); (p / {name!r}).touch()"
        return Step(name, tmp_path / name, [sys.executable, "-c", body], wide=wide)

    run_steps(
        [meeting("wide", "", wide=True), meeting("one", "two"), meeting("two", "one")], 2
    )  # else they'd wait for ever
    log = (tmp_path / "log").read_text().split()
    assert sorted(log) == sorted(
        f"{sign}{name}" for name in ("wide", "one", "two") for sign in "+-"
    )
    assert log.index("-wide") == log.index("+wide") + 1


def test_a_process_takes_a_device_that_the_user_has(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    devices = [slot_environment(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)]
    assert devices == ["2", "5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slot_environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in slot_environment(1, 0)


def test_a_stage_is_a_launch_of_its_own(tmp_path, monkeypatch):
    """Else train.py in it would take itself for a rank of this one."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("KEPT", "yes")
    out = tmp_path / "out"
    body = "import os, pathlib; names = ('RANK', 'KEPT', 'OMP_NUM_THREADS')\n"
    body += f"pathlib.Path({str(out)!r}).write_text(' '.join(map(str, map(os.environ.get, names))))"
    run_steps([Step("s", out, [sys.executable, "-c", body])])
    assert out.read_text() == "None yes 1"


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0"}
SRUN = {"SLURM_STEP_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_a_stage_takes_itself_for_a_lone_rank_whatever_started_its_maker(
    tmp_path, monkeypatch, launcher
):
    for name, value in (launcher | {"SLURM_JOB_ID": "7", "MASTER_PORT": "20001"}).items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    body = f"""
import os, pathlib
from nexus_ds.launch import adopt_launcher, job_name
from nexus_ds.runtime import ranks
here = adopt_launcher()
ranks.join(5)
told = here.rank, here.world, here.local_world, job_name()
pathlib.Path({str(out)!r}).write_text(repr(told))
"""
    run_steps([Step("s", out, [sys.executable, "-c", body])])
    assert out.read_text() == "(0, 1, 1, '7')"


class Quiet(Runner):
    """Notes what it is told; goes on after a failure."""

    def __init__(self, tasks, slots):
        super().__init__(tasks, slots)
        self.told = []

    def on_start(self, task):
        self.told.append(f"{task.name} starts {self.progress().partition(',')[0]}")

    def on_success(self, task, seconds):
        self.told.append(f"{task.name} {self.progress().partition(',')[0]}")

    def on_failure(self, task, code, seconds):
        return f"exit {code}"


def task(tmp_path, name, *needs, code=0, cost=1.0):
    words = [sys.executable, "-c", f"open({name!r}, 'w'); raise SystemExit({code})"]

    def start(slot):
        return subprocess.Popen(words, cwd=tmp_path)

    return Task(name, tmp_path / name, start, tuple(tmp_path / need for need in needs), cost=cost)


def test_what_is_there_is_not_made_again_and_a_failure_takes_only_what_needs_it(tmp_path):
    (tmp_path / "there").touch()
    tasks = [
        task(tmp_path, "there"),
        task(tmp_path, "child", "bad"),
        task(tmp_path, "bad", "there", code=3),
        task(tmp_path, "grandchild", "child", "good"),
        task(tmp_path, "good", "there"),
    ]
    runner = Quiet(tasks, slots=1)
    runner.run()
    # What is skipped counts as done.
    assert runner.told == ["bad starts [0/4]", "good starts [3/4", "good [4/4"]
    assert runner.failed == {
        tmp_path / "bad": "exit 3",
        tmp_path / "child": "needs bad, which failed",
        tmp_path / "grandchild": "needs child, which failed",
    }


def test_a_task_that_ends_well_without_its_output_has_failed(tmp_path):
    def start(slot):
        return subprocess.Popen([sys.executable, "-c", ""])

    runner = Quiet([Task("none", tmp_path / "none", start)], slots=1)
    runner.run()
    assert runner.failed == {tmp_path / "none": "exit 0"}


def test_the_time_left_goes_by_cost(tmp_path, monkeypatch):
    runner = Quiet([task(tmp_path, "dear", cost=9.0), task(tmp_path, "cheap")], slots=1)
    runner._started = time.monotonic() - 90.5
    assert runner.progress() == "[0/2]"
    runner.waiting.pop(0)
    assert runner.progress() == "[1/2, 10s to go]"


@pytest.mark.slow
def test_a_signal_ends_what_runs(tmp_path):
    """The children clear up, and nothing of them is left."""
    here = str(tmp_path)
    child = f"""
import pathlib, sys, time
from nexus_ds.outputs import exit_on_signals
with exit_on_signals():
    try:
        pathlib.Path({here!r}, 'started').touch()
        time.sleep(60)
    finally:
        pathlib.Path({here!r}, 'cleared').touch()
"""
    parent = f"""
import pathlib, sys
from nexus_ds.local_runner import run_steps
from nexus_ds.pipeline import Step
run_steps([Step('s', pathlib.Path({here!r}, 'out'), [sys.executable, '-c', {child!r}])])
"""
    process = subprocess.Popen([sys.executable, "-c", parent], env=dict(os.environ))
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "cleared").exists()
