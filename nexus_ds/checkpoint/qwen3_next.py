"""Qwen3 written as Qwen3-Next: translated where the file is read and written, exact both ways.

    q_proj      each head's rows are followed by as many zeros: the output gate, sigmoid 1/2
    o_proj      doubled, which undoes that 1/2
    norms       Qwen3-Next adds 1 to its weights. w = s (1 + v) with a power of two s for each
                channel, so that v keeps every bit of w; s goes into the columns of the next
                matrices: q, k, v, or the experts and the router, or lm_head
    q_norm,     no matrix follows: the same power of two for both channels that RoPE turns, undone
    k_norm      in the other norm. What rounding is left is less than a bf16 model's own
    lm_head     a copy of tied embeddings: some serving programs never tie a Qwen3-Next

The norms as they were stand in nexus/nexus_source.safetensors: reading divides by the powers that
they give, and finds out whether the model file was changed since.
Shapes: H hidden size, D head size.
Not covered: windows, biases in the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import (
    FINAL_NORM,
    Place,
    in_files,
    is_norm,
    place_of,
    repeated,
)
from nexus_ds.checkpoint.forms import QWEN3_NEXT
from nexus_ds.checkpoint.headers import Headers, Plan, read_by_rows, row_slices
from nexus_ds.checkpoint.tensors import (
    TensorInfo,
    TensorReader,
    TensorWriter,
    bytes_of,
    overwrite,
    write_tensors,
)
from nexus_ds.errors import CheckpointError

NORMS = "nexus/nexus_source.safetensors"
POWERS = [2.0**s for s in range(-8, 9)]
"""Tried for q_norm; k_norm gets the inverse."""


def centred(weight_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return v and powers of two s, both [H], of which w = s (1 + v), exactly."""
    exact_H = weight_H.double()
    plain_H = (exact_H - 1).to(weight_H.dtype).double()
    _, exponent_H = torch.frexp(exact_H.abs())
    # w / s lies in [1, 2): nothing is lost when 1 is taken away
    into_H = torch.ldexp(exact_H.sign(), exponent_H - 1)
    powers_H = torch.where(plain_H + 1 == exact_H, torch.ones_like(into_H), into_H)
    stored_H = exact_H / powers_H - 1
    return stored_H.to(weight_H.dtype), powers_H.to(weight_H.dtype)


def _error(weight_D: Tensor, power: float, dtype: torch.dtype) -> Tensor:
    """Return the relative error [D] of a norm's weight that is stored times a power of two."""
    kept_D = (weight_D * power - 1).to(dtype).double() + 1
    # an exact zero has no relative error: -1 is stored without one
    return (kept_D / power - weight_D).abs() / weight_D.abs().clamp_min(1e-30)


