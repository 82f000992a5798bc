"""What the SLURM tests do with a cluster: submit templates, wait, find processes, read logs."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
TINY = "tests/slurm/tiny.yaml"
WIDE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
PATIENCE = 8  # times longer is waited where others use the machine too


class Slurm:
    """The cluster, as tests use it."""

    def __init__(self, cluster, stubs):
        self.cluster, self.env, self.run, self.stubs = cluster, cluster.env, cluster.run, stubs

    def submit(self, template, *arguments, options=()):
        """Submit a template from the repository's folder; return the job's id."""
        command = [
            "sbatch",
            "--parsable",
            f"--output={self.stubs}/%x-%A_%a.out",
            *options,
            f"slurm/{template}.sh",
        ]
        return self.run(*command, *arguments, cwd=REPO).strip()

    def field(self, job, name):
        """Return a field of `scontrol show job`, of an array's first task."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0].split()
        return next((w.partition("=")[2] for w in words if w.startswith(f"{name}=")), "")

    def state(self, job):
        return self.field(job, "JobState")

    def until(self, condition, seconds, what, log=None, every=0.2):
        """Wait for a condition, which takes a quiet machine at most `seconds`; return its value.

        `every` so many seconds it is asked.
        """
        seconds *= PATIENCE
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-3000:] if log and log.is_file() else ""
                raise AssertionError(
                    f"no {what} within {seconds} s\n{self.run('squeue', '--states=all')}\n{text}"
                )
            time.sleep(every)
        return value

    def finished(self, job, seconds, log=None):
        """Wait for the end of a job; return its state."""
        ended = lambda: (s := self.state(job)) in ("COMPLETED", *FAILED) and s  # noqa: E731
        return self.until(ended, seconds, f"end of job {job}", log)

    def processes(self, job, **variables):
        """Return processes of train.py in a job with these environment variables."""
        wanted = {f"{name}={value}" for name, value in {"SLURM_JOB_ID": job, **variables}.items()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "environ").read_text(errors="replace").split("\0")
                if wanted <= set(words) and "train.py" in (folder / "cmdline").read_text(
                    errors="replace"
                ):
                    found.append(int(folder.name))
        return found

    def status(self, run):
        """Return what `nexus-ds status RUN` prints."""
        command = [sys.executable, "-m", "nexus_ds", "status", str(run)]
        return subprocess.run(
            command, cwd=REPO, env=self.env, capture_output=True, text=True, check=True
        ).stdout


def _steps(run, stage):
    path = run / f"{stage}.training" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [
        int(line.partition('"step": ')[2].partition(",")[0])
        for line in lines
        if '"kind": "train"' in line
    ]


def metrics_step(run, stage="nexus"):
    """Return the last optimizer step that a stage has logged, 0 without any."""
    return max(_steps(run, stage)[-1:], default=0)


def steps_logged(run, stage="nexus"):
    """Return how many steps a stage has logged, those that were done again counted twice."""
    return len(_steps(run, stage))


def clean_environment():
    """Return the environment without another job's variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "NEXUS_"))}
