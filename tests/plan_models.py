"""Sizes and checkpoints for the tests of the plan: small, but large enough that a run's small
change does not count."""

import torch
from conftest import repeat_head

from nexus_ds.planning.sizes import Sizes

LENGTH = 64
EMBEDDING = 64
SMALL = Sizes(
    vocabulary=1500,
    hidden=128,
    layers=3,
    heads=4,
    kv_heads=4,
    head_size=32,
    ffn=320,
    tied=True,
    experts=4,
    projection=(EMBEDDING * 256, 128 * 128),
)
# Grouped queries, an output layer of its own, two experts a token, and one slot that stays vacant
# on two ranks.
OTHER = Sizes(
    vocabulary=900,
    hidden=192,
    layers=2,
    heads=6,
    kv_heads=2,
    head_size=32,
    ffn=256,
    tied=False,
    experts=3,
    top_k=2,
    projection=(EMBEDDING * 384, 192 * 192),
)
# 52 million parameters.
LARGE = Sizes(
    vocabulary=4000,
    hidden=512,
    layers=4,
    heads=8,
    kv_heads=8,
    head_size=64,
    ffn=1408,
    tied=True,
    experts=4,
    projection=(EMBEDDING * 1024, 512 * 512),
)
NAMES = {SMALL: "small", OTHER: "other", LARGE: "large"}


def make_model(out, sizes):
    """Save a random Nexus checkpoint of the given sizes."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from nexus_ds.checkpoint.expert_rows import centre_of
    from nexus_ds.checkpoint.projection_module import expert_embeddings, state_of
    from nexus_ds.checkpoint.qwen2_moe import SHARED_GATE_FILL
    from nexus_ds.checkpoint.records import (
        EncoderRecord,
        ExpertRecord,
        RouterRecord,
        step_of,
    )
    from nexus_ds.checkpoint.sidecar import Sidecar, write_sidecar
    from nexus_ds.model.router import Projection

    config = Qwen2MoeConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        moe_intermediate_size=sizes.ffn,
        shared_expert_intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=sizes.tied,
        qkv_bias=sizes.qkv_bias,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(config)
    vectors = torch.randn(sizes.experts, EMBEDDING).numpy()
    names = [f"domain{i}" for i in range(sizes.experts)]
    sidecar = Sidecar(
        experts=[ExpertRecord(name=d, domain=d, source=d, sha256="0" * 64) for d in names],
        router=RouterRecord(
            kind="nexus",
            depth=2,
            width=0,
            projection="swiglu",
            row_norm="free",
            input="token",
            centre=True,
            top_k=sizes.top_k,
        ),
        encoder=EncoderRecord(
            name="tiny", revision="1" * 64, dimension=EMBEDDING, documents=5, normalised=True
        ),
        lineage=[step_of({"verb": "upcycle"})],
        versions={},
        vectors=vectors,
        centre=centre_of(vectors),
        projections=[
            state_of(Projection(EMBEDDING, sizes.hidden).state_dict()) for _ in range(sizes.layers)
        ],
    )
    for index, block in enumerate(model.model.layers):
        block.mlp.gate.weight.data = expert_embeddings(sidecar, index, torch.float32)
        block.mlp.shared_expert_gate.weight.data.fill_(SHARED_GATE_FILL)
    model.save_pretrained(out)
    if sizes.tied:
        repeat_head(out)
    write_sidecar(out, sidecar)
    return out
