"""Stored numbers in numpy: as torch has them, bit by bit; samples and sums."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.tensors import DTYPE_NAMES
from nexus_ds.checkpoint.values import (
    SAMPLE_VALUES,
    SAMPLES,
    Comparison,
    decoded,
    encoded,
    read_rows,
    read_values,
    rounded,
    sample,
)
from nexus_ds.errors import CheckpointError

ODD = [0.0, -0.0, 1.0, -2.5, 3.4e38, 1e-40, float("inf"), float("-inf"), float("nan")]


def saved(folder, **tensors):
    save_file(tensors, folder / "model.safetensors")
    return Headers(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_are_those_of_torch(tmp_path, dtype):
    x = torch.cat([torch.tensor(ODD), torch.randn(31)]).to(dtype).reshape(8, 5)
    reader = saved(tmp_path, x=x)
    expected = (x.double() if dtype == torch.float64 else x.float()).numpy()
    np.testing.assert_array_equal(read_values(reader, "x"), expected)
    np.testing.assert_array_equal(read_rows(reader, "x", 2, 5), expected[2:5])
    np.testing.assert_array_equal(sample(reader, "x"), expected.reshape(-1))


@pytest.mark.parametrize("read", [read_values, sample, lambda *a: read_rows(*a, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float8_e5m2])
def test_what_is_no_number_of_a_weight_is_named(tmp_path, dtype, read):
    reader = saved(tmp_path, x=torch.zeros(3, 2).to(dtype))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'x' has values of "):
        read(reader, "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32)
    x = torch.cat(
        [bits.view(torch.float32), torch.tensor(ODD), torch.tensor([1.00390625, 1.01171875])]
    )
    expected = x.to(dtype).float().numpy()
    np.testing.assert_array_equal(rounded(x.numpy(), DTYPE_NAMES[dtype]), expected)
    np.testing.assert_array_equal(rounded(x.numpy(), "F32"), x.numpy())
    halves = x.to(dtype).view(torch.int16).numpy().tobytes()
    np.testing.assert_array_equal(decoded(halves, DTYPE_NAMES[dtype]), expected)
    finite = x[torch.isfinite(x)]
    stored = finite.to(dtype).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encoded(finite.numpy(), DTYPE_NAMES[dtype]), stored)


def test_a_sample_has_pieces_of_all_of_a_tensor(tmp_path):
    reader = saved(tmp_path, x=torch.arange(1_000_000, dtype=torch.float32))
    found = sample(reader, "x")
    pieces = found.reshape(SAMPLES, SAMPLE_VALUES)
    assert pieces[0, 0] == 0 and pieces[-1, -1] == 999_999
    assert (np.diff(pieces, axis=1) == 1).all()
    assert np.ptp(np.diff(pieces[:, 0])) <= 1


def test_cosine_and_distance_are_those_of_whole_vectors():
    a, b = torch.randn(2, 3000, dtype=torch.float64)
    seen = Comparison()
    for start in range(0, 3000, 1000):
        seen.add(a[start : start + 1000].numpy(), b[start : start + 1000].numpy())
    assert seen.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert seen.distance == pytest.approx(float((a - b).norm() / a.norm()))
    nothing = Comparison()
    nothing.add(np.zeros(3), np.ones(3))
    assert np.isnan(nothing.cosine) and np.isnan(nothing.distance)
