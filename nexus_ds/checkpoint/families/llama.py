"""Llama 2 and 3: the plain form of which other families differ."""

from nexus_ds.checkpoint.families.record import Family

LLAMA = Family(
    name="llama",
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
