"""Damaged, foreign and missing states are named, nothing is deleted, and a full disk told early."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import file_limit, finish, start_ranks
from saved_states import KINDS, RANK_0, RANK_1, WORKER, copy_step, flip
from soak import ON_DISK, disk

from nexus_ds.checkpoint.headers import header_of
from nexus_ds.errors import CheckpointError
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import portable_state, states
from nexus_ds.runtime.portable_state import StateFiles
from nexus_ds.runtime.states import damage, newest_good, read_manifest, steps_saved
from nexus_ds.sealed import read_sealed, seal

PAGE = os.sysconf("SC_PAGESIZE")  # what a tmpfs gives out

# Damage -------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def edit(**values):
    """Return what writes a manifest anew, with its hash, but with other values."""

    def rewrite(path):
        path.write_text(seal(read_sealed(path) | values))

    return rewrite


DAMAGES = {
    "flipped": (flip, RANK_1, f"{RANK_1}: found sha256 "),
    "truncated": (truncate, RANK_1, f"{RANK_1}: found "),
    "missing": (Path.unlink, RANK_1, f"{RANK_1}: not there"),
    "no manifest": (Path.unlink, "manifest.json", "manifest.json: FileNotFoundError"),
    "half a manifest": (truncate, "manifest.json", "manifest.json: ValueError('not valid JSON"),
    "a flipped manifest": (flip, "manifest.json", "manifest.json: ValueError("),
    "another step": (edit(step=5), "manifest.json", "manifest.json: found that of step 5"),
    "edited": (
        lambda path: path.write_text(path.read_text().replace('"step": 6', '"step": 66')),
        "manifest.json",
        "manifest.json: ValueError('found sha256 ",
    ),
    **{
        f"{value!r} for {key}": (
            lambda path, key=key, value=value: path.write_text(
                json.dumps(json.loads(path.read_text()) | {key: value})
            ),
            "manifest.json",
            "manifest.json: ValueError('found sha256 ",
        )
        for key, value in [("files", []), ("optimizer_step", "6"), ("config", None)]
    },
    "nested": (
        lambda path: path.write_text("[" * 20_000),
        "manifest.json",
        "manifest.json: ValueError('not valid JSON (maximum recursion",
    ),
}


@pytest.fixture()
def saved(tmp_path, source):
    target = tmp_path / "states"
    shutil.copytree(source[0], target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_newest_good_state_is_taken(saved, alone, kind):
    harm, name, message = DAMAGES[kind]
    assert newest_good(saved) == (6, [])
    harm(saved / "step_6" / name)
    step, problems = newest_good(saved)
    assert step == 4
    assert len(problems) == 1
    assert problems[0].startswith(f"{saved / 'step_6'} is damaged ({message}")
    assert (saved / "step_6").exists()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_hashing_and_leave_no_file_out(tmp_path, world):
    files = {f"rank_{rank:05}.safetensors": bytes([rank] * 100) for rank in range(5)}
    entries = {
        name: {"size": 100, "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    folder = tmp_path / "step_4"
    folder.mkdir()
    manifest = {"format": 2, "step": 4, "optimizer_step": 4, "layout": "1 rank"}
    manifest |= {"parameters": {}, "config": {}, "files": entries}
    (folder / "manifest.json").write_text(seal(manifest))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert [damage(folder, rank, world) for rank in range(world)] == [""] * world
    for name, data in files.items():
        flip(folder / name)
        found = [damage(folder, rank, world) for rank in range(world)]
        assert sorted(map(bool, found)) == [False] * (world - 1) + [True]
        assert next(filter(None, found)).startswith(f"{name}: found sha256 ")
        (folder / name).write_bytes(data)


@pytest.mark.slow
def test_a_file_of_another_step_is_found_out(saved, alone):
    shutil.copyfile(saved / "step_4" / RANK_1, saved / "step_6" / RANK_1)
    assert newest_good(saved)[0] == 4


@pytest.mark.slow
def test_all_states_damaged_is_an_error_that_names_each_and_deletes_nothing(saved, alone):
    for step in (2, 4, 6):
        flip(saved / f"step_{step}" / RANK_1)
    with pytest.raises(CheckpointError) as found:
        newest_good(saved)
    text = str(found.value)
    assert text.startswith("no training state can be used: ")
    assert all(
        f"{saved / f'step_{step}'} is damaged ({RANK_1}: found sha256" in text for step in (2, 4, 6)
    )
    assert f"remove {saved} to start over from the beginning" in text
    assert steps_saved(saved) == [2, 4, 6]


def test_a_folder_of_another_name_is_no_state(tmp_path):
    """isdigit() takes more than int() does: '²' ended in its traceback."""
    for name in ("step_12", "step_3", "step_²", "step_٣", "step_", "step_007", "step_1x"):
        (tmp_path / name).mkdir()
    (tmp_path / f"step_{'9' * 200}").mkdir()
    (tmp_path / "step_5").touch()
    assert steps_saved(tmp_path) == [3, 12]


@pytest.mark.slow
@pytest.mark.parametrize("latest", ["", "step_99", "../../elsewhere", None])
def test_what_latest_says_does_not_matter(saved, alone, latest):
    (saved / "latest").unlink()
    if latest is not None:
        (saved / "latest").write_text(latest)
    assert newest_good(saved) == (6, [])


@pytest.mark.slow
def test_a_run_whose_states_are_gone_does_not_start_over_silently(saved, alone):
    for step in (2, 4, 6):
        shutil.rmtree(saved / f"step_{step}")
    with pytest.raises(CheckpointError, match="latest is there, but no state that it could name"):
        newest_good(saved)
    (saved / "latest").unlink()
    assert newest_good(saved) == (0, [])


OTHER_TYPES = [
    ({"step": "6"}, "step"),
    ({"optimizer_step": None}, "optimizer_step"),
    ({"layout": 1}, "layout"),
    ({"config": []}, "config"),
    ({"parameters": {"w": "x"}}, "parameters.w"),
    ({"parameters": {"w": [1.5]}}, "parameters.w[0]"),
    ({"files": []}, "files"),
    ({"files": {RANK_1: 3}}, f"files.{RANK_1}"),
    ({"files": {RANK_1: {"size": "3", "sha256": ""}}}, f"files.{RANK_1}.size"),
    ({"files": {RANK_1: {"size": 3}}}, f"files.{RANK_1}"),
]
"""Values in a manifest with the right hash, and where they are found out."""


@pytest.mark.slow
def test_a_manifest_leads_nowhere_else(saved):
    path = saved / "step_6" / "manifest.json"
    sound = read_sealed(path)
    files = dict(sound["files"])
    files["../step_4/" + RANK_1] = files.pop(RANK_1)
    edit(files=files)(path)
    said = f"manifest.json: '../step_4/{RANK_1}' is not the name of a rank's file"
    assert damage(saved / "step_6") == said
    for values, place in OTHER_TYPES:
        path.write_text(seal(sound | values))
        assert damage(saved / "step_6").startswith(f"manifest.json: {place}: found "), values
    edit(format=1)(path)
    said = "manifest.json: found format 1, expected format 2 of a training state"
    assert damage(saved / "step_6") == said
    (saved / "step_4" / RANK_1).rename(saved / "moved")
    (saved / "step_4" / RANK_1).symlink_to(saved / "moved")
    assert damage(saved / "step_4") == f"{RANK_1}: not there"


@pytest.mark.slow
def test_a_state_of_another_model_or_configuration_is_refused(saved):
    manifest = read_manifest(saved / "step_6")
    shapes = manifest["parameters"]
    description = {"layout": "any", "config": {"training.lr": 0.5}}
    message = (
        r"the training state at step 6 belongs to another configuration "
        r"\(training.lr: 0.01 then, 0.5 now\); "
        "restore these settings, or give another output"
    )
    with pytest.raises(CheckpointError, match=message):
        states._compare(manifest, description, shapes)
    description["config"] = manifest["config"]
    states._compare(manifest, description, shapes)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    message = (
        f"another model: 1 parameters differ, the first is {name}: found None, "
        "expected .16, 24.; give another"
    )
    fewer = manifest | {"parameters": {key: shape for key, shape in shapes.items() if key != name}}
    with pytest.raises(CheckpointError, match=message):
        states._compare(fewer, description, shapes)


def differences(key, then, now):
    return states._differences(key, {key: then}, {key: now})


def test_a_difference_is_told_by_its_own_entry():
    assert differences("training.lr", 0.1, 0.2) == ["training.lr: 0.1 then, 0.2 now"]
    weights = {"a": 0.5, "b": 0.5}
    assert differences("data.weights", weights, weights | {"b": 0.6}) == [
        "data.weights.b: 0.5 then, 0.6 now"
    ]
    turned = {"b": 0.5, "a": 0.5}
    assert differences("data.weights", weights, turned) == [
        "data.weights: in the order a, b then, b, a now"
    ]
    assert differences("data.weights", weights, {"a": 1.0}) == [
        "data.weights: {'a': 0.5, 'b': 0.5} then, {'a': 1.0} now"
    ]


PARTS = {"text": "t", "tokenizer": "k"}
OLDER = "the text of b, its tokenizer or data.* are not what they were"


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (PARTS, PARTS | {"text": "u"}, "not what it was: the text of b"),
        (
            PARTS,
            PARTS | {"tokenizer": "l"},
            "not what it was: the tokenizer of b, data.bos or data.chat",
        ),
        (
            PARTS,
            {"text": "u", "tokenizer": "l"},
            "not what it was: the text of b and the tokenizer of b, data.bos or data.chat",
        ),
        (
            PARTS,
            PARTS,
            "data.max_bytes, data.on_bad_row or the form of token files differs for b",
        ),
        (None, PARTS, OLDER),
        ([], PARTS, OLDER),
    ],
)
def test_other_data_is_told_by_what_it_was_made_of(then, now, told):
    saved = {"data fingerprint": {"a": "0", "b": "1"}, "data made from": {"a": PARTS, "b": then}}
    current = {"data fingerprint": {"a": "0", "b": "2"}, "data made from": {"a": PARTS, "b": now}}
    manifest = {"step": 6, "config": saved, "parameters": {}}
    with pytest.raises(
        CheckpointError, match=rf"another configuration \({re.escape(told)}\); restore"
    ):
        states._compare(manifest, {"layout": "any", "config": current}, {})


@pytest.mark.parametrize("then", [{}, {"data made from": 3}, {"data made from": {"b": {}}}])
def test_a_state_that_says_otherwise_what_its_data_was_made_from_resumes_all_the_same(then):
    kept = {"data fingerprint": {"b": "1"}}
    manifest = {"step": 6, "config": kept | then, "parameters": {}}
    current = kept | {"data made from": {"b": PARTS}}
    states._compare(manifest, {"layout": "any", "config": current}, {})


@pytest.mark.slow
def test_elements_that_no_file_has_are_named(saved):
    directory = saved / "step_6"
    files = StateFiles(directory, ["rank_00000.safetensors"])
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(
        CheckpointError,
        match=f"element 128 of exp_avg of {name} is in no file; the training state is inc",
    ):
        files.fill("exp_avg", name, 0, torch.empty(256))


# Retention and room -------------------------------------------------------------------------------


@pytest.mark.slow
def test_old_states_go_only_while_the_newer_ones_are_whole(saved, alone):
    truncate(saved / "step_6" / RANK_1)
    states._retain(saved, 6, 1)
    assert steps_saved(saved) == [2, 4, 6]
    shutil.rmtree(saved / "step_6")
    states._retain(saved, 4, 1)
    assert steps_saved(saved) == [4]


def kept(folder, step, keep_last):
    """Let retention follow the saving of `step`; return the steps that are left."""
    states._retain(folder, step, keep_last)
    return steps_saved(folder)


def test_a_state_that_was_just_written_stays_beside_newer_ones_that_are_damaged(tmp_path, alone):
    """The run fell back behind them by their hashes, which retention does not compute."""
    for step in (1, 2, 3, 4, 6):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        (folder / RANK_0).write_bytes(b"x")
        files = {RANK_0: {"size": 1, "sha256": "another"}}
        manifest = {"format": states.FORMAT, "step": step, "files": files, "optimizer_step": step}
        manifest |= {"layout": "", "config": {}, "parameters": {}}
        (folder / states.MANIFEST).write_text(seal(manifest))
        assert damage(folder, share=0, of=0) == "" != damage(folder, share=0, of=1)
    assert kept(tmp_path, 3, 2) == [2, 3, 4, 6]
    assert kept(tmp_path, 3, 1) == [3, 4, 6]
    assert kept(tmp_path, 6, 2) == [4, 6]


def test_a_file_shorter_than_its_header_says_does_not_count(tmp_path):
    (tmp_path / RANK_0).write_bytes(b"x" * 1000)
    portable_state._check_size(tmp_path / RANK_0, 1000)
    with pytest.raises(
        CheckpointError,
        match=rf"{RANK_0}: 1,000 bytes were written, 1,200 planned; the state does not c",
    ):
        portable_state._check_size(tmp_path / RANK_0, 1200)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(
        CheckpointError,
        match="not enough space for a training state: need 1,000,000,000,000,000,000 by",
    ):
        states._start(tmp_path, 12, 10**18)
    assert list(tmp_path.iterdir()) == []


def test_each_saving_has_a_name_of_its_own_and_clears_what_others_left(tmp_path):
    """A node that still knows the last folder by its name would write into a committed state."""
    (tmp_path / "partial").mkdir()  # of an older version
    (tmp_path / "step_1").mkdir()
    first = states._start(tmp_path, 12, 0)
    (tmp_path / first / RANK_0).write_bytes(b"half")
    second = states._start(tmp_path, 12, 0)
    assert re.fullmatch(r"partial_12_\w{8}", first) and first != second
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([second, "step_1"])


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "not there"), (b"abc", "found 3 bytes, expected 4")]
)
def test_a_state_whose_files_are_not_all_there_is_not_committed(
    tmp_path, monkeypatch, content, problem
):
    """As of a node whose write went elsewhere, or is not to be seen yet."""
    monkeypatch.setattr(states, "_fault", lambda point, step: None)
    partial = tmp_path / states._start(tmp_path, 12, 0)
    (partial / RANK_0).write_bytes(b"abcd")
    if content:
        (partial / RANK_1).write_bytes(content)
    entry = {"size": 4, "sha256": "0" * 64}
    manifest = {"format": states.FORMAT, "step": 12, "optimizer_step": 12, "layout": ""}
    manifest |= {"config": {}, "parameters": {}, "files": {RANK_0: entry, RANK_1: entry}}
    said = f"{partial}: {RANK_1}: {problem}; the state of step 12 does not count, what was saved"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        states._commit(tmp_path, partial, manifest)
    assert steps_saved(tmp_path) == [] and not (tmp_path / "latest").exists()


def test_a_manifest_that_does_not_fit_is_named_and_leaves_no_state_behind(
    tmp_path, alone, monkeypatch
):
    """The ranks' files are whole by then, and as large as a state."""

    def write_rank(engine, path, halfway):
        path.write_bytes(b"x" * 1000)
        return {"size": 1000, "sha256": ""}

    monkeypatch.setattr(portable_state, "shapes", lambda model: {"w": [1]})
    monkeypatch.setattr(portable_state, "write_rank", write_rank)
    monkeypatch.setattr(internals, "optimizer_step", lambda engine: 12)
    engine = SimpleNamespace(module=None)
    folder = tmp_path / "states"
    states.save(engine, folder, 6, {"layout": "", "config": {}}, 1)
    said = (
        r"File too large: need [\d,]+ bytes more, free [\d,]+: '.*/partial_12_\w{8}/manifest.json'"
    )
    with file_limit(2000), pytest.raises(CheckpointError, match=said):
        states.save(engine, folder, 12, {"layout": "x" * 3000, "config": {}}, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_6"]
    assert (folder / "latest").read_text() == "step_6\n"


def one_rank_size(directory):
    """Return the bytes of the values of a state, and those of its file where one rank holds all."""
    shapes = read_manifest(directory)["parameters"]
    held = {
        f"{kind}:0:{name}": ("F32", (math.prod(shape),))
        for name, shape in shapes.items()
        for kind in KINDS
    }
    _, places = header_of(held | {"rng:cpu": ("U8", tuple(torch.get_rng_state().shape))})
    values = states.BYTES * sum(math.prod(shape) for shape in shapes.values())
    return values, places["rng:cpu"]


ONE_RANK = ["stage=2", "router.load_balance=0", "training.batch_size=8"]
SAVE_7 = ["until=7", "save=7", "keep=1"]


@pytest.mark.slow
@pytest.mark.parametrize("full_at", [RANK_0, "manifest.json"])
def test_a_disk_that_fills_up_amid_a_save_is_told_with_file_need_and_room(
    tmp_path, checkpoint, source, full_at
):
    """A real disk with room for what is foreseen, and for less than what is written."""
    with disk(tmp_path / "disk") as allowed:
        if not allowed:
            pytest.skip("only root may mount a small disk")
        folder = tmp_path / "disk" / "states"
        copy_step(source[0], folder, 6)
        values, (_, end) = one_rank_size(folder / "step_6")
        # The head of the file and the random states are not foreseen.
        room = values if full_at == RANK_0 else end
        free = shutil.disk_usage(folder).free
        (tmp_path / "disk" / "ballast").write_bytes(bytes(free - room // PAGE * PAGE - PAGE))
        said = finish(
            start_ranks([WORKER, checkpoint, folder, tmp_path / "out", *ONE_RANK, *SAVE_7], 1), 1
        )
        told = (
            r"NEXUS CheckpointError: \[Errno 28\] No space left on device: need [\d,]+ bytes more, "
        )
        assert re.search(rf"{told}free [\d,]+: '{folder}/partial_7_\w{{8}}/{full_at}'", said), said
        assert re.search(ON_DISK["full disk"].dying, said)
        assert [path.name for path in folder.iterdir()] == ["step_6"]
        assert damage(folder / "step_6") == ""


@pytest.mark.slow
def test_a_state_that_could_not_be_written_whole_does_not_count_and_the_older_one_stays(
    tmp_path, checkpoint, source
):
    """A real short write: the file system stops a file before its end, as a quota or a full disk
    does."""
    folder = tmp_path / "states"
    copy_step(source[0], folder, 6)
    _, (_, end) = one_rank_size(folder / "step_6")
    # amidst the last write, so that none fails after it
    with file_limit(end - 1000):
        words = [*ONE_RANK, *SAVE_7]
        ranks = start_ranks([WORKER, checkpoint, folder, tmp_path / "out", *words], 1)
    said = finish(ranks, code=1)
    assert re.search(
        r"NEXUS CheckpointError: \[Errno 27\] File too large: need [\d,]+ bytes more, "
        rf"free [\d,]+: '{folder}/partial_7_\w{{8}}/{RANK_0}'",
        said,
    )
    assert steps_saved(folder) == [6] and damage(folder / "step_6") == ""
    assert not list(folder.glob("partial*"))
