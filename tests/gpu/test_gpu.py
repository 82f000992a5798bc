"""What only a CUDA device can show: grouped GEMM in bf16, the literal command under NCCL, the
export of a GPU engine."""

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from conftest import make_nexus
from launch import clean_environment, finish, start_ranks
from test_train import settings

from nexus_ds.__main__ import main
from nexus_ds.experiments.benchmarks.gpu import LAUNCHER
from nexus_ds.launch import free_port
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import RouterConfig

REPOSITORY = Path(__file__).parents[2]
NAMES = ["a", "b", "c", "d"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


def test_grouped_gemm_in_bf16_equals_the_reference_forward_and_backward(tmp_path):
    checkpoint = make_nexus(tmp_path / "nexus", names=NAMES)
    router = RouterConfig(load_balance=0.1, z_loss=0.01)
    layer = (
        load_nexus(checkpoint, torch.bfloat16, Placement(4), router, True)
        .model.layers[0]
        .mlp.cuda()
    )
    plain = oracle.load(checkpoint, torch.bfloat16, router).model.layers[0].mlp.cuda()
    x = torch.randn(2, 512, 16, device="cuda", dtype=torch.bfloat16)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [module(i) for module, i in zip((layer, plain), inputs, strict=True)]
    assert relative(outputs[0], outputs[1]) < 1e-2
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    assert relative(inputs[0].grad, inputs[1].grad) < 2e-2
    expected = dict(plain.named_parameters())
    for name, parameter in layer.named_parameters():
        assert relative(parameter.grad, expected[name].grad) < 3e-2, name


def test_twenty_steps_of_the_literal_command(tmp_path, text_folder):
    """On a mixture that is there already: the demo's own seed and branches would take minutes."""
    for name in ("nexus_ds", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    checkpoint = make_nexus(tmp_path / "nexus", names=["alpha", "beta", "gamma"])
    options = ("model.dtype=bf16", "training.steps=20")
    words = settings(checkpoint, text_folder, tmp_path / "out", *options)
    # the program `deepspeed`, which need not stand beside python
    launcher = [sys.executable, *LAUNCHER, f"--master_port={free_port()}"]
    done = subprocess.run(
        [*launcher, "nexus_ds/train.py", "--deepspeed", "ds_configs/z3.json", *words],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    said = done.stdout + done.stderr
    assert f"wrote {tmp_path / 'out'} (reloaded in plain transformers" in said


def test_the_export_equals_the_engine(tmp_path, text_folder):
    checkpoint = make_nexus(tmp_path / "nexus", names=["alpha", "beta", "gamma"])
    config = tmp_path / "z3.json"
    config.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    words = settings(
        checkpoint, text_folder, tmp_path / "out", "model.dtype=bf16", "training.steps=20"
    )
    worker = REPOSITORY / "tests" / "train_worker.py"
    log = finish(start_ranks([worker, tmp_path / "logits.pt", config, *words], 1))
    difference = float(log.split("logits differ by ")[1].split(")")[0])
    assert difference <= 1e-2


def test_the_comparison_at_the_size_of_the_470m_recipe(tmp_path, capsys):
    """Prints the table; MFU counts active parameters. Two mixtures and the dense model, so that 80
    GB suffice.

    The router's share can't be that of its arithmetic (below 1%): forward and backward it is about
    80 small kernels a layer of at least 4 microseconds, 6 ms of the 100 ms that a step takes at
    this size. A tenth is what more kernels, or a host that waits in them, would exceed.
    """
    words = [
        "--preset=470m",
        "--device=cuda",
        "--models=nexus-grouped,transformers-grouped",
        "--rounds=3",
        f"--out={tmp_path / 'speed'}",
    ]
    assert main(["bench", "train", *words]) == 0
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    lines = (tmp_path / "speed" / "train.jsonl").read_text().splitlines()
    rows = {row["model"]: row for row in map(json.loads, lines)}
    assert rows["nexus-grouped"]["loss"] == pytest.approx(
        rows["transformers-grouped"]["loss"], abs=0.05
    )
    assert rows["nexus-grouped"]["shares"]["router"] < 0.1
    if any(row["mfu"] is None for row in rows.values()):
        pytest.skip("the peak of this GPU is not known, so no MFU")
    assert 0 < rows["nexus-grouped"]["mfu"] < 1
