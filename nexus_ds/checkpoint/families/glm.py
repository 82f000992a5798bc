"""GLM-4 (9B, `glm`): interleaved RoPE for half of a head, biases of q, k and v, a fused FFN.

GLM-4-0414 (`glm4`) is another family: it has norms after attention and FFN.
"""

from nexus_ds.checkpoint.families.record import Family

GLM = Family(
    name="glm",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "pad_token_id": 151329,
        "eos_token_id": [151329, 151336, 151338],
    },
    nulls=(),
    qkv_bias="attention_bias",
    bias_keys=(),
    fused=("gate_up_proj",),
    interleaved=True,
    partial=True,
)
