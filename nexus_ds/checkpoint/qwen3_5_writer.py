"""Writes Qwen3.5's tensors as a Qwen3-Next; `qwen3_5` says which rows go where."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.headers import Plan
from nexus_ds.checkpoint.qwen3_5 import in_qwen3_next, runs_of
from nexus_ds.checkpoint.tensors import TensorWriter


class ReorderedWriter(TensorWriter):
    """Writes the tensors of a Qwen3.5, and of experts for it, as a Qwen3-Next."""

    def __init__(self, directory: Path, plan: Plan, config: ConfigJson) -> None:
        """Begin the files; `plan` is of the dense model's names, `config` is theirs."""
        self.runs = runs_of(settings(config))
        copies = {} if HEAD in plan else {HEAD: EMBEDDING}
        super().__init__(directory, in_qwen3_next(plan, config), copies=copies)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole planned tensor."""
        if name in self.runs:
            self.write_rows(name, 0, tensor)
        else:
            super().write(name, tensor)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows [start, start + len(rows)) of a planned tensor, each row once."""
        if name not in self.runs:
            super().write_rows(name, start, rows)
            return
        stop = start + len(rows)
        for run in self.runs[name]:
            first, last = max(start, run.start), min(stop, run.start + run.rows)
            if first < last:
                place = run.place + first - run.start
                super().write_rows(run.name, place, rows[first - start : last - start])
