"""Compiled layers against the same ones as they are: loss, every gradient, and what is compiled."""

import pytest
import torch
from conftest import make_nexus
from torch._dynamo.utils import counters

from nexus_ds.model.compiled import compile_layers, parts_to_compile
from nexus_ds.model.experts import ACTIVATIONS, compiled_elementwise, eager_elementwise
from nexus_ds.model.head import next_token_loss
from nexus_ds.runtime.nexus_moe import NexusMoE, Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import RouterConfig

VOCABULARY = 31
NAMES = ["a", "b", "c"]


def nexus(checkpoint, dtype):
    model = load_nexus(checkpoint, dtype, Placement(3), RouterConfig(load_balance=0.1), True)
    return model.train()


def test_all_of_a_layer_is_compiled_but_what_routes(tmp_path):
    model = nexus(make_nexus(tmp_path / "nexus", names=NAMES), torch.float32)
    layer = model.model.layers[0]
    parts = list(parts_to_compile(layer))
    assert parts == [
        layer.self_attn,
        layer.mlp.shared_experts,
        layer.input_layernorm,
        layer.post_attention_layernorm,
    ]
    assert not any(isinstance(part, NexusMoE) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_stands_between_the_products_of_experts_is_compiled_as_it_is(activation):
    torch._dynamo.reset()
    gate_NF, up_NF, dinner_NF = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(0))
    eager, compiled = eager_elementwise(activation), compiled_elementwise(activation)
    torch.testing.assert_close(compiled.inner(gate_NF, up_NF), eager.inner(gate_NF, up_NF))
    found = compiled.gradients(gate_NF, up_NF, dinner_NF)
    torch.testing.assert_close(found, eager.gradients(gate_NF, up_NF, dinner_NF))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_loss_and_gradients_are_those_of_the_layers_as_they_are(tmp_path, dtype, bound):
    checkpoint = make_nexus(tmp_path / "nexus", names=NAMES)
    windows = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        model = nexus(checkpoint, dtype)
        if compiled:
            compile_layers(model)
            assert model.model.layers[0].mlp.experts.elementwise is not eager_elementwise("silu")
        loss, _ = next_token_loss(model, windows)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (loss, compiled_gradients) = found
    assert abs(float(loss - expected)) <= bound
    for name, gradient in gradients.items():
        distance = (compiled_gradients[name] - gradient).float().norm()
        assert float(distance) <= bound * float(gradient.float().norm()), name
    # attention, two sizes of norm calls, the shared expert, and both functions of the routed ones
    assert counters["stats"]["unique_graphs"] >= 5
    assert not counters["graph_break"]
    torch._dynamo.reset()
