"""A mixture `extended` by experts, appended after those it has (paper section 2.3).

`branched` and the checks of branches serve `replaced`, too.
Shapes: n old and k new routed experts, h hidden size, m width of a domain embedding.
Not covered: experts of other sizes than the mixture's, or of another base model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.cards import NO_PACKAGES, Packages
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense import DenseModel, open_dense
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.qwen2_moe import Role, Stored, check_shared_gates, gate_name, stored
from nexus_ds.checkpoint.records import (
    CHECKPOINT,
    ExtendStep,
    keeps_seed,
    portable,
    start_scale,
)
from nexus_ds.checkpoint.sidecar import Sidecar, rows_of, versions
from nexus_ds.checkpoint.values import read_floats
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError, IncompatibleModelsError
from nexus_ds.settings import Config
from nexus_ds.upcycling.blend import (
    domain_vectors,
    expert_records,
    expert_start,
)
from nexus_ds.upcycling.branches import check_branches, open_all
from nexus_ds.upcycling.compatible import NOTHING, Waived, check_disk, mixture_origin, note
from nexus_ds.upcycling.new_checkpoint import (
    NewModel,
    OldModel,
    bytes_of,
    casts,
    copy_of,
    open_old,
)
from nexus_ds.upcycling.new_router import domain_rows, free_rows, layer_draws, lengths, normal
from nexus_ds.upcycling.same_tokenizers import Alignment, by_row
from nexus_ds.upcycling.seeds import check_seed
from nexus_ds.upcycling.sources import Blend, Part, Source

# norm of a new expert embedding relative to the largest old one's
LARGEST_EMBEDDING = 100.0


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
    packages: Packages = NO_PACKAGES,
    waived: Waived = NOTHING,
    out: Path | None = None,
) -> NewModel:
    """Describe a mixture with further experts appended (paper section 2.3); nothing is written.

    Old FFNs and the shared expert: exact copies. New FFNs: exact copies, after the old ones. All
    else, in fp32: (1 - lambda) phi_moe + lambda / k * sum of the k new models. Router: the learned
    P applied to the new domains, conditioned with the stored centre: no new parameter, and the old
    rows stay as they are. A linear router gets, by `linear_init`, one random row of the old rows'
    mean norm for each new expert (keep), or fresh rows for all (reset, the paper's baseline).

    Args:
        checkpoint: Nexus checkpoint, upcycled or trained.
        experts: for each new expert's name, which is also its domain, its dense model.
        embeddings: rows of (at least) the new domains, from the checkpoint's encoder.
        config: `router.warm_start`, `router.init`, `router.init_norm` for linear rows, and `seed`.
        share: lambda, the total share of the new experts; see `merge_share`.
        linear_init: keep | reset, for a linear router.
        packages: what else is known of the new branches.
        waived: differences that are no mistake.
        out: where it will be written, if the disk's room is to be checked.

    Raises:
        ConfigError: an expert's name or domain that is taken, lambda outside [0, 1].
        DataError: a domain that was not embedded, a card of other weights.
        CheckpointError, UnsupportedModelError, IncompatibleModelsError: models that can't be put
            together, or embeddings of another encoder. All that is wrong is told at once, in one
            error of the first one's type.
    """
    mixture = open_old(checkpoint)
    old = mixture.sidecar
    before = len(old.experts)
    problems = Problems()
    with problems.collected():
        _check_names(old, experts)
    with problems.collected():
        check_encoder(old, embeddings)
    vectors = np.empty(0, np.float32)
    with problems.collected():
        vectors = domain_vectors(embeddings, experts)
    total = 0.0
    with problems.collected():
        total = merge_share(before, len(experts), share)
    if share is None:
        note_mixing(mixture, total)
    models, alignment = open_fitting(mixture, experts, packages.base, waived, problems)
    seed = seed_of(mixture, packages.base, waived)
    step = ExtendStep(
        checkpoint=portable(checkpoint),
        experts=list(models),
        share=total,
        linear_init=linear_init if old.router.kind == "linear" else None,
        router=config.router,
        seed=config.seed,
        aligned=alignment.recorded([CHECKPOINT, *models]) if alignment else {},
    )
    sidecar = _extended_sidecar(old, models, packages, vectors, step)
    # behind the old ones, whose numbers and rows stay
    places = {name: number for number, name in enumerate(models, start=before)}

    def embeddings_of(layer: int) -> Floats:
        rows = _extended_embeddings(mixture.reader, sidecar, layer, config, linear_init)
        check_expert_embeddings(rows, before, layer)
        return rows

    branches = Branches(models, places, total, alignment, seed)
    model = branched("extend", mixture, branches, sidecar, embeddings_of, out)
    return dataclasses.replace(model, kept=before)


def note_mixing(mixture: OldModel, share: float) -> None:
    """Say on stderr what a `share` that nobody has chosen does to weights that the seed gave."""
    if keeps_seed(mixture.sidecar.lineage):
        note(
            f"{mixture.directory}: all but its feed-forward networks began as the seed's "
            f"(model.merge=seed); of these weights {share:.3g} come from the new branches now "
            "(the default of --lambda): --lambda 0 keeps them as they are, as the recipe own does"
        )


def _extended_sidecar(
    old: Sidecar,
    models: Mapping[str, DenseModel],
    packages: Packages,
    vectors: Floats,
    step: ExtendStep,
) -> Sidecar:
    """Return the new mixture's sidecar; `vectors` are the new domains' embeddings [k, m].

    The centre stays: the old experts' embeddings were computed with it, and P was trained on it.
    """
    records = expert_records(models, packages.cards, old.experts)
    return dataclasses.replace(
        old,
        experts=[*old.experts, *records],
        lineage=[*old.lineage, step],
        versions=versions(),
        vectors=np.concatenate([old.vectors, vectors]),
    )


def open_fitting(
    mixture: OldModel,
    experts: Mapping[str, Path],
    base: Path | None,
    waived: Waived,
    problems: Problems,
) -> tuple[dict[str, DenseModel], Alignment | None]:
    """Open dense models, or adapters, that are to become experts, and check them.

    Adapters are merged into `base`; where experts go further from the seed than their branches,
    `base` is the seed, and an adapter that names a model here is merged into that.

    Returns:
        The models by name, and how embeddings are put together where vocabularies may have grown.

    Raises what `problems` has by then:
        IncompatibleModelsError: sizes or tokenizers that differ from the checkpoint's, weights that
            have nothing to do with its own.
        CheckpointError, UnsupportedModelError: models that can't be read or expressed; a checkpoint
            that was trained elsewhere, with its shared expert's gate.
    """
    with problems.collected():
        check_shared_gates(mixture.reader, settings(mixture.config).layers)
    # where it is given as the seed, an adapter may have another base
    far = start_scale(mixture.sidecar.lineage, "task") != 1.0
    if far:
        models = open_all(experts, problems, fallback=base)
    else:
        models = open_all(experts, problems, base)
    origin = mixture_origin(mixture.directory, mixture.config, mixture.reader)
    alignment = check_branches(origin, models, waived, problems)
    problems.refuse()
    return models, alignment


def seed_of(mixture: OldModel, base: Path | None, waived: Waived) -> Headers | None:
    """Return the seed's tensors where experts go further from it than their branches; else None.

    Raises:
        ConfigError: it is needed, and `base` is None.
        IncompatibleModelsError: `base` is another model, a relative of the seed too. Where that
            can't be told, it is said on stderr.
    """
    task = start_scale(mixture.sidecar.lineage, "task")
    if task == 1.0:
        return None
    if base is None:
        raise ConfigError(
            f"{mixture.directory}: its routed experts started as seed + {task:g} (branch - seed) "
            "(model.task_scale), and a new one needs the seed too; give it with --base DIR"
        )
    problems = Problems()
    models = {"base": open_dense(base)}
    origin = mixture_origin(mixture.directory, mixture.config, mixture.reader)
    check_branches(origin, models, waived, problems)
    with problems.collected():
        doubt = check_seed(mixture.sidecar.lineage, models["base"])
        if doubt:
            note(f"--base {doubt}")
    problems.refuse()
    return models["base"].reader


def check_expert_embeddings(rows: Floats, old: int, layer: int) -> None:
    """Raise CheckpointError where rows [n + k, h] after the first `old` dwarf those.

    So do rows that are not finite. P has then never learned such input.
    """
    norms = lengths(rows)
    largest_old = float(norms[:old].max())
    largest_new = float(norms[old:].max())
    # The 1 lets old rows be all but zero, as those of a router that was hardly trained.
    dwarfed = largest_new > LARGEST_EMBEDDING * largest_old + 1.0
    if dwarfed or not bool(np.isfinite(norms).all()):
        raise CheckpointError(
            f"layer {layer}: the rows of the new experts have norms up to {largest_new:.1e}, "
            f"those of the old {largest_old:.1e}; P is no use for these domains: "
            "embed them as the first ones were embedded"
        )


def _check_names(sidecar: Sidecar, experts: Mapping[str, Path]) -> None:
    taken = [expert.name for expert in sidecar.experts]
    for name in experts:
        if name in taken:
            raise ConfigError(
                f"--expert {name}: the checkpoint has an expert of this name "
                f"({', '.join(taken)}); rename it"
            )


def check_encoder(sidecar: Sidecar, embeddings: DomainEmbeddings) -> None:
    """Raise IncompatibleModelsError unless the embeddings come from the checkpoint's encoder."""
    old = sidecar.encoder
    dimension = sidecar.vectors.shape[1]
    # without a record of the encoder, the dimension is all there is to compare
    same = old is None or embeddings.revision == old.revision
    if same and embeddings.dimension == dimension:
        return
    name = old.name if old else "unknown"
    revision = old.revision[:12] if old else "unknown"
    raise IncompatibleModelsError(
        f"the domain embeddings come from the encoder {embeddings.encoder} "
        f"(revision {embeddings.revision[:12]}, dimension {embeddings.dimension}), "
        f"the checkpoint's from {name} (revision {revision}, dimension {dimension}); "
        "P only understands its own: embed the new domain with that encoder"
    )


@dataclass(frozen=True)
class Branches:
    """Dense models that are put into a mixture, as new experts or in the place of old ones."""

    models: Mapping[str, DenseModel]
    """By the expert's name."""
    places: Mapping[str, int]
    """For each expert's name its number in the new mixture."""
    share: float
    """lambda, the total share of the models in all that is averaged."""
    alignment: Alignment | None
    """How embeddings are put together where vocabularies may have grown."""
    seed: Headers | None
    """Of the mixture; None where its experts start as their branches."""


def branched(
    verb: str,
    mixture: OldModel,
    branches: Branches,
    sidecar: Sidecar,
    embeddings: Callable[[int], Floats],
    out: Path | None,
) -> NewModel:
    """Return a mixture that dense models are put into.

    Args:
        verb: that puts them there.
        mixture: the old one.
        branches: the models.
        sidecar: of the new mixture.
        embeddings: returns the new router's weight [n, h] of a layer.
        out: where it will be written, if the disk's room is to be checked.

    Raises:
        CheckpointError: the disk has no room for it.
    """
    alignment = branches.alignment
    target = mixture.target(len(sidecar.experts), alignment)
    if out:
        check_disk(out, bytes_of(target, mixture.dtype))
    return NewModel(
        verb,
        target,
        mixture.dtype,
        _branched_tensors(target, mixture, branches, embeddings),
        sidecar,
        mixture.directory,
        alignment.tokenizer if alignment else mixture.directory,
        cast=casts(branches.models, mixture.dtype),
    )


def _branched_tensors(
    target: ConfigJson,
    mixture: OldModel,
    branches: Branches,
    embeddings: Callable[[int], Floats],
) -> dict[str, Source]:
    """Return the tensors of the mixture with the config.json `target`; see `branched`."""
    new = {
        place: (f"expert {name}", branches.models[name].reader)
        for name, place in branches.places.items()
    }
    # it says how experts are scaled
    lineage = mixture.sidecar.lineage

    def source(name: str, entry: Stored) -> Source:
        if entry.role is Role.ROUTER:
            return embeddings(entry.layer)
        if entry.role is Role.DENSE:
            parts = [Part("checkpoint", mixture.reader, name, 1.0 - branches.share)]
            # lambda is the share of all new models together
            each = branches.share / len(new)
            for who, branch in new.values():
                parts.append(Part(who, branch, entry.dense_name, each))
            return by_row(Blend(parts), entry, branches.alignment)
        if entry.role is Role.ROUTED and entry.expert in new:
            who, branch = new[entry.expert]
            part = Part(who, branch, entry.dense_name)
            return expert_start(part, entry, lineage, branches.seed)
        return copy_of(mixture.reader, name, entry)

    return {name: source(name, entry) for name, entry in stored(target).items()}


def _extended_embeddings(
    reader: Headers,
    sidecar: Sidecar,
    layer: int,
    config: Config,
    linear_init: str,
) -> Floats:
    """Return the router's weight [n + k, h] of one layer; `sidecar` is the new one."""
    stored_rows = read_floats(reader, gate_name(layer))
    old, hidden_size = stored_rows.shape
    if sidecar.router.kind == "nexus":
        # The old rows as they are stored: recomputing them in a larger matrix product could change
        # the last bit.
        computed = rows_of(sidecar, layer, reader.info(gate_name(layer)).dtype)
        return np.concatenate([stored_rows, computed[old:]])
    router = config.router
    total = len(sidecar.experts)
    draws = layer_draws(config.seed, layer)
    if linear_init == "reset":
        return free_rows(total, hidden_size, router.init, router.init_norm, draws)
    if router.warm_start == "embedding":
        inputs = sidecar.domain_inputs()
        fresh = domain_rows(inputs, hidden_size, layer, 1.0)[old:]
    else:
        fresh = normal(draws, (total - old, hidden_size), 1.0)
    return _as_long(fresh, stored_rows)


def _as_long(fresh: Floats, stored_rows: Floats) -> Floats:
    """Return the stored rows [n, h] and behind them fresh ones [k, h] of their mean norm."""
    # As long as the old rows are: scores are products with them, and a longer row would draw tokens
    # by its length alone.
    norm = lengths(stored_rows).mean()
    directions = fresh / lengths(fresh)[:, None]
    return np.concatenate([stored_rows, directions * norm])
