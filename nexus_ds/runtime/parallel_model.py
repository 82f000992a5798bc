"""A Nexus checkpoint as the model that trains: each rank reads its own routed experts and the dense
part, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ds.checkpoint.build import DTYPES, NexusParts, _empty_skeleton, _fill, load_stock
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.model.experts import FeedForward
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement
from nexus_ds.settings import Config, RouterConfig


def _zero_ffn(hidden_size: int, ffn_size: int, dtype: torch.dtype) -> FeedForward:
    ffn = FeedForward(hidden_size, ffn_size).to(dtype)
    for parameter in ffn.parameters():
        nn.init.zeros_(parameter)
    return ffn


def _nexus_block(
    parts: NexusParts, layer: int, placement: Placement, router: RouterConfig, grouped_mm: bool
) -> NexusMoE:
    shared = parts.shared(layer)
    ffn_size, hidden_size = shared.gate_proj.weight.shape
    local = [
        _zero_ffn(hidden_size, ffn_size, parts.dtype)
        if expert is None
        else parts.routed(layer, expert)
        for expert in placement.local_experts()
    ]
    projection, inputs_EM = parts.projection(layer)
    gate = NexusRouter(
        hidden_size,
        placement,
        parts.sidecar.router.top_k,
        projection,
        inputs_EM,
        router.load_balance,
        router.z_loss,
        parts.mean(layer),
    )
    if projection is None:
        gate.gate.weight = nn.Parameter(parts.rows(layer))
    return NexusMoE(placement, local, shared, gate, grouped_mm)


def leave(module: nn.Module) -> None:
    """Leave a module as it is."""


def _assemble(
    directory: Path,
    dtype: torch.dtype,
    block: Callable[[NexusParts, int], nn.Module],
    partition: Callable[[nn.Module], None] = leave,
) -> Any:
    """Build a model part by part: embeddings, then each layer, then the rest; `partition` gets each
    part once it is read."""
    parts = NexusParts(directory, dtype)
    model = _empty_skeleton(directory, parts.config, dtype)
    tied = model.config.tie_word_embeddings
    _fill(model, "model.embed_tokens.", parts.reader, dtype)
    if tied:
        model.tie_weights()
    partition(model.model.embed_tokens)
    for index, layer in enumerate(model.model.layers):
        _fill(model, f"model.layers.{index}.", parts.reader, dtype)
        layer.mlp = block(parts, index)
        partition(layer)
    for name, module in [("model.norm.", model.model.norm)] + [("lm_head.", model.lm_head)] * (
        not tied
    ):
        _fill(model, name, parts.reader, dtype)
        partition(module)
    return model


def load_nexus(
    directory: Path,
    dtype: torch.dtype,
    placement: Placement,
    router: RouterConfig,
    grouped_mm: bool,
    partition: Callable[[nn.Module], None] = leave,
) -> Any:
    """Load a Nexus checkpoint for training: NexusMoE blocks that hold the experts of `placement`.

    Args:
        directory: of the checkpoint.
        dtype: working dtype.
        placement: which routed experts to read.
        router: coefficients of the router's losses.
        grouped_mm: grouped matrix products for the experts.
        partition: called with each part of the model as soon as it is read; under ZeRO-3 it keeps this
            rank's shard only, so that no more than one layer is ever whole.
    """
    return _assemble(
        directory,
        dtype,
        lambda parts, layer: _nexus_block(parts, layer, placement, router, grouped_mm),
        partition,
    )


def load_for_training(
    config: Config,
    placement: Placement | None,
    grouped_mm: bool,
    partition: Callable[[nn.Module], None] = leave,
) -> Any:
    """Load `config.model.path`, dense or Nexus, in the working dtype.

    Args:
        config: the run's configuration.
        placement: which routed experts this rank holds; None for a dense model.
        grouped_mm: grouped matrix products for the experts.
        partition: see `load_nexus`; a dense model is read whole and then settled.
    """
    directory, dtype = Path(config.model.path), DTYPES[config.model.dtype]
    if placement is not None:
        verify_expert_embeddings(directory)
        return load_nexus(directory, dtype, placement, config.router, grouped_mm, partition)
    model = load_stock(directory, dtype)
    partition(model)
    return model