def centred_pair(query_D: Tensor, key_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return q_norm and k_norm as they are stored, [D] each."""
    dtype, half = query_D.dtype, len(query_D) // 2
    q_D, k_D = query_D.double(), key_D.double()
    errors = []
    for power in POWERS:
        error_D = torch.maximum(_error(q_D, power, dtype), _error(k_D, 1 / power, dtype))
        # RoPE turns channel i with channel i + D/2: both need the same power
        errors.append(torch.maximum(error_D[:half], error_D[half:]))
    best = torch.stack(errors).argmin(0)
    power_D = torch.tensor(POWERS, dtype=torch.float64)[best].repeat(2)
    return (q_D * power_D - 1).to(dtype), (k_D / power_D - 1).to(dtype)


def stored_norms(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all norms as a Qwen3-Next has them."""
    found = {}
    for name, weight in norms.items():
        if name.endswith("q_norm.weight"):
            key = name.replace("q_norm", "k_norm")
            found[name], found[key] = centred_pair(weight, norms[key])
        elif not name.endswith("k_norm.weight"):
            found[name], _ = centred(weight)
    return found


class SourceReader(TensorReader):
    """The tensors of a dense Qwen3, and of experts for it, out of a Qwen3-Next."""

    def __init__(self, raw: Headers, config: ConfigJson, norms_of: Path | None = None) -> None:
        """Read what a Qwen3-Next's files have.

        Args:
            raw: the files.
            config: their config.json.
            norms_of: the checkpoint that has the norms as they were; None: this one.

        Raises:
            CheckpointError: damaged, or without the norms as they were.
        """
        self.raw = TensorReader.of(raw)
        self.directory = raw.directory
        dense = settings(config)
        self.head_dim = dense.head_dim
        self.tied = dense.tied_embeddings
        self.own = TensorReader.of_file(norms_of or self.directory, NORMS)
        missing = [name for name in self.raw.names() if is_norm(name) and name not in self.own]
        if missing:
            raise CheckpointError(
                f"{self.directory / NORMS} lacks {missing[0]}; the checkpoint is incomplete, "
                "restore it from where it came"
            )

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted; a tied head is none."""
        return [name for name in self.raw.names() if name in self]

    def __contains__(self, name: object) -> bool:
        return name in self.raw and not (self.tied and name == HEAD)

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies, with the shape that `read` gives it."""
        info = self.raw.info(name)
        place = place_of(name, self.head_dim)
        if not place.head:
            return info
        return info._replace(shape=(info.shape[0] // 2, *info.shape[1:]))

    def files(self) -> list[Path]:
        """Return the files that the tensors come from."""
        return self.raw.files()

    def read_range(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` (bytes) with a tensor's bytes from its byte `start` on, as the dense model
        has them."""
        info = self.info(name)
        read_by_rows(info, start, view, lambda *rows: bytes_of(self._rows(name, *rows)))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor as the dense model has it; one row or more."""
        if is_norm(name):
            return self._norm(name)[start:stop]
        place = place_of(name, self.head_dim)
        first, last = place.in_file(start), place.in_file(stop - 1) + 1
        tensor = self.raw.read_rows(name, first, last)
        if place.head:
            tensor = self._without_gate(name, tensor, first)
        if place.norm:
            tensor = tensor / self._powers(place.norm)
        return tensor / place.scale if place.scale != 1.0 else tensor

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor that lies in the file row by row; see `tensors.overwrite`."""
        place = place_of(name, self.head_dim)
        powers = self._powers(place.norm) if place.norm else torch.ones(())
        overwrite(self.raw.info(name), tensor * powers.to(tensor.dtype) * place.scale)

    def _without_gate(self, name: str, rows: Tensor, first: int) -> Tensor:
        """Return rows of the file, the first of which is `first`, without those of the gate."""
        number = torch.arange(first, first + len(rows))
        gate = number // self.head_dim % 2 == 1
        if bool(rows[gate].any()):
            raise CheckpointError(
                f"{self.directory}: the output gate in {name} is not zero: the model was trained "
                "elsewhere, with a gate that a Qwen3 has not; start from the checkpoint before that"
            )
        return rows[~gate]

    def _powers(self, norm: str) -> Tensor:
        return centred(self.own.read(norm))[1]

    def _norm(self, name: str) -> Tensor:
        """Return a norm as it was; CheckpointError if the model file has another one."""
        pair = [name]
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            pair = [name.replace("k_norm", "q_norm"), name.replace("q_norm", "k_norm")]
        expected = stored_norms({one: self.own.read(one) for one in pair})
        if not torch.equal(self.raw.read(name), expected[name]):
            raise CheckpointError(
                f"{self.directory}: {name} is not that of {NORMS}: the model was trained "
                "elsewhere since; start from the checkpoint before that"
            )
        return self.own.read(name)


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
            rows = rows * centred(self.norms[place.norm])[1].to(rows.device)
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
        for name, weight in stored_norms(self.norms).items():
            super().write_rows(name, 0, weight)
        super().close()
        (self.directory / NORMS).parent.mkdir(exist_ok=True)
        write_tensors(self.directory / NORMS, self.norms)


def open_reader(raw: Headers, config: ConfigJson, norms_of: Path | None = None) -> TensorReader:
    """Return the tensors of a checkpoint's files under its dense family's names; see
    `SourceReader`."""
    if config.get("model_type") == QWEN3_NEXT:
        return SourceReader(raw, config, norms_of)
    return TensorReader.of(raw)


def head_is_tied(directory: Path, norms_of: Path) -> bool:
    """Return whether the output layer of a Qwen3-Next holds nothing but its embeddings.

    Args:
        directory: of the model.
        norms_of: the checkpoint that has the norms as they were.
    """
    raw = TensorReader(directory)
    norms = TensorReader.of_file(norms_of, NORMS)
    final = norms.read(FINAL_NORM)
    _, powers = centred(final)
    shape = raw.info(EMBEDDING).shape
    if raw.info(HEAD).shape != shape:
        return False
    # a piece at a time: whole, both may be larger than memory
    for start, stop in row_slices(shape):
        rows = raw.read_rows(EMBEDDING, start, stop)
        head = raw.read_rows(HEAD, start, stop)
        if not torch.equal(rows * powers, head):
            return False
    return True


def open_writer(directory: Path, plan: Plan, config: ConfigJson) -> TensorWriter:
    """Return a writer of tensors under the dense family's names."""
    if config.get("model_type") == QWEN3_NEXT:
        return SourceWriter(directory, plan, config)
    return TensorWriter(directory, in_files(plan, config), copies=repeated(config))
