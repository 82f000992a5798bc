"""What a tensor is made of, as the engine reads it."""

import numpy as np
import pytest

from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.values import read_values
from nexus_ds.upcycling.sources import Part, mean_of, source_of

NORM = "model.norm.weight"
MATRIX = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def reader(dense_dir):
    return Headers(dense_dir)


def test_a_mean_divides_by_the_number_of_its_parts(reader):
    parts = [Part("a", reader, MATRIX)] * 3
    found = mean_of(parts)
    assert found.divisor == 3.0 and [part.weight for part in found.parts] == [1.0] * 3


def test_a_source_is_the_tensor_or_some_of_its_rows(reader):
    whole = read_values(reader, MATRIX)
    source = source_of(Part("expert a", reader, MATRIX), (2, 5))
    data = bytearray(source.size)
    source.read(0, memoryview(data))
    assert np.array_equal(np.frombuffer(data, np.float32), whole[2:5].ravel())
    assert source_of(Part("expert a", reader, MATRIX)).size == whole.nbytes
    assert source.label == f"expert a ({reader.directory}): tensor {MATRIX}"


def test_zeros_are_right_where_they_stand_for_nothing(reader):
    assert not source_of(Part("a", reader, NORM)).zeros
    assert source_of(Part("a", reader, NORM, zeros=True)).zeros
