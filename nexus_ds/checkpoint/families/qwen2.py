"""Qwen2 and 2.5: biases of q, k and v, a window for the last layers."""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.record import FULL, SLIDING, Family


def windows_in_the_last_layers(config: ConfigJson) -> Sequence[str]:
    """Return windows for the layers from `max_window_layers` on; no layers where it is null."""
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    if config["sliding_window"] is None:
        first = layers
    if first is None:
        return []
    return [SLIDING if layer >= first else FULL for layer in range(layers)]


QWEN2 = Family(
    name="qwen2",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    kinds=windows_in_the_last_layers,
    window_switch="use_sliding_window",
    nulls=("num_key_value_heads",),
    qkv_bias=True,
)
