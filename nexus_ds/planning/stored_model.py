"""What a checkpoint says of its sizes: its config.json, and the sidecar's P.

Not covered: families whose parameters are not those of Llama, Mistral, Qwen2 or Qwen2-MoE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_ds.checkpoint.config_json import CONTEXT_MODEL, ConfigJson, read_config
from nexus_ds.checkpoint.dense_settings import SIZES, UNIFORM, filled, settings
from nexus_ds.checkpoint.expert_rows import open_router
from nexus_ds.checkpoint.families.record import DenseSettings
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import MIXTURES
from nexus_ds.checkpoint.records import Manifest, is_nexus, read_manifest
from nexus_ds.errors import CheckpointError, UnsupportedModelError

MIXTURE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A checkpoint's form. A dense model has no experts."""

    dense: DenseSettings
    """Of a mixture: what it shares with a dense model."""
    experts: int = 0
    top_k: int = 1
    context: bool = False
    """Whether routers read running means."""
    projection: tuple[int, ...] = ()
    """Elements of each map of P in one layer; empty for free rows."""
    shared: bool = True
    """Whether the shared expert computes something."""


def _check_form(found: ConfigJson, where: str) -> None:
    """Refuse a Qwen2-MoE that is not counted by one layer times their number.

    That is one whose layers are not all alike, or whose shared expert has another width than the
    routed ones.
    """
    form = UNIFORM | found
    expected = UNIFORM | {"shared_expert_intermediate_size": found["moe_intermediate_size"]}
    for key, value in expected.items():
        if form.get(key) != value:
            raise CheckpointError(
                f"{where}: {key} is {form.get(key)!r}; "
                f"plan needs a Qwen2-MoE that has {value!r} there"
            )


def _read(found: ConfigJson, where: str) -> DenseSettings:
    """Return a config.json in the normal form that training reads it in (`families.settings`)."""
    kind = found.get("model_type")
    if kind not in (*FAMILIES, *MIXTURES):
        raise UnsupportedModelError(
            f"{where}: model_type {kind!r} can't be planned; "
            f"plan knows {', '.join(FAMILIES)}, Nexus and Qwen2-MoE checkpoints"
        )
    needed = (*SIZES, *MIXTURE_SIZES) if kind in MIXTURES else SIZES
    for key in needed:
        value = found.get(key)
        if type(value) is not int or value <= 0:
            raise CheckpointError(
                f"{where}: {key} is {value!r}, expected a number above 0; "
                "plan needs a dense model, a Nexus or a Qwen2-MoE checkpoint"
            )
    if kind in MIXTURES:
        _check_form(found, where)
    return settings(found, where)


def _maps(directory: Path, manifest: Manifest) -> tuple[int, ...]:
    """Return the elements of each map of P in a layer, by headers alone; none of free rows."""
    reader = open_router(directory, manifest).reader
    sizes = []
    for name in reader.names():
        if name.startswith("layers.0."):
            shape = reader.info(name).shape
            sizes.append(math.prod(shape))
    if bool(sizes) != (manifest.router.kind == "nexus"):
        raise CheckpointError(
            f"{directory}: a {manifest.router.kind} router with {len(sizes)} maps of P in layer 0; "
            "the sidecar is damaged or of another model, restore it from where it came"
        )
    return tuple(sizes)


def read_model(directory: Path) -> StoredModel:
    """Return what a dense, Nexus or stock Qwen2-MoE checkpoint says of itself.

    Raises:
        CheckpointError: no checkpoint, a size that is missing, or a Qwen2-MoE of another form than
            a Nexus model's.
        UnsupportedModelError: a family that can't be trained here.
    """
    found = read_config(directory)
    dense = _read(found, str(directory / "config.json"))
    if found["model_type"] not in MIXTURES:
        # as its own class has it: a mixture may need a head of its own
        tied = bool(filled(found)["tie_word_embeddings"])
        return StoredModel(dense=replace(dense, tied_embeddings=tied))
    maps: tuple[int, ...] = ()
    shared = True
    if is_nexus(directory):
        manifest = read_manifest(directory)
        maps = _maps(directory, manifest)
        shared = manifest.shared_expert == "seed"
    return StoredModel(
        dense=dense,
        experts=found["num_experts"],
        top_k=found["num_experts_per_tok"],
        context=found["model_type"] == CONTEXT_MODEL,
        projection=maps,
        shared=shared,
    )
