"""What a run tells: one line a log interval, TensorBoard, JSONL; a bar on a terminal. Rank 0 only.

Not covered: other trackers; both files are plain and easy to feed to one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nexus_ds.outputs import create, naming
from nexus_ds.progress import duration


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


class Metrics:
    """Writes what `log` is given; silent on other ranks than 0."""

    def __init__(
        self, directory: Path, name: str, first_step: int, total_steps: int, active: bool
    ) -> None:
        self.active, self.name, self.total = active, name, total_steps
        self.started, self.first = time.monotonic(), first_step
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self.jsonl = create(directory / "metrics.jsonl", append=True)
        self.events = directory / "tensorboard"
        self.board = SummaryWriter(str(self.events), purge_step=first_step)
        self.bar = (
            tqdm(total=total_steps, initial=first_step, desc=name, unit="step")
            if sys.stderr.isatty()
            else None
        )

    def say(self, text: str) -> None:
        """Print one line."""
        if self.active:
            tqdm.write(text, file=sys.stderr) if self.bar is not None else print(
                text, file=sys.stderr, flush=True
            )

    def advance(self) -> None:
        """Count one optimizer step on the bar."""
        if self.active and self.bar is not None:
            self.bar.update(1)

    def eta(self, step: int) -> str:
        """Return the time left, from the mean speed of this start."""
        done = step - self.first
        return duration((time.monotonic() - self.started) / max(done, 1) * (self.total - step))

    def log(self, kind: str, step: int, values: dict[str, Any], line: str) -> None:
        """Write `values` (nested numbers) under `kind` and print `line`."""
        if not self.active:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
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
                self.bar.close()
