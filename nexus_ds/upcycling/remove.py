"""A mixture `reduced` by some of its experts.

What an extension (paper section 2.3) appends is taken out again: the softmax over the others is
that of a mixture that never had them.
Shapes: n routed experts that stay, h hidden size.
Not covered: taking the experts' part out of the averaged weights; fitting the router anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.qwen2_moe import Role, Stored, check_shared_gates, expert_name, stored
from nexus_ds.checkpoint.records import RemoveStep, portable
from nexus_ds.checkpoint.sidecar import Sidecar, versions
from nexus_ds.checkpoint.values import read_floats
from nexus_ds.errors import ConfigError
from nexus_ds.upcycling.new_checkpoint import NewModel, copy_of, open_old
from nexus_ds.upcycling.sources import Blend, Part, Source


def reduced(checkpoint: Path, names: Sequence[str]) -> NewModel:
    """Describe a mixture without some of its routed experts; nothing is written.

    Their FFNs and rows go, everything else is an exact copy: the softmax of the others renormalises
    by itself. What the experts gave to the averaged weights stays there.

    Raises:
        ConfigError: an unknown expert, or fewer experts left than a token chooses.
        CheckpointError: no Nexus checkpoint, a damaged one, or one that was trained elsewhere, with
            its shared expert's gate.
    """
    mixture = open_old(checkpoint)
    layers = mixture.config["num_hidden_layers"]
    check_shared_gates(mixture.reader, layers)
    old = mixture.sidecar
    kept = _kept(old, names)
    step = RemoveStep(checkpoint=portable(checkpoint), experts=list(names))
    # the centre stays: P was trained on embeddings that it was taken from
    sidecar = dataclasses.replace(
        old,
        experts=[old.experts[index] for index in kept],
        lineage=[*old.lineage, step],
        versions=versions(),
        vectors=old.vectors[kept],
    )
    target = mixture.target(len(kept))
    tensors = _reduced_tensors(target, mixture.reader, kept)
    return NewModel("remove", target, mixture.dtype, tensors, sidecar, checkpoint, checkpoint)


def _kept(old: Sidecar, names: Sequence[str]) -> list[int]:
    """Return the numbers of the experts that stay; ConfigError as in `reduced`."""
    known = [expert.name for expert in old.experts]
    if len(set(names)) != len(names):
        raise ConfigError(f"--expert names one twice: {', '.join(names)}; name each once")
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--expert {name}: the checkpoint has {', '.join(known)}; name one of these"
            )
    kept = [index for index, name in enumerate(known) if name not in names]
    top_k = old.router.top_k
    # the top-k of fewer experts does not exist
    if len(kept) < top_k or not kept:
        raise ConfigError(
            f"{len(kept)} experts would be left, but each token goes to {top_k}; "
            "keep at least as many"
        )
    return kept


def _reduced_tensors(target: ConfigJson, reader: Headers, kept: Sequence[int]) -> dict[str, Source]:
    """Return the new mixture's tensors; `kept` are the old numbers of its experts, in order."""

    def source(name: str, entry: Stored) -> Source:
        if entry.role is Role.ROUTER:
            # fp32 holds them, whatever the mixture is in
            return read_floats(reader, name)[kept]
        if entry.role is Role.ROUTED:
            # those behind a gap move up
            old_number = kept[entry.expert]
            old_name = expert_name(entry.layer, old_number, entry.part)
            return Blend([Part("checkpoint", reader, old_name)])
        return copy_of(reader, name, entry)

    return {name: source(name, entry) for name, entry in stored(target).items()}
