"""Hashes of a checkpoint's files: as other tools compute them; what was changed, by name."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import hashes
from nexus_ds.checkpoint.hashes import differences, hash_of, record_hashes, recorded
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import write_at


@pytest.fixture
def checkpoint(nexus_dir, tmp_path):
    """A Nexus checkpoint whose hashes are recorded."""
    out = tmp_path / "m"
    shutil.copytree(nexus_dir, out)
    (out / "README.md").write_text("a card")
    record_hashes(out)
    return out


def changes(checkpoint):
    return differences(checkpoint, recorded(checkpoint))


def test_hashes_are_those_of_sha256sum(checkpoint):
    files = json.loads((checkpoint / "nexus.json").read_text())["files"]
    assert "nexus.json" not in files and "README.md" not in files
    assert {"config.json", "model.safetensors", "nexus/nexus_router.safetensors"} <= set(files)
    for name, entry in files.items():
        content = (checkpoint / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
    tensors = load_file(checkpoint / "model.safetensors")
    assert set(files["model.safetensors"]["tensors"]) == set(tensors)
    found = changes(checkpoint)
    assert not found.problems and not found.notes


def test_files_are_hashed_behind_their_writers(tmp_path):
    """Each byte when it is there and not before, whatever the order they are written in."""
    (tmp_path / "nexus.json").write_text("{}")
    plan = {"a": ("U8", (3 << 20,)), "b": ("U8", (5,))}
    with hashes.Hashing(tmp_path) as hashing, NewFiles(tmp_path, plan) as files:
        hashing.follow(files)
        for name in reversed(plan):
            place = files.place(name)
            write_at(
                place.descriptor,
                place.start,
                memoryview(b"x" * (place.end - place.start)),
                place.file,
            )
            files.frontier.landed(place)
            files.wrote(name)
        hashing.record()
    path = tmp_path / "model.safetensors"
    assert recorded(tmp_path) == {path.name: hash_of(path)}
    assert hash_of(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_hashing_ends_with_the_writing_that_it_follows(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        hashes.Hashing(tmp_path) as hashing,
        NewFiles(tmp_path, {"a": ("U8", (5,))}) as files,
    ):
        hashing.follow(files)
        raise ZeroDivisionError


def test_no_sha256_of_weights_is_computed_that_nobody_compares(checkpoint, monkeypatch):
    before = recorded(checkpoint)
    hashed = []

    def counted(path):
        hashed.append(path.name)
        return hash_of(path)

    monkeypatch.setattr(hashes, "hash_of", counted)
    assert not differences(checkpoint, before).problems
    assert "config.json" in hashed
    assert not [name for name in hashed if name.endswith(".safetensors")]


def test_a_flipped_bit_is_named_by_its_tensor(checkpoint):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    [problem] = changes(checkpoint).problems
    assert problem.startswith("1 tensors were changed: model.")


def test_tensors_of_one_name_in_two_folders_are_two(checkpoint):
    """A Qwen3-Next keeps its norms as they were beside those of its own form."""
    name = "model.norm.weight"
    own = load_file(checkpoint / "model.safetensors")
    save_file({name: own[name] + 1}, checkpoint / "nexus" / "nexus_source.safetensors")
    record_hashes(checkpoint)
    assert not changes(checkpoint).problems
    save_file(own | {name: own[name] + 2}, checkpoint / "model.safetensors")
    assert changes(checkpoint).problems == [f"1 tensors were changed: {name}"]
    save_file(own, checkpoint / "model.safetensors")
    save_file({name: own[name]}, checkpoint / "nexus" / "nexus_source.safetensors")
    assert changes(checkpoint).problems == [f"1 tensors were changed: nexus/{name}"]


def test_weights_that_were_saved_anew_are_compared_by_tensor(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    one = {name: tensors[name] for name in names[:5]}
    save_file(one, checkpoint / "model-1.safetensors")
    rest = {name: tensors[name] for name in names[5:]}
    save_file(rest, checkpoint / "model-2.safetensors")
    found = changes(checkpoint)
    assert not found.problems
    assert found.notes == ["model-1.safetensors was added", "model-2.safetensors was added"]
    rest[names[5]] = rest[names[5]].bfloat16()
    rest["new"] = rest.pop(names[6])
    save_file(rest, checkpoint / "model-2.safetensors")
    assert changes(checkpoint).problems == [
        f"1 tensors were changed: {names[5]}",
        f"1 tensors are missing: {names[6]}",
        "1 tensors were added: new",
    ]


def test_other_files(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "README.md").write_text("another card")
    (checkpoint / "more.txt").write_text("more")
    found = changes(checkpoint)
    assert found.problems == ["config.json was changed", "tokenizer.json is missing"]
    assert found.notes == ["more.txt was added"]


def test_long_lists_are_cut(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, checkpoint / "model.safetensors")
    [problem] = changes(checkpoint).problems
    assert problem.endswith(f" and {len(tensors) - 10} more")


def test_writing_the_sidecar_drops_what_is_no_longer_true(checkpoint):
    write_sidecar(checkpoint, read_sidecar(checkpoint))
    assert recorded(checkpoint) is None


def test_a_damaged_record(checkpoint):
    path = checkpoint / "nexus.json"
    numbers = {"config.json": {"bytes": 3, "sha256": 1}}
    tensors = {"config.json": {"bytes": 3, "sha256": "", "tensors": [1]}}
    for files in ([], {"config.json": 3}, {"config.json": {"bytes": 3}}, numbers, tensors):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
        with pytest.raises(CheckpointError, match="expected bytes and sha256 of each file"):
            recorded(checkpoint)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "link"])
def test_no_file_outside_is_hashed(checkpoint, name):
    """Else whoever made the checkpoint learns whether there is such a file, and what it holds."""
    (checkpoint.parent / "secret.txt").write_text("secret")
    (checkpoint / "link").symlink_to(checkpoint.parent / "secret.txt")
    path = checkpoint / "nexus.json"
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {name: entry}}))
    with pytest.raises(CheckpointError, match="lies outside the model's directory"):
        recorded(checkpoint)


def test_empty_tensors_and_files(tmp_path):
    save_file({"a": torch.zeros(0, 3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert hash_of(tmp_path / "x.safetensors").sha256 == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").touch()
    assert hash_of(tmp_path / "empty").sha256 == hashlib.sha256().hexdigest()
