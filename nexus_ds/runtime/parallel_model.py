"""A checkpoint as the model that trains: each rank reads its own routed experts and the dense part.

Part by part, so that under ZeRO-3 no more than one layer is ever whole in a rank's memory.
Shapes: H hidden size, F inner width, E routed experts, M domain embedding.
Not covered: a dense model part by part (it is read whole on every rank, then partitioned).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nexus_ds.checkpoint.build import DTYPES, NexusParts, empty_skeleton, fill, load_stock
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.model.experts import FeedForward
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement
from nexus_ds.settings import Config, RouterConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Partition = Callable[[nn.Module], None]
"""What is done to each part of a model as soon as it is read."""


def keep_whole(module: nn.Module) -> None:
    """Let a module stay as it was read: every rank holds all of it."""


def _vacant(hidden_size: int, ffn_size: int, dtype: torch.dtype) -> FeedForward:
    """Return what a vacant slot holds: no token ever comes, and zeros stay zeros."""
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
        _vacant(hidden_size, ffn_size, parts.dtype)
        if expert is None
        else parts.routed(layer, expert)
        for expert in placement.local_experts()
    ]
    projection, inputs_EM = parts.projection(layer)
    gate = NexusRouter(
        hidden_size=hidden_size,
        placement=placement,
        top_k=parts.sidecar.router.top_k,
        projection=projection,
        domain_inputs_EM=inputs_EM,
        load_balance=router.load_balance,
        z_loss=router.z_loss,
        mean_H=parts.mean(layer),
    )
    if projection is None:
        gate.gate.weight = nn.Parameter(parts.rows(layer))
    return NexusMoE(placement, local, shared, gate, grouped_mm)


def load_nexus(
    directory: Path,
    dtype: torch.dtype,
    placement: Placement,
    router: RouterConfig,
    grouped_mm: bool,
    partition: Partition = keep_whole,
) -> PreTrainedModel:
    """Load a Nexus checkpoint for training: NexusMoE blocks that hold the experts of `placement`.

    Args:
        directory: of the checkpoint.
        dtype: working dtype.
        placement: which routed experts to read.
        router: coefficients of the router's losses.
        grouped_mm: grouped matrix products for the experts.
        partition: called with each part of the model as soon as it is read; under ZeRO-3 it keeps
            this rank's shard only, so that no more than one layer is ever whole.

    Raises:
        CheckpointError: damaged, incomplete, or with a trained gate of the shared expert.
    """
    parts = NexusParts(directory, dtype)
    model = empty_skeleton(directory, parts.config, dtype)
    tied = model.config.tie_word_embeddings
    fill(model, "model.embed_tokens.", parts.reader, dtype)
    if tied:
        # Before the embedding is partitioned: both names must be of one parameter by then.
        model.tie_weights()
    partition(model.model.embed_tokens)
    for index, layer in enumerate(model.model.layers):
        fill(model, f"model.layers.{index}.", parts.reader, dtype)
        layer.mlp = _nexus_block(parts, index, placement, router, grouped_mm)
        partition(layer)
    fill(model, "model.norm.", parts.reader, dtype)
    partition(model.model.norm)
    if not tied:
        fill(model, "lm_head.", parts.reader, dtype)
        partition(model.lm_head)
    return model


def load_for_training(
    config: Config,
    placement: Placement | None,
    grouped_mm: bool,
    partition: Partition = keep_whole,
) -> PreTrainedModel:
    """Load `config.model.path`, dense or Nexus, in the working dtype.

    Args:
        config: the run's configuration.
        placement: which routed experts this rank holds; None for a dense model.
        grouped_mm: grouped matrix products for the experts.
        partition: see `load_nexus`; a dense model is read whole and then partitioned.

    Raises:
        CheckpointError: damaged, or expert embeddings on disk that P(D) does not give.
    """
    directory = Path(config.model.path)
    dtype = DTYPES[config.model.dtype]
    if placement is None:
        model = load_stock(directory, dtype)
        partition(model)
        return model
    verify_expert_embeddings(directory)
    return load_nexus(directory, dtype, placement, config.router, grouped_mm, partition)
