"""The one door to DeepSpeed, and what ranks on GPUs need, shown on a pretend one."""

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_nexus
from pretend import GPU, TwoDevices, gpu, module_to_gpu, on_device

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.model.experts import TORCH_PRODUCTS
from nexus_ds.model.head import next_token_loss, use_loss_head
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.attention import WHOLE_WINDOWS
from nexus_ds.runtime.engine import Batch, moe_layers, start_engine
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config, RouterConfig

PACKAGE = Path(internals.__file__).parents[1]
FORMS = ("nexus", "context", "linear")


# The one door -------------------------------------------------------------------------------------


def deepspeed_words(path):
    """Return what a module imports of DeepSpeed and which of ZeRO's attributes it names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("deepspeed")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            found.add(node.module)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("ds_"):
            found.add(node.attr)
    return found


def test_no_other_module_imports_deepspeed_or_names_its_attributes():
    words = {path: deepspeed_words(path) for path in PACKAGE.rglob("*.py")}
    door = words.pop(Path(internals.__file__))
    assert door >= {"deepspeed", "deepspeed.moe.layer", "ds_numel"}
    for path, found in words.items():
        imports = {word for word in found if word.startswith("deepspeed")}
        # `ds_config` and the like are names of our own.
        attributes = found & door
        assert not imports | attributes, path


def test_the_layer_and_the_router_are_deepspeeds(nexus_dir):
    """The engine and its ZeRO stages know expert layers by their class."""
    assert issubclass(NexusMoE, internals.AutoEPMoELayer)
    assert issubclass(NexusRouter, internals.TokenChoiceTopKRouter)


class Accelerator:
    """Stands for DeepSpeed's of a machine with GPUs; notes which one is taken."""

    def __init__(self, count):
        self.count, self.taken = count, None

    def device_count(self):
        return self.count

    def set_device(self, number):
        self.taken = number

    def device_name(self, number=None):
        return "cuda" if number is None else f"cuda:{number}"


@pytest.mark.parametrize(("visible", "number"), [(4, 3), (1, 0)])
def test_a_rank_takes_the_gpu_that_it_sees(monkeypatch, visible, number):
    """srun's --gpus-per-task lets every rank see one, which is cuda:0 to each of them."""
    there = Accelerator(visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(internals, "get_accelerator", lambda: there)
    monkeypatch.setattr(internals.ranks, "join", lambda seconds: None)
    monkeypatch.setattr(internals.deepspeed, "init_distributed", lambda **settings: None)
    internals.start(1)
    assert there.taken == number
    assert internals.device() == torch.device("cuda", number)


@pytest.mark.parametrize("triton", [False, True])
def test_grouped_products_are_those_of_the_kernel_that_deepspeed_chose(triton, monkeypatch):
    """DeepSpeed's Triton kernel needs a GPU: torch's products stand for its two functions."""
    kernel = importlib.import_module("deepspeed.ops.triton_ops.group_gemm_triton")
    by_weights, by_rows = TORCH_PRODUCTS
    monkeypatch.setattr(kernel, "_group_gemm", by_weights)
    monkeypatch.setattr(kernel, "_grouped_dw", lambda a, b, ends, experts: by_rows(a, b, ends))
    chosen = internals.grouped_products(SimpleNamespace(use_triton_grouped_mm=triton))
    assert (chosen is TORCH_PRODUCTS) != triton
    rows_NX = torch.randn(6, 4)
    ends_E = torch.tensor([2, 6], dtype=torch.int32)
    found = chosen.by_rows(rows_NX, rows_NX, ends_E)
    torch.testing.assert_close(found[1], rows_NX[2:].T @ rows_NX[2:])
    weights_EXY = torch.randn(2, 4, 8)
    found = chosen.by_weights(rows_NX, weights_EXY, ends_E)
    torch.testing.assert_close(found[:2], rows_NX[:2] @ weights_EXY[0])


# A GPU that is not there --------------------------------------------------------------------------


@pytest.fixture
def rank(monkeypatch):
    """This rank's device is the pretend one."""
    monkeypatch.setattr(internals, "device", lambda: GPU)


@pytest.fixture(params=FORMS)
def model(request, tmp_path):
    """A mixture for training, on the CPU; each kind of router."""
    form = {"router_input": "context", "row_norm": "fixed"} if request.param == "context" else {}
    checkpoint = make_nexus(tmp_path / "nexus", **form)
    if request.param == "linear":
        sidecar = read_sidecar(checkpoint)
        sidecar.router.kind, sidecar.projections = "linear", []
        write_sidecar(checkpoint, sidecar)
    return load_nexus(
        checkpoint, torch.float32, Placement(3), RouterConfig(load_balance=0.1, z_loss=0.01), False
    )


def pass_and_back(model):
    model.train()
    use_loss_head(model)
    loss, _ = next_token_loss(model, torch.zeros(2, 13, dtype=torch.long, device=GPU))
    loss.backward()


def test_a_pass_needs_nothing_from_another_device_once_the_buffers_have_moved(rank, model):
    """ZeRO-3 has moved the parameters, and nothing else."""
    module_to_gpu(model, buffers=False)
    with gpu():
        internals.buffers_to_device(model)
        pass_and_back(model)
    assert all(on_device(parameter.grad) for parameter in model.parameters())


@pytest.mark.parametrize("model", [form for form in FORMS if form != "linear"], indirect=True)
def test_a_buffer_left_behind_is_seen(rank, model):
    """What the test above is worth: without its buffers there the model can't make one forward
    pass. (A linear router reads one under expert parallelism alone.)"""
    module_to_gpu(model, buffers=False)
    with gpu(), pytest.raises(TwoDevices):
        pass_and_back(model)


@pytest.fixture
def start(monkeypatch):
    """Return a function that starts an engine around a model, without DeepSpeed's own part."""
    monkeypatch.setattr(
        internals.deepspeed,
        "initialize",
        lambda model, **rest: (SimpleNamespace(module=model), None, None, None),
    )
    config = Config()
    config.model.dtype = "fp32"
    zero = {"zero_optimization": {"stage": 3}}
    return lambda model: start_engine(model, zero, config, Batch(1, 1)).module


def test_an_engine_gets_a_model_that_asks_for_no_mask(model, start):
    assert start(model).config._attn_implementation == WHOLE_WINDOWS


def test_an_engine_gets_a_model_with_all_its_buffers_on_the_device(rank, model, start):
    """Of a partitioned model DeepSpeed itself moves no buffer."""
    model.model.register_buffer("later", torch.zeros(2), persistent=False)
    started = start(model)
    found = {name: buffer.device for name, buffer in started.named_buffers()}
    assert set(found.values()) == {GPU}
    ends = {name.rpartition(".")[2] for name in found}
    assert ends >= {"slot_of_expert", "tokens_per_expert", "inv_freq", "later"}
    assert ("domain_inputs" in ends) == (moe_layers(model)[0].router.projection is not None)


def test_a_dense_models_buffers_move_too(rank, dense_dir):
    model = load_stock(dense_dir, torch.float32)
    internals.buffers_to_device(model)
    assert {buffer.device for buffer in model.buffers()} == {GPU}
