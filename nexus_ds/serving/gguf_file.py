"""A mixture as one GGUF file, which llama.cpp and what is built on it read.

llama.cpp knows models by architecture. Two of them compute this mixture, gates by softmax and not
renormalised, a shared expert without a gate:

    glm4moe     all but the two below; it reads no RoPE factors and has no windows
    step35      llama3's RoPE as factors, sliding windows by layer; it has no biases

What they are named for differs in numbers that the file states. Weights keep their dtype; norms,
biases and the router are fp32, and its own tools, which quantise, leave the router so.
Shapes: E routed experts, H hidden size, F inner width, D head size.
Not covered: quantisation, several files, other architectures (qwen2moe divides by the shared
expert's gate, which can be 0; qwen3next renormalises the gates).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nexus_ds.checkpoint.families.record import (
    EMBEDDING,
    FULL,
    HEAD,
)
from nexus_ds.checkpoint.headers import ITEM_BYTES
from nexus_ds.checkpoint.qwen2_moe import (
    Role,
    Stored,
    expert_name,
    stored,
)
from nexus_ds.checkpoint.values import encoded, read_values
from nexus_ds.errors import (
    CheckpointError,
    ConfigError,
    ServingError,
)
from nexus_ds.outputs import naming
from nexus_ds.serving.directory import Opened
from nexus_ds.serving.gguf_words import Words
from nexus_ds.serving.targets import Mixture

if TYPE_CHECKING:
    from types import ModuleType

FILE = "model.gguf"
GLM, STEP = "glm4moe", "step35"
Value = bool | int | float | str | list[bool] | list[int]
Facts = dict[str, Value]
"""Of the file's metadata, by key."""
PARTS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
OUTSIDE = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
"""Names of tensors outside of the layers."""
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
IDLE_WIDTH = 32  # of an FFN that adds zeros
SOFTMAX = 1  # of expert_gating_func
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


def gguf_package() -> ModuleType:
    """Return the package that writes GGUF; ConfigError where it is not installed."""
    try:
        # an extra: nothing else needs it
        import gguf
    except ImportError as error:
        raise ConfigError(
            "--for llamacpp and ollama write with the package gguf, which is not installed; "
            "pip install gguf"
        ) from error
    return gguf


def architecture(mixture: Mixture) -> str:
    """Return the architecture of llama.cpp that computes a mixture."""
    return STEP if mixture.windows or mixture.rope == "llama3" else GLM


# Metadata -----------------------------------------------------------------------------------------


def facts_of(mixture: Mixture) -> Facts:
    """Return what the file says of the model, by keys without the architecture's name."""
    sizes = mixture.sizes
    config = mixture.config
    facts: Facts = {
        "block_count": sizes.layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": sizes.hidden_size,
        "vocab_size": sizes.vocabulary,
        "feed_forward_length": sizes.ffn_size,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": sizes.norm_eps,
        "rope.freq_base": float(sizes.rope["rope_theta"]),
        "rope.dimension_count": sizes.head_dim,
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": sizes.ffn_size,
        "expert_gating_func": SOFTMAX,
        "expert_weights_norm": False,
        "expert_weights_scale": 1.0,
    }
    if mixture.rope in ("linear", "yarn"):
        facts["rope.scaling.type"] = mixture.rope
        facts["rope.scaling.factor"] = float(sizes.rope["factor"])
    if mixture.rope == "yarn":
        # its other numbers are llama.cpp's own, too
        first = sizes.rope["original_max_position_embeddings"]
        facts["rope.scaling.original_context_length"] = first
    more = _step_facts(mixture) if architecture(mixture) == STEP else _glm_facts()
    return facts | more


def _glm_facts() -> Facts:
    return {
        "expert_shared_count": 1,
        "leading_dense_block_count": 0,
        "nextn_predict_layers": 0,
    }


def _step_facts(mixture: Mixture) -> Facts:
    sizes = mixture.sizes
    windows = [kind != FULL for kind in sizes.layer_types]
    facts: Facts = {
        "expert_shared_feed_forward_length": sizes.ffn_size,
        # a layer without a window turns half of what is stated
        "rope.dimension_count": 2 * sizes.head_dim,
        "rope.dimension_count_swa": sizes.head_dim,
        "rope.freq_base_swa": float(sizes.rope["rope_theta"]),
        "attention.sliding_window": sizes.sliding_window or 1,
        "attention.sliding_window_pattern": windows,
    }
    if any(windows):
        return facts
    # of the idle layer one head of each kind
    heads = {"head_count": sizes.heads, "head_count_kv": sizes.kv_heads}
    for key, count in heads.items():
        facts[f"attention.{key}"] = [count] * sizes.layers + [1]
    return facts | {
        "block_count": sizes.layers + 1,
        "feed_forward_length": IDLE_WIDTH,
        "attention.sliding_window_pattern": [*windows, True],
    }


