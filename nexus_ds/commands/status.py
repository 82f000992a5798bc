"""The verb `status`: what each stage of a run is doing, from the run's folder and, where there is
one, SLURM's queue.

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
from pathlib import Path
from typing import Any

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.pipeline import Step, evaluation_step, needed_for, steps
from nexus_ds.progress import duration
from nexus_ds.runtime.schedule import total_steps
from nexus_ds.settings import Config

TEMPLATES = {  # template: the stages that its job makes, in order
    "seed": ("seed",),
    "dense_branch": ("branch:",),
    "embed": ("embed", "embed:new"),
    "upcycle": ("upcycle", "moe"),
    "finetune": ("extend", "extended"),
    "evaluate": ("evaluate",),
}
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
ACTIVE = ("RUNNING", "COMPLETING")
# without SLURM: a log that did not grow for so long belongs to nothing that runs
QUIET_SECONDS = 120.0
TAIL_BYTES = 1 << 16
ERROR = re.compile(r"error|refused|failed|killed|not requeued|no space left", re.IGNORECASE)
NOISE = re.compile(r"^(srun|slurmstepd): |^\s*(File|raise|at) |exitcode|errno: ?0")


@dataclass
class Job:
    """A job of SLURM: its id (`12`, or `12_3` for a task of an array), its state ('' if SLURM
    forgot it), its reason."""

    id: str
    state: str = ""
    reason: str = ""


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="directory of the run (pipeline.run of its recipe)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of stages as JSON")


def run_config(run: Path) -> Config:
    """Return the configuration of the run that lives in `run`, from what its jobs or trainings left
    there.

    Raises:
        ConfigError: nothing there tells what the run is made of.
    """
    saved = [
        run / "logs" / "recipe.yaml",
        *run.glob("*.training/config.yaml"),
        *run.glob("branches/*.training/config.yaml"),
    ]
    path = next((p for p in saved if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{run}: found neither logs/recipe.yaml nor a .training folder; expected the directory of a run that was "
            "started (pipeline.run of its recipe)"
        )
    config = load_config(path)
    config.pipeline.run = str(run)
    return config


def plan(config: Config) -> list[Step]:
    """Return the stages of a run, the evaluation last."""
    found = steps(config, "", [], ranks=1)
    return [*found, evaluation_step(config, found, [])]


def recorded_jobs(run: Path) -> dict[str, list[str]]:
    """Return the job ids of each template, oldest first."""
    file, found = run / "logs" / "jobs.txt", dict[str, list[str]]()
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        identity, _, template = line.partition(" ")
        if re.fullmatch(r"\d+(_\d+)?", identity) and template in TEMPLATES:
            found.setdefault(template, []).append(identity)
    return found


def queue(identities: list[str]) -> dict[str, Job] | None:
    """Ask SLURM for these jobs; None where there is no SLURM. Jobs that it has forgotten are left
    out."""
    program = shutil.which("squeue")
    if program is None or not identities:
        return None
    wanted = ",".join(dict.fromkeys(identity.partition("_")[0] for identity in identities))
    command = [
        program,
        "--noheader",
        "--array",
        "--states=all",
        "--format=%i|%T|%r",
        f"--jobs={wanted}",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    rows = [line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    return {row[0]: Job(*row) for row in rows}


def template_of(stage: str) -> str:
    """Return the template whose job makes a stage."""
    name = "branch:" if stage.startswith("branch:") else stage
    return next(template for template, stages in TEMPLATES.items() if name in stages)


def job_of(
    step: Step, config: Config, recorded: dict[str, list[str]], known: dict[str, Job] | None
) -> Job | None:
    """Return the newest job of a stage, None if none was submitted."""
    template = template_of(step.name)
    identities = recorded.get(template, [])
    if step.name.startswith("branch:"):
        index = [*config.pipeline.domains, *config.pipeline.new_domains].index(
            step.name.partition(":")[2]
        )
        identities = [
            i if "_" in i else f"{i}_{index}"
            for i in identities
            if i.partition("_")[2] in ("", str(index))
        ]
    if not identities:
        return None
    return (known or {}).get(identities[-1], Job(identities[-1]))


def tail(path: Path) -> list[str]:
    """Return the last lines of a file, [] without one."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()


