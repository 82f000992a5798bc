"""The one door to DeepSpeed, and what ranks on GPUs need, shown without one.

Tensors on the meta device stand for those on a GPU. They have no values; that all tensors of an
operation are on one device is what is looked at, as CUDA would.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_nexus
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.model.experts import RoutedExperts, _SwiGLUExperts
from nexus_ds.model.head import next_token_loss, use_loss_head
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import Batch, moe_layers, start_engine
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.runtime.tally import Tally
from nexus_ds.settings import Config, RouterConfig

PACKAGE = Path(internals.__file__).parents[1]
GPU = torch.device("meta")
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


# A GPU that is not there --------------------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Fails where an operation other than a copy meets tensors on two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # transformers asks whether positions follow each other
        out = func(*args, **(kwargs or {}))
        met = {
            t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)
        }
        assert len(met) <= 1 or "copy" in str(func), (
            f"{func}: expected all tensors on one device, found {sorted(met)}"
        )
        return out


@pytest.fixture
def gpu(monkeypatch):
    """This rank's device is the one that stands for a GPU; each expert gets as many rows, since
    counts have no values."""

    def even(self, x_NH, counts_E):
        counts = [len(x_NH) // len(counts_E)] * len(counts_E)
        return _SwiGLUExperts.apply(x_NH, self.w1, self.w2, self.w3, counts)

    monkeypatch.setattr(internals, "device", lambda: GPU)
    monkeypatch.setattr(RoutedExperts, "forward", even)


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


def parameters_to_device(model):
    """Move what ZeRO-3 moves: parameters, and nothing else."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, torch.nn.Parameter(parameter.data.to(GPU)))
    model.tie_weights()


def pass_and_back(model):
    model.train()
    use_loss_head(model)
    layers, tokens_BS = moe_layers(model), torch.zeros(2, 13, dtype=torch.long, device=GPU)
    with OneDevice():
        loss, losses_BS = next_token_loss(model, tokens_BS)
        Tally(3, 3, GPU).add(losses_BS, torch.zeros(2, dtype=torch.long, device=GPU), layers)
        loss.backward()
    return loss


def test_a_pass_forward_and_backward_needs_nothing_from_another_device(gpu, model):
    parameters_to_device(model)
    internals.buffers_to_device(model)
    assert pass_and_back(model).device == GPU
    assert {p.grad.device for p in model.parameters()} == {GPU}


def test_a_buffer_left_behind_is_seen(gpu, model):
    """What the test above is worth: without its buffers there the model can't make one forward
    pass."""
    parameters_to_device(model)
    with pytest.raises(
        AssertionError, match=r"expected all tensors on one device, found \['cpu', 'meta'\]"
    ):
        pass_and_back(model)


def test_an_engine_gets_a_model_with_all_its_buffers_on_the_device(gpu, model, monkeypatch):
    """DeepSpeed is left out: of a partitioned model it moves no buffer."""
    monkeypatch.setattr(
        internals.deepspeed,
        "initialize",
        lambda model, **rest: (SimpleNamespace(module=model), None, None, None),
    )
    model.model.register_buffer("later", torch.zeros(2), persistent=False)
    config = Config()
    config.model.dtype = "fp32"
    started = start_engine(model, {"zero_optimization": {"stage": 3}}, config, Batch(1, 1)).module
    found = {name: buffer.device for name, buffer in started.named_buffers()}
    assert set(found.values()) == {GPU}
    ends = {name.rpartition(".")[2] for name in found}
    assert ends >= {"slot_of_expert", "tokens_per_expert", "inv_freq", "later"}
    assert ("domain_inputs" in ends) == (moe_layers(model)[0].router.projection is not None)


def test_a_dense_models_buffers_move_too(gpu, dense_dir):
    model = load_stock(dense_dir, torch.float32)
    internals.buffers_to_device(model)
    assert {buffer.device for buffer in model.buffers()} == {GPU}
