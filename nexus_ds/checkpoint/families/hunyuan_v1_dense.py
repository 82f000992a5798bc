"""Hunyuan (dense, 0.5B to 7B): Llama with norms of each head's queries and keys behind RoPE."""

from nexus_ds.checkpoint.families.record import Family

HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    defaults={
        "num_key_value_heads": None,
        # transformers' class takes no share of the hidden size for it
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    nulls=("num_key_value_heads",),
    # behind RoPE, not before it as Qwen3's: so no Qwen3-Next
    qk_norm="head",
    qk_names=("query_layernorm", "key_layernorm"),
    bias_keys=("attention_bias",),
    mixture="",
)
