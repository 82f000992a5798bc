"""What a run tells: one line a log interval, TensorBoard, JSONL; a bar on a terminal. Rank 0 only.

Not covered: other trackers; both files are plain and easy to feed to one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from nexus_ds.console import visible
from nexus_ds.outputs import create, naming
from nexus_ds.progress import duration, say

Values: TypeAlias = Mapping[str, "float | str | Values"]
"""Numbers under names, nested; words go into the JSONL file alone."""

LONGEST = 1 << 20  # bytes of a record, by far


def _flat(values: Values, prefix: str = "") -> dict[str, float]:
    """Return the numbers under their paths: {"loss/alpha": 2.5}."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def take_back_unfinished(log: Path) -> None:
    """Cut off a last line without an end, as a full disk or a kill leaves it.

    The next record would join it, and both be lost.

    Raises:
        OSError: the file can't be written; it names the file.
    """
    if not log.is_file():
        return
    with log.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        start = stream.seek(max(0, size - LONGEST))
        end = stream.read().rfind(b"\n") + 1
        if start + end < size:
            stream.truncate(start + end)


def steps_told(log: Path) -> int:
    """Return the largest training step of which the end of a log tells; 0 for none.

    Lines that are damaged tell nothing.
    """
    if not log.is_file():
        return 0
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - LONGEST))
        lines = stream.read().splitlines()
    found = [0]
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == "train":
                step = record.get("step")
                found += [step] if type(step) is int else []
    return max(found)


@contextmanager
def unread() -> Iterator[None]:
    """Let a terminal that was closed, or a log whose reader has gone, end no training.

    What is told stands in metrics.jsonl.
    """
    with suppress(OSError, ValueError):
        yield


class Metrics:
    """Writes what `log` is given.

    Args:
        directory: where metrics.jsonl (appended to) and tensorboard/ go.
        name: of the run, at the start of each line.
        first_step: optimizer steps that lie behind; what the board has of later ones is dropped.
        total_steps: optimizer steps of the whole run.
        active: False on other ranks than 0: all calls are silent there.
    """

    def __init__(
        self, directory: Path, name: str, first_step: int, total_steps: int, active: bool
    ) -> None:
        self.active = active
        self.name = name
        self.first = first_step
        self.total = total_steps
        self.started = time.monotonic()
        self.bar: tqdm | None = None
        if not active:
            return
        # Its import takes a second or more, which other ranks need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        take_back_unfinished(directory / "metrics.jsonl")
        self.jsonl = create(directory / "metrics.jsonl", append=True)
        self.events = directory / "tensorboard"
        self.board = SummaryWriter(str(self.events), purge_step=first_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=first_step, desc=visible(name), unit="step")

    def say(self, text: str) -> None:
        """Print one line, if there is still somebody to read it."""
        if not self.active:
            return
        with unread():
            if self.bar is None:
                say(text)
            else:
                tqdm.write(visible(text), file=sys.stderr)

    def advance(self) -> None:
        """Count one optimizer step on the bar."""
        if self.bar is not None:
            with unread():
                self.bar.update(1)

    def eta(self, step: int) -> str:
        """Return the time left, from the mean speed of this start."""
        # What a resumed run did before would say nothing of the ranks that it has now.
        done = step - self.first
        seconds_a_step = (time.monotonic() - self.started) / max(done, 1)
        return duration(seconds_a_step * (self.total - step))

    def log(self, kind: str, step: int, values: Values, line: str) -> None:
        """Write `values` under `kind` at optimizer step `step`, and print `line`.

        Raises:
            OSError: not all could be written; it names the file and the free space.
        """
        if not self.active:
            return
        now = round(time.time(), 3)
        record = {"kind": kind, "step": step, "time": now, **values}
        self.jsonl.write((json.dumps(record) + "\n").encode())
        self.jsonl.flush()
        with naming(self.events):
            for name, value in _flat(values).items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
        self.say(f"{self.name} {line}")

    def close(self) -> None:
        """Flush and close both files."""
        if self.active:
            self.jsonl.close()
            with naming(self.events):
                self.board.close()
            if self.bar is not None:
                with unread():
                    self.bar.close()
