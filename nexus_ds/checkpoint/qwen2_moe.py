"""The form of a mixture on disk: transformers' Qwen2-MoE, every tensor of it in one table.

Attention and norms keep their dense names; model.layers.L.mlp becomes mlp.shared_expert,
mlp.experts.E and the router's weight mlp.gate. A stock Qwen2-MoE multiplies the shared expert by
the sigmoid of a gate, which the paper's has not: the gate is stored as a constant of about zero,
whose sigmoid is exactly 1/2, and the shared expert's down_proj doubled. `stored` is the one place
that says so; all that writes, reads or counts a mixture's tensors asks it.
Another form would be a module like this one: `stored`, `moe_config`, `open_moe` and the names.
Shapes: E routed experts, H hidden size.
Not covered: Qwen2-MoEs of other forms (renormalised gates, dense layers in between, a shared
expert of another width).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.config_json import (
    CONTEXT_MODEL,
    ConfigJson,
    positive,
    refuse_hooks,
    refuse_in_any_form,
    refuse_odd_type,
    refuse_other_weights,
)
from nexus_ds.checkpoint.dense import as_stored, check_tensors
from nexus_ds.checkpoint.dense_settings import (
    UNIFORM,
    both_ropes,
    family_of,
    filled,
    refuse_activation,
    settings,
)
from nexus_ds.checkpoint.families.record import (
    FFN_PARTS,
    FULL,
    SLIDING,
    DenseSettings,
    DenseWeight,
    Family,
    dense_weights,
)
from nexus_ds.checkpoint.forms import (
    LINEAR_ATTENTION,
    MIXTURES,
    NATIVE,
    QWEN3_NEXT,
    SOURCE,
    native_class,
)
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.json_files import read_json_object, require_directory
from nexus_ds.checkpoint.qwen3_next_headers import as_dense
from nexus_ds.checkpoint.values import read_values
from nexus_ds.errors import CheckpointError, UnsupportedModelError

SHARED_GATE_FILL = 2.0**-60
"""Weight of the shared expert's gate: its sigmoid is exactly 1/2, and llama.cpp's silu(x)/x stays
finite, as it would not with 0."""
TRAINED_GATE = 1e-9
"""A gate above this was trained: no longer the constant, in whatever dtype it was stored."""
# The gate value is the raw probability: renormalised top-1 would be 1 and teach nothing.
FORM = {"norm_topk_prob": False, **UNIFORM}
NATIVE_KEYS = (
    "dtype",
    *FORM,
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
"""What a native form says beyond its dense family's config.json."""


class Role(Enum):
    """What a stored tensor is to the mixture."""

    DENSE = "outside of the feed-forward networks; averaged over the branches (paper section 2.1)"
    ROUTED = "of a routed expert"
    SHARED = "of the shared expert"
    SHARED_GATE = "of the shared expert's gate, a constant"
    ROUTER = "the router's weight: an expert embedding a row"
    CONTEXT_MEAN = "what a router with the input `context` subtracts from what it reads"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a mixture's checkpoint: what it is, where it belongs, and how it is stored."""

    role: Role
    shape: tuple[int, ...]
    layer: int = -1
    """-1: outside of the layers."""
    expert: int = -1
    """Of a routed expert, in the sidecar's order; -1: of none."""
    part: str = ""
    """One of FFN_PARTS for ROUTED and SHARED."""
    dense_name: str = ""
    """The weight of a dense model that it is a copy or a mean of; empty: of none."""
    scale: float = 1.0
    """stored = scale * the weight that is computed with; a power of two, so nothing is rounded."""
    fill: float | None = None
    """Value of all elements, where it is a constant."""
    fp32: bool = False
    """As `DenseWeight.fp32`."""


def expert_name(layer: int, expert: int, part: str) -> str:
    """Return the name of a routed expert's weight."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def shared_name(layer: int, part: str) -> str:
    """Return the name of the shared expert's weight."""
    return f"model.layers.{layer}.mlp.shared_expert.{part}.weight"


def gate_name(layer: int) -> str:
    """Return the name of the router's weight [E, H]."""
    return f"model.layers.{layer}.mlp.gate.weight"


