"""Qwen3 (dense): its attention norms each head's queries and keys. It becomes a Qwen3-Next."""

from nexus_ds.checkpoint.families.qwen2 import QWEN2, windows_in_the_last_layers
from nexus_ds.checkpoint.families.record import Family

QWEN3 = Family(
    name="qwen3",
    defaults=QWEN2.defaults | {"head_dim": 128},
    kinds=windows_in_the_last_layers,
    window_switch="use_sliding_window",
    nulls=("num_key_value_heads",),
    qk_norm="head",
    mixture="qwen3_next",
)
