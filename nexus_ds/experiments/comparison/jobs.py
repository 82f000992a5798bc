"""Jobs: commands that make one thing each, run side by side in the order of what they need.

A job's output has a name that follows from its command and its inputs, so methods share what they
have in common (a seed's branches, the label fit of two variants) and a repetition makes only what
is missing. The processes are forked from one that has the libraries loaded, which saves seconds a
job; on GPUs each sees one device, which several jobs may share.
Not covered: jobs over several processes or machines (`compare --dry-run` prints the commands for
those).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.children import tie_to_parent
from nexus_ds.command_lines import typed_training
from nexus_ds.errors import CheckpointError
from nexus_ds.launch import launch_names
from nexus_ds.local_runner import Runner, Task, slot_environment
from nexus_ds.progress import duration, say

PRELOAD = [
    "nexus_ds.runtime.loop",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
]
# functions that are no verbs
WORK = "nexus_ds.experiments.comparison.work"


@dataclass(frozen=True)
class Job:
    """One command and the path that it makes."""

    name: str
    output: Path
    words: tuple[str, ...]
    """Of the command line after `nexus-ds`; or WORK, a function's name and its arguments (JSON)."""
    needs: tuple[Path, ...] = ()
    """Outputs of other jobs."""
    flops: float = 0.0
    """Of its training; 0 for jobs that don't train."""
    tokens: int = 0

    def command(self) -> str:
        """Return the job as one would type it."""
        if self.words[0] == "train":
            return typed_training(self.words[1:])
        program = ["python", "-m"] if self.words[0] == WORK else ["nexus-ds"]
        return shlex.join([*program, *self.words])


def identity(*parts: object, without: str = "", names: Mapping[str, str] | None = None) -> str:
    """Return eight digits that follow from `parts`.

    Args:
        parts: anything that JSON can say.
        without: a directory; where it is does not count.
        names: what stands for a path that is given from outside: its content, say.
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    if without:
        text = text.replace(without, "")
    # a copy of a model in another place is the same model
    for path, content in (names or {}).items():
        # a word may be NAME=PATH
        text = text.replace(json.dumps(path)[1:-1], content)
    # Enough for the hundreds of jobs of a comparison, and short in a path.
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def content_of(model: Path) -> str:
    """Return a hash of a model's weights, settings and tokenizer, whatever its folder is called.

    Raises:
        CheckpointError: there is none, or a mixture.
    """
    if not (model / "config.json").is_file():
        raise CheckpointError(
            f"{model}: found no config.json; expected a dense checkpoint to start from"
        )
    # its branches would fail one after the other, each with a message of its own
    if is_nexus(model):
        raise CheckpointError(
            f"{model}: found a mixture; expected a dense checkpoint to start from"
        )
    whole = hashlib.sha256()
    for path in sorted(model.iterdir()):
        # cards and READMEs change nothing
        if path.suffix in (".json", ".safetensors", ".model", ".txt"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            whole.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return f"model {whole.hexdigest()}"


def last_line(log: Path) -> str:
    """Return the last line of a log, without what stands before a verb's message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no log"
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^nexus-ds \w+: ", "", lines[-1]) if lines else "no message"


def _run_words(words: tuple[str, ...], log: Path, environment: Mapping[str, str]) -> NoReturn:
    """Run one job in a process of its own, all that it prints in a file."""
    tie_to_parent()
    with log.open("w", encoding="utf-8") as file:
        # The descriptors, not sys.stdout and sys.stderr: libraries print too.
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in launch_names():
        del os.environ[name]
    os.environ.update(environment)
    # Ctrl-C is the parent's, which ends us with SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Here, so that a job on a GPU sees its device before torch asks for devices.
    import torch

    # OMP_NUM_THREADS comes too late for a process that is forked with torch in it.
    torch.set_num_threads(1)
    module = "nexus_ds.__main__"
    arguments = list(words)
    if words[0] == WORK:
        module = WORK
        arguments = list(words[1:])
    sys.exit(importlib.import_module(module).main(arguments))


class _Child:
    """A process of multiprocessing with the words of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None, "a joined process has ended"
        return self.process.exitcode


def _context() -> ForkServerContext:
    """Return how processes start: forked from one that has the libraries loaded."""
    # A process that has asked CUDA for devices can't be forked: this lets torch, which looks for
    # them when it is loaded, ask the driver's library instead.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Pool(Runner):
    """Runs jobs; a failed job's dependants are skipped, all others still run.

    `failed` says afterwards what could not be made, and why.
    """

    def __init__(
        self,
        jobs: Mapping[Path, Job],
        logs: Path,
        slots: int,
        gpus: int = 0,
    ) -> None:
        self.logs = logs
        self.gpus = gpus
        self.there = sum(job.output.exists() for job in jobs.values())
        logs.mkdir(parents=True, exist_ok=True)
        # Libraries read it when they are loaded, which in a forked job is before the job starts.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.context = _context()
        missing = [job.flops for job in jobs.values() if not job.output.exists()]
        # What does not train counts as one in twenty of the mean job.
        least = sum(missing) / max(20 * len(missing), 1) + 1.0
        tasks = [self._task(job, job.flops + least) for job in jobs.values()]
        super().__init__(tasks, slots)

    def _task(self, job: Job, cost: float) -> Task:
        start = partial(self._start, job)
        return Task(job.name, job.output, start, job.needs, cost=cost)

    def _start(self, job: Job, slot: int) -> _Child:
        environment = slot_environment(slot, self.gpus) | {
            # Its threads do not survive a fork.
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        arguments = (job.words, self.log(job.output), environment)
        process = self.context.Process(target=_run_words, args=arguments)
        process.start()
        return _Child(process)

    def log(self, output: Path) -> Path:
        """Return where the messages of the job that makes `output` go."""
        return self.logs / f"{output.name}.log"

    def on_start(self, task: Task) -> None:
        """Say that a job starts."""
        say(f"{self.progress()} {task.name} ...")

    def on_success(self, task: Task, seconds: float) -> None:
        """Say that a job is done."""
        say(f"{self.progress()} {task.name}: {duration(seconds)}")

    def on_failure(self, task: Task, code: int, seconds: float) -> str:
        """Say that a job failed; return the last line of its log."""
        log = self.log(task.output)
        why = last_line(log)
        failed = f"{task.name} FAILED after {duration(seconds)} (exit {code})"
        say(f"{self.progress()} {failed}: {why} [{log}]")
        return why

    def run(self) -> None:
        """Run everything that is missing."""
        say(
            f"{self.total} jobs, {self.there} more are there already; {self.slots} at once, "
            f"messages of each in {self.logs}"
        )
        super().run()

    def close(self) -> None:
        """End what is still running; it clears up after itself."""
        if self.running:
            say("stopping; the same command again goes on from here")
        super().close()