def rope_factors(mixture: Mixture) -> np.ndarray:
    """Return by what llama3's RoPE divides the frequency of each pair of channels, [D/2] fp32.

    Wavelengths up to L / high_freq_factor stay, those from L / low_freq_factor on are stretched by
    `factor`, and between them it goes from one to the other; L: positions of the first training.
    """
    rope = mixture.sizes.rope
    width = mixture.sizes.head_dim
    # in fp64; transformers' fp32 differs in the last bit
    exponent_D = np.arange(0, width, 2) / width
    length_D = 2 * math.pi * float(rope["rope_theta"]) ** exponent_D
    turns_D = rope["original_max_position_embeddings"] / length_D
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept_D = np.clip((turns_D - low) / (high - low), 0, 1)
    speed_D = kept_D + (1 - kept_D) / rope["factor"]
    return (1 / speed_D).astype(np.float32)


# Tensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    """Names in the checkpoint; several are stacked."""
    scale: float = 1.0
    """The checkpoint's is so many times as large."""
    full: bool = False
    """fp32 whatever the model is in."""
    values: np.ndarray | None = None
    """Of a tensor that is not in the checkpoint."""


def _layer_name(name: str, arch: str) -> str:
    """Return a dense weight's name within a layer."""
    part, _, kind = name.split(".", 3)[3].rpartition(".")
    after = "post_attention_norm" if arch == GLM else "ffn_norm"
    return f"{(INSIDE | {'post_attention_layernorm': after})[part]}.{kind}"


def _experts(layer: int, entry: Stored, experts: int) -> tuple[str, Entry]:
    names = tuple(expert_name(layer, expert, entry.part) for expert in range(experts))
    return f"{PARTS[entry.part]}_exps.weight", Entry((experts, *entry.shape), names)


def _layer_entry(name: str, entry: Stored, arch: str, experts: int) -> tuple[str, Entry] | None:
    """Return what becomes of one tensor of a layer; None of one that comes with others."""
    if entry.role is Role.ROUTER:
        return "ffn_gate_inp.weight", Entry(entry.shape, (name,), full=True)
    if entry.role is Role.SHARED:
        # no gate halves it there
        return f"{PARTS[entry.part]}_shexp.weight", Entry(entry.shape, (name,), entry.scale)
    if entry.role is Role.ROUTED and not entry.expert:
        return _experts(entry.layer, entry, experts)
    if entry.role is Role.DENSE:
        vector = len(entry.shape) == 1
        return _layer_name(name, arch), Entry(entry.shape, (name,), full=vector)
    return None


def _idle_layer(mixture: Mixture) -> Iterator[tuple[str, Entry]]:
    """Yield a layer that adds zeros: one head, and an FFN without experts.

    step35 does not load without a window in some layer, and reads no RoPE factors in one with it.
    """
    sizes = mixture.sizes
    hidden, width = sizes.hidden_size, sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (width, hidden),
        "attn_k": (width, hidden),
        "attn_v": (width, hidden),
        "attn_output": (hidden, width),
        "ffn_norm": (hidden,),
        "ffn_gate": (IDLE_WIDTH, hidden),
        "ffn_up": (IDLE_WIDTH, hidden),
        "ffn_down": (hidden, IDLE_WIDTH),
    }
    for part, shape in shapes.items():
        zeros = np.zeros(shape, np.float32)
        yield f"blk.{sizes.layers}.{part}.weight", Entry(shape, values=zeros)


def entries(mixture: Mixture) -> Iterator[tuple[str, Entry]]:
    """Yield the file's tensors by name, in order."""
    arch = architecture(mixture)
    experts = mixture.config["num_experts"]
    table = stored(mixture.config)
    if mixture.rope == "llama3":
        factors = rope_factors(mixture)
        yield "rope_freqs.weight", Entry(factors.shape, values=factors)
    for name, entry in table.items():
        if entry.layer < 0:
            yield OUTSIDE[name], Entry(entry.shape, (name,), full=len(entry.shape) == 1)
            continue
        found = _layer_entry(name, entry, arch, experts)
        if found:
            yield f"blk.{entry.layer}.{found[0]}", found[1]
        if found and entry.role is Role.ROUTER and arch == GLM:
            # it has a bias for each expert in choosing
            none_E = np.zeros(experts, np.float32)
            yield f"blk.{entry.layer}.exp_probs_b.bias", Entry((experts,), values=none_E)
    if arch == STEP and not mixture.windows:
        yield from _idle_layer(mixture)
    if HEAD not in table and arch == STEP:
        yield OUTSIDE[HEAD], Entry(table[EMBEDDING].shape, (EMBEDDING,))


