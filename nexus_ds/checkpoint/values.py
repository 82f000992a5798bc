"""Values of stored tensors as numpy has them, whole or sampled; without torch.

bf16 has no type in numpy: it is the upper half of an fp32, which is exact. Sums are in float64.
Not covered: fp8 and integers, which no weight of a known family has (`SAMPLED` has the dtypes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.headers import Headers, TensorInfo
from nexus_ds.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
NAN_BITS = 0x7FC0
"""Of the NaN that bf16 gets for any."""
SAMPLES, SAMPLE_VALUES = 4, 1 << 13
"""Pieces of a tensor that a sample has, evenly spaced, and values of each."""


def decoded(data: bytes | bytearray | np.ndarray, dtype: str) -> np.ndarray:
    """Return stored bytes as numbers [N]: float32, or float64 of F64.

    Args:
        data: whole elements, little endian.
        dtype: one of FLOATS, as safetensors names it.
    """
    if dtype == "BF16":
        halves = np.frombuffer(data, "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    found = np.frombuffer(data, kind)
    return found.astype(np.float32) if dtype == "F16" else found


def _halves(x: np.ndarray) -> np.ndarray:
    """Return the bits of bf16, in uint32, that fp32 numbers are rounded to: the nearest, or even.

    In place: with an array for each step it takes 2.5 times as long.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    halves = bits >> 16
    # half of what is cut off, and one less where the last kept bit is even
    halves &= 1
    halves += bits
    halves += 0x7FFF
    halves >>= 16
    # of some NaN that sum is a number
    halves[np.isnan(x)] = NAN_BITS
    return halves


def _fp16(x: np.ndarray) -> np.ndarray:
    # in silence, as bf16: who writes weights looks for what is no number
    with np.errstate(over="ignore"):
        return np.asarray(x, "<f2")


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return fp32 numbers rounded to nearest even, as a tensor of `dtype` (F32 | BF16 | F16) holds
    them.

    They stay fp32 in numpy; NaN stays NaN, and what is too large becomes infinite.
    """
    if dtype == "F32":
        return np.asarray(x, np.float32)
    if dtype == "F16":
        return _fp16(x).astype(np.float32)
    return (_halves(x) << 16).view(np.float32)


def encoded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bytes of fp32 numbers as a tensor of `dtype` (F32 | BF16 | F16) holds them,
    rounded to nearest even."""
    if dtype == "F16":
        return _fp16(x).reshape(-1).view(np.uint8)
    if dtype == "BF16":
        return _halves(x).reshape(-1).astype("<u2").view(np.uint8)
    return rounded(x, dtype).reshape(-1).astype("<f4", copy=False).view(np.uint8)


def _floats(reader: Headers, name: str) -> TensorInfo:
    """Return where a tensor lies; CheckpointError unless it has floating-point numbers."""
    info = reader.info(name)
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} has values of {info.dtype}, "
            f"expected {' | '.join(FLOATS)}; it is damaged, or of another program"
        )
    return info


def read_values(reader: Headers, name: str) -> np.ndarray:
    """Return a whole tensor in its shape; float32, or float64 of F64."""
    info = _floats(reader, name)
    data = reader.items(name, 0, math.prod(info.shape))
    return decoded(data, info.dtype).reshape(info.shape)


def read_floats(reader: Headers, name: str) -> Floats:
    """Return a whole tensor in its shape as fp32."""
    return np.asarray(read_values(reader, name), np.float32)


def read_rows(reader: Headers, name: str, start: int, stop: int) -> np.ndarray:
    """Return rows [start, stop) of a tensor's leading dimension; float32, or float64 of F64."""
    info = _floats(reader, name)
    width = math.prod(info.shape[1:])
    data = reader.items(name, start * width, (stop - start) * width)
    return decoded(data, info.dtype).reshape(stop - start, *info.shape[1:])


def sample(reader: Headers, name: str) -> np.ndarray:
    """Return some values [N] of a tensor, of all of it where it is small; the same places always.

    SAMPLES pieces of SAMPLE_VALUES, evenly spaced, the first and the last values among them.
    """
    info = _floats(reader, name)
    count = math.prod(info.shape)
    if count <= SAMPLES * SAMPLE_VALUES:
        return read_values(reader, name).reshape(-1)
    starts = [(count - SAMPLE_VALUES) * index // (SAMPLES - 1) for index in range(SAMPLES)]
    pieces = [reader.items(name, start, SAMPLE_VALUES) for start in starts]
    return decoded(b"".join(pieces), info.dtype)


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    # numpy's own loop: a library's threads take longer to meet than so few numbers take to add
    return float(np.einsum("i,i", x, y))


@dataclass
class Comparison:
    """Sums over values of two tensors, or of several pairs of them."""

    dot: float = 0.0
    first: float = 0.0
    """Of squares of the first's values."""
    second: float = 0.0
    apart: float = 0.0
    """Of squares of the differences."""

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Count values of two tensors, of one shape."""
        x, y = a.astype(np.float64), b.astype(np.float64)
        self.dot += _dot(x, y)
        self.first += _dot(x, x)
        self.second += _dot(y, y)
        y -= x
        self.apart += _dot(y, y)

    def join(self, other: Comparison) -> None:
        """Count what another one has counted."""
        self.dot += other.dot
        self.first += other.first
        self.second += other.second
        self.apart += other.apart

    @property
    def cosine(self) -> float:
        """1: the same direction, 0: unrelated; NaN where one has only zeros, or non-numbers."""
        norms = float(np.sqrt(self.first) * np.sqrt(self.second))
        return self.dot / norms if norms else float("nan")

    @property
    def distance(self) -> float:
        """Of the second from the first, relative to the first's length; NaN where that is 0."""
        length = float(np.sqrt(self.first))
        return float(np.sqrt(self.apart)) / length if length else float("nan")
