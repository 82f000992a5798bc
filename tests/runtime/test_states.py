"""Training states: exact resumption in the same and in any other layout, damage, kills at every
point of a save."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_nexus
from launch import file_limit, file_modes, finish, fork_ranks, start_ranks, umask

from nexus_ds.checkpoint.qwen2_moe import mean_name
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader, header_of
from nexus_ds.config import load_config
from nexus_ds.errors import CheckpointError
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.runtime import portable_state, states
from nexus_ds.runtime.portable_state import StateFiles
from nexus_ds.runtime.states import damage, newest_good, read_manifest, steps_saved

WORKER = Path(__file__).parents[1] / "state_worker.py"
TRAIN = Path(__file__).parents[2] / "nexus_ds" / "train.py"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
RANK_0, RANK_1 = "rank_00000.safetensors", "rank_00001.safetensors"
POINTS = (
    "before_files",
    "during_file",
    "after_file",
    "before_manifest",
    "before_rename",
    "after_rename",
    "after_latest",
    "during_retention",
)


def launch(checkpoint, folder, world, *words, out="out", code=0):
    """Run the worker on `world` ranks; return what it wrote."""
    path = folder.parent / out
    finish(
        fork_ranks([WORKER, checkpoint, folder, path, "training.batch_size=8", *words], world), code
    )
    return json.loads(Path(f"{path}.json").read_text())


def content(directory):
    """Return a state's values in full: per (kind, parameter) a flat tensor."""
    manifest = read_manifest(directory)
    files, found = StateFiles(directory, sorted(manifest["files"])), {}
    for name, shape in manifest["parameters"].items():
        for kind in KINDS:
            found[kind, name] = torch.empty(math.prod(shape))
            files.fill(kind, name, 0, found[kind, name])
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copy_step(source, target, step):
    shutil.copytree(source / f"step_{step}", target / f"step_{step}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_nexus(tmp_path_factory.mktemp("states") / "nexus", names=["a", "b", "c"])


@pytest.fixture(scope="module")
def source(tmp_path_factory, checkpoint):
    """States after steps 2, 4 and 6 of an uninterrupted run: ZeRO-3, three experts on expert
    parallel 2."""
    folder = tmp_path_factory.mktemp("source") / "states"
    result = launch(
        checkpoint,
        folder,
        2,
        "stage=3",
        "parallel.expert=2",
        "router.load_balance=0",
        "save=2,4,6",
        "until=6",
    )
    return folder, result["losses"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone, for the functions that ranks call together."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Exact resumption ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_layout_goes_on_to_bit_equal_weights_and_moments(tmp_path, checkpoint, source):
    """Newer states are damaged, each in another rank's file: the ranks share the hashing, and see
    both."""
    folder, losses = source
    for step in (2, 4, 6):
        copy_step(folder, tmp_path / "states", step)
    flip(tmp_path / "states" / "step_4" / RANK_0)
    flip(tmp_path / "states" / "step_6" / RANK_1)
    words = ("stage=3", "parallel.expert=2", "router.load_balance=0", "save=6", "until=6")
    result = launch(checkpoint, tmp_path / "states", 2, *words)
    assert result["first"] == 2
    told = [message.partition(": found sha256")[0] for message in result["messages"]]
    damaged = [(6, RANK_1), (4, RANK_0)]
    assert told == [
        f"{tmp_path / 'states' / f'step_{step}'} is damaged ({name}" for step, name in damaged
    ]
    assert result["losses"] == {step: loss for step, loss in losses.items() if int(step) >= 2}
    assert equal(content(folder / "step_6"), content(tmp_path / "states" / "step_6"))
    assert read_manifest(tmp_path / "states" / "step_6")["optimizer_step"] == 6


SAME = [  # stage, world, expert parallel, dtype, offload
    (2, 2, 1, "bf16", ""),
    (1, 2, 2, "bf16", ""),
    (3, 2, 2, "bf16", ""),
    (3, 4, 2, "bf16", ""),
    (3, 2, 2, "bf16", "parameters"),
    (2, 2, 2, "fp32", "optimizer"),
]


def check_same(tmp_path, checkpoint, stage, world, expert, dtype, offload):
    words = (
        f"stage={stage}",
        f"parallel.expert={expert}",
        f"model.dtype={dtype}",
        f"offload={offload}",
        "until=6",
    )
    whole = launch(checkpoint, tmp_path / "a", world, *words, "save=3,6")
    copy_step(tmp_path / "a", tmp_path / "b", 3)
    resumed = launch(checkpoint, tmp_path / "b", world, *words, "save=6")
    assert resumed["losses"] == {
        step: loss for step, loss in whole["losses"].items() if int(step) >= 3
    }
    assert equal(content(tmp_path / "a" / "step_6"), content(tmp_path / "b" / "step_6"))


@pytest.mark.slow
def test_bf16_weights_come_back_from_their_masters_bit_by_bit(tmp_path, checkpoint):
    check_same(tmp_path, checkpoint, *SAME[0])


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", SAME[1:], ids=str)
def test_every_layout_resumes_bit_exactly(tmp_path, checkpoint, case):
    check_same(tmp_path, checkpoint, *case)


# stage, world, expert parallel, offload: everything differs from the source at least once
OTHER = [
    (2, 1, 1, ""),
    (1, 2, 2, ""),
    (3, 1, 1, ""),
    (1, 4, 4, ""),
    (2, 4, 2, ""),
    (3, 4, 4, ""),
    (3, 2, 1, ""),
    (3, 2, 2, "parameters"),
    (2, 2, 2, "optimizer"),
]


def check_other(tmp_path, checkpoint, source, stage, world, expert, offload):
    folder, losses = source
    copy_step(folder, tmp_path / "states", 2)
    words = (
        f"stage={stage}",
        f"parallel.expert={expert}",
        f"offload={offload}",
        "router.load_balance=0",
    )
    result = launch(
        checkpoint,
        tmp_path / "states",
        world,
        *words,
        f"copy={tmp_path / 'copy'}",
        "until=6",
        "save=4,6",
        "router.z_loss=0.01",
    )
    assert result["first"] == 2
    assert equal(content(folder / "step_2"), content(tmp_path / "copy" / "step_2"))
    assert read_manifest(tmp_path / "copy" / "step_2")["optimizer_step"] == 2
    if (stage, world, expert) != (3, 2, 2):
        assert (
            "the state of step 2 was saved by 2 ranks, expert parallel 2, ZeRO stage 3; now"
            in result["messages"][0]
        )
    for step, loss in result["losses"].items():
        assert abs(loss - losses[step]) <= (1e-6 if step == "2" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER[:2], ids=str)
def test_another_layout_takes_over_every_element(tmp_path, checkpoint, source, case):
    check_other(tmp_path, checkpoint, source, *case)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", OTHER[2:], ids=str)
def test_every_other_layout_takes_over_every_element(tmp_path, checkpoint, source, case):
    check_other(tmp_path, checkpoint, source, *case)


@pytest.mark.slow
def test_a_state_holds_no_rank_no_vacant_slot_and_no_pickle(source, checkpoint):
    folder, _ = source
    directory = folder / "step_6"
    assert sorted(p.name for p in directory.iterdir()) == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    shapes, held, elements = read_manifest(directory)["parameters"], set(), 0
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        # JSON and then numbers, of which the header tells every one
        header = json.loads(content[8:end])
        held |= {tuple(name.split(":")[::2]) for name in header if not name.startswith("rng:")}
        elements += sum(
            math.prod(entry["shape"])
            for name, entry in header.items()
            if not name.startswith("rng:")
        )
        assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - end
        assert {
            entry["dtype"] for name, entry in header.items() if not name.startswith("rng:")
        } == {"F32"}
        assert {name for name in header if name.startswith("rng:")} == {"rng:cpu"}
        assert not zipfile.is_zipfile(path)
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(content, fix_imports=False)
    assert held == {(kind, name) for kind in KINDS for name in shapes}
    experts = {name.split(".experts.")[1].split(".")[0] for _, name in held if ".experts." in name}
    assert experts == {"0", "1", "2"}  # of four slots
    total = sum(math.prod(shape) for shape in shapes.values())
    size = sum(p.stat().st_size for p in directory.iterdir())
    # headers, manifest and the random generators of two ranks
    assert 12 * total < size < 12 * total + 60_000
    # as planned
    assert (
        disk(sizes_of(load_config("demo", [f"model.path={checkpoint}"])), 4, 2)["state"]
        == 12 * total
    )
    assert elements == 3 * sum(math.prod(shape) for shape in shapes.values())  # each once
    assert (folder / "latest").read_text() == "step_6\n"


def losses_of(output):
    lines = [
        json.loads(line)
        for line in Path(f"{output}.training/metrics.jsonl").read_text().splitlines()
    ]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.slow
def test_train_py_goes_on_with_other_ranks_and_another_stage(tmp_path, nexus_dir, text_folder):
    def words(output, stage):
        return [
            TRAIN,
            "--config",
            "demo",
            f"model.path={nexus_dir}",
            f"model.tokenizer={nexus_dir}",
            f"output={output}",
            f"data.path={text_folder}",
            "data.domains=[alpha,beta,gamma]",
            "data.validation_domains=[alpha]",
            f"data.cache={tmp_path / 'tokens'}",
            "data.sequence_length=16",
            "training.tokens=0",
            "training.steps=8",
            "training.batch_size=4",
            "training.lr=1e-2",
            "training.log_every=1",
            "training.eval_windows=4",
            "training.save_every=4",
            "training.keep_last=9",
            "router.load_balance=0",
            "pipeline.run=unused",
            f"parallel.zero_stage={stage}",
        ]

    with umask(0o022):
        finish(start_ranks([*words(tmp_path / "a", 3), "parallel.expert=2"], 2))
    assert file_modes(tmp_path / "a") == file_modes(tmp_path / "a.training") == {0o644}
    copy_step(tmp_path / "a.training" / "states", tmp_path / "b.training" / "states", 4)
    said = finish(start_ranks(words(tmp_path / "b", 1), 1))
    assert (
        "the state of step 4 was saved by 2 ranks, expert parallel 2, ZeRO stage 3; now 1 ranks, expert parallel"
        in said
    )
    assert "resumed after step 4" in said
    expected, found = losses_of(tmp_path / "a"), losses_of(tmp_path / "b")
    assert sorted(found) == [5, 6, 7, 8]  # each step's samples depend on its number alone
    assert abs(found[5] - expected[5]) <= 1e-6
    assert all(abs(found[step] - expected[step]) <= 1e-4 for step in found)
    assert steps_saved(tmp_path / "b.training" / "states") == [4, 8]


# Export --------------------------------------------------------------------------------------------------------------


def check_export(tmp_path, checkpoint, stage, world, expert, offload):
    out = tmp_path / "exported"
    words = (
        f"stage={stage}",
        f"parallel.expert={expert}",
        f"offload={offload}",
        "save=2",
        "until=2",
        f"export={out}",
    )
    with umask(0o077):
        launch(checkpoint, tmp_path / "states", world, *words)
    assert file_modes(out) == file_modes(tmp_path / "states") == {0o600}
    state, exported = content(tmp_path / "states" / "step_2"), TensorReader(out)
    experts = [name for name in exported.names() if ".mlp.experts." in name]
    assert len(experts) == 2 * 3 * 3  # layers, experts, matrices: no vacant slot
    for name in [*experts, "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"]:
        assert torch.equal(exported.read(name).flatten(), state["fp32", name])
    verify_expert_embeddings(out)


@pytest.mark.slow
def test_an_export_holds_the_trained_experts_in_order(tmp_path, context_dir):
    """Of a router that reads running means, so that what only such a one has is trained, gathered
    and verified too."""
    check_export(tmp_path, context_dir, 3, 2, 2, "")
    exported = TensorReader(tmp_path / "exported")
    for layer in range(2):
        mean = exported.read(mean_name(layer))
        assert not torch.equal(mean, TensorReader(context_dir).read(mean_name(layer)))
        assert torch.equal(
            mean,
            content(tmp_path / "states" / "step_2")[
                "fp32", f"model.layers.{layer}.mlp.router.mean"
            ],
        )
    assert read_sidecar(tmp_path / "exported").projections[0]["log_norm"].shape == (1,)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [(1, 2, 2, ""), (2, 4, 4, ""), (3, 4, 2, ""), (3, 4, 4, "parameters"), (2, 2, 1, "optimizer")],
    ids=str,
)
def test_an_export_out_of_every_layout(tmp_path, checkpoint, case):
    check_export(tmp_path, checkpoint, *case)


@pytest.mark.slow
def test_an_export_that_computes_something_else_fails_on_all_ranks_and_keeps_the_state(
    tmp_path, checkpoint
):
    out, words = (
        tmp_path / "exported",
        ["stage=2", "parallel.expert=2", "save=1", "until=1", "training.batch_size=8"],
    )
    ranks = fork_ranks(
        [
            WORKER,
            checkpoint,
            tmp_path / "states",
            tmp_path / "out",
            *words,
            f"export={out}",
            "wrong=1",
        ],
        2,
    )
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    for text in said:
        assert (
            "NEXUS CheckpointError: the exported model does not compute what was trained: logits differ by"
            in text
        )
        assert "nothing was exported, the training state is kept" in text
    assert not out.exists()
    assert not list(tmp_path.glob(".exported*"))
    assert damage(tmp_path / "states" / "step_1") == ""


# Extension -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_extended_model_keeps_the_moments_of_what_it_was_made_of(tmp_path, source):
    extended = make_nexus(tmp_path / "extended", seed=1, names=["a", "b", "c", "d"])
    words = (
        "stage=2",
        "parallel.expert=2",
        f"adopt={source[0]}",
        f"copy={tmp_path / 'copy'}",
        "until=2",
    )
    result = launch(extended, tmp_path / "states", 2, *words)
    old, new = content(source[0] / "step_6"), content(tmp_path / "copy" / "step_0")
    assert result["messages"] == [f"optimizer moments from {source[0] / 'step_6'}"]
    assert read_manifest(tmp_path / "copy" / "step_0")["optimizer_step"] == 6
    for (kind, name), values in new.items():
        if kind != "fp32" and (kind, name) in old:
            assert torch.equal(values, old[kind, name])
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = "model.layers.1.mlp.experts.{}." + part + ".weight"
        assert not new["exp_avg", name.format(3)].any()
        mean = sum(old["exp_avg_sq", name.format(e)] for e in range(3)) / 3
        assert torch.allclose(new["exp_avg_sq", name.format(3)], mean, rtol=1e-6, atol=0)
        # weights are the checkpoint's
        assert not torch.equal(new["fp32", name.format(0)], old["fp32", name.format(0)])
    assert all(math.isfinite(loss) for loss in result["losses"].values())


# Damage --------------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {
    "flipped": (flip, RANK_1, f"{RANK_1}: found sha256 "),
    "truncated": (truncate, RANK_1, f"{RANK_1}: found "),
    "missing": (Path.unlink, RANK_1, f"{RANK_1}: not there"),
    "no manifest": (Path.unlink, "manifest.json", "manifest.json: FileNotFoundError"),
    "half a manifest": (truncate, "manifest.json", "manifest.json: JSONDecodeError"),
}


