"""Stages of a run: where they live, what they need, and how they are run side by side."""

import sys
import time

import pytest

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.pipeline import Step, needed_for, next_training, resolve, run_steps, steps

WORDS = ["pipeline.run=RUN", "pipeline.domains=[a,b]", "pipeline.new_domains=[c]"]


def config_of(tmp_path, *words):
    return resolve(load_config("demo", [w.replace("RUN", str(tmp_path)) for w in WORDS] + list(words)))


def test_each_stage_knows_its_place_and_its_text(tmp_path):
    seed, branch = config_of(tmp_path, "stage=seed"), config_of(tmp_path, "stage=branch", "branch=b")
    moe, extend = config_of(tmp_path), config_of(tmp_path, "stage=extend")
    assert (seed.model.path, seed.output, seed.data.domains) == ("", f"{tmp_path}/seed", ["a", "b"])
    assert (branch.model.path, branch.output) == (f"{tmp_path}/seed", f"{tmp_path}/branches/b")
    assert branch.data.domains == ["b"] and branch.name == "branch b"
    assert (moe.model.path, moe.output) == (f"{tmp_path}/upcycled", f"{tmp_path}/nexus")
    assert (extend.data.domains, extend.data.new_domains) == (["a", "b", "c"], ["c"])
    assert moe.data.validation_domains == ["a", "b", "c"]


def test_a_given_checkpoint_brings_its_own_domains(nexus_dir):
    config = resolve(load_config("own", [f"model.path={nexus_dir}"]))
    assert config.data.domains == ["alpha", "beta", "gamma"]
    assert config.model.tokenizer == str(nexus_dir)


def test_no_domains_at_all_is_refused(dense_dir):
    with pytest.raises(ConfigError, match=r"no domains to train on; set pipeline.domains or data.domains"):
        resolve(load_config("own", [f"model.path={dense_dir}"]))


def test_what_is_there_is_not_needed_again(tmp_path):
    plan = steps(config_of(tmp_path), "demo", [], 2)
    names = [step.name for step in plan]
    assert names[0] == "seed" and names[-1] == "extended"
    assert {s.name for s in needed_for(plan, "moe")} == {"seed", "branch:a", "branch:b", "embed", "upcycle"}
    (tmp_path / "upcycled").mkdir()
    assert needed_for(plan, "moe") == []
    (tmp_path / "seed").mkdir()
    (tmp_path / "nexus").mkdir()
    assert {s.name for s in needed_for(plan, "extended")} == {"branch:c", "embed:new", "extend"}
    with pytest.raises(ConfigError, match="unknown stage nowhere; known: seed, "):
        needed_for(plan, "nowhere")


def test_the_next_command_is_quoted(tmp_path):
    command = next_training(tmp_path / "a b", "my data", "demo", "moe")
    assert f"'model.path={tmp_path}/a b'" in command and "'data.path=my data'" in command


def step(tmp_path, name, needs=(), seconds=0.0, code=0, wide=False):
    body = f"import pathlib, sys, time; time.sleep({seconds})\n"
    body += f"p = pathlib.Path({str(tmp_path)!r}); (p / {name!r}).touch()\n"
    body += f"(p / 'log').open('a').write({name!r} + ' ')\nsys.exit({code})"
    return Step(name, tmp_path / name, [sys.executable, "-c", body], needs=tuple(needs), wide=wide)


def test_stages_wait_for_what_they_need_and_wide_ones_run_alone(tmp_path, capfd):
    todo = [
        step(tmp_path, "first", seconds=0.3), step(tmp_path, "free"),
        step(tmp_path, "second", needs=["first"]), step(tmp_path, "wide", needs=["free"], wide=True),
    ]  # fmt: skip
    run_steps(todo, 2)
    order = (tmp_path / "log").read_text().split()
    assert order.index("first") < order.index("second")
    assert set(order) == {"first", "free", "second", "wide"}
    assert "== second done in" in capfd.readouterr().err


def test_a_failing_stage_ends_the_others(tmp_path):
    started = time.monotonic()
    with pytest.raises(NexusError, match=r"stage bad failed \(exit 3\); its message stands above"):
        run_steps([step(tmp_path, "slow", seconds=60), step(tmp_path, "bad", code=3)], 2)
    assert time.monotonic() - started < 30
    assert not (tmp_path / "slow").exists()
