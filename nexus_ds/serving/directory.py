"""A mixture as a directory of safetensors for another program: just what it reads, and checked.

The weights are copied in their dtype, by several threads and without torch; a program gets beside
them what it asks for (`additions`), and neither the router's sidecar nor what tells how the model
was made.
Shapes: H hidden size.
Not covered: GGUF (`gguf_file`), what the hub is shown (`hub`).
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.config_json import ConfigJson, read_generation_config
from nexus_ds.checkpoint.dense_settings import both_ropes, filled
from nexus_ds.checkpoint.families.record import (
    EMBEDDING,
    FULL,
    HEAD,
    DenseSettings,
)
from nexus_ds.checkpoint.families.rotary import attention_factor
from nexus_ds.checkpoint.file_layout import in_files
from nexus_ds.checkpoint.forms import PLAIN, SOURCE
from nexus_ds.checkpoint.headers import (
    INDEX,
    SINGLE,
    Headers,
    Plan,
    kept_open,
    tensor_bytes,
)
from nexus_ds.checkpoint.json_files import confined
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.checkpoint.qwen2_moe import (
    check_shared_gates,
    open_moe,
    planned,
)
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.errors import ServingError
from nexus_ds.outputs import copy_file, write_json
from nexus_ds.serving.targets import Mixture, Target, next_without_linear

LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*")
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Opened:
    """A checkpoint that can be exported: whole, and sound."""

    directory: Path
    mixture: Mixture
    reader: Headers
    """Of the dense family's names."""
    raw: Headers
    """Of the names in the files."""

    @property
    def config(self) -> ConfigJson:
        """Its config.json."""
        return self.mixture.config


def open_checkpoint(directory: Path) -> Opened:
    """Open a Nexus checkpoint.

    Raises:
        CheckpointError: none, damaged, rows that are not P(D), or trained elsewhere with its shared
            expert's gate.
        UnsupportedModelError: code hooks.
    """
    # names, shapes and what config.json says
    config, headers = open_moe(directory)
    # what no header tells
    verify_expert_embeddings(directory)
    check_shared_gates(headers, config["num_hidden_layers"])
    return Opened(Path(directory), Mixture.of(config), headers, Headers(directory))


# Weights ------------------------------------------------------------------------------------------


def _biases(sizes: DenseSettings) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the biases of q, k and v, which are zero where a family has none."""
    rows = {"q_proj": sizes.query_width, "k_proj": sizes.kv_width, "v_proj": sizes.kv_width}
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(sizes.layers):
        for part, width in rows.items():
            found[f"model.layers.{layer}.self_attn.{part}.bias"] = (width,)
    return found


def zero_biases(target: Target, mixture: Mixture) -> dict[str, tuple[int, ...]]:
    """Return what a program's Qwen2-MoE always has and this mixture has not."""
    # QKVParallelLinear(bias=True), whatever qkv_bias says
    hard_coded = target.name == "vllm" and mixture.form in PLAIN
    return _biases(mixture.sizes) if hard_coded and not mixture.sizes.qkv_bias else {}


