"""What `bench gpu` counts in a profile, its sizes, and the models and text that it works on."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.config import load_config
from nexus_ds.experiments.benchmarks import gpu_steps
from nexus_ds.experiments.benchmarks.gpu_steps import LARGE, SMALL, count_events, main
from nexus_ds.experiments.benchmarks.models import PRESETS
from nexus_ds.planning.sizes import sizes_of


@pytest.fixture
def cuda(monkeypatch):
    """Let the steps see a CUDA device of 80 GB: 20 free, 55 of them kept by the allocator."""
    monkeypatch.setattr(gpu_steps, "device_here", lambda: torch.device("cuda"))
    answers = {
        "get_device_name": "NVIDIA H100",
        "get_device_capability": (9, 0),
        "mem_get_info": (20_000_000_000, 80_000_000_000),
        "memory_reserved": 55_000_000_000,
        "max_memory_allocated": 50_000_000_000,
        "max_memory_reserved": 55_000_000_000,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def event(name, kind, microseconds=0.0, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(
        name=name, device_type=kind, time_range=span, is_user_annotation=annotation
    )


def test_kernels_and_their_time_are_counted_once_and_host_waits_apart():
    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    found = count_events(
        [
            event("sm90_gemm", gpu, 1500.0),
            event("elementwise_kernel", gpu, 500.0),
            event("Memcpy DtoH (Device -> Pageable)", gpu, 10.0),
            event("Memset (Device)", gpu, 5.0),
            event("ProfilerStep*", gpu, 9000.0, annotation=True),
            event("aten::mm", cpu, 1600.0),
            event("aten::_local_scalar_dense", cpu, 20.0),
            event("cudaLaunchKernel", cpu, 3.0),
            event("cudaStreamSynchronize", cpu, 15.0),
            event("cudaDeviceSynchronize", cpu, 100.0),
        ]
    )
    assert found == {
        "device busy ms": pytest.approx(2.015),
        "kernels": 2,
        "copies and fills": 2,
        "host waits": 1,
        "numbers read by the host": 1,
        "operators": 2,
    }


def test_a_gpu_says_its_ceilings_and_what_its_context_takes(cuda):
    with FakeTensorMode():
        *_, found = gpu_steps.machine(small=False)
    assert found["device"] == "NVIDIA H100" and found["capability"] == "9.0"
    assert found["memory GB"] == 80 and found["context GB"] == 5
    assert found["matrix product TFLOPS"] > 0 and found["copy GB/s"] > 0


def test_peak_memory_is_what_the_driver_counts_over_the_plan(cuda, monkeypatch):
    monkeypatch.setattr(gpu_steps, "_engine_step", lambda *_: lambda: None)
    *_, found = gpu_steps.peak_memory(False, "1", "none", "4")
    assert found["tensors GB"] == 50 and found["reserved GB"] == 55 and found["used GB"] == 60
    assert found["used / planned"] == pytest.approx(60 / found["planned GB"])
    assert 30 < found["planned tensors GB"] < found["planned GB"] < 40


def test_the_large_model_says_its_peak_for_each_batch(cuda, monkeypatch):
    monkeypatch.setattr(gpu_steps, "build", lambda *_: torch.nn.Linear(2, 3))
    monkeypatch.setattr(gpu_steps, "step_figures", lambda *_: {"ms": 1.0})
    first, *_ = map(json.dumps, gpu_steps.large(small=False))
    assert json.loads(first) == {"parameters": 9, "1 x 2048 tokens": {"ms": 1.0, "peak GB": 50}}


@pytest.mark.parametrize(("recipe", "shape"), [("nexus-2.8b", LARGE), ("nexus-470m", "470m")])
def test_sizes_are_those_of_the_recipes(recipe, shape):
    shape = PRESETS[shape] if isinstance(shape, str) else shape
    assert shape.sizes().counts() == sizes_of(load_config(recipe, ["stage=moe"])).counts()


def test_arithmetic_is_that_of_plan():
    # six operations a weight and token, and attention
    active = SMALL.sizes().counts()["active"]
    assert gpu_steps.tflops(SMALL, 1.0) * 1e12 > 6 * active * SMALL.tokens


@pytest.mark.slow
def test_inputs_are_a_mixture_of_branches_that_differ_and_text(tmp_path):
    out = tmp_path / "inputs"
    assert main(["inputs", str(out)]) == 0
    domains = load_config("demo", []).pipeline.domains
    for domain in domains:
        lines = (out / "text" / domain / "train.jsonl").read_text().splitlines()
        assert all(json.loads(line)["text"] for line in lines)
    tensors = load_file(out / "mixture" / "model.safetensors")
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    first, second = (tensors[name.format(index)] for index in (0, 1))
    assert 0 < float((first - second).norm() / first.norm()) < 0.5
    model = load_stock(out / "mixture", torch.float32)
    assert model.config.num_experts == len(domains) == 4
