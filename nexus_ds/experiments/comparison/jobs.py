"""Jobs: commands that make one thing each, run side by side in the order of what they need.

A job's output has a name that follows from its command and its inputs, so contenders share what
they have in common (a seed's branches, the label fit of two variants) and a repetition makes only
what is missing. On a CPU the processes are forked from one that has the libraries loaded, which
saves seconds a job; on GPUs each starts anew and sees one device.
Not covered: jobs over several processes or machines (`compare --dry-run` prints the commands for
those).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nexus_ds.launch import LAUNCH_VARIABLES
from nexus_ds.outputs import exit_on_signals
from nexus_ds.pipeline import typed_training
from nexus_ds.progress import duration

PRELOAD = [
    "nexus_ds.runtime.loop",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
]
WORK = "nexus_ds.experiments.comparison.work"  # functions that are no verbs


@dataclass(frozen=True)
class Job:
    """One command and the path that it makes."""

    name: str
    output: Path
    words: tuple[str, ...]
    """Of the command line after `nexus-ds`; or WORK, the function's name and its arguments as
    JSON."""
    needs: tuple[Path, ...] = ()
    """Outputs of other jobs."""
    flops: float = 0.0
    """Of its training; 0 for jobs that don't train."""
    tokens: int = 0

    def command(self) -> str:
        """Return the job as one would type it."""
        if self.words[0] == "train":
            return typed_training(self.words[1:])
        return shlex.join(
            [*(["python", "-m"] if self.words[0] == WORK else ["nexus-ds"]), *self.words]
        )


def identity(*parts: Any, without: str = "") -> str:
    """Return eight digits that follow from `parts`; the directory `without` in them does not
    count."""
    text = (
        json.dumps(parts, sort_keys=True, default=str).replace(without, "")
        if without
        else json.dumps(parts)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _run_words(words: tuple[str, ...], log: str, environment: dict[str, str]) -> None:
    """Run one job in a process of its own, all that it prints in a file."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    # Ctrl-C is the parent's, which ends us with SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    module, given = (
        ("nexus_ds.__main__", list(words)) if words[0] != WORK else (WORK, list(words[1:]))
    )
    sys.exit(importlib.import_module(module).main(given))


def last_line(log: Path) -> str:
    """Return the last line of a log, without what stands before a verb's message."""
    with contextlib.suppress(OSError):
        lines = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        return re.sub(r"^nexus-ds \w+: ", "", lines[-1]) if lines else "no message"
    return "no log"


@dataclass
class Pool:
    """Runs jobs on `slots` processes at once; a failed job's dependants are skipped, all others
    still run."""

    jobs: dict[Path, Job]
    logs: Path
    slots: int
    gpus: int = 0
    failed: dict[Path, str] = field(default_factory=dict)
    running: dict[int, tuple[Job, BaseProcess, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.context: Any = multiprocessing.get_context("spawn" if self.gpus else "forkserver")
        if not self.gpus:
            self.context.set_forkserver_preload(PRELOAD)
        self.waiting = [job for job in self.jobs.values() if not job.output.exists()]
        self.total, self.started = len(self.waiting), time.monotonic()
        self.least = sum(job.flops for job in self.waiting) / max(20 * self.total, 1) + 1.0
        self.work = sum(map(self._weight, self.waiting))

    def _blocked(self, job: Job) -> bool:
        """Return whether a job has to wait; one that can never run is moved to the failed ones."""
        lost = next((need for need in job.needs if need in self.failed), None)
        if lost is not None:
            self.waiting.remove(job)
            self.failed[job.output] = f"needs {self.jobs[lost].name}, which failed"
            return True
        return any(not need.exists() for need in job.needs)

    def _start_all(self) -> None:
        for job in list(self.waiting):
            if len(self.running) >= self.slots:
                return
            if self._blocked(job):
                continue
            slot = next(s for s in range(self.slots) if s not in self.running)
            environment = {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.gpus)
            log = self.log(job)
            process = self.context.Process(
                target=_run_words, args=(job.words, str(log), environment)
            )
            process.start()
            self.waiting.remove(job)
            self.running[slot] = (job, process, time.monotonic())
            print(f"{self._count()} {job.name} ...", file=sys.stderr, flush=True)

    def log(self, job: Job) -> Path:
        """Return where a job's messages go."""
        return self.logs / f"{job.output.name}.log"

    def _collect(self) -> None:
        for slot, (job, process, since) in list(self.running.items()):
            if process.is_alive():
                continue
            del self.running[slot]
            took = duration(time.monotonic() - since)
            if process.exitcode == 0 and job.output.exists():
                print(f"{self._count()} {job.name}: {took}", file=sys.stderr, flush=True)
                continue
            self.failed[job.output] = last_line(self.log(job))
            print(
                f"{self._count()} {job.name} FAILED after {took} (exit {process.exitcode}): "
                f"{self.failed[job.output]} [{self.log(job)}]",
                file=sys.stderr,
                flush=True,
            )

    def _count(self) -> str:
        """Return how far the pool is; jobs count by their training's operations, all others as one
        in twenty of the mean."""
        left = [*self.waiting, *(job for job, _, _ in self.running.values())]
        undone = sum(map(self._weight, left))
        done = f"{self.total - len(left)}/{self.total}"
        if len(left) == self.total:
            return f"[{done}]"
        rest = (time.monotonic() - self.started) / (self.work - undone) * undone
        return f"[{done}, {duration(rest)} to go]"

    def _weight(self, job: Job) -> float:
        return job.flops + self.least

    def run(self) -> None:
        """Run everything that is missing; `failed` says afterwards what could not be made, and
        why."""
        there = len(self.jobs) - self.total
        print(
            f"{self.total} jobs, {there} more are there already; {self.slots} at once, messages of each in {self.logs}",
            file=sys.stderr,
            flush=True,
        )
        with exit_on_signals(), closing(self):
            while self.waiting or self.running:
                self._start_all()
                time.sleep(0.05)
                self._collect()

    def close(self) -> None:
        """End what is still running; it clears up after itself."""
        if self.running:
            print("stopping; the same command again goes on from here", file=sys.stderr, flush=True)
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.join()
