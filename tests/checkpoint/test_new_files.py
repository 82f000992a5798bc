"""Files of their full length from the start, in the order of the plan; who has written what."""

import os

import pytest

from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.errors import CheckpointError

PLAN = {"a": ("F32", (4,)), "b": ("BF16", (3,)), "c": ("U8", (5,))}


def test_places_are_where_readers_look(tmp_path):
    with NewFiles(tmp_path, PLAN, 16) as files:
        for name, (dtype, _) in PLAN.items():
            place = files.place(name)
            os.pwrite(place.descriptor, name.encode() * (place.end - place.start), place.start)
            assert place.dtype == dtype
            files.wrote(name)
    reader = Headers(tmp_path)
    assert len(reader.files()) == 2
    for name in PLAN:
        info = reader.info(name)
        place = files.place(name)
        assert (info.file, info.start, info.end) == (place.file, place.start, place.end)
        assert b"".join(reader.chunks(name)) == name.encode() * (info.end - info.start)


def test_what_was_not_written_is_named(tmp_path):
    message = "2 planned tensors were not written, the first: 'b'"
    with pytest.raises(CheckpointError, match=message), NewFiles(tmp_path, PLAN) as files:
        files.wrote("a")
    with pytest.raises(CheckpointError, match="'z' was not planned; expected one of the 3"):
        files.place("z")


def test_files_that_are_there_are_never_written_over(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        NewFiles(tmp_path, PLAN)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
