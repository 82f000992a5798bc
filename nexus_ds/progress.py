"""Progress of long work: a bar on a terminal, plain lines in a log; both with rate and ETA."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from nexus_ds.console import visible

# between two plain lines
LOG_SECONDS = 10.0


def say(text: str) -> None:
    """Print a line for whoever waits; stdout is for results."""
    # Flushed: several processes write to one log, and a job that is killed must not take its last
    # words with it.
    print(visible(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return `seconds` as 59s, 12m05s or 3h07m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts work done, as a context manager.

        with Progress("embed", total, "doc") as progress:
            progress.advance(3)

    A total of 0 is unknown: then nothing is said of what is to come.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.started = time.monotonic()
        self.last_line = self.started
        self.bar: tqdm[NoReturn] | None = None
        # A bar rewrites its line, which fills a log file with control characters.
        if sys.stderr.isatty():
            self.bar = tqdm(total=total or None, desc=visible(label), unit=unit, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self._line_is_due():
            self.last_line = time.monotonic()
            self._line()

    def _line_is_due(self) -> bool:
        # The last unit's line is said when the work ends.
        to_come = self.done < self.total or not self.total
        return to_come and time.monotonic() - self.last_line >= LOG_SECONDS

    def _line(self) -> None:
        elapsed = time.monotonic() - self.started
        rate = self.done / max(elapsed, 1e-9)
        pace = f"{rate:.1f} {self.unit}/s, {duration(elapsed)} elapsed"
        if not self.total:
            say(f"{self.label}: {self.done} {self.unit}, {pace}")
            return
        eta = (self.total - self.done) / rate if rate else 0.0
        done = f"{self.done}/{self.total} {self.unit}"
        say(f"{self.label}: {done}, {pace}, {duration(eta)} to go")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            self._line()
