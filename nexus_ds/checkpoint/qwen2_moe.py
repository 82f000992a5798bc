"""The form of a mixture on disk: transformers' Qwen2-MoE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.families import (
    FFN_PARTS,
    _check_tensors,
    _positive,
    _refuse_in_any_form,
    as_stored,
    both_ropes,
    dense_shapes,
    ffn_place,
    own_config,
    refuse_hooks,
    refuse_other_weights,
    settings,
)
from nexus_ds.checkpoint.tensors import TensorReader, read_json_object, require_directory
from nexus_ds.errors import CheckpointError
from nexus_ds.model.context import CONTEXT_MODEL

SHARED_GATE_FILL = 2.0**-60


def expert_name(layer: int, expert: int, part: str) -> str:
    """Return the name of a routed expert's weight."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def shared_name(layer: int, part: str) -> str:
    """Return the name of the shared expert's weight (its down_proj is stored doubled)."""
    return f"model.layers.{layer}.mlp.shared_expert.{part}.weight"


def gate_name(layer: int) -> str:
    """Return the name of the router weight [experts, hidden]."""
    return f"model.layers.{layer}.mlp.gate.weight"


def mean_name(layer: int) -> str:
    """Return the name of the vector [hidden] that a router with the input `context` subtracts from
    what it reads."""
    return f"model.layers.{layer}.mlp.gate.mean"


def shared_gate_name(layer: int) -> str:
    """Return the name of the shared expert's gate [1, hidden], filled with SHARED_GATE_FILL."""
    return f"model.layers.{layer}.mlp.shared_expert_gate.weight"


def check_shared_gates(reader: TensorReader, layers: int) -> None:
    """Raise CheckpointError unless the shared expert's gate is the constant that the doubled
    down_proj makes up for.

    What has been trained elsewhere with that gate runs in transformers, but nothing here computes
    or extends it.
    """
    for layer in range(layers):
        gate = float(reader.read(shared_gate_name(layer)).abs().max())
        if not gate <= 1e-9:
            raise CheckpointError(
                f"{reader.directory}: layer {layer}: the shared expert's gate has weights up to {gate:.1e}, expected the "
                f"constant {SHARED_GATE_FILL:.0e}; the model was trained elsewhere: keep shared_expert_gate frozen there "
                "(peft: exclude_modules), and start from the checkpoint before that"
            )


def moe_config(
    dense_config: dict[str, Any], experts: int, top_k: int, router_input: str = "token"
) -> dict[str, Any]:
    """Return the complete config.json of the Qwen2-MoE that a dense model's branches become.

    Args:
        dense_config: config.json of a Llama, Mistral or Qwen2.
        experts: number of routed experts.
        top_k: routed experts per token.
        router_input: token | context; the latter is no stock Qwen2-MoE and says so by its
            model_type.
    """
    s, own, context = settings(dense_config), own_config(dense_config), router_input == "context"
    config: dict[str, Any] = {
        "architectures": ["NexusMoeForCausalLM" if context else "Qwen2MoeForCausalLM"],
        "model_type": CONTEXT_MODEL if context else "qwen2_moe",
        "dtype": dense_config.get("dtype") or dense_config.get("torch_dtype") or "float32",
        "vocab_size": s["vocabulary"],
        "hidden_size": s["hidden_size"],
        "intermediate_size": s["ffn_size"],
        "moe_intermediate_size": s["ffn_size"],
        "shared_expert_intermediate_size": s["ffn_size"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv_heads"],
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        # the gate is the raw probability: renormalised top-1 would be 1 and teach nothing
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": s["norm_eps"],
        "max_position_embeddings": own.max_position_embeddings,
        "rope_parameters": s["rope"],
        "qkv_bias": s["qkv_bias"],
        "attention_dropout": own.attention_dropout or 0.0,
        "initializer_range": own.initializer_range,
        "tie_word_embeddings": s["tied_embeddings"],
        "use_sliding_window": s["sliding_window"] is not None,
        "sliding_window": s["sliding_window"],
        "layer_types": s["layer_types"],
        "use_cache": True,
    }
    if dense_config.get("head_dim") is not None:  # a null would be taken as the size itself
        config["head_dim"] = s["head_dim"]
    tokens = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return both_ropes(config | tokens)


def expert_as_dense(config: dict[str, Any], expert: int | None) -> dict[str, tuple[str, float]]:
    """Return for each weight of a dense model the stored weight of a Nexus model that it is, and a
    factor.

    Args:
        config: config.json of the Nexus model.
        expert: index of a routed expert, or None for the shared expert (whose stored down_proj has
            the factor 1/2).
    """
    names: dict[str, tuple[str, float]] = {}
    for name in dense_shapes(config):
        layer, part = ffn_place(name)
        if part is None:
            names[name] = name, 1.0
        elif expert is None:
            names[name] = shared_name(layer, part), 0.5 if part == "down_proj" else 1.0
        else:
            names[name] = expert_name(layer, expert, part), 1.0
    return names


def moe_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all weights of a Nexus model, in file order."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts, hidden = config["num_experts"], config["hidden_size"]
    for name, shape in dense_shapes(config).items():
        layer, part = ffn_place(name)
        if part is None:
            shapes[name] = shape
            continue
        if part == FFN_PARTS[0]:
            shapes[gate_name(layer)] = (experts, hidden)
            shapes[shared_gate_name(layer)] = (1, hidden)
            if config["model_type"] == CONTEXT_MODEL:
                shapes[mean_name(layer)] = (hidden,)
        shapes[shared_name(layer, part)] = shape
        shapes |= {expert_name(layer, expert, part): shape for expert in range(experts)}
    return shapes


def open_moe(directory: Path) -> tuple[dict[str, Any], TensorReader]:
    """Open the Qwen2-MoE part of a Nexus checkpoint: config.json and the checked tensors.

    Raises:
        CheckpointError: not a Qwen2-MoE of the form that `moe_config` describes, or incomplete.
        UnsupportedModelError: code hooks.
    """
    directory = require_directory(Path(directory))
    refuse_other_weights(directory)
    config = read_json_object(directory, "config.json")
    where = str(directory / "config.json")
    refuse_hooks(config, where)
    if config.get("model_type") not in ("qwen2_moe", CONTEXT_MODEL):
        found = config.get("model_type")
        raise CheckpointError(
            f"{where}: model_type is {found!r}, a Nexus checkpoint has 'qwen2_moe' or {CONTEXT_MODEL!r}; give one that "
            "nexus-ds upcycle has made"
        )
    expected = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{where}: {key} is {config.get(key)!r}, a Nexus checkpoint has {value!r}"
            )
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        _positive(config, key, where)
    _refuse_in_any_form(config, where)
    reader = TensorReader(directory)
    config = as_stored(config, reader)
    _check_tensors(reader, moe_shapes(config), settings(config, where)["tied_embeddings"])
    return config, reader


def parameter_counts(config: dict[str, Any], shared: bool = True) -> tuple[int, int]:
    """Return (all, active per token) parameters of a Nexus model; they differ by n - k FFN stacks
    (paper section 3).

    A shared expert of zeros (`shared` false) is stored but computes nothing: it is not active.
    """
    s = settings(config)
    total = sum(math.prod(shape) for shape in moe_shapes(config).values())
    stack = s["layers"] * len(FFN_PARTS) * s["hidden_size"] * s["ffn_size"]
    return total, total - (
        config["num_experts"] - config["num_experts_per_tok"] + (not shared)
    ) * stack
