"""All that only a GPU shows, by one command within eight minutes: `nexus-ds bench gpu`.

The most valuable comes first. Every step is a process of its own with a time limit of its own, so
that one which crashes, hangs or takes the memory costs nothing but itself. Steps of one wave run
side by side; those whose time or memory is measured are alone in theirs. The limits of the waves
add up to the time of a whole run, and `gpu.json` is whole after every step.
Not covered: several GPUs, and what a trained model is worth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from nexus_ds.children import tied
from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.launch import devices, free_port, launch_names
from nexus_ds.outputs import new_file, refuse_existing, write_json, write_text
from nexus_ds.progress import say
from nexus_ds.report.page import Cell, format_cell

REPOSITORY = Path(__file__).parents[3]
SECONDS = 480
PATIENCE = 5
"""A rehearsal gets this many times the time: it may share two cores with other work."""
POLL_SECONDS = 0.1
TAIL_LINES = 12
LINE_CHARACTERS = 400
SMALLEST_PLAIN = 0.005  # smaller figures are written as 1.2e-03
LOG_LINES = 400
TABLE = "docs/performance.md"
BEGIN = "<!-- bench gpu: the table begins -->"
END = "<!-- bench gpu: the table ends -->"
MODULE = "nexus_ds.experiments.benchmarks.gpu_steps"
LAUNCHER = ("-m", "deepspeed.launcher.runner")
"""The program `deepspeed`, also where pip put it somewhere else than beside python."""
OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "outlasted its limit", "skipped: no time"


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    limit: float
    """Seconds after which it is killed."""
    command: tuple[str, ...]
    """Words after `python`, started in the repository."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Figures that it says in words: name to a regular expression with one group, of which the last
    match counts. A line of JSON counts without any."""


@dataclass
class Result:
    """What became of a step."""

    name: str
    state: str
    """ok, failed, outlasted its limit, or skipped: no time."""
    code: int | None = None
    """Exit code; None of a step that was skipped, negative of one that a signal ended."""
    seconds: float = 0.0
    limit: float = 0.0
    figures: dict[str, object] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)
    """Last lines that it wrote."""


@dataclass
class Report:
    """What stands in gpu.json."""

    date: str
    small: bool
    seconds: float
    """Of the whole run at most."""
    steps: list[Result] = field(default_factory=list)


# The steps ----------------------------------------------------------------------------------------


def _measured(name: str, limit: float, small: bool, *words: str) -> Step:
    """Return a step of `gpu_steps`: its name and arguments."""
    sizes = ["--small"] if small else []
    return Step(name, limit, ("-m", MODULE, *words, *sizes))


def _tests(name: str, limit: float, which: str) -> Step:
    """Return those of the GPU tests that pytest's expression `which` picks."""
    options = ("-rs", "-m", "gpu", "-p", "no:cacheprovider", "-k", which)
    patterns = {word: rf"(\d+) {word}" for word in ("passed", "failed", "skipped")}
    return Step(name, limit, ("-m", "pytest", *options, "tests/gpu"), patterns)


def _literal(stage: str, inputs: Path, work: Path, small: bool) -> Step:
    """Return `deepspeed nexus_ds/train.py --deepspeed ds_configs/STAGE.json` on a small mixture,
    its export with it."""
    run = work / stage
    command = (
        *LAUNCHER,
        # several of them run at once
        f"--master_port={free_port()}",
        "nexus_ds/train.py",
        "--deepspeed",
        f"ds_configs/{stage}.json",
        f"pipeline.run={run}",
        f"model.path={inputs / 'mixture'}",
        f"data.path={inputs / 'text'}",
        f"output={run / 'out'}",
        "model.dtype=bf16",
        "training.tokens=0",
        f"training.steps={2 if small else 20}",
        "training.eval_windows=4",
    )
    patterns = {
        "tokens/s": r"([\d,]+) tok/s",
        "logits of the export differ by": r"logits differ by ([\d.e+-]+)\)",
    }
    return Step(f"literal command, {stage}", 110, command, patterns)


def _verbs(inputs: Path, work: Path) -> list[Step]:
    """Return the verbs that use a GPU without the trainer."""
    nexus = ("-m", "nexus_ds")
    mixture, seed, text = (inputs / name for name in ("mixture", "seed", "text"))
    domains = load_config("demo", []).pipeline.domains
    branches = [f"--expert={domain}={inputs / 'branches' / domain}" for domain in domains]
    evaluate = (
        *nexus,
        "evaluate",
        f"--checkpoint={mixture}",
        f"--checkpoint={seed}",
        f"--data={text}",
        f"--out={work / 'report'}",
        "--windows=4",
    )
    upcycle = (
        *nexus,
        "upcycle",
        f"--seed={seed}",
        *branches,
        f"--domains={inputs / 'domains.safetensors'}",
        f"--data={text}",
        f"--out={work / 'upcycled'}",
        "router.warm_start=label_fit",
    )
    generate = (*nexus, "generate", f"--checkpoint={mixture}", "def main", "--tokens=20", "--json")
    fitted = {"tokens at their domain's expert": r"own domain's expert [\d.]+ -> ([\d.]+)"}
    speed = {"tokens/s": r'"tokens_per_second": ([\d.]+)'}
    return [
        Step("evaluate", 110, evaluate, {"tokens/s": r"([\d,]+) tokens/s"}),
        Step("upcycle with label fit", 110, upcycle, fitted),
        Step("generate", 110, generate, speed),
    ]


