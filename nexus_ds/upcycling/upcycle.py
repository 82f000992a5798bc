"""A mixture `upcycled` from a seed model and its dense branches (paper section 2.1).

Shapes: n routed experts, m width of a domain embedding, h hidden size.
Not covered: branches of another architecture or tokenizer than the seed's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.cards import NO_PACKAGES, Packages
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense import DenseModel, open_dense
from nexus_ds.checkpoint.dense_settings import family_of
from nexus_ds.checkpoint.expert_rows import centre_of
from nexus_ds.checkpoint.families.record import AFTER_FFN, DenseSettings
from nexus_ds.checkpoint.forms import QWEN3_NEXT
from nexus_ds.checkpoint.model_card import stated_license
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.projections import Projections, State
from nexus_ds.checkpoint.qwen2_moe import (
    Role,
    Stored,
    moe_config,
    stored,
)
from nexus_ds.checkpoint.records import (
    SEED,
    RouterRecord,
    Step,
    UpcycleStep,
    portable,
)
from nexus_ds.checkpoint.sidecar import Sidecar, versions
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.data.token_counts import TokenCounts
from nexus_ds.errors import ConfigError, UnsupportedModelError
from nexus_ds.settings import Config
from nexus_ds.upcycling.blend import (
    domain_vectors,
    encoder_record,
    expert_records,
    expert_start,
    note_other_seeds,
)
from nexus_ds.upcycling.branches import check_branches, open_all
from nexus_ds.upcycling.compatible import (
    NOTHING,
    Waived,
    check_disk,
    note_unchanged,
    seed_origin,
)
from nexus_ds.upcycling.merge import Merge, check_merge, recorded_merge
from nexus_ds.upcycling.new_checkpoint import (
    NewModel,
    as_written,
    bytes_of,
    casts,
)
from nexus_ds.upcycling.new_router import domain_rows, free_rows, layer_draws, new_state
from nexus_ds.upcycling.same_tokenizers import Alignment
from nexus_ds.upcycling.seeds import seed_hashes
from nexus_ds.upcycling.sources import Computed, Part, Rows, Source
from nexus_ds.warm_start.starts import check_start


def upcycled(
    seed: Path,
    experts: Mapping[str, Path],
    embeddings: DomainEmbeddings,
    config: Config,
    packages: Packages = NO_PACKAGES,
    waived: Waived = NOTHING,
    out: Path | None = None,
    counts: TokenCounts | None = None,
) -> NewModel:
    """Describe the mixture of a seed and its dense branches (paper section 2.1); nothing is
    written.

    Seed FFN: shared expert, or zeros. Branches' FFNs: routed experts, exact copies, in the order of
    `experts`. All else: fp32 mean over the branches, the seed not counted unless it is among them
    (`model.merge` has other ways).
    Router: P(D) of a freshly initialised P, or free rows.

    Args:
        seed: dense model that all branches started from.
        experts: for each expert's name, which is also its domain, its dense model; the seed may be
            one of them.
        embeddings: rows of (at least) these domains; free rows do without that of the seed.
        config: `router`, `model.shared_expert`, `model.merge` and its settings, and `seed`.
        packages: what else is known of the branches.
        waived: differences that are no mistake.
        out: where it will be written, if the disk's room is to be checked.
        counts: of each expert's text, for `model.merge_rows`.

    Raises:
        ConfigError: top-k larger than the number of experts, a warm start that the router can't
            have, two experts of one domain.
        DataError: a domain that was not embedded, a card of other weights.
        CheckpointError, UnsupportedModelError, IncompatibleModelsError: models that can't be put
            together, or whose router can't learn. All that is wrong is told at once, in one error
            of the first one's type.
    """
    # All checks come first, of headers and configurations and a sample of the weights: all of them
    # are read as they are written.
    problems = Problems()
    with problems.collected():
        check_start(config.router.warm_start, config.router.kind, config.router.projection)
    vectors = np.empty(0, np.float32)
    with problems.collected():
        vectors = _domain_vectors(seed, experts, embeddings, config)
    with problems.collected():
        _check_top_k(config, experts)
    with problems.collected():
        check_merge(config.model, experts, waived.vocabulary)
    kept = config.model.merge == "seed"
    base, models, alignment = _open_checked(seed, experts, packages, waived, problems, kept)
    _check_learns(base, config)
    _check_precision(base)
    note_other_seeds(base, packages.cards)
    note_unchanged(base, models)
    givers = [SEED, *models] if kept else list(models)
    router = config.router
    form = moe_config(base.config, len(models), router.top_k, router.input)
    if alignment:
        form["vocab_size"] = alignment.rows
    target = as_written(form, base.dtype)
    if out:
        check_disk(out, bytes_of(target, base.dtype))
    step = UpcycleStep(
        seed_model=portable(seed),
        family=base.family,
        router=config.router,
        seed=config.seed,
        seed_license=stated_license(seed),
        scales=_scales(config),
        aligned=alignment.recorded(givers) if alignment else {},
        merge=recorded_merge(config.model),
        # all of its FFNs are read for it: only where `extend` will ask for the seed
        seed_sha256=seed_hashes(base) if config.model.task_scale != 1.0 else {},
    )
    sidecar = _upcycled_sidecar(models, embeddings, packages, vectors, config, step)
    return NewModel(
        "upcycle",
        target,
        base.dtype,
        _upcycled_tensors(target, base, models, sidecar, config, alignment, counts),
        sidecar,
        seed,
        alignment.tokenizer if alignment else seed,
        cast=casts(models, base.dtype),
    )


def _scales(config: Config) -> dict[str, float]:
    """Return what outputs are multiplied by at the start; empty where nothing is."""
    model = config.model
    scales = {
        "shared": model.shared_scale,
        "routed": model.routed_scale,
        "task": model.task_scale,
    }
    return {kind: scale for kind, scale in scales.items() if scale != 1.0}


def _open_checked(
    seed: Path,
    experts: Mapping[str, Path],
    packages: Packages,
    waived: Waived,
    problems: Problems,
    kept: bool,
) -> tuple[DenseModel, dict[str, DenseModel], Alignment | None]:
    """Return the seed, the experts' models, and how their embeddings are put together; `kept`:
    whether rows that the seed has are the seed's.

    Raises what `problems` has, if anything.
    """
    base = None
    with problems.collected():
        base = open_dense(seed)
    models = open_all(experts, problems, packages.base, seed)
    alignment = None
    if base:
        alignment = check_branches(seed_origin(base, kept), models, waived, problems)
    problems.refuse()
    # without it there was a problem
    assert base is not None
    return base, models, alignment


def _check_top_k(config: Config, experts: Mapping[str, Path]) -> None:
    if config.router.top_k > len(experts):
        raise ConfigError(
            f"router.top_k is {config.router.top_k}, but there are {len(experts)} experts; lower it"
        )


def _check_learns(base: DenseModel, config: Config) -> None:
    """Raise UnsupportedModelError where the router's gradient would be next to nothing.

    A norm over p E(x) gives what it gives of E(x): the one gate has no effect.
    """
    normed = [norm for norm in base.settings.norms if norm in AFTER_FFN]
    alone = config.model.shared_expert == "none" and config.router.top_k == 1
    if normed and alone:
        raise UnsupportedModelError(
            f"model.shared_expert=none with router.top_k=1: {base.family} norms what its FFN "
            f"returns ({normed[0]}), which undoes the gate, and the router would learn nothing; "
            "set router.top_k=2, or leave model.shared_expert at seed"
        )


def _check_precision(base: DenseModel) -> None:
    """Raise UnsupportedModelError where the mixture's form could not hold the seed's weights."""
    if base.dtype == "F16" and family_of(base.config).mixture == QWEN3_NEXT:
        raise UnsupportedModelError(
            f"{base.directory}: weights are F16, and a mixture of {base.family} has some of them "
            "multiplied by powers of two, which fp16 rounds where they are small; save the seed "
            "in bf16 or fp32 first"
        )


def _domain_vectors(
    seed: Path,
    experts: Mapping[str, Path],
    embeddings: DomainEmbeddings,
    config: Config,
) -> Floats:
    """Return the domain embeddings [n, m].

    The seed as an expert has no domain: where rows are free, it gets the mean of the others'.
    """
    others = []
    for name, path in experts.items():
        # however its path is spelled, or linked to
        is_seed = Path(path).resolve() == Path(seed).resolve()
        if name in embeddings.names or not is_seed:
            others.append(name)
    if config.router.kind == "nexus" or not others:
        return domain_vectors(embeddings, experts)
    vectors = domain_vectors(embeddings, others)
    found = dict(zip(others, vectors, strict=True))
    return np.stack([found.get(name, vectors.mean(0)) for name in experts])


def _upcycled_sidecar(
    models: dict[str, DenseModel],
    embeddings: DomainEmbeddings,
    packages: Packages,
    vectors: Floats,
    config: Config,
    step: Step,
) -> Sidecar:
    """Return the sidecar of a new mixture, with a freshly initialised P for each layer."""
    router = config.router
    # RouterRecord has some of the router's settings, by the same names
    fields = [field.name for field in dataclasses.fields(RouterRecord)]
    embedded = [name for name in models if name in embeddings.names]
    sidecar = Sidecar(
        experts=expert_records(models, packages.cards),
        router=RouterRecord(**{name: getattr(router, name) for name in fields}),
        encoder=encoder_record(embeddings, embedded),
        lineage=[step],
        versions=versions(),
        vectors=vectors,
        centre=centre_of(vectors) if router.centre else np.zeros_like(vectors[0]),
        shared_expert=config.model.shared_expert,
    )
    sizes = next(iter(models.values())).settings
    if router.kind == "nexus":
        sidecar.projections = _new_projections(sidecar, sizes, config)
    return sidecar


def _new_projections(sidecar: Sidecar, sizes: DenseSettings, config: Config) -> Projections:
    """Return freshly initialised states of P for each layer, drawn when they are asked for."""
    router = config.router
    inputs = sidecar.domain_inputs()

    def drawn(layer: int) -> State:
        draws = layer_draws(config.seed, layer)
        return new_state(
            sidecar.router, inputs, sizes.hidden_size, router.init, router.init_norm, draws
        )

    return Projections(sizes.layers, drawn)


def _upcycled_tensors(
    target: ConfigJson,
    seed: DenseModel,
    models: dict[str, DenseModel],
    sidecar: Sidecar,
    config: Config,
    alignment: Alignment | None,
    counts: TokenCounts | None,
) -> dict[str, Source]:
    """Return where each tensor of the mixture with the config.json `target` comes from."""
    readers = {name: model.reader for name, model in models.items()}
    branches = list(readers.items())
    base = seed.reader
    merge = Merge(base, readers, config, alignment, counts)

    def source(entry: Stored) -> Source:
        match entry.role:
            case Role.DENSE:
                return merge.source(entry)
            case Role.ROUTED:
                name, reader = branches[entry.expert]
                part = Part(f"expert {name}", reader, entry.dense_name)
                return expert_start(part, entry, sidecar.lineage, base)
            case Role.SHARED:
                if sidecar.shared_expert == "none":
                    return 0.0
                part = Part("seed", base, entry.dense_name)
                return expert_start(part, entry, sidecar.lineage, base)
            case Role.SHARED_GATE:
                assert entry.fill is not None
                return float(entry.fill)
            case Role.CONTEXT_MEAN:
                # nothing is known of it before text is read; a warm start sets it
                return 0.0
            case Role.ROUTER:
                return _router(entry, sidecar, config, seed.dtype)

    return {name: source(entry) for name, entry in stored(target).items()}


def _router(entry: Stored, sidecar: Sidecar, config: Config, dtype: str) -> Source:
    """Return where the router's weight of one layer comes from."""
    if config.router.kind == "nexus":
        # in the dtype they are stored in: whoever opens the checkpoint computes them again
        return Rows(sidecar, entry.layer, dtype)
    return Computed(partial(_free_rows, entry, sidecar, config))


def _free_rows(entry: Stored, sidecar: Sidecar, config: Config) -> Floats:
    """Return a linear router's weight [n, h] of one layer before any warm start that reads text."""
    router = config.router
    experts, hidden_size = entry.shape
    if router.warm_start == "embedding":
        inputs = sidecar.domain_inputs()
        return domain_rows(inputs, hidden_size, entry.layer, router.init_norm)
    # of its own in each layer: rows don't depend on what other layers have drawn
    draws = layer_draws(config.seed, entry.layer)
    return free_rows(experts, hidden_size, router.init, router.init_norm, draws)
