"""Runs tasks on this machine, each in a process of its own: a pipeline's stages, a comparison's
jobs.

A task starts as soon as what it needs is there and a slot is free; one whose output exists is done.
The processes end with this one: a signal or an error ends what still runs, and so does a kill.
Not covered: tasks over several machines (slurm/).
"""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from nexus_ds.children import tied
from nexus_ds.errors import BadBatchesError, NexusError
from nexus_ds.launch import EXIT_BAD_BATCHES, devices, launch_names
from nexus_ds.outputs import exit_on_signals
from nexus_ds.pipeline import Step
from nexus_ds.progress import duration, say

# Unnoticed beside tasks of seconds to hours, and next to no CPU time.
POLL_SECONDS = 0.05


class Process(Protocol):
    """What the runner asks of a process; `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self) -> int:
        """Wait until it has ended; return its exit code."""


@dataclass(frozen=True)
class Task:
    """One thing to make."""

    name: str
    output: Path
    """The path that is there when it is done."""
    start: Callable[[int], Process]
    """Starts its process on a slot."""
    needs: tuple[Path, ...] = ()
    """Outputs of other tasks that it reads."""
    wide: bool = False
    """Whether it takes all devices, so that nothing runs beside it."""
    cost: float = 1.0
    """Its share of the work, in any unit; what is left of the time is told by it."""


@dataclass(frozen=True)
class _Running:
    task: Task
    process: Process
    since: float
    """Of the monotonic clock, seconds."""


class Runner(ABC):
    """Runs the tasks that are missing, at most one a slot; says what starts and what ends.

    Its `on_` methods speak, and one decides what a failure means: raise an error, and the others
    are ended; return why it failed, and they go on, without those that need the lost output.
    """

    def __init__(self, tasks: Iterable[Task], slots: int) -> None:
        self.slots = slots
        self.waiting = [task for task in tasks if not task.output.exists()]
        self.running: dict[int, _Running] = {}
        """By slot."""
        self.failed: dict[Path, str] = {}
        """Why, by output."""
        self.total = len(self.waiting)
        self._names = {task.output: task.name for task in self.waiting}
        self._unmade = set(self._names)
        self._cost = sum(task.cost for task in self.waiting)
        self._started = time.monotonic()

    @abstractmethod
    def on_start(self, task: Task) -> None:
        """Say that a task starts."""

    @abstractmethod
    def on_success(self, task: Task, seconds: float) -> None:
        """Say that a task is done, after `seconds`."""

    @abstractmethod
    def on_failure(self, task: Task, code: int, seconds: float) -> str:
        """Return why a task failed, or raise."""

    def run(self) -> None:
        """Run everything that is missing."""
        with exit_on_signals(), closing(self):
            while self.waiting or self.running:
                self._start_all()
                time.sleep(POLL_SECONDS)
                self._collect()

    def close(self) -> None:
        """End what is still running; it clears up after itself."""
        # All are asked before any is waited for, so that they clear up side by side.
        for running in self.running.values():
            running.process.terminate()
        for running in self.running.values():
            running.process.wait()

    def progress(self) -> str:
        """Return how many tasks are done, and how long the others take: [3/8, 2m05s to go]."""
        under_way = [running.task for running in self.running.values()]
        left = [*self.waiting, *under_way]
        done = f"{self.total - len(left)}/{self.total}"
        # Before the first is done there is no pace to tell the rest by.
        if len(left) == self.total:
            return f"[{done}]"
        undone = sum(task.cost for task in left)
        elapsed = time.monotonic() - self._started
        pace = elapsed / (self._cost - undone)
        return f"[{done}, {duration(pace * undone)} to go]"

    def _start_all(self) -> None:
        for task in list(self.waiting):
            if self._is_lost(task) or not self._can_start(task):
                continue
            # Before it starts: its own messages may stand in the same log.
            self.on_start(task)
            self.waiting.remove(task)
            # The lowest that is free, since a slot stands for a device.
            slot = next(s for s in range(self.slots) if s not in self.running)
            process = task.start(slot)
            self.running[slot] = _Running(task, process, time.monotonic())

    def _is_lost(self, task: Task) -> bool:
        """Return whether what a task needs has failed; then it is one of the failed ones too."""
        lost = [need for need in task.needs if need in self.failed]
        if not lost:
            return False
        self.waiting.remove(task)
        self.failed[task.output] = f"needs {self._names[lost[0]]}, which failed"
        return True

    def _can_start(self, task: Task) -> bool:
        if any(need in self._unmade for need in task.needs):
            return False
        # It takes all devices, so a neighbour would share one with it.
        if task.wide:
            return not self.running
        beside_wide = any(running.task.wide for running in self.running.values())
        has_slot = len(self.running) < self.slots
        return has_slot and not beside_wide

    def _collect(self) -> None:
        for slot, running in list(self.running.items()):
            code = running.process.poll()
            if code is None:
                continue
            del self.running[slot]
            task = running.task
            seconds = time.monotonic() - running.since
            # Exit code 0 is not enough: what comes next would wait for a file that isn't there.
            if code == 0 and task.output.exists():
                self._unmade.discard(task.output)
                self.on_success(task, seconds)
            else:
                self.failed[task.output] = self.on_failure(task, code, seconds)


def slot_environment(slot: int, gpus: int) -> dict[str, str]:
    """Return what a process on a slot finds in its environment: one thread, and one device of
    those that this process has."""
    # More threads than one wait for each other on a busy machine; what runs side by side uses the
    # other cores.
    found = {"OMP_NUM_THREADS": "1"}
    if gpus:
        told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        # By name: a device may be told by its UUID.
        names = [name for name in told.split(",") if name]
        visible = names or [str(number) for number in range(gpus)]
        found["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
    return found


class _StepRunner(Runner):
    """Runs stages of a pipeline; one that fails ends the others."""

    def on_start(self, task: Task) -> None:
        say(f"== {task.name}")

    def on_success(self, task: Task, seconds: float) -> None:
        say(f"== {task.name} done in {duration(seconds)}")

    def on_failure(self, task: Task, code: int, seconds: float) -> str:
        # Its exit code is this process's too: a job that it ends is never requeued.
        kind = BadBatchesError if code == EXIT_BAD_BATCHES else NexusError
        raise kind(f"stage {task.name} failed (exit {code}); its message stands above")


def _start(step: Step, gpus: int, slot: int) -> subprocess.Popen[bytes]:
    # A stage is a launch of its own: this process's rank is none of its business.
    inherited = dict(os.environ)
    for name in launch_names():
        del inherited[name]
    # Of a wide stage the launcher gives each rank its device.
    own = slot_environment(slot, 0 if step.wide else gpus)
    told = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    return subprocess.Popen(
        tied(step.command),
        env=inherited | own | told,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if step.quiet else None,
    )


def run_steps(todo: list[Step], side_by_side: int = 0) -> None:
    """Run stages that are missing, telling what runs and how long each took.

    Args:
        todo: stages in an order in which they could run one by one.
        side_by_side: single-rank stages at once; 0: one a device, or one a CPU core.

    Raises:
        NexusError: a stage failed; those that run beside it are ended.
        BadBatchesError: a training failed by them.
    """
    gpus = devices()
    outputs = {step.name: step.output for step in todo}
    tasks = []
    for step in todo:
        # What isn't among them is there already.
        needs = tuple(outputs[name] for name in step.needs if name in outputs)
        start = partial(_start, step, gpus)
        tasks.append(Task(step.name, step.output, start, needs, step.wide))
    # The cores that this process may use, which in a job are fewer than the machine's.
    slots = side_by_side or gpus or len(os.sched_getaffinity(0))
    _StepRunner(tasks, slots).run()
