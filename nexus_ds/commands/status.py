"""The verb `status`: what each stage of a run is doing, from its folder and from SLURM's queue.

A stage is finished when its output exists. Jobs are known from <run>/logs/jobs.txt, which the
templates in slurm/ write; without SLURM a stage counts as running while its log grows.
Not covered: jobs of other users' runs, output directories that a recipe puts outside of the run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TypedDict, TypeGuard

from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import unfinished
from nexus_ds.pipeline import (
    Step,
    branch_step,
    check_domains,
    evaluation_step,
    needed_for,
    steps,
)
from nexus_ds.progress import duration
from nexus_ds.runtime.schedule import total_steps
from nexus_ds.settings import Config

# template: the stages that its job makes, in order
TEMPLATES = {
    "tokens": ("tokens",),
    "seed": ("seed",),
    "dense_branch": ("branch:",),
    "embed": ("embed", "embed:new"),
    "upcycle": ("upcycle", "moe"),
    "finetune": ("extend", "extended"),
    "evaluate": ("evaluate",),
}
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
ACTIVE = ("RUNNING", "COMPLETING")
# `12`, or `12_3` for a task of an array; files are named by it.
JOB = re.compile(r"[0-9]{1,10}(_[0-9]{1,10})?")
# Without SLURM: a log that did not grow for so long belongs to nothing that runs.
QUIET_SECONDS = 120.0
# Of a log: enough for its last error, and logs grow to gigabytes.
TAIL_BYTES = 1 << 16
ERROR = re.compile(r"error|refused|failed|killed|not requeued|no space left", re.IGNORECASE)
# Lines of srun and of a traceback.
NOISE = re.compile(r"^(srun|slurmstepd): |^\s*(File|raise|at) |exitcode|errno: ?0")


@dataclass
class Job:
    """A job of SLURM."""

    id: str
    """`12`, or `12_3` for a task of an array."""
    state: str = ""
    """'' if SLURM forgot it."""
    reason: str = ""
    """Why it waits."""


@dataclass
class StageStatus:
    """What is known of one stage."""

    stage: str
    state: str
    """waiting | pending | running | finished | failed | cancelled | stopped"""
    detail: str = ""
    job: str = ""
    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Optimizer steps in all; 0 if the stage does not train or has not started."""
    loss: float | None = None


class TrainRecord(TypedDict):
    """What is read of a training step's line in metrics.jsonl."""

    step: int
    loss: float
    time: float
    """Seconds since the epoch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="directory of the run (pipeline.run of its recipe)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of stages as JSON")


def run_config(run: Path) -> Config:
    """Return the configuration of a run, from what its jobs or trainings left in its folder.

    Raises:
        ConfigError: nothing there tells what the run is made of, or what does names no stages.
    """
    saved = [
        run / "logs" / "recipe.yaml",
        *run.glob("*.training/config.yaml"),
        *run.glob("branches/*.training/config.yaml"),
    ]
    path = next((p for p in saved if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{run}: found neither logs/recipe.yaml nor a .training folder; expected the "
            "directory of a run that was started (pipeline.run of its recipe)"
        )
    config = load_config(path)
    check_domains(config)
    # The folder may have been moved since.
    config.pipeline.run = str(run)
    return config


def plan(config: Config) -> list[Step]:
    """Return the stages of a run, the evaluation last."""
    found = steps(config, "", [], ranks=1)
    return [*found, evaluation_step(config, found, [])]


def recorded_jobs(run: Path) -> dict[str, list[str]]:
    """Return the job ids of each template, oldest first."""
    file = run / "logs" / "jobs.txt"
    if not file.is_file():
        return {}
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        identity, _, template = line.partition(" ")
        if JOB.fullmatch(identity) and template in TEMPLATES:
            found.setdefault(template, []).append(identity)
    return found


def queue(identities: list[str]) -> dict[str, Job] | None:
    """Ask SLURM for these jobs; None where there is no SLURM.

    Jobs that it has forgotten are left out.
    """
    program = shutil.which("squeue")
    if program is None or not identities:
        return None
    # An array's id stands for all of its tasks.
    jobs = dict.fromkeys(identity.partition("_")[0] for identity in identities)
    command = [
        program,
        "--noheader",
        "--array",
        "--states=all",
        "--format=%i|%T|%r",
        f"--jobs={','.join(jobs)}",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        if line.count("|") == 2:
            job = Job(*line.strip().split("|"))
            found[job.id] = job
    return found


def template_of(stage: str) -> str:
    """Return the template whose job makes a stage."""
    name = "branch:" if stage.startswith("branch:") else stage
    return next(template for template, stages in TEMPLATES.items() if name in stages)


def job_of(
    step: Step,
    config: Config,
    recorded: dict[str, list[str]],
    known: dict[str, Job] | None,
) -> Job | None:
    """Return the newest job of a stage, None if none was submitted."""
    identities = recorded.get(template_of(step.name), [])
    if step.name.startswith(branch_step("")):
        domains = [*config.pipeline.domains, *config.pipeline.new_domains]
        index = domains.index(step.name.removeprefix(branch_step("")))
        identities = _of_task(identities, index)
    if not identities:
        return None
    newest = identities[-1]
    return (known or {}).get(newest, Job(newest))


def _of_task(identities: list[str], index: int) -> list[str]:
    """Return the jobs that a task of an array is, of whole arrays (`12`) and of tasks (`12_3`)."""
    found = []
    for identity in identities:
        array, _, task = identity.partition("_")
        if task in ("", str(index)):
            found.append(f"{array}_{index}")
    return found


def tail(path: Path) -> list[str]:
    """Return the last lines of a file, [] without one."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()


