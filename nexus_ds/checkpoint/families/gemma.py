"""Gemma 1: Llama with GELU, scaled embeddings, and norms that add 1 to their weights."""

from nexus_ds.checkpoint.families.gemma3_text import GEMMA as DEFAULTS
from nexus_ds.checkpoint.families.record import Family

GEMMA = Family(
    name="gemma",
    defaults=DEFAULTS | {"num_key_value_heads": 16, "max_position_embeddings": 8192},
    # its class takes no null
    nulls=(),
    centred=True,
    bias_keys=("attention_bias",),
    # its first files say "gelu", which its class takes for the other
    activations=("gelu_pytorch_tanh", "gelu"),
    mixture="",
)
