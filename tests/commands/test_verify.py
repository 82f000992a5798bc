"""The verb verify: what it prints, its exit code, JSON."""

import argparse
import json
import shutil

import pytest
from branches import edit_tensors, make_parts, upcycle

from nexus_ds.commands import verify
from nexus_ds.errors import CheckpointError, ConfigError


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, and the mixture of them."""
    make_parts(tmp_path, dense_dir, text_folder)
    upcycle(tmp_path)
    return tmp_path


def run(*words):
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([str(word) for word in words]))


def test_a_sound_checkpoint(parts, capsys):
    assert run(parts / "out", "--sources") == 0
    said = capsys.readouterr().out
    assert "checked: hashes of " in said and "averages, computed again" in said
    assert said.endswith(f"{parts / 'out'}: what was written\n")
    assert run(parts / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True


def test_a_changed_one(parts, capsys):
    edit_tensors(parts / "out", lambda t: t["model.norm.weight"].mul_(2))
    assert run(parts / "out") == 1
    said = capsys.readouterr().out
    assert "DIFFERS: 1 tensors were changed: model.norm.weight" in said
    assert said.endswith(f"{parts / 'out'}: NOT what was written\n")
    assert run(parts / "out", "--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"]


def test_sources_that_moved(parts, capsys):
    shutil.move(parts / "seed", parts / "base")
    assert run(parts / "out", "--sources") == 1
    assert "DIFFERS: the source of seed is not at" in capsys.readouterr().out
    assert run(parts / "out", "--sources", f"seed={parts / 'base'}") == 0
    with pytest.raises(ConfigError, match="--sources 'seed': expected NAME=DIR"):
        run(parts / "out", "--sources", "seed")


def test_the_help_names_the_base_of_adapters():
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    assert "base: the model that adapters were merged into" in " ".join(
        parser.format_help().split()
    )


def test_no_nexus_checkpoint(parts):
    with pytest.raises(CheckpointError, match="it is no Nexus checkpoint"):
        run(parts / "seed")