def last_error(log: Path) -> str:
    """Return the last line of a log that tells of an error, of srun only if there is no other."""
    lines = [line.strip() for line in tail(log) if ERROR.search(line)]
    # What a launcher says of a failed program is not why it failed.
    causes = [line for line in lines if "its message stands above" not in line]
    own = [line for line in causes if not NOISE.search(line)]
    return (own or lines or [""])[-1]


def _training_records(metrics: Path) -> list[TrainRecord]:
    """Return the last records of training steps, oldest first."""
    found = []
    for line in tail(metrics):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut off by the tail, or being written
        if _is_training(record):
            found.append(record)
    return found


def _is_training(record: object) -> TypeGuard[TrainRecord]:
    """Return whether a line of the log tells of training steps; it may be damaged."""
    if not isinstance(record, dict) or record.get("kind") != "train":
        return False
    numbers = [record.get(key) for key in ("step", "loss", "time")]
    sound = all(isinstance(number, int | float) and abs(number) < 1e15 for number in numbers)
    return sound and type(numbers[0]) is int


def training(step: Step) -> StageStatus | None:
    """Return how far a stage has trained, from its metrics; None if it has not."""
    folder = Path(f"{step.output}.training")
    records = _training_records(folder / "metrics.jsonl")
    if not records or not (folder / "config.yaml").is_file():
        return None
    config = load_config(folder / "config.yaml")
    last = records[-1]
    done = last["step"]
    total = total_steps(config.training, config.data)
    found = StageStatus(step.name, "", step=done, steps=total, loss=last["loss"])
    found.detail = f"step {done}/{total}, loss {last['loss']:.3f}"
    # A training that was resumed may have written a step twice.
    if len(records) > 1 and done > records[-2]["step"]:
        before = records[-2]
        seconds = last["time"] - before["time"]
        pace = seconds / (done - before["step"])
        # nodes' clocks differ: time may seem to run backwards
        left = max(0.0, pace * (total - done))
        found.detail += f", ETA {duration(left)}"
    return found


def _grows(path: Path) -> bool:
    if not path.is_file():
        return False
    quiet = time.time() - path.stat().st_mtime
    return quiet < QUIET_SECONDS


def _queued(job: Job) -> str:
    """Return why a job waits, in words."""
    words = {"Dependency": "waits for an earlier job", "BeginTime": "requeued"}
    return words.get(job.reason, job.reason)


