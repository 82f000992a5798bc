"""Granite 3: Llama with four multipliers, which the reading view folds into weights."""

from nexus_ds.checkpoint.families.llama import LLAMA
from nexus_ds.checkpoint.families.record import Family

GRANITE = Family(
    name="granite",
    defaults=LLAMA.defaults
    | {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    nulls=("num_key_value_heads",),
    multipliers=True,
)
