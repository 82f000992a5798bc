"""Files of their full length from the start, in the order of the plan; who has written what."""

import os
import threading

import pytest

from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.new_files import GivenUp, NewFiles
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


def test_who_follows_waits_for_gaps_to_be_filled(tmp_path):
    passed = []
    with NewFiles(tmp_path, PLAN, copies={"c": "b"}) as files:
        a, b, c = map(files.place, PLAN)

        def follow():
            for place in (a, b, c):
                files.frontier.wait(place.file, place.end)
                passed.append(place.start)

        follower = threading.Thread(target=follow)
        follower.start()
        # with its copy, which stands at the end; behind a gap both
        files.frontier.landed(b)
        files.frontier.landed(a.part(8, 16))
        assert not passed
        files.frontier.landed(a.part(0, 0))
        files.frontier.landed(a.part(0, 8))
        follower.join(10)
        assert passed == [a.start, b.start, c.start]
        for name in PLAN:
            files.wrote(name)


def test_who_follows_files_that_are_given_up_is_told(tmp_path):
    with pytest.raises(ZeroDivisionError), NewFiles(tmp_path, PLAN) as files:
        a, b, _ = map(files.place, PLAN)
        files.frontier.landed(a)
        raise ZeroDivisionError
    files.frontier.wait(a.file, a.end)
    with pytest.raises(GivenUp):
        files.frontier.wait(b.file, b.end)


def test_a_lone_file_may_have_another_name(tmp_path):
    with NewFiles(tmp_path, PLAN, single="r.safetensors") as files:
        assert files.paths() == [tmp_path / "r.safetensors"]
        for name in PLAN:
            files.wrote(name)
