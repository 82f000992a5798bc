"""Runs a pipeline's steps on this machine, as many at once as its devices allow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing

from nexus_ds.errors import NexusError
from nexus_ds.launch import LAUNCH_VARIABLES, devices
from nexus_ds.outputs import exit_on_signals
from nexus_ds.pipeline import Step
from nexus_ds.progress import duration


def _environment(slot: int, gpus: int) -> dict[str, str]:
    """Return the environment of a stage: no launcher variables of our own, one device and one
    thread a single rank."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    if gpus and slot >= 0:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        kept["CUDA_VISIBLE_DEVICES"] = (visible or [str(i) for i in range(gpus)])[slot % gpus]
    # More threads than one wait for each other on a busy machine; branches that run side by side
    # use the other cores.
    return kept | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }


class _Scheduler:
    """Runs stages as soon as what they need is there: single-rank ones side by side, the others
    alone."""

    def __init__(self, todo: list[Step], slots: int, gpus: int) -> None:
        self.waiting, self.slots, self.gpus = list(todo), slots, gpus
        self.unfinished = {step.name for step in todo}
        self.running: dict[int, tuple[Step, subprocess.Popen[bytes], float]] = {}

    def _startable(self) -> Step | None:
        alone = any(step.wide for step, _, _ in self.running.values())
        for step in self.waiting:
            free = not self.running if step.wide else len(self.running) < self.slots and not alone
            if free and not any(name in self.unfinished for name in step.needs):
                return step
        return None

    def start_all(self) -> None:
        """Start whatever can start."""
        while step := self._startable():
            self.waiting.remove(step)
            slot = next(s for s in range(self.slots) if s not in self.running)
            print(f"== {step.name}", file=sys.stderr, flush=True)
            environment = _environment(-1 if step.wide else slot, self.gpus)
            process = subprocess.Popen(
                step.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if step.quiet else None,
            )
            self.running[slot] = (step, process, time.monotonic())

    def collect(self) -> None:
        """Take note of stages that ended; NexusError for one that failed."""
        for slot, (step, process, started) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[slot]
            if process.returncode != 0 or not step.output.exists():
                raise NexusError(
                    f"stage {step.name} failed (exit {process.returncode}); its message stands above"
                )
            self.unfinished.discard(step.name)
            print(
                f"== {step.name} done in {duration(time.monotonic() - started)}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """End what is still running; it clears up after itself."""
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.wait()


def run_steps(todo: list[Step], side_by_side: int = 0) -> None:
    """Run stages that are missing, telling what runs and how long each took.

    Args:
        todo: stages in an order in which they could run one by one.
        side_by_side: single-rank stages at once; 0: one a device, or one a CPU core.

    Raises:
        NexusError: a stage failed; those that run beside it are ended.
    """
    gpus = devices()
    scheduler = _Scheduler(todo, side_by_side or gpus or len(os.sched_getaffinity(0)), gpus)
    with exit_on_signals(), closing(scheduler):
        while scheduler.unfinished:
            scheduler.start_all()
            time.sleep(0.05)
            scheduler.collect()
