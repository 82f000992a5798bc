"""Everything that can hit a job: it saves, requeues itself and ends with the weights of an
undisturbed run."""

import contextlib
import os
import signal
import time

import pytest
from safetensors import safe_open

from slurm.rig import TINY, WIDE, metrics_step, steps_logged

# as long as the rig is patient, the whole run included
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]


def same_weights(first, second):
    """Return names of tensors that are not bit-equal."""
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        assert set(a.keys()) == set(b.keys())
        return [name for name in a.keys() if not a.get_tensor(name).equal(b.get_tensor(name))]  # noqa: SIM118


def usr1(slurm, job):
    """What SLURM sends to the batch shell before the time limit."""
    slurm.run("scancel", "--signal=USR1", "--batch", job)


def term_one_rank(slurm, job):
    os.kill(slurm.processes(job, SLURM_PROCID="3")[0], signal.SIGTERM)


def requeue(slurm, job):
    slurm.run("scontrol", "requeue", job)


def node_down(slurm, job):
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    slurm.until(lambda: slurm.state(job) != "RUNNING", 20, "requeue after the loss of a node")
    slurm.run("scontrol", "update", "nodename=node2", "state=resume", check=False)


def preempt(slurm, job):
    """A job of a better partition takes both nodes for a moment."""
    slurm.run("sbatch", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    slurm.until(lambda: slurm.state(job) != "RUNNING", 20, "preemption")


@contextlib.contextmanager
def standing_still(slurm, job):
    """Stop all ranks meanwhile: a quick machine would be done before SLURM has acted."""
    ranks = slurm.processes(job)
    assert len(ranks) == 4
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    yield
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)


EVENTS = (usr1, term_one_rank, requeue, node_down, preempt)


def test_a_run_hit_by_everything_ends_with_the_weights_of_an_undisturbed_one(
    slurm, whole_run, copy_of
):
    run = copy_of("upcycled")
    job = slurm.submit("upcycle", TINY, f"pipeline.run={run}", options=(*WIDE, "--partition=low"))
    log = run / "logs" / f"upcycle-{job}.log"
    for number, event in enumerate(EVENTS):
        goal = steps_logged(run) + 4

        def trained(number=number, goal=goal):
            resumed = log.is_file() and log.read_text().count("resumed after step")
            return steps_logged(run) >= goal and resumed == number

        slurm.until(trained, 90, f"steps before {event.__name__}", log, every=0.02)
        with standing_still(slurm, job):
            event(slurm, job)
        restarts = lambda number=number: int(slurm.field(job, "Restarts")) > number  # noqa: E731
        slurm.until(restarts, 60, f"restart after {event.__name__}", log)
    assert slurm.finished(job, 120, log) == "COMPLETED", log.read_text()[-3000:]
    text = log.read_text()
    assert int(slurm.field(job, "Restarts")) == len(EVENTS)
    assert text.count("resumed after step") == len(EVENTS), text
    assert (
        same_weights(run / "nexus" / "model.safetensors", whole_run / "nexus" / "model.safetensors")
        == []
    )


def test_no_progress_stops_the_requeues(slurm, copy_of):
    """A job that is interrupted before its first state, again and again."""
    run = copy_of("upcycled")
    job = slurm.submit("upcycle", TINY, f"pipeline.run={run}")
    log = run / "logs" / f"upcycle-{job}.log"
    begun = lambda start: log.is_file() and f"start {start}] on node" in log.read_text()  # noqa: E731
    for start in range(1, 5):
        slurm.until(
            lambda start=start: begun(start) or slurm.state(job) == "FAILED",
            60,
            f"start {start}",
            log,
        )
        if slurm.state(job) == "FAILED":
            break
        usr1(slurm, job)
        slurm.until(lambda: slurm.state(job) != "RUNNING", 60, "stop", log)
    assert slurm.finished(job, 60, log) == "FAILED"
    assert "no progress in 3 starts at step 0 of moe; not requeued" in log.read_text()


def test_a_cancelled_job_stays_cancelled(slurm, copy_of):
    run = copy_of("upcycled")
    job = slurm.submit("upcycle", TINY, f"pipeline.run={run}")
    log = run / "logs" / f"upcycle-{job}.log"
    slurm.until(lambda: metrics_step(run) >= 3, 90, "step 3", log)
    slurm.run("scancel", job)
    slurm.finished(job, 60, log)
    time.sleep(3)
    assert slurm.state(job) == "CANCELLED", log.read_text()


@pytest.mark.full
def test_one_task_of_an_array_requeues_itself_alone(slurm, copy_of):
    """The last task of an array carries the id of the whole array."""
    run = copy_of("seed")
    longer = ("training.steps=3000", "training.log_every=50")
    job = slurm.submit(
        "dense_branch", TINY, f"pipeline.run={run}", *longer, options=("--array=3-4",)
    )
    last = slurm.field(f"{job}_4", "JobId")
    log = run / "logs" / f"dense_branch-{job}_4.log"
    slurm.until(lambda: metrics_step(run, "branches/cpp") >= 5, 90, "step 5", log)
    usr1(slurm, f"{job}_4")
    slurm.until(lambda: slurm.state(f"{job}_4") == "COMPLETED", 120, "end", log)
    assert last and slurm.field(f"{job}_4", "Restarts") == "1"
    assert slurm.finished(f"{job}_3", 60) == "COMPLETED"
    assert slurm.field(f"{job}_3", "Restarts") == "0"


@pytest.mark.full
def test_the_time_limit(slurm, whole_run, copy_of):
    """SLURM's own signal ahead of a limit, however long a start or a step takes: the limit comes
    near when steps were done, and the ranks stand still until the signal is there."""
    run = copy_of("upcycled")
    options = (*WIDE, "--time=01:00:00", "--signal=B:USR1@600")
    job = slurm.submit("upcycle", TINY, f"pipeline.run={run}", options=options)
    log = run / "logs" / f"upcycle-{job}.log"
    slurm.until(lambda: metrics_step(run) >= 3, 90, "step 3", log)
    ranks = slurm.processes(job)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    hours, minutes, _ = map(int, slurm.field(job, "RunTime").split(":"))
    # less than 600 seconds from now, so it is time to tell
    near = 60 * hours + minutes + 8
    slurm.run("scontrol", "update", f"jobid={job}", f"timelimit={near}")
    told = lambda: "received SIGUSR1" in log.read_text()  # noqa: E731
    slurm.until(told, 120, "SLURM's signal", log)
    # of the next start, too
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    assert len(ranks) == 4
    assert slurm.finished(job, 240, log) == "COMPLETED", log.read_text()[-3000:]
    assert "resumed after step" in log.read_text()
    assert int(slurm.field(job, "Restarts")) >= 1
    assert (
        same_weights(run / "nexus" / "model.safetensors", whole_run / "nexus" / "model.safetensors")
        == []
    )
