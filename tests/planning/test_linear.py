"""Linear attention: its arithmetic and what it keeps, held to transformers' own code."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint.build import DTYPES
from nexus_ds.checkpoint.families.delta_net import DeltaNet
from nexus_ds.planning.linear import CHUNK, linear_activations, linear_flops
from nexus_ds.planning.memory import activations
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.planning.traffic import token_flops
from nexus_ds.planning.verbs import need_of_sizes
from nexus_ds.settings import Config
from tests.planning.test_activations import LENGTH, SEQUENCES, layout, measured

NET = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=48,
)
KINDS = {
    "hybrid": {},
    "linear": dict(layer_types=["linear_attention"] * 4),
    "full": dict(layer_types=["full_attention"] * 4),
    "as many heads": dict(linear_num_value_heads=2),
}


def make(out, **keys):
    """Return a Qwen3.5, and its sizes."""
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=900,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        **(NET | keys),
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(out)
    config = Config()
    config.model.path = str(out)
    return model, sizes_of(config)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_keeps_what_was_planned(kind, dtype, tmp_path):
    model, sizes = make(tmp_path, **KINDS[kind])
    total, head = measured(model.to(DTYPES[dtype]), "none")
    width = DTYPES[dtype].itemsize
    planned = activations(sizes, layout("none"), width, SEQUENCES * LENGTH)
    assert total - head == pytest.approx(planned, rel=0.06)


def test_arithmetic_is_what_its_own_code_does(tmp_path):
    """But for two solutions of a triangular system, which torch does not count."""
    model, sizes = make(tmp_path, layer_types=["linear_attention"] * 4)
    x = torch.zeros(1, 2 * CHUNK, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(x, use_cache=False)
    counted = counter.get_total_flops() / x.numel() / 4
    net = sizes.linear
    solved = net.value_heads * CHUNK * (net.key_dim + net.value_dim)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters() if weight.ndim > 1)
    assert counted == pytest.approx(2 * layer + linear_flops(net) - solved, rel=1e-3)


def test_full_layers_alone_cost_more_with_the_length(tmp_path):
    _, hybrid = make(tmp_path / "a")
    _, full = make(tmp_path / "b", **KINDS["full"])
    # causal: 6 operations a channel and a token of the length, in every full layer
    slope = 6 * 3 * 32
    for sizes, layers in ((hybrid, 1), (full, 4)):
        more = token_flops(sizes, 2048)[0] - token_flops(sizes, 1024)[0]
        assert more == layers * slope * 1024
        assert need_of_sizes(sizes, 2).cache == layers * 2 * 2 * 32


def test_states_and_chunks_grow_with_heads_alone():
    small, large = DeltaNet(4, 2, 4, 32, 48), DeltaNet(4, 4, 8, 32, 48)
    assert linear_flops(large) == 2 * linear_flops(small)
    assert linear_activations(large, 2) < 2 * linear_activations(small, 2) + 1