def _memory(layout: str, micro: int, small: bool) -> Step:
    """Return the step that compares the peak memory of a layout with `plan`."""
    stage, checkpointing = layout.split()
    noted = "" if checkpointing == "none" else ", checkpointing"
    name = f"memory, ZeRO-{stage}{noted}"
    return _measured(name, 35, small, "memory", stage, checkpointing, str(micro))


def waves(inputs: Path, work: Path, small: bool, make: bool) -> list[list[Step]]:
    """Return the steps, most valuable first; those of one wave run side by side.

    Args:
        inputs: what `gpu_steps.make_inputs` writes.
        work: folder for what the steps write.
        small: sizes for a CPU.
        make: the first wave makes the inputs.
    """
    first = [_measured("machine", 60, small, "machine")]
    if make:
        first.append(_measured("inputs", 60, small, "inputs", str(inputs)))
    micro = 1 if small else 4
    return [
        first,
        [
            _tests("tests/gpu", 120, "not comparison"),
            *(_literal(stage, inputs, work, small) for stage in ("z3", "z2", "z1", "z3_offload")),
            *_verbs(inputs, work),
        ],
        [_measured("profile", 50, small, "profile")],
        [_measured("speed", 55, small, "speed")],
        [_memory("1 none", micro, small)],
        [_memory("3 none", micro, small)],
        [_memory("3 non_reentrant", 2 * micro, small)],
        [_measured("9.1B", 45, small, "large")],
        # What `speed` measured, as a test that can fail; the first to go where time is short.
        [_tests("tests/gpu, comparison", 45, "comparison")],
    ]


# The runner ---------------------------------------------------------------------------------------


class Runner:
    """Runs waves of steps and keeps `gpu.json` after each.

    Args:
        out: existing folder; gets gpu.json and logs.txt.
        work: folder for the output of running steps.
        report: still without steps. One whose limit is longer than what is left is skipped.
        side_by_side: steps of a wave that run at once.
    """

    def __init__(self, out: Path, work: Path, report: Report, side_by_side: int) -> None:
        self.out = out
        self.work = work
        self.report = report
        self.deadline = time.monotonic() + report.seconds
        self.side_by_side = side_by_side
        self.running: dict[Path, tuple[Step, subprocess.Popen[bytes], float]] = {}

    def run(self, wave: Sequence[Step]) -> None:
        """Run the steps of a wave; return when all have ended."""
        waiting = list(wave)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.side_by_side:
                    self._start(waiting.pop(0))
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            for _, process, _ in self.running.values():
                _kill(process)

    def _start(self, step: Step) -> None:
        now = time.monotonic()
        if now + step.limit > self.deadline:
            self._note(Result(step.name, SKIPPED, limit=step.limit))
            return
        log = self.work / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower())}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                tied([sys.executable, *step.command]),
                cwd=REPOSITORY,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # a group of its own, so that a launcher's ranks are killed with it
                start_new_session=True,
            )
        self.running[log] = (step, process, now)

    def _collect(self) -> None:
        """Note the steps that have ended, and end those that outlasted their limit."""
        for log, (step, process, started) in list(self.running.items()):
            seconds = time.monotonic() - started
            going = process.poll() is None
            late = going and seconds > step.limit
            if going and not late:
                continue
            # Also of one that ended: a launcher that crashed may leave a rank, and that the GPU's
            # memory.
            _kill(process)
            del self.running[log]
            state = TIMED_OUT if late else FAILED if process.returncode else OK
            self._finish(step, state, process.returncode, seconds, log)

    def _finish(self, step: Step, state: str, code: int, seconds: float, log: Path) -> None:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        with (self.out / "logs.txt").open("a", encoding="utf-8") as file:
            last = "\n".join(lines[-LOG_LINES:])
            file.write(f"######## {step.name}: {state}, exit code {code}\n{last}\n")
        figures = read_figures(text, step.patterns)
        tail = [line[:LINE_CHARACTERS] for line in lines[-TAIL_LINES:]]
        self._note(Result(step.name, state, code, round(seconds, 1), step.limit, figures, tail))

    def _note(self, result: Result) -> None:
        self.report.steps.append(result)
        write_json(self.out / "gpu.json", asdict(self.report))
        line = f"{result.name}: {result.state} ({result.seconds:.0f} s)"
        shown = [] if result.state == OK else result.tail
        say("\n    ".join([line, *shown]))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a step with all that it started, and wait for it."""
    # it may have ended by itself
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """Return the environment of a step: this checkout, no launcher's variables, no network."""
    kept = dict(os.environ)
    for name in launch_names():
        del kept[name]
    paths = [str(REPOSITORY), *kept.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        # several steps share the cores; else every one takes them all
        "OMP_NUM_THREADS": "4",
        # the plan counts on it
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **kept,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def read_figures(text: str, patterns: Mapping[str, str]) -> dict[str, object]:
    """Return the figures that a step wrote: those of `patterns`, or without any its last JSON."""
    if patterns:
        matches = {name: re.findall(pattern, text) for name, pattern in patterns.items()}
        return {name: _number(found[-1]) for name, found in matches.items() if found}
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line) if line.startswith("{") else None
        except ValueError:
            continue  # cut off in the middle
        if isinstance(found, dict):
            return found
    return {}


