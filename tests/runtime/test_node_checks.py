import re
from pathlib import Path

import pytest
import torch

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.launch import Position
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import node_checks

REPO = Path(__file__).parents[2]
HERE = Position(0, 4, 2, "n1")


@pytest.mark.parametrize(
    ("visible", "env", "expected"),
    [
        (0, {}, ""),
        (2, {"SLURM_GPUS_ON_NODE": "2"}, ""),
        (0, {"SLURM_GPUS_ON_NODE": "2", "DS_ACCELERATOR": "cpu"}, ""),
        (0, {"SLURM_GPUS_ON_NODE": "2"}, "the job has 2 GPUs on this node, torch sees 0"),
        (1, {"SLURM_GPUS_ON_NODE": "2"}, "the job has 2 GPUs on this node, torch sees 1"),
        (1, {}, "2 ranks share 1 GPUs; submit with --ntasks-per-node=1"),
        (1, {"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS_PER_TASK": "1"}, ""),
        (1, {"SLURM_GPUS_ON_NODE": "2", "SLURM_GPU_BIND": "single:1"}, ""),
        (8, {"SLURM_GPUS_ON_NODE": "8"}, "8 GPUs for 2 ranks; submit with --ntasks-per-node=8"),
    ],
)
def test_devices_against_the_request(visible, env, expected):
    found = node_checks.device_problems(HERE, visible, env)
    assert bool(found) == bool(expected)
    assert not found or found[0].startswith(expected)


def test_nodes_with_other_versions_are_named():
    reports = [
        node_checks.Report(node, {"torch": version}, node_checks.Needs(), [])
        for node, version in (("n1", "2.13"), ("n2", "2.12"))
    ]
    assert node_checks.differences(reports) == ["n2: torch 2.12, but 2.13 on n1"]


def test_absent_ranks_are_named_with_their_nodes(monkeypatch):
    monkeypatch.setenv("NEXUS_NODES", "n1\nn2")
    there = node_checks.Report("n1", {}, node_checks.Needs(), [])
    found = node_checks.absent([there, there, there, None], HERE, "n1:20000", 60)
    assert found == [
        "n2: rank 3 did not come to n1:20000 within 60 s; did it start, is there a firewall?"
    ]


def needs(*overrides, ds_json="", ranks=2, gpu=0.0, host=0.0):
    config = resolve(load_config("demo", overrides))
    return node_checks.needs_of(config, Position(0, ranks, ranks, "n1"), ds_json, gpu, host)


def test_what_a_new_model_takes():
    found = needs("stage=seed", "model.path=")
    count = 2048 * 96 + 3 * (4 * 96**2 + 3 * 96 * 256 + 2 * 96) + 96
    # keep_last 2, and one being written
    assert found.disk == pytest.approx(count * 4 + 3 * count * 12, rel=0.01)
    assert found.gpu > count * 16 and found.host > count * 4


def test_a_mixture_is_planned_before_it_exists_and_from_its_files_after(nexus_dir, tmp_path):
    planned = needs(f"model.path={tmp_path / 'upcycled'}", "pipeline.domains=[a,b]")
    assert (
        needs(f"model.path={tmp_path / 'upcycled'}", "pipeline.domains=[a,b,c]").disk > planned.disk
    )
    size = sum(path.stat().st_size for path in nexus_dir.glob("model*.safetensors"))
    assert size < needs(f"model.path={nexus_dir}").disk < 20 * size


def test_offload_of_the_deepspeed_json_counts():
    big = ("model.hidden_size=2048", "model.heads=16", "model.ffn_size=8192", "model.layers=24")
    plain = needs(*big, ds_json=str(REPO / "ds_configs" / "z3.json"))
    offload = needs(*big, ds_json=str(REPO / "ds_configs" / "z3_offload.json"))
    assert offload.gpu < plain.gpu / 2 and offload.host > plain.host


def test_a_missing_deepspeed_json_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no DeepSpeed configuration"):
        needs(ds_json=str(tmp_path / "none.json"))


def test_a_batch_that_does_not_divide_is_found_before_training():
    with pytest.raises(LayoutError, match=r"training\.batch_size 8 does not divide over 3"):
        needs(ranks=3)


def test_memory_against_the_plan():
    assert needs(gpu=80e9, host=200e9).problem == needs().problem == ""
    refused = r"of GPU memory, a GPU has 1 GB \(CUDA context \(estimated\) 1.2 GB.*\); nothing fits"
    assert re.search(refused, needs(gpu=1e9).problem)
    # the processes alone take 8 GB
    host = needs(gpu=80e9, host=4e9)
    assert "of main memory are planned for a node, it has 4 GB (" in host.problem
    assert "); nothing fits 2" in host.problem
    assert needs("parallel.check_memory=false", gpu=1e9).problem == ""


def test_a_stage_that_is_left_open_is_planned():
    big = ("model.hidden_size=2048", "model.heads=16", "model.ffn_size=8192", "model.layers=24")
    assert needs(*big, "parallel.zero_stage=2", gpu=24e9, host=500e9).problem
    assert needs(*big, gpu=24e9, host=500e9).problem == ""
    # a DeepSpeed JSON decides; one without a stage means 2
    z3 = str(REPO / "ds_configs" / "z3.json")
    assert needs(*big, ds_json=z3, gpu=24e9, host=500e9).problem


def test_the_job_s_memory_is_its_request():
    assert node_checks.host_memory({"SLURM_MEM_PER_NODE": "100"}) == 100 << 20
    assert node_checks.host_memory({}) == node_checks.host_memory({"SLURM_MEM_PER_NODE": "0"}) > 1e9


def test_too_little_disk_is_named_with_both_amounts(tmp_path):
    assert node_checks.disk_problems(tmp_path, 0) == []
    [found] = node_checks.disk_problems(tmp_path, 10**18)
    assert found.startswith(f"{tmp_path}: ") and "1e+03 PB" not in found
    assert "free, 1e+06 TB will be written" in found and "training.keep_last" in found


@pytest.mark.parametrize(("local", "visible", "number"), [("3", 4, 3), ("3", 1, 0), ("3", 2, 1)])
def test_each_rank_asks_its_own_gpu(tmp_path, monkeypatch, local, visible, number):
    """As srun starts it: nothing but SLURM's own variables tell which one that is."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def local_report(*given):
        raise ConfigError(f"asks {chosen}")

    monkeypatch.setattr(node_checks, "local_report", local_report)
    with pytest.raises(ConfigError, match=rf"asks \[{number}\]"):
        node_checks.check(tmp_path, HERE, "127.0.0.1", 1, 1.0, lambda gpu, host: None)
