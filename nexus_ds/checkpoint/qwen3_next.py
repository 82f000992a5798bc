"""Qwen3 written as Qwen3-Next: translated where the file is read and written, exact both ways.

    q_proj      each head's rows are followed by as many zeros: the output gate, sigmoid 1/2
    o_proj      doubled, which undoes that 1/2
    norms       Qwen3-Next adds 1 to its weights. w = s (1 + v) with a power of two s for each
                channel, so that v keeps every bit of w; s goes into the columns of the next
                matrices: q, k, v, or the experts and the router, or lm_head
    q_norm,     no matrix follows: the same power of two for both channels that RoPE turns, undone
    k_norm      in the other norm. What rounding is left is less than a bf16 model's own
    lm_head     a copy of tied embeddings: some serving programs never tie a Qwen3-Next

The norms as they were stand in nexus/nexus_source.safetensors: `qwen3_next_headers`, which reads
without torch, divides by the powers that they give, and finds out whether the model file was
changed since. The arithmetic of norms stands there for both ways.
Not covered: windows, biases in the attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import Place, in_files, is_norm, place_of, repeated
from nexus_ds.checkpoint.forms import reordered, translated
from nexus_ds.checkpoint.headers import Headers, Plan
from nexus_ds.checkpoint.qwen3_5_writer import ReorderedWriter
from nexus_ds.checkpoint.qwen3_next_headers import NORMS, as_dense, centred, stored_norm
from nexus_ds.checkpoint.tensors import DTYPE_NAMES, TensorReader, TensorWriter, write_tensors


def _numbers(weight: Tensor) -> np.ndarray:
    """Return a weight of fp32 or bf16 as fp32 numbers, exactly."""
    return weight.float().numpy()


class SourceWriter(TensorWriter):
    """Writes the tensors of a dense Qwen3, and of experts for it, as a Qwen3-Next.

    Norms come before the matrices behind them.
    """

    def __init__(self, directory: Path, plan: Plan, config: ConfigJson) -> None:
        """Begin the files; `plan` is of the dense model's names, `config` is theirs."""
        self.head_dim = settings(config).head_dim
        self.norms: dict[str, Tensor] = {}
        self.tied = HEAD not in plan
        super().__init__(directory, in_files(plan, config))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole planned tensor."""
        self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows [start, start + len(rows)) of a planned tensor, each row once."""
        if is_norm(name):
            self._planned(name)
            self.norms[name] = rows.detach().cpu().clone()
            return
        self._write_place(name, place_of(name, self.head_dim), start, rows)
        if self.tied and name == EMBEDDING:
            self._write_place(HEAD, place_of(HEAD, self.head_dim), start, rows)

    def _write_place(self, name: str, place: Place, start: int, rows: Tensor) -> None:
        if place.norm:
            norm = self.norms[place.norm]
            _, powers_H = centred(_numbers(norm), DTYPE_NAMES[norm.dtype])
            rows = rows * torch.from_numpy(powers_H).to(norm.dtype).to(rows.device)
        rows = rows * place.scale
        if not place.head:
            super().write_rows(name, start, rows)
            return
        zeros = torch.zeros_like(rows)
        done = 0
        while done < len(rows):
            # to the end of this head: the gate's rows come between it and the next
            count = min(place.head - (start + done) % place.head, len(rows) - done)
            first = place.in_file(start + done)
            super().write_rows(name, first, rows[done : done + count])
            super().write_rows(name, first + place.head, zeros[:count])
            done += count

    def close(self) -> None:
        """Write the norms, in both forms, and close the files."""
        for name, weight in self.norms.items():
            dtype = DTYPE_NAMES[weight.dtype]
            numbers = stored_norm(name, lambda one: _numbers(self.norms[one]), dtype)
            super().write_rows(name, 0, torch.from_numpy(numbers).to(weight.dtype))
        super().close()
        (self.directory / NORMS).parent.mkdir(exist_ok=True)
        write_tensors(self.directory / NORMS, self.norms)


def open_reader(raw: Headers, config: ConfigJson) -> TensorReader:
    """Return the tensors of a checkpoint's files under its dense family's names, as torch has
    them."""
    return TensorReader.of(as_dense(raw, config))


def open_writer(directory: Path, plan: Plan, config: ConfigJson) -> TensorWriter:
    """Return a writer of tensors under the dense family's names."""
    if reordered(config):
        return ReorderedWriter(directory, plan, config)
    if translated(config):
        return SourceWriter(directory, plan, config)
    return TensorWriter(directory, in_files(plan, config), copies=repeated(config))
