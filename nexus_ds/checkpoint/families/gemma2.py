"""Gemma 2: GELU, norms on both sides of attention and FFN, caps of scores and of logits.

Every other layer has a window. Scores are capped by no fused kernel: attention is eager.
"""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.gemma3_text import GEMMA, GEMMA3_TEXT, GEMMA_NORMS
from nexus_ds.checkpoint.families.record import ATTENTION_CAP, FULL, SLIDING, Family


def full_every_second(config: ConfigJson) -> Sequence[str]:
    """Return windows for the first layer, the third and so on."""
    return [FULL if layer % 2 else SLIDING for layer in range(config["num_hidden_layers"])]


GEMMA2 = Family(
    name="gemma2",
    defaults=GEMMA
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0,
        ATTENTION_CAP: 50.0,
    },
    kinds=full_every_second,
    nulls=(),
    norms=GEMMA_NORMS,
    centred=True,
    bias_keys=("attention_bias",),
    factors=GEMMA3_TEXT.factors,
    caps=(*GEMMA3_TEXT.caps, ATTENTION_CAP),
    activation_key=GEMMA3_TEXT.activation_key,
    activations=GEMMA3_TEXT.activations,
    mixture="",
)
