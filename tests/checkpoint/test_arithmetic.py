"""Blocks of stored numbers against torch: every bit pattern of 16 bits, and fp32 near ties."""

import numpy as np
import pytest
import torch

from nexus_ds.checkpoint.arithmetic import Health, narrow, widen
from nexus_ds.checkpoint.tensors import DTYPES
from nexus_ds.errors import UnsupportedModelError

PATTERNS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def of_bits(bits, dtype):
    return torch.from_numpy(bits.copy()).view(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits_is_widened_and_narrowed_as_by_torch(dtype):
    stored = of_bits(PATTERNS, dtype)
    wide = np.empty(len(PATTERNS), np.float32)
    widen(PATTERNS.view(np.uint8), dtype, wide)
    finite = torch.isfinite(stored)
    assert torch.equal(torch.from_numpy(wide)[finite], stored.float()[finite])
    back = np.empty(2 * len(PATTERNS), np.uint8)
    narrow(wide, dtype, back, np.empty(len(PATTERNS), np.uint32))
    assert np.array_equal(back.view(np.uint16)[finite.numpy()], PATTERNS[finite.numpy()])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_fp32_is_rounded_as_by_torch(dtype):
    """Ties, both neighbours of each, and what rounds up to infinity."""
    top = np.repeat(PATTERNS.astype(np.uint32) << 16, 5).reshape(-1, 5)
    numbers = (top + np.array([0, 1, 0x7FFF, 0x8000, 0x8001], np.uint32)).reshape(-1)
    numbers = numbers.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    out = np.empty(len(numbers) * DTYPES[dtype].itemsize, np.uint8)
    narrow(numbers, dtype, out, np.empty(len(numbers), np.uint32))
    expected = torch.from_numpy(numbers).to(DTYPES[dtype]).view(torch.uint8)
    assert np.array_equal(out, expected.numpy())


def test_other_kinds_are_refused():
    with pytest.raises(UnsupportedModelError, match="type I32 can't be averaged or cast; save"):
        widen(np.zeros(8, np.uint8), "I32", np.empty(2, np.float32))


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize(
    ("values", "bad", "nonzero"),
    [
        ([0.0, -0.0], 0, False),
        ([0.0, 1e-7], 0, True),
        ([-0.0, -1e-7], 0, True),
        ([1.0, float("inf"), float("-inf"), float("nan"), -2.0], 3, True),
        ([-1.0, float("-inf")], 1, True),
        ([], 0, False),
    ],
)
def test_what_is_no_number_is_counted(dtype, values, bad, nonzero):
    health = Health()
    for part in (values[:1], values[1:]):
        stored = torch.tensor(part, dtype=torch.float64).to(DTYPES[dtype])
        health.see(stored.view(torch.uint8).numpy(), dtype)
    assert (health.bad, health.nonzero) == (bad, nonzero)


def test_integers_are_all_numbers():
    health = Health()
    health.see(np.zeros(8, np.uint8), "I64")
    assert not health.nonzero
    health.see(np.full(8, 255, np.uint8), "I64")
    assert health.nonzero and not health.bad