def last_error(log: Path) -> str:
    """Return the last line of a log that tells of an error, of the programs rather than of srun if
    there is one."""
    lines = [line.strip() for line in tail(log) if ERROR.search(line)]
    own = [
        line for line in lines if not NOISE.search(line) and "its message stands above" not in line
    ]
    return (own or lines or [""])[-1]


def training(step: Step) -> StageStatus | None:
    """Return step, steps, loss and time left of a stage that has trained, from its metrics; None if
    it has not."""
    folder = Path(f"{step.output}.training")
    records: list[dict[str, Any]] = []
    for line in tail(folder / "metrics.jsonl"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut off by the tail, or being written
    records = [record for record in records if record.get("kind") == "train"]
    if not records or not (folder / "config.yaml").is_file():
        return None
    config = load_config(folder / "config.yaml")
    last, total = records[-1], total_steps(config.training, config.data)
    found = StageStatus(step.name, "", step=last["step"], steps=total, loss=last["loss"])
    found.detail = f"step {last['step']}/{total}, loss {last['loss']:.3f}"
    if len(records) > 1 and last["step"] > records[-2]["step"]:
        pace = (last["time"] - records[-2]["time"]) / (last["step"] - records[-2]["step"])
        found.detail += f", ETA {duration(max(0.0, pace * (total - last['step'])))}"
    return found


def _grows(paths: list[Path]) -> bool:
    return any(
        path.is_file() and time.time() - path.stat().st_mtime < QUIET_SECONDS for path in paths
    )


def _queued(job: Job) -> str:
    """Return why a job waits, in words."""
    words = {"Dependency": "waits for an earlier job", "BeginTime": "requeued"}
    return words.get(job.reason, job.reason)


def judge(step: Step, job: Job | None, run: Path, slurm: bool) -> StageStatus:
    """Return the state of one stage by its own traces; stages that wait for others are judged by
    `survey`."""
    if step.output.exists():
        return StageStatus(step.name, "finished", str(step.output))
    seen = training(step) or StageStatus(step.name, "")
    seen.job = job.id if job else ""
    log = run / "logs" / f"{template_of(step.name)}-{seen.job}.log"
    if job and job.state in QUEUED:
        seen.state, seen.detail = (
            "pending",
            "; ".join(text for text in (_queued(job), seen.detail) if text),
        )
    elif (job and job.state in ACTIVE) or (
        not slurm and _grows([log, Path(f"{step.output}.training/metrics.jsonl")])
    ):
        seen.state, seen.detail = "running", seen.detail or "starting"
    elif job and job.state == "CANCELLED" and not log.is_file():
        seen.state, seen.detail = "cancelled", "never started"
    elif job and (log.is_file() or job.state):
        word = job.state.lower().replace("_", " ") or "ended"
        seen.state, seen.detail = "failed", last_error(log) or f"{word}; log: {log}"
    elif seen.steps:
        seen.state = "stopped"
    else:
        seen.state = "waiting"
    return seen


def survey(run: Path) -> list[StageStatus]:
    """Return all stages of a run in order.

    Raises:
        ConfigError: `run` is not the directory of a run.
    """
    config = run_config(run)
    found, recorded = plan(config), recorded_jobs(run)
    known = queue([identity for identities in recorded.values() for identity in identities])
    result: dict[str, StageStatus] = {}
    for step in found:
        seen = judge(step, job_of(step, config, recorded, known), run, known is not None)
        before = [
            result[needed.name] for needed in needed_for(found, step.name) if needed.name in result
        ]
        lost = [other.stage for other in before if other.state == "failed"]
        if seen.state in ("cancelled", "failed", "pending", "waiting") and lost:
            seen.state, seen.detail = "cancelled", f"needs {', '.join(lost)}, which failed"
        elif (
            seen.state == "running"
            and not seen.steps
            and any(template_of(b.stage) == template_of(step.name) for b in before)
        ):
            seen.state, seen.detail = "waiting", f"after {before[-1].stage}, in the same job"
        result[step.name] = seen
    return list(result.values())


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    stages = survey(args.run)
    if args.json:
        print(json.dumps([asdict(stage) for stage in stages], ensure_ascii=False))
        return 0
    width = max(len(stage.stage) for stage in stages)
    for stage in stages:
        job = f"job {stage.job}" if stage.job else ""
        print(f"{stage.stage:{width}}  {stage.state:9}  {job:10}  {stage.detail}".rstrip())
    print(f"logs: {args.run / 'logs'}")
    return 0