@pytest.fixture()
def saved(tmp_path, source):
    target = tmp_path / "states"
    shutil.copytree(source[0], target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_newest_good_state_is_taken(saved, one_rank, kind):
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
    manifest = {"format": 1, "step": 4, "parameters": {}, "config": {}, "files": entries}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert [damage(tmp_path, rank, world) for rank in range(world)] == [""] * world
    for name, data in files.items():
        flip(tmp_path / name)
        found = [damage(tmp_path, rank, world) for rank in range(world)]
        assert sorted(map(bool, found)) == [False] * (world - 1) + [True]
        assert next(filter(None, found)).startswith(f"{name}: found sha256 ")
        (tmp_path / name).write_bytes(data)


@pytest.mark.slow
def test_a_file_of_another_step_is_found_out(saved, one_rank):
    shutil.copyfile(saved / "step_4" / RANK_1, saved / "step_6" / RANK_1)
    assert newest_good(saved)[0] == 4


@pytest.mark.slow
def test_all_states_damaged_is_an_error_that_names_each_and_deletes_nothing(saved, one_rank):
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


@pytest.mark.slow
@pytest.mark.parametrize("latest", ["", "step_99", "../../elsewhere", None])
def test_what_latest_says_does_not_matter(saved, one_rank, latest):
    (saved / "latest").unlink()
    if latest is not None:
        (saved / "latest").write_text(latest)
    assert newest_good(saved) == (6, [])


@pytest.mark.slow
def test_a_run_whose_states_are_gone_does_not_start_over_silently(saved, one_rank):
    for step in (2, 4, 6):
        shutil.rmtree(saved / f"step_{step}")
    with pytest.raises(CheckpointError, match="latest is there, but no state that it could name"):
        newest_good(saved)
    (saved / "latest").unlink()
    assert newest_good(saved) == (0, [])


@pytest.mark.slow
def test_a_manifest_leads_nowhere_else(saved):
    manifest = json.loads((saved / "step_6" / "manifest.json").read_text())
    manifest["files"]["../step_4/" + RANK_1] = manifest["files"].pop(RANK_1)
    (saved / "step_6" / "manifest.json").write_text(json.dumps(manifest))
    assert (
        damage(saved / "step_6")
        == "manifest.json: found another format, expected format 1 of a training state"
    )
    (saved / "step_4" / RANK_1).rename(saved / "moved")
    (saved / "step_4" / RANK_1).symlink_to(saved / "moved")
    assert damage(saved / "step_4") == f"{RANK_1}: not there"


@pytest.mark.slow
def test_a_state_of_another_model_or_configuration_is_refused(saved):
    manifest = read_manifest(saved / "step_6")
    shapes = manifest["parameters"]
    description = {"layout": "any", "config": {"training.lr": 0.5}}
    message = (
        r"the training state at step 6 belongs to another configuration \(training.lr: 0.01 then, 0.5 now\); "
        "restore these settings, or give another output"
    )
    with pytest.raises(CheckpointError, match=message):
        states._compare(manifest, description, shapes)
    description["config"] = manifest["config"]
    states._compare(manifest, description, shapes)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    message = f"another model: 1 parameters differ, the first is {name}: found None, expected .16, 24.; give another"
    fewer = manifest | {"parameters": {key: shape for key, shape in shapes.items() if key != name}}
    with pytest.raises(CheckpointError, match=message):
        states._compare(fewer, description, shapes)


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


# Retention and room --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_old_states_go_only_while_the_newer_ones_are_whole(saved):
    truncate(saved / "step_6" / RANK_1)
    states._retain(saved, 6, 1)
    assert steps_saved(saved) == [2, 4, 6]
    shutil.rmtree(saved / "step_6")
    states._retain(saved, 4, 1)
    assert steps_saved(saved) == [4]


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
        states._start(tmp_path, tmp_path / "partial", 10**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_state_that_could_not_be_written_whole_does_not_count_and_the_older_one_stays(
    tmp_path, checkpoint, source
):
    """A real short write: the file system stops a file before its end, as a quota or a full disk
    does."""
    folder = tmp_path / "states"
    copy_step(source[0], folder, 6)
    shapes = read_manifest(folder / "step_6")["parameters"]
    held = {
        f"{kind}:0:{name}": ("F32", (math.prod(shape),))
        for name, shape in shapes.items()
        for kind in KINDS
    }
    # one rank holds all
    _, places = header_of(held | {"rng:cpu": ("U8", tuple(torch.get_rng_state().shape))})
    words = [
        "stage=2",
        "router.load_balance=0",
        "training.batch_size=8",
        "until=7",
        "save=7",
        "keep=1",
    ]
    # amidst the last write, so that none fails after it
    with file_limit(places["rng:cpu"][1] - 1000):
        ranks = start_ranks([WORKER, checkpoint, folder, tmp_path / "out", *words], 1)
    said = finish(ranks, code=1)
    assert re.search(
        rf"NEXUS CheckpointError: \[Errno 27\] File too large: need [\d,]+ bytes more, free [\d,]+: '{folder}/partial/{RANK_0}'",
        said,
    )
    assert steps_saved(folder) == [6] and damage(folder / "step_6") == ""
    assert not (folder / "partial").exists()


# Kills ---------------------------------------------------------------------------------------------------------------


def check_kill(tmp_path, monkeypatch, checkpoint, source, point, rank):
    monkeypatch.setenv("NEXUS_FAULT", f"kill:rank{rank}:{point}:4")
    folder = tmp_path / "states"
    words = [
        "stage=3",
        "parallel.expert=2",
        "router.load_balance=0",
        "save=2,4,6",
        "keep=1",
        "training.batch_size=8",
    ]
    ranks = fork_ranks([WORKER, checkpoint, folder, tmp_path / "out", *words, "until=6"], 2)
    for process in ranks:
        process.communicate(timeout=120)
    assert ranks[rank].returncode == -9
    assert ranks[1 - rank].returncode not in (0, None)
    step, problems = newest_good(folder)
    # there all files are whole: rank 0 may commit, or miss rank 1 before
    if (rank, point) != (1, "after_file"):
        assert step == (4 if point in ("after_rename", "after_latest", "during_retention") else 2)
    assert problems == []
    assert equal(content(folder / f"step_{step}"), content(source[0] / f"step_{step}"))
    monkeypatch.delenv("NEXUS_FAULT")
    return folder, words


@pytest.mark.slow
def test_a_killed_save_leaves_a_state_that_resumes(
    tmp_path, monkeypatch, checkpoint, source, one_rank
):
    folder, words = check_kill(tmp_path, monkeypatch, checkpoint, source, "during_file", 1)
    assert (folder / "partial").exists()
    result = launch(checkpoint, folder, 2, *words, "until=6")
    assert result["first"] == 2
    assert equal(content(folder / "step_6"), content(source[0] / "step_6"))
    assert sorted(os.listdir(folder)) == ["latest", "step_6"]


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save_leaves_a_good_state(
    tmp_path, monkeypatch, checkpoint, source, one_rank, point
):
    check_kill(tmp_path, monkeypatch, checkpoint, source, point, 0)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("point", ["before_files", "after_file"])
def test_a_kill_of_another_rank_leaves_a_good_state(
    tmp_path, monkeypatch, checkpoint, source, one_rank, point
):
    check_kill(tmp_path, monkeypatch, checkpoint, source, point, 1)
