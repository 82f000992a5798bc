"""Batches that give no number cost a batch and not the run: nothing of them is in the weights, and
their documents are named."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DOMAINS
from launch import finish, fork_ranks
from safetensors.torch import load_file

from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.runtime import bad_batches
from nexus_ds.runtime.bad_batches import BadBatches
from nexus_ds.runtime.states import damage, steps_saved
from nexus_ds.settings import Config

WORKER = Path(__file__).parents[1] / "bad_batch_worker.py"


def words(nexus, text, out, *more):
    return [
        f"model.path={nexus}",
        f"model.tokenizer={nexus}",
        f"data.path={text}",
        f"output={out}",
        f"data.cache={out.parent / 'tokens'}",
        f"data.domains=[{','.join(DOMAINS)}]",
        f"data.validation_domains=[{','.join(DOMAINS)}]",
        "data.sequence_length=16",
        "parallel.expert=2",
        "training.tokens=0",
        "training.steps=7",
        "training.lr=1e-2",
        "training.batch_size=8",
        "training.micro_batch_size=2",
        "training.log_every=1",
        "training.eval_windows=2",
        "pipeline.run=unused",
        *more,
    ]


def records(out, kind):
    lines = (out.parent / f"{out.name}.training" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def tokens_learned(out):
    return read_sidecar(out).lineage[-1].tokens


def same_weights(one, other):
    a, b = (load_file(out / "model.safetensors") for out in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.isfinite(tensor).all() for tensor in a.values())
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "dtype", "offload"),
    [
        ("loss", 1, "fp32", []),
        ("gradient", 2, "bf16", []),
        ("expert", 2, "fp32", []),
        ("expert", 3, "bf16", []),
        ("loss", 3, "fp32", []),
        ("expert", 2, "fp32", ["optimizer"]),
        ("gradient", 3, "bf16", ["optimizer", "param"]),
    ],
)
def test_a_bad_batch_leaves_the_run_as_if_its_step_had_not_been_done(
    tmp_path, nexus_dir, text_folder, kind, stage, dtype, offload
):
    """The first step too, in front of which no moments are; gradients on the host keep nothing."""
    setting = [f"parallel.zero_stage={stage}", f"model.dtype={dtype}"]
    if offload:
        devices = {f"offload_{what}": {"device": "cpu"} for what in offload}
        zero = {"stage": stage, **devices}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        setting = [f"deepspeed={path}", f"model.dtype={dtype}"]
    for name in (kind, "omitted"):
        given = words(nexus_dir, text_folder, tmp_path / name, *setting)
        said = finish(fork_ranks([WORKER, name, "0,3", *given], 2))
        if name == kind:
            assert "step 4 left out, nothing was updated (1 in a row, 3 end the run): " in said
    assert same_weights(tmp_path / kind, tmp_path / "omitted")
    assert tokens_learned(tmp_path / kind) == 5 * 8 * 16
    assert [record["step"] for record in records(tmp_path / kind, "left out")] == [1, 4]
    # Of a stretch that was left out there is nothing to log, of the others nothing is missing.
    logged = records(tmp_path / kind, "train")
    assert [record["step"] for record in logged] == [2, 3, 5, 6, 7]
    assert all(record["grad_norm"] < 1e6 and record["loss"] < 10 for record in logged)
    what = records(tmp_path / kind, "left out")[1]["what"]
    if kind == "loss":
        # The first sample of rank 1 in step 4, counted from 0, of 8.
        assert re.fullmatch(
            r"losses that are not numbers: sample 28 \((\w+), "
            rf"{text_folder}/\1/train.jsonl:\d+( to {text_folder}/\1/train.jsonl:\d+)?\)",
            what,
        )
    else:
        assert what.startswith("a gradient that is not finite: sample 24 (")
        assert what.count("train.jsonl:") >= 8


@pytest.mark.slow
def test_several_in_a_row_end_the_run_and_the_next_start_goes_on_behind_them(
    tmp_path, nexus_dir, text_folder
):
    given = words(nexus_dir, text_folder, tmp_path / "bad")
    said = finish(fork_ranks([WORKER, "loss", "0,1,2", *given], 2), code=1)
    assert re.search(
        r"NEXUS BadBatchesError: 3 batches in a row without a finite gradient, the last at step 3 "
        r"\(losses that are not numbers: sample 20 \(.*\)\); stopped. The weights are those of step"
        r" 0, saved with the place behind these batches: .*training.bad_batches allows more",
        said,
    )
    states = tmp_path / "bad.training" / "states"
    assert steps_saved(states) == [3] and damage(states / "step_3") == ""
    assert ", resumed after step 3" in finish(fork_ranks([WORKER, "loss", "0,1,2", *given], 2))
    given = words(nexus_dir, text_folder, tmp_path / "omitted")
    finish(fork_ranks([WORKER, "omitted", "0,1,2", *given], 2))
    assert same_weights(tmp_path / "bad", tmp_path / "omitted")
    assert tokens_learned(tmp_path / "bad") == 4 * 8 * 16


# The counting -------------------------------------------------------------------------------------


@pytest.fixture
def bad(monkeypatch):
    monkeypatch.setattr(bad_batches, "told", lambda *given: f"{given[3]} block {given[4]}")
    sampler = SimpleNamespace(
        domains=["a", "b"], files=[None, None], locate=lambda number: (number % 2, number)
    )
    return BadBatches(Config(), sampler)


def test_only_what_is_in_a_row_counts_towards_the_end(bad):
    for outcome, expected in [(True, 1), (True, 2), (False, 0), (True, 1)]:
        bad.next(outcome)
        assert bad.in_a_row == expected
    assert bad.skipped == 3


def test_samples_with_a_bad_loss_are_named_and_all_where_there_is_none(bad):
    losses_BS = torch.zeros(3, 4)
    bad.start()
    bad.see(losses_BS)
    said = "a gradient that is not finite: sample 6 (a block 6); sample 7 (b block 7); sample 8 (a "
    assert bad.named(range(6, 9)) == f"{said}block 8)"
    bad.start()
    losses_BS[1, 2] = float("nan")
    losses_BS[2, 0] = float("-inf")
    bad.see(losses_BS)
    said = "losses that are not numbers: sample 7 (b block 7); sample 8 (a block 8)"
    assert bad.named(range(6, 9)) == said


def test_a_long_list_is_cut(bad, monkeypatch):
    bad.start()
    bad.see(torch.full((6, 4), float("nan")))
    assert bad.named(range(6)).endswith("sample 3 (b block 3); and 2 more samples")
    # and once more over all ranks
    monkeypatch.setattr(bad_batches, "NAMED_IN_ALL", 1)
    assert bad.named(range(6)).endswith(": sample 0 (a block 0); and 5 more samples")
