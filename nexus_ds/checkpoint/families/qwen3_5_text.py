"""Qwen3.5 (dense): linear attention in three of four layers, gated attention in the others."""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson, positive
from nexus_ds.checkpoint.families.record import FULL, LINEAR, Family


def full_by_interval(config: ConfigJson) -> Sequence[str]:
    """Return full attention for every n-th layer, n being `full_attention_interval`."""
    interval = "full_attention_interval"
    every = positive({interval: 4} | config, interval, "config.json")
    layers = range(1, config["num_hidden_layers"] + 1)
    return [LINEAR if layer % every else FULL for layer in layers]


QWEN3_5_TEXT = Family(
    name="qwen3_5_text",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    kinds=full_by_interval,
    nulls=(),
    partial=True,
    qk_norm="head",
    linear=True,
    output_gate=True,
    centred=True,
    # what predicts the token after the next is no part of what its class computes
    ignored=("mtp.",),
    mixture="qwen3_next",
)