def router_layers(config: ConfigJson, names: Collection[str]) -> list[int]:
    """Return the layers that have a router, in any mixture whose routers have these names.

    Args:
        config: its config.json, which may be damaged.
        names: of all its tensors.
    """
    layers = config.get("num_hidden_layers")
    # each layer has tensors of its own: no more are counted than there are, whatever is stated
    most = min(layers, len(names)) if type(layers) is int else 0
    return [layer for layer in range(most) if gate_name(layer) in names]


def mean_name(layer: int) -> str:
    """Return the name of the vector [H] that a router with the input `context` subtracts."""
    return f"model.layers.{layer}.mlp.gate.mean"


def shared_gate_name(layer: int) -> str:
    """Return the name of the shared expert's gate [1, H]."""
    return f"model.layers.{layer}.mlp.shared_expert_gate.weight"


def _router(layer: int, experts: int, hidden: int, context: bool) -> Iterator[tuple[str, Stored]]:
    """Yield what one layer stores beside its feed-forward networks' weights."""
    yield gate_name(layer), Stored(role=Role.ROUTER, shape=(experts, hidden), layer=layer)
    yield (
        shared_gate_name(layer),
        Stored(role=Role.SHARED_GATE, shape=(1, hidden), layer=layer, fill=SHARED_GATE_FILL),
    )
    if context:
        yield mean_name(layer), Stored(role=Role.CONTEXT_MEAN, shape=(hidden,), layer=layer)


def _ffn(dense_name: str, weight: DenseWeight, experts: int) -> Iterator[tuple[str, Stored]]:
    """Yield what becomes of one weight of a dense feed-forward network: one for each expert."""
    layer, part, shape = weight.layer, weight.part, weight.shape
    yield (
        shared_name(layer, part),
        Stored(
            role=Role.SHARED,
            shape=shape,
            layer=layer,
            part=part,
            dense_name=dense_name,
            # down_proj is linear in the network's output, which the gate halves
            scale=2.0 if part == "down_proj" else 1.0,
        ),
    )
    for expert in range(experts):
        yield (
            expert_name(layer, expert, part),
            Stored(
                role=Role.ROUTED,
                shape=shape,
                layer=layer,
                expert=expert,
                part=part,
                dense_name=dense_name,
            ),
        )


def stored(config: ConfigJson) -> dict[str, Stored]:
    """Return every tensor of a mixture's checkpoint by name, in file order, and no other.

    Args:
        config: its config.json, complete.

    Raises:
        CheckpointError, UnsupportedModelError: a config.json that `settings` refuses.
    """
    sizes = settings(config)
    experts = config["num_experts"]
    context = config["model_type"] == CONTEXT_MODEL
    table: dict[str, Stored] = {}
    for name, weight in dense_weights(sizes).items():
        if not weight.part:
            table[name] = Stored(
                role=Role.DENSE,
                shape=weight.shape,
                layer=weight.layer,
                dense_name=name,
                fp32=weight.fp32,
            )
            continue
        # the first part opens the layer's block
        if weight.part == FFN_PARTS[0]:
            table.update(_router(weight.layer, experts, sizes.hidden_size, context))
        table.update(_ffn(name, weight, experts))
    return table


