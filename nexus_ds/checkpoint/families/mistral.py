"""Mistral: one window for all layers, or with `layer_types` (then it is Ministral) for some."""

from nexus_ds.checkpoint.families.record import Family, windows_everywhere

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MINISTRAL = Family(
    name="ministral",
    # transformers' class takes no share of the hidden size for it
    defaults=DEFAULTS | {"head_dim": None},
    kinds=windows_everywhere,
    nulls=(),
)
MISTRAL = Family(
    name="mistral",
    defaults=DEFAULTS,
    kinds=windows_everywhere,
    listed=False,
    nulls=("head_dim",),
    with_layer_types=MINISTRAL,
)