def own_plan(opened: Opened) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor that the mixture's form has in its files.

    The output layer is among them, also where a checkpoint of before has it in the embeddings
    alone.
    """
    raw = opened.raw
    # one for all but what may be in fp32, as `open_moe` has checked
    plan = in_files(planned(opened.config, raw.info(EMBEDDING).dtype), opened.config)
    return {
        name: (raw.info(name).dtype if name in raw else dtype, shape)
        for name, (dtype, shape) in plan.items()
    }


def _source(opened: Opened, name: str) -> str:
    """Return the name of the tensor that is copied to a name."""
    return EMBEDDING if name == HEAD and HEAD not in opened.raw else name


def _piece(opened: Opened, name: str, files: NewFiles) -> assembly.Piece:
    """Return how a planned tensor is written: a copy, or zeros where the checkpoint has none."""
    place, source = files.place(name), _source(opened, name)
    if source not in opened.raw:
        return assembly.Fill(place, 0.0)
    label = f"{opened.directory}: tensor {source}"
    return assembly.Copy(place, assembly.stored(opened.raw, source, label))


def write_weights(opened: Opened, target: Target, out: Path) -> Plan:
    """Write the weights that a program reads, with an index; return what was written.

    Raises:
        CheckpointError: not enough space, NaN or infinite weights.
    """
    own = own_plan(opened)
    dtype = own[EMBEDDING][0]
    zeros = zero_biases(target, opened.mixture)
    plan = own | {name: (dtype, shape) for name, shape in zeros.items()}
    with NewFiles(out, plan) as files:
        assembly.assemble([assembly.Job([_piece(opened, name, files)]) for name in plan])
        for name in plan:
            files.wrote(name)
    if not (out / INDEX).is_file():
        # loaders that take every *.safetensors beside it go by an index where there is one
        total = sum(tensor_bytes(*entry) for entry in plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(plan, SINGLE)}
        write_json(out / INDEX, index)
    return plan


def check_weights(opened: Opened, out: Path, plan: Plan) -> None:
    """Read what was written and compare it with the checkpoint, bit by bit.

    Raises:
        ServingError: a tensor that is missing, too many, or another one; a second file of tensors
            that a loader would take.
    """
    written = Headers(out)
    files = {path.name for path in out.glob("*.safetensors")}
    listed = {path.name for path in written.files()}
    odd = [*(files - listed), *set(written.names()).symmetric_difference(plan)]
    if not odd:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            # one is enough: a large model takes minutes
            found = pool.map(partial(_is_planned, opened, written, plan), plan)
            others = (name for name, same in zip(plan, found, strict=True) if not same)
            odd += [name for name in [next(others, "")] if name]
            pool.shutdown(cancel_futures=True)
    if odd:
        raise ServingError(
            f"{out}: {odd[0]} is not what was to be written; the disk or its memory is at fault, "
            "export again"
        )


def _is_planned(opened: Opened, written: Headers, plan: Plan, name: str) -> bool:
    """Return whether a written tensor is the checkpoint's, or zeros where it has none."""
    info, (dtype, shape) = written.info(name), plan[name]
    if (info.dtype, info.shape) != (dtype, tuple(shape)):
        return False
    source = _source(opened, name)
    with kept_open():
        chunks = written.chunks(name)
        # as bytes: a NaN is not equal to itself
        if source in opened.raw:
            return all(a == b for a, b in zip(opened.raw.chunks(source), chunks, strict=True))
        return not any(any(chunk) for chunk in chunks)


# Configuration ------------------------------------------------------------------------------------


def served_config(opened: Opened, target: Target) -> ConfigJson:
    """Return the config.json that a program reads."""
    mixture = opened.mixture
    config = both_ropes(json.loads((opened.directory / "config.json").read_text("utf-8")))
    # how the dense family's own config.json differs: of use with the sidecar alone
    config.pop(SOURCE, None)
    if zero_biases(target, mixture):
        config["qkv_bias"] = True
    if target.name == "transformers4":
        config |= _factor_of_longrope(mixture, config, "attention_factor")
    if target.name in ("vllm", "sglang"):
        config |= _factor_of_longrope(mixture, config, "short_mscale", "long_mscale")
    if _uncached(target, mixture):
        config["use_cache"] = False
    return config


def _factor_of_longrope(mixture: Mixture, config: ConfigJson, *keys: str) -> ConfigJson:
    """Return the keys that state a longrope's factor, which others compute from other numbers."""
    if mixture.rope != "longrope":
        return {}
    factor = attention_factor(mixture.sizes.rope, filled(config))
    rope = dict(mixture.sizes.rope) | dict.fromkeys(keys, factor)
    return {"rope_parameters": rope, "rope_scaling": rope}


def _uncached(target: Target, mixture: Mixture) -> bool:
    """Return whether a program's cache is wrong for a mixture that it computes right without."""
    windows = mixture.windows and FULL not in mixture.sizes.layer_types
    wrong = windows or next_without_linear(mixture)
    return target.name == "transformers4" and wrong


def copy_licenses(source: Path, out: Path) -> None:
    """Copy the licenses' texts that lie beside a model."""
    for pattern in LICENSES:
        for path in sorted(source.glob(pattern)):
            copy_file(confined(source, path.name), out / path.name)


def write_directory(opened: Opened, target: Target, out: Path) -> int:
    """Write all that a program reads into an empty directory and check it; return the tensors.

    Raises:
        CheckpointError: not enough space, no tokenizer that can be taken along.
        ServingError: what stands there is not what was to be written.
    """
    # first: the tokenizer's class depends on it
    write_json(out / "config.json", served_config(opened, target))
    generation = read_generation_config(opened.directory)
    if _uncached(target, opened.mixture):
        generation = (generation or {}) | {"use_cache": False}
    if generation is not None:
        write_json(out / GENERATION, generation)
    copy_tokenizer(opened.directory, out)
    copy_licenses(opened.directory, out)
    plan = write_weights(opened, target, out)
    check_weights(opened, out, plan)
    return len(plan)