def planned(config: ConfigJson, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a mixture's checkpoint, under the dense names.

    Args:
        config: its config.json.
        dtype: of all weights but those that are always in fp32, as safetensors names it.
    """
    # the constant gate would be zero in fp16
    full = {Role.SHARED_GATE} if dtype == "F16" else set()
    return {
        name: ("F32" if entry.fp32 or entry.role in full else dtype, entry.shape)
        for name, entry in stored(config).items()
    }


def parameter_counts(config: ConfigJson, shared: bool = True) -> tuple[int, int]:
    """Return (all, active per token) parameters of a Nexus model; they differ by n - k FFN stacks
    (paper section 3).

    A shared expert of zeros (`shared` false) is stored but computes nothing: it is not active.
    """
    elements = dict.fromkeys(Role, 0)
    for entry in stored(config).values():
        elements[entry.role] += math.prod(entry.shape)
    total = sum(elements.values())
    unvisited = config["num_experts"] - config["num_experts_per_tok"]
    idle = elements[Role.ROUTED] // config["num_experts"] * unvisited
    if not shared:
        idle += elements[Role.SHARED]
    return total, total - idle


def check_shared_gates(reader: Headers, layers: int) -> None:
    """Raise CheckpointError unless the shared expert's gate is the constant that the doubled
    down_proj makes up for.

    What has been trained elsewhere with that gate runs in transformers, but nothing here computes
    or extends it.
    """
    for layer in range(layers):
        gate = float(np.abs(read_values(reader, shared_gate_name(layer))).max())
        if not gate <= TRAINED_GATE:
            raise CheckpointError(
                f"{reader.directory}: layer {layer}: the shared expert's gate has weights "
                f"up to {gate:.1e}, expected the constant {SHARED_GATE_FILL:.0e}; "
                "the model was trained elsewhere: keep shared_expert_gate frozen there "
                "(peft: exclude_modules), and start from the checkpoint before that; "
                "nexus-ds adopt DIR --from NEXUS --approximate sets it back"
            )


def moe_config(
    dense_config: ConfigJson,
    experts: int,
    top_k: int,
    router_input: str = "token",
) -> ConfigJson:
    """Return the complete config.json of the mixture that a dense model's branches become.

    Args:
        dense_config: config.json of a model of `families.FAMILIES`.
        experts: number of routed experts.
        top_k: routed experts per token.
        router_input: token | context; the latter is no stock Qwen2-MoE and says so by its
            model_type.

    Raises:
        UnsupportedModelError: a router input that the family's form can't have.
    """
    sizes = settings(dense_config)
    family = family_of(dense_config)
    context = router_input == "context"
    if context and family.mixture != "qwen2_moe":
        raise UnsupportedModelError(
            f"router.input=context: a mixture of {family.name} can't be written with it; "
            "leave it at token"
        )
    written = _common(dense_config, sizes) | {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": sizes.ffn_size,
        "shared_expert_intermediate_size": sizes.ffn_size,
        **FORM,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }
    if family.mixture == "qwen2_moe":
        return both_ropes(written | _as_qwen2_moe(dense_config, sizes, context))
    if family.mixture == QWEN3_NEXT:
        return both_ropes(written | _as_qwen3_next(family, sizes) | _linear(sizes))
    kept = {key: value for key, value in dense_config.items() if key != "torch_dtype"}
    named = {"model_type": NATIVE + family.name, "architectures": [native_class(family.name)]}
    # the key that the experts' block asks for, whatever the family's own is
    named["hidden_act"] = sizes.activation
    return kept | {key: written[key] for key in NATIVE_KEYS} | named


def _common(dense_config: ConfigJson, sizes: DenseSettings) -> ConfigJson:
    """Return what all translated forms say of a dense model."""
    own = filled(dense_config)
    tokens = {key: own[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        # `torch_dtype` is the key of transformers before 5
        "dtype": dense_config.get("dtype") or dense_config.get("torch_dtype") or "float32",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "hidden_act": sizes.activation,
        "rms_norm_eps": sizes.norm_eps,
        "max_position_embeddings": own["max_position_embeddings"],
        "rope_parameters": dict(sizes.rope),
        "attention_dropout": own["attention_dropout"] or 0.0,
        "initializer_range": own["initializer_range"],
        "layer_types": list(sizes.layer_types),
        "use_cache": True,
        **tokens,
    }


def _as_qwen2_moe(dense_config: ConfigJson, sizes: DenseSettings, context: bool) -> ConfigJson:
    config: ConfigJson = {
        "architectures": ["NexusMoeForCausalLM" if context else "Qwen2MoeForCausalLM"],
        "model_type": CONTEXT_MODEL if context else "qwen2_moe",
        "qkv_bias": sizes.qkv_bias,
        "tie_word_embeddings": sizes.tied_embeddings,
        "use_sliding_window": sizes.sliding_window is not None,
        "sliding_window": sizes.sliding_window,
    }
    if sizes.sliding_window is not None:
        # where flash attention of transformers 4 begins with windows; 5 goes by layer_types
        config["max_window_layers"] = sizes.layer_types.index(SLIDING)
    # transformers would take a null as the size itself, and what is missing as the rest's share
    implied = sizes.hidden_size // sizes.heads
    if dense_config.get("head_dim") is not None or sizes.head_dim != implied:
        config["head_dim"] = sizes.head_dim
    return config


def _as_qwen3_next(family: Family, sizes: DenseSettings) -> ConfigJson:
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": QWEN3_NEXT,
        "head_dim": sizes.head_dim,
        "attention_bias": False,
        # said beside rope_parameters too, where SGLang and llama.cpp look for it
        "partial_rotary_factor": 1.0,
        # SGLang and llama.cpp count layers by it, not by layer_types
        "full_attention_interval": 1,
        **LINEAR_ATTENTION,
        # vLLM never ties a Qwen3-Next: the head is written out
        "tie_word_embeddings": False,
        SOURCE: {"model_type": family.name, "tie_word_embeddings": sizes.tied_embeddings},
    }


def _linear(sizes: DenseSettings) -> ConfigJson:
    """Return what a Qwen3-Next says of Qwen3.5's layers; nothing of Qwen3's."""
    if not sizes.linear:
        return {}
    types = sizes.layer_types
    # of layers in no such order there is no right answer
    interval = types.index(FULL) + 1 if FULL in types else sizes.layers + 1
    return {
        **sizes.linear,
        "partial_rotary_factor": sizes.rope["partial_rotary_factor"],
        "full_attention_interval": interval,
    }


def _check_form(config: ConfigJson, where: str) -> None:
    """Raise CheckpointError for a config.json that `moe_config` could not have written."""
    refuse_odd_type(config, where)
    found = config.get("model_type")
    if found not in MIXTURES:
        raise CheckpointError(
            f"{where}: model_type is {found!r}, a Nexus checkpoint has 'qwen2_moe' or "
            f"{CONTEXT_MODEL!r}; give one that nexus-ds upcycle has made"
        )
    # a Qwen3-Next that does not say otherwise renormalises
    stated = {} if found == QWEN3_NEXT else FORM
    for key, value in FORM.items():
        if config.get(key, stated.get(key)) != value:
            raise CheckpointError(
                f"{where}: {key} is {config.get(key)!r}, a Nexus checkpoint has {value!r}"
            )
    refuse_activation(config, where)
    refuse_in_any_form(config, where)


def check_experts(config: ConfigJson, tensors: int, where: str) -> None:
    """Raise CheckpointError for sizes of experts that are none, or more experts than tensors.

    `stored` has some names for each expert of each layer: a false number would fill the memory.
    """
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        positive(config, key, where)
    experts = config["num_experts"] * positive(config, "num_hidden_layers", where)
    if experts > tensors:
        raise CheckpointError(
            f"{where}: num_experts is {config['num_experts']} in {config['num_hidden_layers']} "
            f"layers, but the model has {tensors} tensors; the configuration is damaged or of "
            "another model"
        )


def open_moe(directory: Path, norms_of: Path | None = None) -> tuple[ConfigJson, Headers]:
    """Open the model part of a Nexus checkpoint: config.json and the checked tensors.

    Args:
        directory: the checkpoint.
        norms_of: of a translated form, the checkpoint that has the norms as they were; None: this
            one.

    Returns:
        config.json, and the tensors under the names of `stored`, whatever the form on disk.

    Raises:
        CheckpointError: not a mixture of a form that `moe_config` describes, or incomplete.
        UnsupportedModelError: code hooks.
    """
    directory = require_directory(Path(directory))
    refuse_other_weights(directory)
    config = read_json_object(directory, "config.json")
    where = str(directory / "config.json")
    refuse_hooks(config, where)
    _check_form(config, where)
    raw = Headers(directory)
    check_experts(config, len(raw.names()), where)
    # `where` starts the messages: read once here, before the table reads it again
    settings(config, where)
    if config["model_type"] != QWEN3_NEXT:
        config = as_stored(config, raw)
    reader = as_dense(raw, config, norms_of)
    tied = settings(config, where).tied_embeddings
    table = stored(config)
    gates = {name for name, entry in table.items() if entry.role is Role.SHARED_GATE}
    fp32 = gates | {name for name, entry in table.items() if entry.fp32}
    check_tensors(reader, {name: entry.shape for name, entry in table.items()}, tied, fp32)
    return config, reader
