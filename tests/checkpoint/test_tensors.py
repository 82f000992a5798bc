"""Safetensors files in and out; every way in which a file can lie."""

import json
import os
import pickle

import pytest
import torch
from launch import file_limit
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.tensors import (
    INDEX,
    SINGLE,
    TensorReader,
    TensorWriter,
    overwrite,
    read_header,
    row_slices,
    sha256_of_tensors,
    tensor_bytes,
    write_tensors,
)
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


def raw(path, header, data=b"", length=None):
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


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


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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


@pytest.mark.parametrize("lead", [b"\x80\x02", b"PK"])
def test_a_header_whose_length_starts_like_a_pickle_is_read(tmp_path, lead):
    """One header in thirty-two has a length whose first byte is 0x80."""
    length = int.from_bytes(lead, "little")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / SINGLE).write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert TensorReader(tmp_path).read("a").item() == 0.0


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_by_name_and_by_content(tmp_path, zipped):
    canary, weights = tmp_path / "canary", tmp_path / "model"
    weights.mkdir()
    file = weights / "pytorch_model.bin"
    if zipped:
        torch.save({"a": Canary(canary)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Canary(canary)}))
    with pytest.raises(
        CheckpointError, match=r"holds only pytorch_model.bin: pickled weights are not read"
    ):
        TensorReader(weights)
    file.rename(weights / SINGLE)
    with pytest.raises(CheckpointError, match="is a pickle under the name of a safetensors file"):
        TensorReader(weights)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "'b' overlaps another one"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12, "'b' leaves a gap"),
        ({"a": entry(0, 8)}, b"\0" * 4, "its header describes"),
        ({"a": entry(0, 8)}, b"\0" * 12, "its header describes"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, r"8 bytes at \[0, 8\), expected 12"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, "are no sizes"),
        ({"a": entry(0, 8, [2.0])}, b"\0" * 8, "are no sizes"),
        ({"a": entry(8, 0, [2])}, b"\0" * 8, "-8 bytes"),
        ({"a": entry(0, 8, [1 << 62, 1 << 62])}, b"\0" * 8, "expected 8507"),
        ({"a": entry(0, 8, dtype="X9")}, b"\0" * 8, "unknown dtype 'X9'"),
        ({"a": {"dtype": "F32"}}, b"", "expected dtype, shape and data_offsets"),
        (
            b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2),
            b"\0" * 4,
            "the name 'a' stands twice",
        ),
        (b"[1]", b"", "does not start with"),
        (b'{"a": ', b"", "not valid JSON"),
        (b'{"a": "\xff"}', b"", "not valid JSON"),
        (b"{" + b'"a":{' * 100_000, b"", "not valid JSON"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(raw(tmp_path / SINGLE, header, data))


@pytest.mark.parametrize("length", [1 << 62, 200_000_000, 17])
def test_header_length_is_checked_before_reading(tmp_path, length):
    with pytest.raises(CheckpointError, match=f"its header would have {length} bytes in a file of"):
        TensorReader(raw(tmp_path / SINGLE, b"{}", b"", length).parent)


def test_cut_off_files(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut off"):
            TensorReader(tmp_path)


def sharded(tmp_path, weight_map, **files):
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


ONE = {"x": torch.ones(1)}


@pytest.mark.parametrize(
    ("weight_map", "files", "message"),
    [
        ({"x": "s.safetensors", "y": "s.safetensors"}, {"s": ONE}, "in no shard, the first: 'y'"),
        ({"x": "s.safetensors"}, {}, "shard 's.safetensors' .* is missing"),
        (
            {"x": "s.safetensors", "y": "t.safetensors"},
            {"s": ONE, "t": ONE},
            "'x' is in s.safetensors and in t",
        ),
        (
            {"y": "s.safetensors"},
            {"s": {**ONE, "y": torch.ones(1)}},
            "'x' is in s.safetensors, .* says None",
        ),
        ({"x": "../s.safetensors"}, {}, "lies outside the model's directory"),
        ({"x": "/etc/passwd"}, {}, "lies outside the model's directory"),
        ({"x": "s\0.safetensors"}, {}, "lies outside the model's directory"),
        ({"x": "weights.bin"}, {}, "not a .safetensors file"),
        ({"x": 7}, {}, "expected a weight_map"),
        (None, {}, "expected a weight_map"),
    ],
)
def test_indexes_that_lie(tmp_path, weight_map, files, message):
    with pytest.raises(CheckpointError, match=message):
        TensorReader(sharded(tmp_path, weight_map, **files))


def test_links_may_not_lead_out_but_in_a_hub_cache(tmp_path):
    outside, model = tmp_path / "outside.safetensors", tmp_path / "model"
    save_file(ONE, outside)
    model.mkdir()
    (model / SINGLE).symlink_to(outside)
    with pytest.raises(CheckpointError, match="lies outside the model's directory"):
        TensorReader(model)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(ONE, blobs / "123")
    (snapshot / SINGLE).symlink_to("../../blobs/123")
    assert TensorReader(snapshot).names() == ["x"]


def test_missing_things_are_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="is not a directory; expected a local model directory"
    ):
        TensorReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no weights; expected model.safetensors"):
        TensorReader(tmp_path)
    save_file(TENSORS, tmp_path / SINGLE)
    reader = TensorReader(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'z' among its 5"):
        reader.read("z")
    with pytest.raises(CheckpointError, match=r"has no rows \[2, 9\)"):
        reader.read_rows("a", 2, 9)
    with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
        TensorReader.of_file(tmp_path, "nexus_router.safetensors")


def test_hash_covers_names_dtypes_shapes_and_bytes(tmp_path):
    def digest(tensors, names=None):
        (tmp_path / SINGLE).unlink(missing_ok=True)
        save_file(tensors, tmp_path / SINGLE)
        return sha256_of_tensors(TensorReader(tmp_path), names or list(tensors))

    base = {"x": torch.ones(2, 2), "y": torch.zeros(3)}
    same = digest(base)
    assert same == digest(base, ["y", "x"]) == digest({**base, "z": torch.ones(1)}, ["x", "y"])
    others = [
        {"w": base["x"], "y": base["y"]},
        {"x": base["x"].reshape(4), "y": base["y"]},
        {"x": base["x"], "y": torch.zeros(3, dtype=torch.int32)},
        {"x": base["x"] + 1, "y": base["y"]},
    ]
    assert len({same, *map(digest, others)}) == 5
