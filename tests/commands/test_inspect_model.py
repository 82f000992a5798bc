"""The verb inspect: facts of one checkpoint, differences of several, JSON."""

import argparse
import json

import pytest

from nexus_ds.commands import inspect_model
from nexus_ds.errors import CheckpointError


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    inspect_model.add_arguments(parser)
    assert inspect_model.run(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def test_one_checkpoint(nexus_dir, capsys):
    lines = run(capsys, nexus_dir).splitlines()
    facts = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines if "  " in line}
    assert (
        facts["kind"] == "Nexus"
        and facts["routed_experts"] == "3"
        and facts["encoder.name"] == "tiny"
    )
    assert "expert 1: beta (domain beta) from branches/beta, sha256 000000000000" in lines
    assert 'step 1: upcycle {"seed": "seed"}' in lines


def test_several_show_what_differs(dense_dir, nexus_dir, capsys):
    out = run(capsys, dense_dir, nexus_dir)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["family"].split() == ["family", "llama", "qwen2_moe"]
    assert "hidden_size" in rows["equal:"] and "hidden_size" not in rows
    assert rows["experts"].split()[1] == "–"


def test_json(dense_dir, nexus_dir, capsys):
    assert json.loads(run(capsys, dense_dir, "--json"))["family"] == "llama"
    both = json.loads(run(capsys, dense_dir, nexus_dir, "--json"))
    assert [facts["kind"] for facts in both] == ["dense", "Nexus"]


def test_no_checkpoint(tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(capsys, tmp_path)
