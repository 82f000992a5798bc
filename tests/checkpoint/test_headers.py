"""Headers of safetensors files: every way in which a file can lie."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from nexus_ds.checkpoint import headers
from nexus_ds.checkpoint.headers import (
    INDEX,
    SINGLE,
    Headers,
    read_header,
    sha256_of_tensors,
)
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError

TENSORS = {letter: torch.zeros(3) for letter in "abcde"}


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


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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
        Headers(weights)
    file.rename(weights / SINGLE)
    with pytest.raises(CheckpointError, match="is a pickle under the name of a safetensors file"):
        Headers(weights)
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
        # whose product takes hours
        ({"a": entry(0, 8, [1 << 62] * 65)}, b"\0" * 8, "are no sizes"),
        ({"a": entry(0, 8, [1 << 62] * 64)}, b"\0" * 8, "8 bytes at .*, expected [0-9]{1,9}"),
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


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="is a pipe, socket or device, expected a file"):
        Headers(tmp_path)


@pytest.mark.parametrize("length", [1 << 62, 200_000_000, 17])
def test_header_length_is_checked_before_reading(tmp_path, length):
    with pytest.raises(CheckpointError, match=f"its header would have {length} bytes in a file of"):
        Headers(raw(tmp_path / SINGLE, b"{}", b"", length).parent)


def test_cut_off_files(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut off"):
            Headers(tmp_path)


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
        ({"x": "s" * 300 + ".safetensors"}, {}, "shard 's{200}' .* is missing"),
        ({"x": "weights.bin"}, {}, "not a .safetensors file"),
        ({"x": 7}, {}, "expected a weight_map"),
        (None, {}, "expected a weight_map"),
    ],
)
def test_indexes_that_lie(tmp_path, weight_map, files, message):
    with pytest.raises(CheckpointError, match=message):
        Headers(sharded(tmp_path, weight_map, **files))


def test_links_may_not_lead_out_but_in_a_hub_cache(tmp_path):
    outside, model = tmp_path / "outside.safetensors", tmp_path / "model"
    save_file(ONE, outside)
    model.mkdir()
    (model / SINGLE).symlink_to(outside)
    with pytest.raises(CheckpointError, match="lies outside the model's directory"):
        Headers(model)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(ONE, blobs / "123")
    (snapshot / SINGLE).symlink_to("../../blobs/123")
    assert Headers(snapshot).names() == ["x"]


def test_missing_things_are_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="is not a directory; expected a local model directory"
    ):
        Headers(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no weights; expected model.safetensors"):
        Headers(tmp_path)
    save_file(TENSORS, tmp_path / SINGLE)
    reader = TensorReader(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'z' among its 5"):
        reader.read("z")
    with pytest.raises(CheckpointError, match=r"has no rows \[2, 9\)"):
        reader.read_rows("a", 2, 9)
    with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
        Headers.of_file(tmp_path, "nexus_router.safetensors")


def test_hash_covers_names_dtypes_shapes_and_bytes(tmp_path):
    def digest(tensors, names=None):
        (tmp_path / SINGLE).unlink(missing_ok=True)
        save_file(tensors, tmp_path / SINGLE)
        return sha256_of_tensors(Headers(tmp_path), names or list(tensors))

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


def test_a_file_is_opened_once_where_it_is_kept_open(tmp_path, monkeypatch):
    names = [tmp_path / str(number) for number in range(3)]
    for path in names:
        path.write_bytes(path.name.encode() * 4)
    opened = []
    monkeypatch.setattr(headers, "MOST_KEPT", 2)
    real = os.open

    def counted(path, flags):
        opened.append(path)
        return real(path, flags)

    monkeypatch.setattr(headers.os, "open", counted)

    def read():
        for path in names * 2:
            view = bytearray(2)
            headers.read_into(path, 1, memoryview(view))
            assert view == path.name.encode() * 2

    before = len(os.listdir("/proc/self/fd"))
    # one within another is the same
    with headers.kept_open(), headers.kept_open():
        read()
        assert opened == names[:2]
    assert len(os.listdir("/proc/self/fd")) == before
    read()
    assert opened == names[:2]
