"""Cohere 2 (Command R7B, Command A): attention and FFN side by side behind one norm.

Norms subtract the mean, logits are multiplied by a number, and layers without a window have no
RoPE.
"""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.record import SLIDING, Family, full_by_pattern


def turned(config: ConfigJson, kinds: Sequence[str]) -> Sequence[bool]:
    """Return RoPE for the layers with a window."""
    return [kind == SLIDING for kind in kinds]


COHERE2 = Family(
    name="cohere2",
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "pad_token_id": 0,
    },
    kinds=full_by_pattern,
    nulls=("num_key_value_heads",),
    norms=("input_layernorm",),
    eps_key="layer_norm_eps",
    bias_keys=("attention_bias",),
    turned_layers=turned,
    factors=("logit_scale",),
    mixture="",
)