def _values(opened: Opened, entry: Entry) -> np.ndarray:
    """Return a tensor as the file has it: fp32, or the bytes of 16 bits."""
    if entry.values is not None:
        return entry.values
    dtype = "F32" if entry.full else opened.reader.info(entry.sources[0]).dtype
    # one layer's experts at a time: that is all the memory it takes
    parts = []
    for name in entry.sources:
        whole = read_values(opened.reader, name)
        whole = whole / np.float32(entry.scale)
        parts.append(encoded(whole, dtype))
    stacked = np.concatenate(parts)
    if dtype == "F32":
        return stacked.view(np.float32).reshape(entry.shape)
    # numpy has no bf16
    return stacked.reshape(*entry.shape[:-1], ITEM_BYTES[dtype] * entry.shape[-1])


# The file -----------------------------------------------------------------------------------------


def _add_words(writer: object, words: Words) -> None:
    """Add the tokenizer to a file's metadata."""
    add = {key: getattr(writer, f"add_{key}") for key in ("bool", "array", "uint32", "string")}
    prefix = "tokenizer.ggml."
    add["string"](f"{prefix}model", words.model)
    add["string"](f"{prefix}pre", words.way)
    lists = {"tokens": words.tokens, "token_type": words.types}
    lists |= {"merges": words.merges, "scores": words.scores}
    for key, values in lists.items():
        if values:
            add["array"](prefix + key, values)
    for role, index in words.roles.items():
        add["uint32"](f"{prefix}{role}_token_id", index)
    add["bool"](f"{prefix}add_bos_token", words.begins)
    add["bool"](f"{prefix}add_space_prefix", words.spaced)
    if words.template:
        add["string"]("tokenizer.chat_template", words.template)


def _add_facts(writer: object, arch: str, facts: Facts) -> None:
    """Add numbers to a file's metadata, each in the type that llama.cpp expects."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in facts.items():
        add = getattr(writer, f"add_{kinds[type(value)]}")
        add(f"{arch}.{key}", value)


def write_gguf(opened: Opened, words: Words, path: Path) -> int:
    """Write the file and read it again; return its tensors.

    Raises:
        CheckpointError: not enough space.
        OSError: the disk was full all the same; it names the file.
        ConfigError: without the package that writes it.
        ServingError: what stands there is not what was to be written.
    """
    gguf = gguf_package()
    arch = architecture(opened.mixture)
    # in the order of the file: the library writes what was announced, one after the other
    table = dict(entries(opened.mixture))
    dtype = opened.reader.info(EMBEDDING).dtype
    # one file: those who split it have gguf-split
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(opened.directory.name)
    writer.add_file_type(FILE_TYPES[dtype])
    _add_facts(writer, arch, facts_of(opened.mixture))
    _add_words(writer, words)
    total = 0
    for name, entry in table.items():
        half = dtype != "F32" and not entry.full and entry.values is None
        # the library reads the shape off the bytes
        shape = (*entry.shape[:-1], 2 * entry.shape[-1]) if half else entry.shape
        kind = np.dtype(np.uint8 if half else np.float32)
        size = math.prod(shape) * kind.itemsize
        raw = gguf.GGMLQuantizationType[dtype] if half else None
        writer.add_tensor_info(name, shape, kind, size, raw)
        total += size
    _refuse_full_disk(path.parent, total)
    with naming(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in table.values():
            writer.write_tensor_data(_values(opened, entry))
        writer.close()
    _check(gguf, opened, table, path)
    return len(table)


def _refuse_full_disk(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise CheckpointError(
            f"{directory}: not enough space: need {size:,} bytes, free {free:,}; make room first"
        )


def _check(gguf: ModuleType, opened: Opened, table: dict[str, Entry], path: Path) -> None:
    """Read every tensor again; ServingError for one that is not what it was to be."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, entry in table.items():
        # out of the checkpoint once more, not what was held when writing
        expected = _values(opened, entry)
        there = found.pop(name, None)
        same = there is not None and there.data.tobytes() == expected.tobytes()
        if not same or there.shape.tolist() != list(reversed(entry.shape)):
            raise ServingError(
                f"{path}: {name} is not what was to be written; the disk or its memory is at "
                "fault, export again"
            )
