"""Random Nexus checkpoints of any size, written tensor by tensor."""

import torch

from nexus_ds.checkpoint.expert_rows import centre_of, condition
from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import (
    SHARED_GATE_FILL,
    expert_name,
    gate_name,
    shared_gate_name,
    shared_name,
)
from nexus_ds.checkpoint.records import EncoderRecord, ExpertRecord, RouterRecord, step_of
from nexus_ds.checkpoint.sidecar import Sidecar, write_sidecar
from nexus_ds.checkpoint.tensors import TensorWriter
from nexus_ds.upcycling.new_router import layer_draws, new_state


def sizes_of(hidden, ffn, layers, experts, vocabulary):
    """Return name and shape of every tensor of a Qwen2-MoE with tied embeddings."""
    found = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    parts = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            found[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = (hidden,)
        found |= {gate_name(layer): (experts, hidden), shared_gate_name(layer): (1, hidden)}
        for part, shape in parts.items():
            found[shared_name(layer, part)] = shape
            found |= {expert_name(layer, expert, part): shape for expert in range(experts)}
    return found


def make_large(
    out, hidden=1024, ffn=4096, layers=9, experts=8, vocabulary=32000, dtype=torch.bfloat16, top_k=1
):
    """Write a random Nexus checkpoint tensor by tensor; return its number of parameters."""
    from transformers import Qwen2MoeConfig

    out.mkdir()
    generator = torch.Generator().manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        moe_intermediate_size=ffn,
        shared_expert_intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=64,
        tie_word_embeddings=True,
        qkv_bias=False,
        bos_token_id=None,
        eos_token_id=0,
        architectures=["Qwen2MoeForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(out)
    vectors = torch.randn(experts, 384, generator=generator).numpy()
    sidecar = Sidecar(
        experts=[
            ExpertRecord(name=f"d{i}", domain=f"d{i}", source=f"d{i}", sha256="0" * 64)
            for i in range(experts)
        ],
        router=RouterRecord(
            kind="nexus",
            depth=2,
            width=0,
            projection="swiglu",
            row_norm="free",
            input="token",
            centre=True,
            top_k=top_k,
        ),
        encoder=EncoderRecord(
            name="tiny", revision="1" * 64, dimension=384, documents=5, normalised=True
        ),
        lineage=[step_of({"verb": "upcycle"})],
        versions={},
        vectors=vectors,
        centre=centre_of(vectors),
    )
    for layer in range(layers):
        inputs = condition(vectors, sidecar.centre)
        draws = layer_draws(0, layer)
        state = new_state(sidecar.router, inputs, hidden, "balanced", 0.5, draws)
        sidecar.projections.append(state)
    shapes = sizes_of(hidden, ffn, layers, experts, vocabulary)
    kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    with TensorWriter(out, {name: (kind, shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            if name.endswith(".mlp.gate.weight"):
                writer.write(name, expert_embeddings(sidecar, int(name.split(".")[2]), dtype))
            elif name.endswith(".shared_expert_gate.weight"):
                writer.write(name, torch.full(shape, SHARED_GATE_FILL, dtype=dtype))
            else:
                deviation = 0.02 if len(shape) > 1 else 0.0
                values = torch.empty(shape, dtype=dtype).uniform_(
                    -deviation, deviation, generator=generator
                )
                writer.write(name, values + (len(shape) == 1))
    write_sidecar(out, sidecar)
    return sum(torch.Size(shape).numel() for shape in shapes.values())