def _number(text: str) -> float | int:
    plain = text.replace(",", "")
    return int(plain) if plain.isdigit() else float(plain)


# The table ----------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    if isinstance(value, float) and 0 < abs(value) < SMALLEST_PLAIN:
        return f"{value:.1e}"
    if value is None or isinstance(value, str | int | float):
        cell: Cell = value
        return format_cell(cell)
    raise DataError(
        f"gpu.json: found {str(value)[:100]!r} as a figure; expected a number or a word"
    )


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _step_line(step: Result) -> list[str]:
    figures = step.figures.items()
    shown = [f"{name} {_cell(value)}" for name, value in figures if not isinstance(value, dict)]
    return [step.name, step.state, _cell(step.seconds), "; ".join(shown)]


def _part_tables(step: Result) -> list[str]:
    """Return a table for the figures of a step that have parts, one for each set of columns."""
    parts = {name: value for name, value in step.figures.items() if isinstance(value, dict)}
    lines: list[str] = []
    for columns in dict.fromkeys(tuple(part) for part in parts.values()):
        alike = {name: part for name, part in parts.items() if tuple(part) == columns}
        rows = [[name, *map(_cell, part.values())] for name, part in alike.items()]
        lines += ["", *_grid([step.name, *columns], rows)]
    return lines


def table(report: Report) -> str:
    """Return a report as Markdown: a line for each step, then tables of those with parts."""
    sizes = ", small sizes," if report.small else ""
    lines = [f"Measured {report.date}{sizes} by `nexus-ds bench gpu`:", ""]
    header = ["step", "outcome", "seconds", "figures"]
    lines += _grid(header, [_step_line(step) for step in report.steps])
    for step in report.steps:
        lines += _part_tables(step)
    return "\n".join(lines)


def read_report(path: Path) -> Report:
    """Read a gpu.json; DataError if there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        report = Report(**found | {"steps": [Result(**step) for step in found["steps"]]})
        table(report)  # whose errors are those of wrong types
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: not what bench gpu writes ({type(error).__name__}: {error}); give its --out"
        ) from error


def put_table(report: Report, document: Path) -> None:
    """Write the table of a report into a document, between its two markers.

    Raises:
        ConfigError: a document without the markers.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{document}: expected the lines {BEGIN} and {END}; put them there")
    with new_file(document, overwrite=True) as temporary:
        write_text(temporary, f"{before}{BEGIN}\n{table(report)}\n{END}{after}")


# The command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        metavar="DIR",
        help="new directory of gpu.json and logs.txt (%(default)s)",
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="DIR",
        help="models and text that make gpu-kit wrote (default: made first)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help="in all (%(default)s)",
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes, also without a GPU: a rehearsal"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the table of --out into FILE, between its markers",
    )


def _check(args: argparse.Namespace) -> None:
    if not (REPOSITORY / "tests" / "gpu").is_dir():
        raise ConfigError(
            f"bench gpu: found no tests/gpu in {REPOSITORY}; run it in a clone, not from a wheel"
        )
    if args.inputs and not (args.inputs / "mixture").is_dir():
        raise ConfigError(
            f"--inputs: found no mixture in {args.inputs}; make gpu-kit writes one, or leave it out"
        )
    if not args.small and not devices():
        raise ConfigError(
            "bench gpu: torch finds no CUDA device on this machine; use --small for a rehearsal"
        )
    refuse_existing(args.out)


def run(args: argparse.Namespace) -> int:
    """Run all steps, or write the table of a run; return 1 if a step did not end well."""
    if args.table:
        put_table(read_report(args.out / "gpu.json"), args.table)
        print_text(f"wrote {args.table}")
        return 0
    _check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    patience = PATIENCE if args.small else 1
    report = Report(time.strftime("%Y-%m-%d"), args.small, patience * args.seconds)
    # A process needs a core for itself and one for what it starts.
    side_by_side = max(1, len(os.sched_getaffinity(0)) // 2)
    with tempfile.TemporaryDirectory(prefix="nexus-ds-gpu-") as folder:
        work = Path(folder)
        inputs = (args.inputs or work / "inputs").absolute()
        runner = Runner(args.out, work, report, side_by_side)
        for wave in waves(inputs, work, args.small, not args.inputs):
            runner.run([replace(step, limit=patience * step.limit) for step in wave])
    print_text(table(report))
    written = args.out / "gpu.json"
    following = ["nexus-ds", "bench", "gpu", "--out", str(args.out), "--table", TABLE]
    print_text(f"wrote {written}; next: {shlex.join(following)}")
    return 0 if all(step.state == OK for step in report.steps) else 1
