"""Safetensors files in and out; every way in which a file can lie."""

import json
import os

import pytest
import torch
from launch import file_limit
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.headers import (
    INDEX,
    SINGLE,
    row_slices,
    tensor_bytes,
)
from nexus_ds.checkpoint.tensors import TensorReader, TensorWriter, overwrite, write_tensors
from nexus_ds.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b": torch.arange(10, dtype=torch.bfloat16),
    "c": torch.tensor(3.0),
    "d": torch.zeros(0, 5),
    "e": torch.arange(6, dtype=torch.int64).reshape(1, 2, 3),
}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
PLAN = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("limit", [1 << 30, 40])
def test_writer_and_reader_agree_with_safetensors(tmp_path, limit):
    with TensorWriter(tmp_path, PLAN, limit) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert (files == [SINGLE]) == (limit > 40)
    stock = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    reader = TensorReader(tmp_path)
    assert reader.names() == sorted(TENSORS) and "a" in reader and "z" not in reader
    for name, tensor in TENSORS.items():
        assert torch.equal(stock[name], tensor) and torch.equal(reader.read(name), tensor)
        assert reader.read(name).dtype == tensor.dtype and reader.info(name).shape == tuple(
            tensor.shape
        )
    assert torch.equal(reader.read_rows("a", 1, 3), TENSORS["a"][1:3])
    if limit == 40:
        index = json.loads((tmp_path / INDEX).read_text())
        assert set(index["weight_map"]) == set(TENSORS)
        assert index["metadata"]["total_size"] == sum(
            tensor_bytes(*entry) for entry in PLAN.values()
        )
        assert (
            files[0].startswith("model-00001-of-0000")
            and max(os.stat(tmp_path / f).st_size for f in files) < 400
        )


def test_reads_what_safetensors_writes(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_rows_make_up_a_tensor(tmp_path):
    tensor = torch.randn(7, 3)
    assert list(row_slices((7, 3), 6)) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(row_slices((2, 100), 6)) == [(0, 1), (1, 2)]
    with TensorWriter(tmp_path, {"t": ("F32", (7, 3))}) as writer:
        for start, stop in row_slices((7, 3), 6):
            writer.write_rows("t", start, tensor[start:stop])
    assert torch.equal(TensorReader(tmp_path).read("t"), tensor)


def test_overwrite_casts_to_the_stored_dtype(tmp_path):
    save_file({"x": torch.zeros(2, 2, dtype=torch.bfloat16), "y": torch.ones(3)}, tmp_path / SINGLE)
    reader = TensorReader(tmp_path)
    overwrite(reader.info("x"), torch.full((2, 2), 1.5))
    assert torch.equal(reader.read("x"), torch.full((2, 2), 1.5, dtype=torch.bfloat16))
    assert torch.equal(reader.read("y"), torch.ones(3))
    with pytest.raises(
        CheckpointError, match=r"found a tensor of shape \(3,\), the file has \(2, 2\)"
    ):
        overwrite(reader.info("x"), torch.zeros(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda w: w.write("a", torch.zeros(4, 3)),
            r"planned tensors were not written, the first: 'b'",
        ),
        (lambda w: w.write("z", torch.zeros(1)), "'z' was not planned"),
        (lambda w: w.write("a", torch.zeros(3, 4)), r"shape \(3, 4\), planned was \(4, 3\)"),
        (
            lambda w: w.write("a", torch.zeros(4, 3).double()),
            "dtype torch.float64, planned was F32",
        ),
        (lambda w: w.write_rows("a", 2, torch.zeros(3, 3)), "do not fit"),
        (lambda w: [w.write("a", torch.zeros(4, 3)) for _ in range(2)], "written twice"),
    ],
)
def test_writer_holds_to_its_plan(tmp_path, write, message):
    with pytest.raises(CheckpointError, match=message), TensorWriter(tmp_path, PLAN) as writer:
        write(writer)


def test_writer_wants_space_first(tmp_path):
    with pytest.raises(CheckpointError, match=r"not enough space: need 4,\d+.* bytes, free"):
        TensorWriter(tmp_path, {"t": ("F32", (1 << 30, 1 << 20))})
    assert not list(tmp_path.iterdir())


FULL = r"\[Errno 27\] File too large: need [\d,]+ bytes more, free [\d,]+: '.*/{}'$"


def test_a_write_that_stops_short_names_the_file_and_does_not_count(tmp_path):
    (tmp_path / "late").mkdir()
    plan = {"a": ("F32", (100,)), "b": ("F32", (1000,))}
    with file_limit(2000), pytest.raises(OSError, match=FULL.format("model.safetensors")):
        TensorWriter(tmp_path, plan)
    writer = TensorWriter(tmp_path / "late", plan)
    writer.write("a", torch.ones(100))
    with file_limit(2000), pytest.raises(OSError, match=FULL.format("model.safetensors")):
        writer.write("b", torch.ones(1000))
    with pytest.raises(CheckpointError, match="1 planned tensors were not written, the first: 'b'"):
        writer.close()


def test_an_overwrite_that_stops_short_names_the_file(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    info = TensorReader(tmp_path).info("a")
    with file_limit(2000), pytest.raises(OSError, match=FULL.format("model.safetensors")):
        overwrite(info, torch.ones(1000))


def test_a_file_that_is_written_at_once(tmp_path):
    tensors = {
        "a": torch.arange(5),
        "b": torch.randn(3, 4).T,
        "c": torch.zeros(0, 2, dtype=torch.bfloat16),
    }
    write_tensors(tmp_path / "some.safetensors", tensors)
    found = load_file(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with file_limit(100), pytest.raises(OSError, match=FULL.format("some.safetensors")):
        write_tensors(tmp_path / "some.safetensors", tensors)


def test_copies_are_written_with_what_they_are_copies_of(tmp_path):
    shape = ("F32", (4, 2))
    tensor = torch.arange(8.0).view(4, 2)
    with TensorWriter(tmp_path, {"a": shape, "b": shape, "c": shape}, copies={"c": "a"}) as writer:
        writer.write("b", -tensor)
        writer.write_rows("a", 2, tensor[2:])
        writer.write_rows("a", 0, tensor[:2])
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], tensor) and torch.equal(found["c"], tensor)
    assert torch.equal(found["b"], -tensor)


def test_a_copy_is_missing_where_its_source_is(tmp_path):
    shape = ("F32", (4, 2))
    with (
        pytest.raises(CheckpointError, match="2 planned tensors were not written"),
        TensorWriter(tmp_path, {"a": shape, "c": shape}, copies={"c": "a"}) as writer,
    ):
        writer.write_rows("a", 0, torch.zeros(2, 2))