def judge(step: Step, job: Job | None, run: Path, slurm: bool) -> StageStatus:
    """Return the state of one stage by its own traces.

    Stages that wait for others are judged by `survey`.
    """
    if step.output.exists():
        return StageStatus(step.name, "finished", str(step.output))
    seen = training(step) or StageStatus(step.name, "")
    seen.job = job.id if job else ""
    log = run / "logs" / f"{template_of(step.name)}-{seen.job}.log"
    active = job is not None and job.state in ACTIVE
    if not slurm:
        metrics = Path(f"{step.output}.training/metrics.jsonl")
        active = active or _grows(log) or _grows(metrics)
    if job and job.state in QUEUED:
        told = [text for text in (_queued(job), seen.detail) if text]
        seen.state = "pending"
        seen.detail = "; ".join(told)
    elif active:
        seen.state = "running"
        seen.detail = seen.detail or "starting"
    elif job:
        _judge_ended(seen, job, log)
    else:
        seen.state = "stopped" if seen.steps else "waiting"
    return seen


def _judge_ended(seen: StageStatus, job: Job, log: Path) -> None:
    """Say of a stage whose output is not there what became of its job."""
    if job.state == "CANCELLED" and not log.is_file():
        seen.state = "cancelled"
        seen.detail = "never started"
    elif log.is_file() or job.state:
        word = job.state.lower().replace("_", " ") or "ended"
        seen.state = "failed"
        seen.detail = last_error(log) or f"{word}; log: {log}"
    else:
        seen.state = "stopped" if seen.steps else "waiting"


def survey(run: Path) -> list[StageStatus]:
    """Return all stages of a run in order.

    Raises:
        ConfigError: `run` is not the directory of a run.
    """
    config = run_config(run)
    found = plan(config)
    recorded = recorded_jobs(run)
    # one question for all jobs: SLURM's controller serves a whole cluster
    known = queue(list(chain.from_iterable(recorded.values())))
    result: dict[str, StageStatus] = {}
    for step in found:
        job = job_of(step, config, recorded, known)
        seen = judge(step, job, run, known is not None)
        needed = [other.name for other in needed_for(found, step.name)]
        before = [result[name] for name in needed if name in result]
        _judge_by_others(seen, before)
        result[step.name] = seen
    return list(result.values())


def _judge_by_others(seen: StageStatus, before: list[StageStatus]) -> None:
    """Change what was seen of a stage if those that it needs, and are not there, tell more."""
    lost = [other.stage for other in before if other.state == "failed"]
    # Their job makes this stage too, once they are there.
    template = template_of(seen.stage)
    same_job = any(template_of(other.stage) == template for other in before)
    if seen.state in ("cancelled", "failed", "pending", "waiting") and lost:
        seen.state = "cancelled"
        seen.detail = f"needs {', '.join(lost)}, which failed"
    elif seen.state == "running" and not seen.steps and same_job:
        seen.state = "waiting"
        seen.detail = f"after {before[-1].stage}, in the same job"


def unfinished_lines(run: Path) -> list[str]:
    """Return a line for each directory of the run that was not written to its end.

    As large as a model, each of them, and hidden.
    """
    found = []
    for folder in (run, run / "branches"):
        if not folder.is_dir():
            continue
        for left in unfinished(folder):
            size = f"{left.size / 1e6:,.1f} MB"
            writer = left.writer or "a process whose lock is gone"
            what = "being written, or of a job that was killed on another machine: then remove it"
            if left.gone:
                what = "which was killed: the next stage of this run removes it"
            found.append(f"unfinished: {left.path}, {size}, of {writer}; {what}")
    return found


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    stages = survey(args.run)
    if args.json:
        print_text(json.dumps([asdict(stage) for stage in stages], ensure_ascii=False))
        return 0
    width = max(len(stage.stage) for stage in stages)
    for stage in stages:
        job = f"job {stage.job}" if stage.job else ""
        print_text(f"{stage.stage:{width}}  {stage.state:9}  {job:10}  {stage.detail}".rstrip())
    for line in unfinished_lines(args.run):
        print_text(line)
    print_text(f"logs: {args.run / 'logs'}")
    return 0
