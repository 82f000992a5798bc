"""A training that is stopped at any of its steps reads what one reads that nobody stops."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import sentences
from launch import finish, fork_ranks
from safetensors.torch import load_file

from nexus_ds.runtime.states import damage, steps_saved

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parents[1] / "resume_worker.py"
# A whole cycle of 64 samples, two epochs of each domain: four documents of 81 tokens are 16 blocks.
STEPS, BATCH, LENGTH, EPOCHS = 8, 8, 20, 2
DOMAINS = ("alpha", "beta")


@pytest.fixture(scope="module")
def words(tmp_path_factory, nexus_dir):
    """Settings of a training that goes twice through the text of two domains."""
    folder = tmp_path_factory.mktemp("twice")
    for domain in DOMAINS:
        (folder / domain).mkdir()
        for seed, (split, count) in enumerate((("train", 4), ("validation", 2))):
            lines = [json.dumps({"text": text}) for text in sentences(domain, count, seed)]
            (folder / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return [
        f"model.path={nexus_dir}",
        f"model.tokenizer={nexus_dir}",
        f"data.path={folder}",
        f"data.domains=[{','.join(DOMAINS)}]",
        "data.validation_domains=[alpha]",
        "data.mixture=uniform",
        f"data.sequence_length={LENGTH}",
        f"data.cache={folder}/tokens",
        "training.tokens=0",
        f"training.steps={STEPS}",
        f"training.batch_size={BATCH}",
        "training.micro_batch_size=2",  # two passes a step
        "training.eval_windows=2",
        "parallel.expert=2",
        "pipeline.run=unused",
    ]


def start(folder, name, words, stop=0):
    """Start two ranks, which are told to stop after step `stop`."""
    return fork_ranks([WORKER, folder / name, stop, *words, f"output={folder}/{name}.out"], 2)


def train(folder, name, words, stop=0):
    """Start two ranks, which stop after step `stop`; return what rank 0 said."""
    return finish(start(folder, name, words, stop), code=75 if stop else 0)


def samples(folder, name):
    """Return the steps that each rank did, in order, and each sample that a step was given."""
    lines = [
        [json.loads(line) for line in (folder / f"{name}-{rank}").read_text().splitlines()]
        for rank in range(2)
    ]
    steps = [[step for step, _ in rank] for rank in lines]
    return steps, [tuple(sample) for rank in lines for _, taken in rank for sample in taken]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, words):
    """What a training reads that nobody stops."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder, "straight", words)
    return *samples(folder, "straight"), load_file(folder / "straight.out" / "model.safetensors")


def test_an_epoch_has_each_sample_once(straight):
    """Or what follows would compare little."""
    assert straight[0] == [list(range(1, STEPS + 1))] * 2
    assert set(Counter(straight[1]).values()) == {EPOCHS}
    assert Counter(sample[0] for sample in set(straight[1])) == {0: 16, 1: 16}


@pytest.mark.parametrize("stops", [*([k] for k in range(1, STEPS)), range(1, STEPS)], ids=str)
def test_a_run_stopped_at_any_step_reads_what_one_reads_that_nobody_stops(
    tmp_path, words, straight, stops
):
    states, before = tmp_path / "out.out.training" / "states", 0
    for stop in [*stops, 0]:
        said = train(tmp_path, "out", words, stop)
        assert not before or f", resumed after step {before}" in said
        assert not stop or steps_saved(states)[-1] == stop
        before = stop
    steps, read = samples(tmp_path, "out")
    assert steps == straight[0]
    assert len(read) == STEPS * BATCH and Counter(read) == Counter(straight[1])


def test_a_save_that_takes_longer_than_the_grace_leaves_the_state_before(
    tmp_path, words, straight, monkeypatch
):
    """A scheduler sends SIGUSR1, waits for a second, and kills."""
    words = [*words, "training.save_every=2", "training.keep_last=2"]
    states = tmp_path / "out.out.training" / "states"
    monkeypatch.setenv("SLOW_SAVE", "5")
    ranks = start(tmp_path, "out", words, stop=5)
    monkeypatch.delenv("SLOW_SAVE")
    deadline = time.monotonic() + 120
    while not (found := list(states.glob("partial_5_*/rank_00001.safetensors"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    half = found[0].stat().st_size
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
    whole = (states / "step_4" / "rank_00001.safetensors").stat().st_size
    assert steps_saved(states) == [2, 4] and 0 < half < whole
    assert [damage(states / f"step_{step}") for step in (2, 4)] == ["", ""]
    said = train(tmp_path, "out", words)
    assert ", resumed after step 4" in said and not list(states.glob("partial_*"))
    steps, _ = samples(tmp_path, "out")
    assert steps == [[*range(1, 6), *range(5, STEPS + 1)]] * 2
    weights = load_file(tmp_path / "out.out" / "model.safetensors")
    assert weights.keys() == straight[2].keys()
    assert all(torch.equal(weights[name], straight[2][name]) for name in weights)
