"""A state goes on in the same layout bit by bit, in any other within rounding, and out of each."""

import json
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from launch import file_modes, finish, fork_ranks, start_ranks, umask
from saved_states import KINDS, RANK_0, RANK_1, WORKER, content, copy_step, equal, flip, launch

from nexus_ds.checkpoint.qwen2_moe import mean_name
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.config import load_config
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.runtime.states import damage, read_manifest, steps_saved

TRAIN = Path(__file__).parents[2] / "nexus_ds" / "train.py"


# Exact resumption ---------------------------------------------------------------------------------


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
        "the state of step 4 was saved by 2 ranks, expert parallel 2, ZeRO stage 3; now 1 ranks, "
        "expert parallel" in said
    )
    assert "resumed after step 4" in said
    expected, found = losses_of(tmp_path / "a"), losses_of(tmp_path / "b")
    assert sorted(found) == [5, 6, 7, 8]  # each step's samples depend on its number alone
    assert abs(found[5] - expected[5]) <= 1e-6
    assert all(abs(found[step] - expected[step]) <= 1e-4 for step in found)
    assert steps_saved(tmp_path / "b.training" / "states") == [4, 8]


# Export -------------------------------------------------------------------------------------------


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
            "NEXUS CheckpointError: the exported model does not compute what was trained: "
            "logits differ by" in text
        )
        assert "nothing was exported, the training state is kept" in text
    assert not out.exists()
    assert not list(tmp_path.glob(".exported*"))
    assert damage(tmp_path / "states" / "step_1") == ""
