"""ERNIE 4.5 (dense, 0.3B): Llama with interleaved RoPE."""

from nexus_ds.checkpoint.families.record import Family

ERNIE4_5 = Family(
    name="ernie4_5",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    bias_keys=("use_bias",),
    interleaved=True,
)
