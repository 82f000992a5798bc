"""A mixture `reduced` by some of its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nexus_ds.checkpoint.families import (
    FFN_PARTS,
)
from nexus_ds.checkpoint.qwen2_moe import (
    check_shared_gates,
    expert_name,
    gate_name,
    open_moe,
)
from nexus_ds.checkpoint.records import RemoveStep
from nexus_ds.checkpoint.sidecar import (
    read_sidecar,
    verify_expert_embeddings,
    versions,
)
from nexus_ds.errors import ConfigError
from nexus_ds.upcycling.blend import (
    Blend,
    Part,
    portable,
)
from nexus_ds.upcycling.new_checkpoint import NewModel, as_written, copy_of


def reduced(checkpoint: Path, names: Sequence[str]) -> NewModel:
    """Describe a mixture without some of its routed experts; nothing is written.

    Their FFNs and rows go, everything else is an exact copy: the softmax of the others renormalises
    by itself. What the experts gave to the averaged weights stays there.

    Raises:
        ConfigError: an unknown expert, or fewer experts left than a token chooses.
        CheckpointError: no Nexus checkpoint, a damaged one, or one that was trained elsewhere, with
            its shared expert's gate.
    """
    config, reader = open_moe(checkpoint)
    verify_expert_embeddings(checkpoint)
    check_shared_gates(reader, config["num_hidden_layers"])
    old = read_sidecar(checkpoint)
    known = [expert.name for expert in old.experts]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--expert {name}: the checkpoint has {', '.join(known)}; name one of these"
            )
    kept = [index for index, name in enumerate(known) if name not in names]
    if len(kept) < old.router.top_k or not kept:
        raise ConfigError(
            f"{len(kept)} experts would be left, but each token goes to {old.router.top_k}; keep at least as many"
        )
    sidecar = dataclasses.replace(
        old,
        experts=[old.experts[index] for index in kept],
        lineage=[
            *old.lineage,
            RemoveStep(checkpoint=portable(checkpoint), experts=list(names)),
        ],
        versions=versions(),
        vectors=old.vectors[kept],
    )
    tensors: dict[str, Blend | Tensor] = {}
    for name in reader.names():
        if ".mlp.experts." not in name:
            tensors[name] = copy_of(reader, name)
    for layer in range(config["num_hidden_layers"]):
        tensors[gate_name(layer)] = reader.read(gate_name(layer))[kept]
        for new, index in enumerate(kept):
            for part in FFN_PARTS:
                source = Part("checkpoint", reader, expert_name(layer, index, part))
                tensors[expert_name(layer, new, part)] = Blend([source])
    dtype = reader.info(gate_name(0)).dtype
    target = config | {"num_experts": len(kept)}
    return NewModel("remove", as_written(target, dtype), dtype, tensors, sidecar, checkpoint)
