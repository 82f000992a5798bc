"""Models in memory: a checkpoint directory becomes a transformers model.

The MoE blocks are those of the caller's choice. A rank reads its own routed experts and the dense
part, nothing else; tensors are read one at a time, and each layer can be partitioned before the
next one is read.
Shapes: E routed experts, H hidden size, F inner width, M domain embedding.
Not covered: dense models layer by layer (they are small enough for one device, or they could not
become an expert).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import FFN_PARTS
from nexus_ds.checkpoint.forms import PLAIN
from nexus_ds.checkpoint.loading import know_model_type, quiet_transformers, told_in_one_line
from nexus_ds.checkpoint.projection_module import domain_inputs, load_projection
from nexus_ds.checkpoint.qwen2_moe import (
    check_shared_gates,
    expert_name,
    gate_name,
    mean_name,
    open_moe,
    shared_name,
    stored,
)
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError
from nexus_ds.model.experts import FeedForward
from nexus_ds.model.router import Projection
from nexus_ds.settings import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformers_config(directory: Path) -> Any:
    """Return the checkpoint's configuration.

    Nothing but local JSON is read, and no code of the checkpoint is run.

    Raises:
        CheckpointError: transformers takes no such config.json.
    """
    from transformers import AutoConfig

    know_model_type(directory)
    with told_in_one_line(directory):
        return AutoConfig.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
        )


def load_stock(directory: Path, dtype: torch.dtype) -> Any:
    """Load any checkpoint as plain transformers does.

    It is the oracle of the export, and the way dense models are trained.

    Raises:
        CheckpointError: damaged files, or files that transformers can't load.
    """
    from transformers import AutoModelForCausalLM

    know_model_type(directory)
    # checks headers, ranges and paths, which transformers trusts
    TensorReader(directory)
    quiet_transformers()
    with told_in_one_line(directory):
        return AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )


def new_dense(model: ModelConfig, vocabulary: int, eos: int, seed: int) -> Any:
    """Return a new Llama (fp32) with the sizes of the recipe, initialised under `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads or model.heads,
        max_position_embeddings=model.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied_embeddings,
        # Llama's own default is an id of its own vocabulary
        bos_token_id=None,
        eos_token_id=eos,
    )
    # the weights depend on the seed alone, not on what was drawn before
    set_seed(seed)
    return LlamaForCausalLM(config)


def empty_skeleton(directory: Path, config_json: ConfigJson, dtype: torch.dtype) -> Any:
    """Return the family's own model, or a Qwen2-MoE, without feed-forward blocks.

    It is on the meta device, but for its rotary buffers: they are computed, not read. What is on
    disk, which may be another form of it, stays with it as `config_json`.

    Raises:
        CheckpointError: transformers makes no model of that config.json.
    """
    tied = settings(config_json).tied_embeddings
    with told_in_one_line(directory):
        if config_json["model_type"] in PLAIN:
            model = _empty_qwen2_moe(directory, tied, dtype)
        else:
            # imports transformers' modelling code of that family
            from nexus_ds.checkpoint.native import empty_dense

            model = empty_dense(config_json, tied, dtype)
    model.config_json = config_json
    return model


def _empty_qwen2_moe(directory: Path, tied: bool, dtype: torch.dtype) -> Any:
    from transformers import Qwen2MoeForCausalLM

    config = transformers_config(directory)
    config.tie_word_embeddings = tied
    # Without experts, layers get dense blocks, which are cheap to make; they are dropped below.
    experts = config.num_experts
    config.num_experts = 0
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM._from_config(config, dtype=dtype)
    config.num_experts = experts
    model.config.num_experts = experts
    decoder = model.model
    # its frequencies are buffers that no file has: made once more, off the meta device
    rotary = type(decoder.rotary_emb)
    decoder.rotary_emb = rotary(config)
    for layer in decoder.layers:
        layer.mlp = nn.Identity()
    return model


def fill(model: Any, prefix: str, reader: TensorReader, dtype: torch.dtype) -> None:
    """Read every tensor under `prefix` that stands outside the MoE blocks."""

    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in names:
        if not name.startswith(prefix):
            continue
        if name not in reader:
            raise CheckpointError(
                f"tensor {name} is missing; expected every weight of {model.config.model_type}"
            )
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = reader.read(name).to(dtype)
        module.register_parameter(last, nn.Parameter(weight))


class NexusParts:
    """Reads the parts of one MoE block from a Nexus checkpoint.

    Raises:
        CheckpointError: damaged, or the shared expert's gate has been trained since, which no layer
            here computes.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.config, reader = open_moe(directory)
        self.reader = TensorReader.of(reader)
        self.sidecar = read_sidecar(directory)
        self.dtype = dtype
        self.experts = len(self.sidecar.experts)
        self.stored = stored(self.config)
        self.activation = settings(self.config).activation
        # no layer here computes a gate: one that was trained would be dropped in silence
        check_shared_gates(self.reader, self.config["num_hidden_layers"])

    def shared(self, layer: int) -> FeedForward:
        """Return the shared expert, as it is computed with."""
        names = {part: shared_name(layer, part) for part in FFN_PARTS}
        return self._ffn(names)

    def routed(self, layer: int, expert: int) -> FeedForward:
        """Return one routed expert."""
        names = {part: expert_name(layer, expert, part) for part in FFN_PARTS}
        return self._ffn(names)

    def _ffn(self, names: dict[str, str]) -> FeedForward:
        """Read one feed-forward network; `names` are those of its parts."""
        ffn_size, hidden_size = self.stored[names["gate_proj"]].shape
        with torch.device("meta"):
            ffn = FeedForward(hidden_size, ffn_size, self.activation)
        for part, name in names.items():
            weight = self.reader.read(name).to(self.dtype)
            # exact: the scale is a power of two
            weight = weight / self.stored[name].scale
            linear = getattr(ffn, part)
            linear.weight = nn.Parameter(weight)
        return ffn

    def projection(self, layer: int) -> tuple[Projection | None, Tensor | None]:
        """Return P in the working dtype and its input [E, M] in fp32; (None, None) for a linear
        router."""
        if self.sidecar.router.kind == "linear":
            return None, None
        projection = load_projection(self.sidecar, layer).to(self.dtype)
        # asked for once; all layers' fp32 weights would stay otherwise
        self.sidecar.projections[layer] = {}
        return projection, domain_inputs(self.sidecar)

    def rows(self, layer: int) -> Tensor:
        """Return the free rows [E, H] of a linear router."""
        return self.reader.read(gate_name(layer)).to(self.dtype)

    def mean(self, layer: int) -> Tensor | None:
        """Return what a router with the input `context` subtracts [H]; None for the input
        `token`."""
        if self.sidecar.router.input != "context":
            return None
        return self.reader.read(mean_name(layer)).to(self.dtype)
