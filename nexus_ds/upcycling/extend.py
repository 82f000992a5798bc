"""A mixture `extended` by experts (paper section 2.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nexus_ds.checkpoint.families import ConfigJson, DenseModel, settings
from nexus_ds.checkpoint.qwen2_moe import (
    Role,
    Stored,
    check_shared_gates,
    gate_name,
    open_moe,
    stored,
)
from nexus_ds.checkpoint.records import ExtendStep
from nexus_ds.checkpoint.sidecar import (
    Sidecar,
    expert_embeddings,
    read_sidecar,
    verify_expert_embeddings,
    versions,
)
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.checkpoint.tokenizer import check_tokenizer
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError, IncompatibleModelsError
from nexus_ds.model.router import domain_expert_embeddings, init_expert_embeddings, layer_generator
from nexus_ds.settings import Config
from nexus_ds.upcycling.blend import (
    Blend,
    Part,
    check_alike,
    check_related,
    check_tokenizers,
    domain_vectors,
    expert_record,
    portable,
    read_generation_config,
)
from nexus_ds.upcycling.new_checkpoint import NewModel, as_written, casts, copy_of, open_all

LARGEST_EMBEDDING = 100.0  # a new router row's norm relative to the largest old one


def merge_share(old: int, new: int, share: float | None) -> float:
    """Return lambda, the total share of `new` experts in every averaged weight of a mixture that
    had `old`.

    The default is new / (old + new): for one expert the paper's 1 / (n + 1), for several what
    adding them one after the other gives, since (1 - 1/(n+1)) (1 - 1/(n+2)) ... = n / (n + k) and
    each new one keeps 1 / (n + k).

    Raises:
        ConfigError: a share outside [0, 1].
    """
    if share is None:
        return new / (old + new)
    if not 0.0 <= share <= 1.0:
        raise ConfigError(
            f"--lambda {share}: expected a share in [0, 1]; leave it out for {new}/{old + new}"
        )
    return share


def extended(
    checkpoint: Path,
    experts: Mapping[str, Path],
    embeddings: DomainEmbeddings,
    config: Config,
    share: float | None = None,
    linear_init: str = "keep",
) -> NewModel:
    """Describe a mixture with further experts appended (paper section 2.3); nothing is written.

    Old FFNs and the shared expert: exact copies. New FFNs: exact copies, after the old ones. All
    else, in fp32: (1 - lambda) phi_moe + lambda / k * sum of the k new models. Router: the learned
    P applied to the new domains,
    conditioned with the stored centre: no new parameter, and the old rows stay as they are. A
    linear router gets, by `linear_init`, one random row of the old rows' mean norm for each new
    expert (keep), or fresh rows for all (reset, the paper's baseline).

    Args:
        checkpoint: Nexus checkpoint, upcycled or trained.
        experts: for each new expert's name, which is also its domain, its dense model.
        embeddings: rows of (at least) the new domains, from the checkpoint's encoder.
        config: `router.warm_start`, `router.init`, `router.init_norm` for linear rows, and `seed`.
        share: lambda, the total share of the new experts; see `merge_share`.
        linear_init: keep | reset, for a linear router.

    Raises:
        ConfigError: an expert's name that is taken, lambda outside [0, 1].
        DataError: a domain that was not embedded.
        CheckpointError, UnsupportedModelError, IncompatibleModelsError: models that can't be put
            together, or embeddings of another encoder.
    """
    old_config, reader = open_moe(checkpoint)
    verify_expert_embeddings(checkpoint)
    old = read_sidecar(checkpoint)
    _check_names(old, experts)
    check_encoder(old, embeddings)
    vectors, models = domain_vectors(embeddings, experts), open_fitting(checkpoint, experts)
    dtype = reader.info(gate_name(0)).dtype
    total = merge_share(len(old.experts), len(models), share)
    step = ExtendStep(
        checkpoint=portable(checkpoint),
        experts=list(models),
        share=total,
        linear_init=linear_init if old.router.kind == "linear" else None,
        router=config.router,
        seed=config.seed,
    )
    sidecar = dataclasses.replace(
        old,
        experts=[*old.experts, *(expert_record(name, model) for name, model in models.items())],
        lineage=[*old.lineage, step],
        versions=versions(),
        vectors=torch.cat([old.vectors, vectors]),
    )
    target = as_written(old_config | {"num_experts": len(sidecar.experts)}, dtype)
    places = {name: number for number, name in enumerate(models, start=len(old.experts))}

    def embeddings_of(layer: int) -> Tensor:
        rows = _extended_embeddings(reader, sidecar, layer, config, linear_init)
        check_expert_embeddings(rows, len(old.experts), layer)
        return rows

    tensors = branched_tensors(target, reader, models, places, total, embeddings_of)
    cast = casts(models, dtype)
    return NewModel("extend", target, dtype, tensors, sidecar, checkpoint, len(old.experts), cast)


def open_fitting(checkpoint: Path, experts: Mapping[str, Path]) -> dict[str, DenseModel]:
    """Open dense models that are to become experts of a checkpoint.

    Raises:
        IncompatibleModelsError: sizes or tokenizers that differ from the checkpoint's, weights that
            have nothing to do with its own.
        CheckpointError, UnsupportedModelError: models that can't be read or expressed; a checkpoint
            that was trained elsewhere, with its shared expert's gate.
    """
    config, reader = open_moe(checkpoint)
    check_shared_gates(reader, config["num_hidden_layers"])
    models, own = open_all(experts), settings(config)
    # not the family: a mixture is of none, and what it computes stands in the settings
    check_alike(
        {"checkpoint": vars(own)} | {name: vars(model.settings) for name, model in models.items()}
    )
    check_related(f"the checkpoint {checkpoint}", reader, models)
    check_tokenizers(checkpoint, experts)
    check_tokenizer(checkpoint, own.vocabulary)
    read_generation_config(checkpoint)
    return models


def check_expert_embeddings(rows: Tensor, old: int, layer: int) -> None:
    """Raise CheckpointError for rows [n, h] after the first `old` that are not finite or dwarf the
    old ones.

    P has then never learned such input.
    """
    norms = rows.float().norm(dim=1)
    if (
        not bool(torch.isfinite(norms).all())
        or float(norms[old:].max()) > LARGEST_EMBEDDING * float(norms[:old].max()) + 1.0
    ):
        raise CheckpointError(
            f"layer {layer}: the rows of the new experts have norms up to {float(norms[old:].max()):.1e}, those of the old "
            f"{float(norms[:old].max()):.1e}; P is no use for these domains: embed them as the first ones were embedded"
        )


def _check_names(sidecar: Sidecar, experts: Mapping[str, Path]) -> None:
    taken = [expert.name for expert in sidecar.experts]
    for name in experts:
        if name in taken:
            raise ConfigError(
                f"--expert {name}: the checkpoint has an expert of this name ({', '.join(taken)}); rename it"
            )


def check_encoder(sidecar: Sidecar, embeddings: DomainEmbeddings) -> None:
    """Raise IncompatibleModelsError unless the embeddings come from the checkpoint's encoder."""
    old = sidecar.encoder
    dimension = sidecar.vectors.shape[1]
    if embeddings.dimension == dimension and (old is None or embeddings.revision == old.revision):
        return
    found = f"{embeddings.encoder} (revision {embeddings.revision[:12]}, dimension {embeddings.dimension})"
    name, revision = (old.name, old.revision[:12]) if old else ("unknown", "unknown")
    raise IncompatibleModelsError(
        f"the domain embeddings come from the encoder {found}, the checkpoint's from {name} (revision {revision}, "
        f"dimension {dimension}); P only understands its own: embed the new domain with that encoder"
    )


def branched_tensors(
    target: ConfigJson,
    reader: TensorReader,
    models: Mapping[str, DenseModel],
    places: Mapping[str, int],
    share: float,
    embeddings: Callable[[int], Tensor],
) -> dict[str, Blend | Tensor]:
    """Return the tensors of a mixture that dense models are put into.

    Args:
        target: config.json of the new mixture.
        reader: the old mixture's tensors.
        models: for each new expert's name its dense model.
        places: for each new expert's name its number in the new mixture.
        share: lambda, the total share of the models in all that is averaged.
        embeddings: returns the new router's weight [n, h] of a layer.
    """
    new = {place: (f"expert {name}", models[name].reader) for name, place in places.items()}

    def source(name: str, entry: Stored) -> Blend | Tensor:
        if entry.role is Role.ROUTER:
            return embeddings(entry.layer)
        if entry.role is Role.DENSE:
            parts = [Part("checkpoint", reader, name, 1.0 - share)]
            for who, branch in new.values():
                parts.append(Part(who, branch, entry.dense_name, share / len(new)))
            return Blend(parts)
        if entry.role is Role.ROUTED and entry.expert in new:
            who, branch = new[entry.expert]
            return Blend([Part(who, branch, entry.dense_name)])
        return copy_of(reader, name, entry)

    return {name: source(name, entry) for name, entry in stored(target).items()}


def _extended_embeddings(
    reader: TensorReader, sidecar: Sidecar, layer: int, config: Config, linear_init: str
) -> Tensor:
    """Return the router weight [n + k, h] of one layer; `sidecar` is the new one."""
    stored = reader.read(gate_name(layer))
    old, total = len(stored), len(sidecar.experts)
    if sidecar.router.kind == "nexus":
        # The old rows as they are stored: recomputing them in a larger matrix product could change
        # the last bit.
        return torch.cat([stored, expert_embeddings(sidecar, layer, stored.dtype)[old:]])
    generator = layer_generator(config.seed, layer)
    if linear_init == "reset":
        return init_expert_embeddings(
            total, stored.shape[1], config.router.init, config.router.init_norm, generator
        )
    norm = stored.float().norm(dim=-1).mean()
    if config.router.warm_start == "embedding":
        rows = domain_expert_embeddings(sidecar.domain_inputs(), stored.shape[1], layer, 1.0)[old:]
        return torch.cat([stored, (rows / rows.norm(dim=-1, keepdim=True) * norm).to(stored.dtype)])
    fresh = torch.empty(total - old, stored.shape[1]).normal_(generator=generator)
    return torch.cat([stored, (fresh / fresh.norm(dim=-1, keepdim=True) * norm).to(stored.dtype)])
