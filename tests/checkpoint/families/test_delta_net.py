"""Sizes of linear attention out of config.json, held to a layer of transformers."""

import torch
from transformers import AutoConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from nexus_ds.checkpoint.families.delta_net import FP32, KEYS, DeltaNet

SIZES = dict(zip(KEYS, (3, 2, 6, 8, 5), strict=True))


def test_a_layer_has_the_weights_of_transformers_own():
    config = AutoConfig.for_model("qwen3_5_text", hidden_size=32, **SIZES)
    with torch.device("meta"):
        layer = Qwen3_5GatedDeltaNet(config, 0)
    own = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    net = DeltaNet.of(SIZES)
    assert list(net.shapes(32).items()) == list(own.items()) and set(FP32) < set(own)
    assert (net.keys, net.values, net.mixed) == (layer.key_dim, layer.value_dim, layer.conv_dim)
