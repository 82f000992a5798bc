"""Seed-OSS: Llama with biases of q, k and v."""

from nexus_ds.checkpoint.families.record import Family

SEED_OSS = Family(
    name="seed_oss",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    qkv_bias="attention_bias",
    bias_keys=("attention_out_bias", "mlp_bias"),
)
