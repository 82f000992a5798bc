"""Progress of long work: a bar on a terminal, a plain line every few seconds in a log; both with
rate and ETA."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_SECONDS = 10.0  # between two plain lines


def duration(seconds: float) -> str:
    """Return `seconds` as 59s, 12m05s or 3h07m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """A context manager that counts work done: `with Progress("embed", total, "doc") as p:
    p.advance(3)`.

    A total of 0 is unknown: then nothing is said of what is to come.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.bar = (
            tqdm(total=total or None, desc=label, unit=unit, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last_line >= LOG_SECONDS and (
            self.done < self.total or not self.total
        ):
            self.last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        elapsed = time.monotonic() - self.started
        rate = self.done / max(elapsed, 1e-9)
        eta = (self.total - self.done) / rate if rate else 0.0
        done, to_go = (
            (f"{self.done}/{self.total}", f", {duration(eta)} to go")
            if self.total
            else (f"{self.done}", "")
        )
        print(
            f"{self.label}: {done} {self.unit}, {rate:.1f} {self.unit}/s, {duration(elapsed)} elapsed{to_go}",
            file=sys.stderr,
            flush=True,
        )

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
