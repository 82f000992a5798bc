"""The pool: what is made, what a failure takes with it, and that a repetition makes only what is
missing."""

import json
import shutil

import pytest

from nexus_ds.command_lines import DS_JSON, TRAIN
from nexus_ds.errors import CheckpointError
from nexus_ds.experiments.comparison.jobs import (
    WORK,
    Job,
    Pool,
    content_of,
    identity,
    last_line,
)


def piece(out, name, needs=(), **given):
    return Job(out.name, out, (WORK, name, json.dumps({"out": str(out), **given})), tuple(needs))


def test_identity_follows_from_everything_but_the_place():
    assert identity("a", {"x": 1}) != identity("a", {"x": 2})
    assert (
        identity("/here/b", without="/here/")
        == identity("/there/b", without="/there/")
        != identity("/there/c")
    )


def test_a_given_model_counts_by_what_is_in_it(dense_dir, tmp_path):
    """Moved or copied it is the same; with one number changed it is another."""
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    (copy / "README.md").write_text("a card")
    same = content_of(copy)
    assert same == content_of(dense_dir)
    words = [
        identity(["--expert", f"a={path}"], names={str(path): same}) for path in (dense_dir, copy)
    ]
    assert words[0] == words[1] == identity(["--expert", f"a={same}"])
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert content_of(copy) != same


def test_a_folder_without_a_model_is_no_seed(tmp_path):
    with pytest.raises(CheckpointError, match=r"found no config.json; expected a dense checkpoint"):
        content_of(tmp_path)


def test_a_mixture_is_no_seed(nexus_dir):
    with pytest.raises(CheckpointError, match=r"found a mixture; expected a dense checkpoint"):
        content_of(nexus_dir)


def test_commands_are_what_one_would_type(tmp_path):
    train = Job("t", tmp_path / "t", ("train", "--config", "a b.yaml"))
    assert train.command() == f"deepspeed {TRAIN} --deepspeed {DS_JSON} --config 'a b.yaml'"
    assert Job("e", tmp_path / "e", ("embed", "--out", "x")).command() == "nexus-ds embed --out x"
    assert (
        piece(tmp_path / "m", "average", models=[])
        .command()
        .startswith("python -m nexus_ds.experiments.comparison.work average")
    )


def test_the_last_line_of_a_log_is_the_message(tmp_path):
    log = tmp_path / "a.log"
    assert last_line(log) == "no log"
    log.write_text("step 1\nnexus-ds train: no text in data\n\n")
    assert last_line(log) == "no text in data"
    log.write_text("")
    assert last_line(log) == "no message"


@pytest.mark.slow
def test_a_failure_takes_only_its_dependants_with_it(tmp_path, dense_dir, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    jobs = [
        piece(bad, "average", models=[str(tmp_path / "nothing")]),
        piece(tmp_path / "child", "average", [bad], models=[str(bad)]),
        piece(good, "average", models=[str(dense_dir)]),
        piece(tmp_path / "grandchild", "average", [tmp_path / "child", good], models=[str(good)]),
        piece(tmp_path / "other", "average", [good], models=[str(good)]),
    ]
    pool = Pool({job.output: job for job in jobs}, tmp_path / "logs", slots=2)
    pool.run()
    assert {path.name for path in tmp_path.iterdir()} == {"good", "other", "logs"}
    assert set(pool.failed) == {bad, tmp_path / "child", tmp_path / "grandchild"}
    assert "nothing" in pool.failed[bad]
    assert pool.failed[tmp_path / "child"] == "needs bad, which failed"
    told = capsys.readouterr().err
    assert told.startswith("5 jobs, 0 more are there already; 2 at once, messages of each in ")
    assert "[0/5] bad ..." in told and "other ..." in told and "[5/5, 0s to go] other: " in told
    assert (
        "good: " in told
        and "bad FAILED after" in told
        and str(tmp_path / "logs" / "bad.log") in told
    )

    made = (good / "model.safetensors").stat().st_mtime_ns
    again = Pool(
        {job.output: job for job in jobs if job.output.name in ("good", "other")},
        tmp_path / "logs",
        slots=2,
    )
    assert again.total == 0
    again.run()
    assert (good / "model.safetensors").stat().st_mtime_ns == made
