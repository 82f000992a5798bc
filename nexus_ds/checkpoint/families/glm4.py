"""GLM-4-0414 (`glm4`): GLM-4 with norms before and after attention and FFN."""

from nexus_ds.checkpoint.families.glm import GLM
from nexus_ds.checkpoint.families.record import PRE_NORMS, Family

GLM4 = Family(
    name="glm4",
    defaults=GLM.defaults,
    # its class takes no null
    nulls=(),
    norms=(*PRE_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    qkv_bias="attention_bias",
    # o_proj and FFN have none in any file
    bias_keys=(),
    # experts have two matrices; q and k stay as they are, in the family's own class
    fused=("gate_up_proj",),
    partial=True,
    mixture="",
)
