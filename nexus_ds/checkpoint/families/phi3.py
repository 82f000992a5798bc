"""Phi-3, Phi-4 and Phi-4-mini: Llama with fused projections, and RoPE for part of a head."""

from nexus_ds.checkpoint.families.record import Family, windows_everywhere

PHI3 = Family(
    name="phi3",
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    kinds=windows_everywhere,
    listed=False,
    nulls=("num_key_value_heads",),
    fused=("qkv_proj", "gate_up_proj"),
    partial=True,
    # older files have the other two names for it
    ropes={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
)
