"""OLMo 2: norms after attention and FFN instead of before, and over all queries and keys."""

from nexus_ds.checkpoint.families.record import Family

OLMO2 = Family(
    name="olmo2",
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    nulls=("num_key_value_heads",),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    qk_norm="all",
    bias_keys=("attention_bias",),
    mixture="",
)
