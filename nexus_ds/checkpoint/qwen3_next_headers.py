"""A Qwen3-Next's files under the names of the dense Qwen3 it was made of, and its norms; no torch.

`qwen3_next` says what the form is, and writes it. The arithmetic of the norms stands here for both
ways: in float64, and what is stored of it is rounded by way of float32.
Shapes: H hidden size, D head size.
Not covered: writing; tensors as torch has them (`tensors.SourceTensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import FINAL_NORM, is_norm, place_of
from nexus_ds.checkpoint.forms import QWEN3_NEXT, reordered
from nexus_ds.checkpoint.headers import Headers, TensorInfo, read_by_rows, row_slices
from nexus_ds.checkpoint.qwen3_5 import Reordered
from nexus_ds.checkpoint.values import encoded, read_rows, read_values, rounded
from nexus_ds.errors import CheckpointError

NORMS = "nexus/nexus_source.safetensors"
POWERS = [2.0**s for s in range(-8, 9)]
"""Tried for q_norm; k_norm gets the inverse."""
BLOCK = 1 << 15
"""Elements that are translated at once: what arithmetic needs besides stays in the cache."""


def _held(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return float64 numbers as a tensor of `dtype` holds them, in fp32."""
    return rounded(x.astype(np.float32), dtype)


# what is huge or no number goes its way in silence, as in torch: who reads weights looks for it
@np.errstate(over="ignore", invalid="ignore")
def centred(weight_H: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return v and powers of two s, both [H] in fp32, of which w = s (1 + v), exactly.

    Args:
        weight_H: numbers of `dtype`.
        dtype: of the weight, and of v as it is stored; as safetensors names it.
    """
    exact_H = weight_H.astype(np.float64)
    plain_H = _held(exact_H - 1, dtype).astype(np.float64)
    _, exponent_H = np.frexp(exact_H)
    # w / s lies in [1, 2): nothing is lost when 1 is taken away
    into_H = np.ldexp(np.sign(exact_H), exponent_H - 1)
    powers_H = np.where(plain_H + 1 == exact_H, 1.0, into_H)
    stored_H = exact_H / powers_H - 1
    return _held(stored_H, dtype), _held(powers_H, dtype)


def _error(weight_D: np.ndarray, power: float, dtype: str) -> np.ndarray:
    """Return the relative error [D] of a norm's weight that is stored times a power of two."""
    kept_D = _held(weight_D * power - 1, dtype).astype(np.float64) + 1
    # an exact zero has no relative error: -1 is stored without one
    size_D = np.maximum(np.abs(weight_D), 1e-30)
    return np.abs(kept_D / power - weight_D) / size_D


@np.errstate(over="ignore", invalid="ignore")
def centred_pair(
    query_D: np.ndarray, key_D: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return q_norm and k_norm as they are stored, [D] each, in fp32."""
    half = len(query_D) // 2
    q_D, k_D = query_D.astype(np.float64), key_D.astype(np.float64)
    errors = []
    for power in POWERS:
        error_D = np.maximum(_error(q_D, power, dtype), _error(k_D, 1 / power, dtype))
        # RoPE turns channel i with channel i + D/2: both need the same power
        errors.append(np.maximum(error_D[:half], error_D[half:]))
    best = np.stack(errors).argmin(0)
    power_D = np.tile(np.array(POWERS)[best], 2)
    return _held(q_D * power_D - 1, dtype), _held(k_D / power_D - 1, dtype)


def stored_norm(name: str, weight_of: Callable[[str], np.ndarray], dtype: str) -> np.ndarray:
    """Return a norm as a Qwen3-Next has it, in fp32.

    Args:
        name: of the norm.
        weight_of: returns a norm as it was, by name.
        dtype: that it is stored in.
    """
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        query = weight_of(name.replace("k_norm", "q_norm"))
        key = weight_of(name.replace("q_norm", "k_norm"))
        of_query, of_key = centred_pair(query, key, dtype)
        return of_query if name.endswith("q_norm.weight") else of_key
    stored, _ = centred(weight_of(name), dtype)
    return stored


class SourceHeaders(Headers):
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
        self.raw = raw
        self.directory = raw.directory
        dense = settings(config)
        self.head_dim = dense.head_dim
        self.tied = dense.tied_embeddings
        self.own = Headers.of_file(norms_of or self.directory, NORMS)
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
        """Return where a tensor lies, with the shape that reading gives it."""
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
        place = place_of(name, self.head_dim)
        if is_norm(name):
            self._check_norm(name)
            self.own.read_range(name, start, view)
        elif place.norm or place.scale != 1.0:
            factors = self.factors(name)

            def rows(first: int, stop: int) -> memoryview:
                return self._rows(name, first, stop, factors).data

            read_by_rows(self.info(name), start, view, rows, BLOCK)
        else:
            self.raw.read_range(name, start, view)

    def factors(self, name: str) -> np.ndarray:
        """Return what rows of a tensor are multiplied by in the file: [1] or one for each column,
        powers of two in fp32."""
        place = place_of(name, self.head_dim)
        if not place.norm:
            return np.array([place.scale], np.float32)
        _, powers_H = centred(self._as_it_was(place.norm), self.raw.info(place.norm).dtype)
        return powers_H

    @np.errstate(over="ignore", invalid="ignore")
    def _rows(self, name: str, start: int, stop: int, factors: np.ndarray) -> np.ndarray:
        """Return the bytes of rows [start, stop) of a tensor as the dense model has it; one row or
        more."""
        place = place_of(name, self.head_dim)
        # to the end of a head: its gate is looked at, too
        first, last = place.in_file(start), place.in_file(stop)
        rows = read_rows(self.raw, name, first, last)
        if place.head:
            rows = self._without_gate(name, rows, first)
        return encoded(rows / factors, self.info(name).dtype)

    def _without_gate(self, name: str, rows: np.ndarray, first: int) -> np.ndarray:
        """Return rows of the file, the first of which is `first`, without those of the gate."""
        number = np.arange(first, first + len(rows))
        gate = number // self.head_dim % 2 == 1
        if rows[gate].any():
            raise CheckpointError(
                f"{self.directory}: the output gate in {name} is not zero: the model was trained "
                "elsewhere, with a gate that a Qwen3 has not; start from the checkpoint before that"
            )
        return rows[~gate]

    def _check_norm(self, name: str) -> None:
        """Raise CheckpointError if the model file has another norm than the one that was."""
        expected = stored_norm(name, self._as_it_was, self.raw.info(name).dtype)
        if not np.array_equal(read_values(self.raw, name), expected):
            raise self._foreign(name)

    def _as_it_was(self, name: str) -> np.ndarray:
        """Return a norm as it was; CheckpointError if it has not the dtype and shape of today's."""
        if self.own.info(name)[:2] != self.raw.info(name)[:2]:
            raise self._foreign(name)
        return read_values(self.own, name)

    def _foreign(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: {name} is not that of {NORMS}: the model was trained "
            "elsewhere since; start from the checkpoint before that"
        )


def as_dense(raw: Headers, config: ConfigJson, norms_of: Path | None = None) -> Headers:
    """Return the tensors of a checkpoint's files under its dense family's names; see
    `SourceHeaders` and, of Qwen3.5, `Reordered`."""
    if reordered(config):
        return Reordered(raw, config)
    if config.get("model_type") == QWEN3_NEXT:
        return SourceHeaders(raw, config, norms_of)
    return raw


@np.errstate(over="ignore", invalid="ignore")
def head_is_tied(directory: Path, norms_of: Path) -> bool:
    """Return whether the output layer of a Qwen3-Next holds nothing but its embeddings.

    Args:
        directory: of the model.
        norms_of: the checkpoint that has the norms as they were.
    """
    raw = Headers(directory)
    norms = Headers.of_file(norms_of, NORMS)
    _, powers_H = centred(read_values(norms, FINAL_NORM), norms.info(FINAL_NORM).dtype)
    dtype, shape = raw.info(EMBEDDING)[:2]
    if raw.info(HEAD)[:2] != (dtype, shape):
        return False
    # a piece at a time: whole, both may be larger than memory
    for start, stop in row_slices(shape):
        rows = read_rows(raw, EMBEDDING, start, stop)
        head = read_rows(raw, HEAD, start, stop)
        if not np.array_equal(rounded(rows * powers_H, dtype), head):
            return False
    return True
