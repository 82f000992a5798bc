import json
import socket
import time

import pytest

from nexus_ds.__main__ import main
from nexus_ds.commands import status
from nexus_ds.config import dump, load_config
from nexus_ds.console import CONTROL

QUEUE = """#!/bin/sh
cat "{file}"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that nothing has been made of yet, on a machine without SLURM."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    config = load_config("demo", [f"pipeline.run={run}"])
    (run / "logs" / "recipe.yaml").write_text(dump(config))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return run


def queue(run, jobs, rows):
    """Let pipeline.sh have submitted `jobs`, and squeue answer `rows`."""
    (run / "logs" / "jobs.txt").write_text(
        "".join(f"{identity} {name}\n" for identity, name in jobs)
    )
    answer = run.parent / "queue"
    answer.write_text("".join(f"{row}\n" for row in rows))
    program = run.parent / "bin" / "squeue"
    program.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < "{answer}"\n')
    program.chmod(0o755)


def trained(run, stage, steps, seconds=2.0):
    """Write the metrics of a training that has done `steps` steps."""
    folder = run / f"{stage}.training"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        dump(load_config("demo", ["training.steps=100", "training.tokens=0"]))
    )
    now = time.time()
    rows = [
        {"kind": "train", "step": s, "time": now - (steps - s) * seconds, "loss": 9.0 - s / 100}
        for s in range(1, steps + 1)
    ]
    rows.append({"kind": "validation", "step": steps, "time": now, "loss": {"a": 1.0}})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr'
    )


def by_name(run):
    return {seen.stage: seen for seen in status.survey(run)}


def test_nothing_started(run):
    assert {seen.state for seen in status.survey(run)} == {"waiting"}
    assert [seen.stage for seen in status.survey(run)][-1] == "evaluate"


def test_finished_running_pending_of_a_pipeline(run):
    queue(
        run,
        [
            ("1", "seed"),
            ("2", "dense_branch"),
            ("2_0", "dense_branch"),
            ("3", "embed"),
            ("4", "upcycle"),
            ("5", "finetune"),
        ],
        [
            "1|COMPLETED|None",
            "2_0|RUNNING|None",
            "2_1|PENDING|Resources",
            "4|PENDING|Dependency",
            "3|PENDING|BeginTime",
        ],
    )
    (run / "seed").mkdir()
    trained(run, "branches/python", 40)
    seen = by_name(run)
    assert seen["seed"].state == "finished"
    assert (seen["branch:python"].state, seen["branch:python"].job) == ("running", "2_0")
    assert seen["branch:python"].detail == "step 40/100, loss 8.600, ETA 2m00s"
    assert (seen["branch:docs"].state, seen["branch:docs"].detail) == ("pending", "Resources")
    assert (seen["embed"].state, seen["embed"].detail) == ("pending", "requeued")
    assert (seen["upcycle"].state, seen["upcycle"].detail) == (
        "pending",
        "waits for an earlier job",
    )
    assert seen["evaluate"].state == "waiting"


def test_two_stages_of_one_job(run):
    queue(run, [("4", "upcycle")], ["4|RUNNING|None"])
    seen = by_name(run)
    assert (seen["upcycle"].state, seen["moe"].state) == ("running", "waiting")
    (run / "upcycled").mkdir()
    assert by_name(run)["moe"].state == "running"


def test_a_failure_shows_its_last_error_line_and_what_it_cancels(run):
    queue(
        run,
        [("2", "dense_branch"), ("4", "upcycle"), ("5", "finetune"), ("6", "evaluate")],
        [
            "2_1|FAILED|NonZeroExitCode",
            "4|CANCELLED|Dependency",
            "5|CANCELLED|Dependency",
            "6|CANCELLED|Dependency",
        ],
    )
    (run / "logs" / "dense_branch-2_1.log").write_text(
        "branch docs 1/9 loss 5.0\ntrain.py: docs/train.jsonl:7: not valid JSON: refused\n"
        "srun: error: node1: task 0: Exited with exit code 1\n"
    )
    seen = by_name(run)
    assert seen["branch:docs"].state == "failed"
    assert seen["branch:docs"].detail == "train.py: docs/train.jsonl:7: not valid JSON: refused"
    for stage in ("upcycle", "moe", "extend", "extended", "evaluate"):
        assert (seen[stage].state, seen[stage].detail) == (
            "cancelled",
            "needs branch:docs, which failed",
        )


def test_what_a_log_says_reaches_no_terminal_as_it_is(run, capsys):
    queue(run, [("2", "dense_branch")], ["2_1|FAILED|NonZeroExitCode"])
    log = run / "logs" / "dense_branch-2_1.log"
    log.write_text("error: \x1b]52;c;eA==\x07 \x9b2J of a library\n", encoding="utf-8")
    for words in ([], ["--json"]):
        assert main(["status", str(run), *words]) == 0
        said = capsys.readouterr().out
        assert not CONTROL.search(said) and "u001b]52;c;eA==" in said and "u009b2J of" in said


def test_a_cancelled_job_that_never_started(run):
    queue(run, [("4", "upcycle")], ["4|CANCELLED|None"])
    assert (by_name(run)["upcycle"].state, by_name(run)["upcycle"].detail) == (
        "cancelled",
        "never started",
    )


def test_a_job_that_slurm_forgot_and_that_left_no_output_has_failed(run):
    queue(run, [("1", "seed")], [])
    (run / "logs" / "seed-1.log").write_text("started\n")
    seen = by_name(run)["seed"]
    assert seen.state == "failed" and seen.detail == f"ended; log: {run / 'logs' / 'seed-1.log'}"


def test_without_slurm_a_growing_log_is_a_running_stage(run):
    trained(run, "seed", 10)
    assert by_name(run)["seed"].state == "running"
    log = run / "seed.training" / "metrics.jsonl"
    import os

    os.utime(log, (time.time() - 1000, time.time() - 1000))
    seen = by_name(run)["seed"]
    assert (seen.state, seen.step, seen.steps) == ("stopped", 10, 100)


def test_a_run_without_records_of_jobs_is_known_by_its_trainings(run):
    (run / "logs" / "recipe.yaml").unlink()
    trained(run, "branches/docs", 5)
    assert by_name(run)["branch:docs"].state == "running"


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 1
    assert "expected the directory of a run that was started" in capsys.readouterr().err


def test_a_domain_that_names_no_folder_is_told_by_its_setting(run, capsys):
    config = load_config("demo", [f"pipeline.domains=a,{'x' * 5000}"])
    (run / "logs" / "recipe.yaml").write_text(dump(config))
    assert main(["status", str(run)]) == 1
    said = capsys.readouterr().err
    assert "pipeline.domains: 'xxx" in said and "expected at most 200 letters" in said
    assert len(said) < 1000


def test_table_and_json(run, capsys):
    trained(run, "seed", 10)
    assert main(["status", str(run)]) == 0
    table = capsys.readouterr().out
    assert (
        "seed " in table
        and "step 10/100, loss 8.900, ETA 3m00s" in table
        and f"logs: {run / 'logs'}" in table
    )
    assert main(["status", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["stage"] == "tokens"
    assert rows[1] | {"detail": ""} == {
        "stage": "seed",
        "state": "running",
        "detail": "",
        "job": "",
        "step": 10,
        "steps": 100,
        "loss": 8.9,
    }


def test_what_a_killed_job_left_is_told(run, capsys):
    """A model of full size under a hidden name."""
    (run / "branches").mkdir()
    dead, here = 2**22 + 1, socket.gethostname()  # no process can have it
    for folder, writer in ((run, f"process {dead} on {here}"), (run / "branches", "")):
        left = folder / f".a.tmp-{dead}"
        left.mkdir()
        (left / "model").write_bytes(bytes(3_000_000))
        if writer:
            (folder / ".a.lock").write_text(f"{writer} since 2026-01-01\n")
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    first = f"unfinished: {run}/.a.tmp-{dead}, 3.0 MB, of process {dead} on {here} since 2026-01-01"
    assert f"{first}; which was killed: the next stage of this run removes it" in said
    assert f"{run}/branches/.a.tmp-{dead}, 3.0 MB, of a process whose lock is gone; being" in said


def test_lines_of_other_programs_in_jobs_txt_are_ignored(run):
    lines = b"x seed\n1 nothing\n12_3 dense_branch\n\n\xff\xff\n7 seed extra\n"
    # a number no file can be named by
    lines += b"1" * 300 + b" upcycle\n"
    (run / "logs" / "jobs.txt").write_bytes(lines)
    assert status.recorded_jobs(run) == {"dense_branch": ["12_3"]}
