"""Gemma 3 (text): Gemma 2 with norms of queries and keys instead of caps.

Five of six layers have a window, and a RoPE of their own.
"""

from nexus_ds.checkpoint.families.record import FULL, PRE_NORMS, SLIDING, Family, full_by_pattern

GEMMA_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""What all Gemmas take for keys that config.json leaves out."""
GEMMA3_TEXT = Family(
    name="gemma3_text",
    defaults=GEMMA
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
    },
    kinds=full_by_pattern,
    # its class takes no null
    nulls=(),
    norms=GEMMA_NORMS,
    centred=True,
    qk_norm="head",
    bias_keys=("attention_bias",),
    rope_bases={FULL: "rope_theta", SLIDING: "rope_local_base_freq"},
    factors=("query_pre_attn_scalar",),
    # its class has a cap of the attention's scores, too, and does not use it
    caps=("final_logit_softcapping",),
    activation_key="hidden_activation",
    activations=("gelu_pytorch_tanh",),
    mixture="",
)
