"""Change an assumption, and the plan follows: none is printed that nothing reads."""

import argparse

import pytest

from nexus_ds.commands import plan
from nexus_ds.config import load_config
from nexus_ds.planning import assumptions, choose
from nexus_ds.planning.export import export_check
from nexus_ds.planning.sizes import sizes_of

RUNS = (  # between them every part of the plan is there
    ["--config=nexus-2.8b", "--gpus=8", "--nodes=2", "--gpu-memory=80GB", "training.batch_size=8"],
    [
        "--config=nexus-2.8b",
        "--gpus=1",
        "--gpu-memory=80GB",
        "training.batch_size=1",
        "data.sequence_length=64",
    ],
    [
        "--gpus=2",
        "--gpu-memory=8GB",
        "model.hidden_size=256",
        "model.heads=4",
        "training.batch_size=64",
        "training.activation_checkpointing=reentrant",
    ],
)


def planned():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    found = []
    for args in map(parser.parse_args, RUNS):
        config = load_config(args.config, args.overrides)
        sizes = sizes_of(config)
        layouts = choose.candidates(sizes, plan.machine_of(args), config)
        found.append([candidate.to_json(tokens=10**9) for candidate in layouts])
        found.append([export_check(sizes, 2).to_json()])
    return found


@pytest.fixture(scope="module")
def now():
    return planned()


@pytest.mark.parametrize("name", assumptions.table())
def test_the_plan_follows_every_assumption(name, now, monkeypatch):
    value = getattr(assumptions, name)
    changed = []
    for factor in (0.5, 2):
        monkeypatch.setattr(assumptions, name, type(value)(value * factor))
        # what `plan --json` prints
        assert assumptions.table()[name] == pytest.approx(value * factor)
        changed.append(planned() != now)
    assert any(changed)
