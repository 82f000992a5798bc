"""The verb `preflight` as two nodes run it: what they agree on, and who is named if they don't."""

import argparse
import os
import subprocess
import sys

import pytest
from launch import free_port

from nexus_ds.command_lines import DS_JSON
from nexus_ds.commands import preflight
from nexus_ds.runtime import node_checks


def ask(*words):
    """Return what the words of the verb are read as."""
    parser = argparse.ArgumentParser()
    preflight.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("name", "stage", "ds_json"),
    [("seed", "seed", ""), ("moe", "moe", str(DS_JSON)), ("extended", "extend", str(DS_JSON))],
)
def test_a_stage_that_trains_is_asked_for_its_needs(name, stage, ds_json, monkeypatch, capsys):
    asked = []

    def check(run, here, address, port, wait, needs):
        asked.append(needs())
        return f"{run}, {wait:g} s"

    def needs_of(config, here, found):
        asked.append((config.stage, found))
        return node_checks.Needs()

    monkeypatch.setattr(node_checks, "check", check)
    monkeypatch.setattr(node_checks, "needs_of", needs_of)
    assert preflight.run(ask("--wait=7", name, "pipeline.run=here")) == 0
    assert asked == [(stage, ds_json), node_checks.Needs()]
    assert capsys.readouterr().out == "here, 7 s\n"


def test_a_stage_that_only_writes_needs_neither_devices_nor_memory(monkeypatch):
    asked = []

    def check(*given):
        asked.append(given[-1](0.0, 0.0))
        return ""

    monkeypatch.setattr(node_checks, "check", check)
    monkeypatch.setattr(node_checks, "needs_of", pytest.fail)
    assert preflight.run(ask("upcycle")) == 0
    assert asked == [node_checks.Needs()]


def test_one_check_stands_for_all_branches(monkeypatch):
    found = []
    monkeypatch.setattr(node_checks, "check", lambda *given: given[-1]() and "")
    monkeypatch.setattr(
        node_checks, "needs_of", lambda config, *_: found.append(config.branch) or True
    )
    preflight.run(ask("branch"))
    preflight.run(ask("branch", "branch=docs"))
    assert found == ["any", "docs"]


def test_another_rank_fails_without_a_word_where_rank_0_says_why(monkeypatch, capsys):
    def fails(why):
        def check(*given):
            raise node_checks.PreflightError(why)

        return check

    monkeypatch.setattr(node_checks, "check", fails(""))
    assert preflight.run(ask("upcycle")) == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(node_checks, "check", fails("n2: no disk"))
    with pytest.raises(node_checks.PreflightError, match="n2: no disk"):
        preflight.run(ask("upcycle"))


def start(rank, world, port, run, wrapper=(), wait=60, **env):
    """Start one rank of `nexus-ds preflight`; two ranks are two nodes."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NEXUS_"))}
    position = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": f"n{rank + 1}",
        "NEXUS_NODES": "n1 n2",
        "SLURM_JOB_ID": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *wrapper,
        sys.executable,
        "-m",
        "nexus_ds",
        "preflight",
        f"--wait={wait}",
        "moe",
        f"pipeline.run={run}",
    ]
    return subprocess.Popen(
        command,
        env={**clean, **position, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(processes):
    found = [process.communicate(timeout=240) for process in processes]
    return [p.returncode for p in processes], [out for out, _ in found], [err for _, err in found]


@pytest.mark.slow
def test_two_ranks_meet_and_reduce(tmp_path):
    port = free_port()
    codes, out, err = outcome([start(rank, 2, port, tmp_path / "run") for rank in range(2)])
    assert codes == [0, 0], err
    assert out[0].startswith("preflight: 2 ranks, 1 a node, on CPUs; torch ") and out[1] == ""
    assert "shared folder: same; all-reduce of 4 MiB: " in out[0]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_problem_of_one_node_ends_all_with_its_name(tmp_path):
    port = free_port()
    second = start(1, 2, port, tmp_path, SLURM_GPUS_ON_NODE="4", DS_ACCELERATOR="")
    codes, _, err = outcome([start(0, 2, port, tmp_path), second])
    assert codes == [1, 1]
    assert "nexus-ds preflight: n2: the job has 4 GPUs on this node, torch sees 0" in err[0]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path):
    process = start(0, 2, free_port(), tmp_path, wait=3)
    codes, _, err = outcome([process])
    assert codes == [1]
    assert "n2: rank 1 did not come to 127.0.0.1:" in err[0] and "within 3 s" in err[0]


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_named(tmp_path):
    """The second node has something else mounted where the run should be."""
    wrapper = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs none "$0" && exec "$@"',
        str(tmp_path),
    )
    if os.geteuid() != 0 or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting in a namespace of its own is not allowed here")
    port = free_port()
    codes, _, err = outcome([start(0, 2, port, tmp_path), start(1, 2, port, tmp_path, wrapper)])
    assert codes == [1, 1]
    assert (
        f"n2: {tmp_path} is not the folder that rank 0 sees" in err[0]
        and "mount it on all nodes" in err[0]
    )
