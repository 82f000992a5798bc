"""A mixture in which experts are `replaced` by other dense branches of the same names.

What an extension (paper section 2.3) does for a new expert, done at the place of an old one.
Shapes: n routed experts, h hidden size.
Not covered: taking the old branch's part out of the averaged weights (they were trained since;
lambda of the new one is laid over them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.cards import NO_PACKAGES, Packages
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import CHECKPOINT, ExpertRecord, ReplaceStep, portable
from nexus_ds.checkpoint.sidecar import Sidecar, rows_of, versions
from nexus_ds.checkpoint.values import read_floats
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import ConfigError
from nexus_ds.settings import Config
from nexus_ds.upcycling.blend import domain_vectors, expert_records
from nexus_ds.upcycling.compatible import NOTHING, Waived
from nexus_ds.upcycling.extend import (
    Branches,
    branched,
    check_encoder,
    check_expert_embeddings,
    merge_share,
    note_mixing,
    open_fitting,
    seed_of,
)
from nexus_ds.upcycling.new_checkpoint import NewModel, open_old


def replaced(
    checkpoint: Path,
    experts: Mapping[str, Path],
    embeddings: DomainEmbeddings | None,
    config: Config,
    share: float | None = None,
    packages: Packages = NO_PACKAGES,
    waived: Waived = NOTHING,
    out: Path | None = None,
) -> NewModel:
    """Describe a mixture with some of its experts replaced; nothing is written.

    The FFNs of the named experts: exact copies of the new branches', at the old places. Averaged
    weights, in fp32: (1 - lambda) phi_moe + lambda / k * sum of the k new models. Rows: P of the
    new domain embedding; as stored where the embedding is the old one's or none is given, and
    always for a linear router. All else: exact copies. The domain stays what it was, unless a card
    names another.

    Args:
        checkpoint: Nexus checkpoint, upcycled or trained.
        experts: for each replaced expert's name its new dense model.
        embeddings: rows of the experts' domains (of cards: of their names), from the checkpoint's
            encoder; None: the text is the old one.
        config: recorded with the lineage.
        share: lambda, the total share of the new branches; default k/n, what k of n experts have by
            right.
        packages: what else is known of the new branches.
        waived: differences that are no mistake.
        out: where it will be written, if the disk's room is to be checked.

    Raises:
        ConfigError: a name that no expert has, a card of a domain that another expert has, lambda
            outside [0, 1].
        DataError: a domain that was not embedded, a card of other weights.
        CheckpointError, UnsupportedModelError, IncompatibleModelsError: models that can't be put
            together, or embeddings of another encoder. All that is wrong is told at once, in one
            error of the first one's type.
    """
    mixture = open_old(checkpoint)
    old = mixture.sidecar
    problems = Problems()
    places: dict[str, int] = {}
    vectors = old.vectors
    with problems.collected():
        places = _places(old, experts)
        vectors = _vectors(old, places, embeddings, packages)
    total = 0.0
    with problems.collected():
        # the number of experts stays: k of n have k / n of the averaged weights by right
        total = merge_share(len(old.experts) - len(experts), len(experts), share)
    if share is None:
        note_mixing(mixture, total)
    models, alignment = open_fitting(mixture, experts, packages.base, waived, problems)
    seed = seed_of(mixture, packages.base, waived)
    step = ReplaceStep(
        checkpoint=portable(checkpoint),
        experts=list(models),
        share=total,
        router=config.router,
        seed=config.seed,
        aligned=alignment.recorded([CHECKPOINT, *models]) if alignment else {},
    )
    sidecar = dataclasses.replace(
        old,
        experts=_records(old, models, places, packages),
        lineage=[*old.lineage, step],
        versions=versions(),
        vectors=vectors,
    )

    def embeddings_of(layer: int) -> Floats:
        return _embeddings(mixture.reader, old, sidecar, layer)

    branches = Branches(models, places, total, alignment, seed)
    return branched("replace", mixture, branches, sidecar, embeddings_of, out)


def _places(sidecar: Sidecar, experts: Mapping[str, Path]) -> dict[str, int]:
    """Return each replaced expert's number; ConfigError for names that are not there."""
    known = [expert.name for expert in sidecar.experts]
    for name in experts:
        if name not in known:
            raise ConfigError(
                f"--expert {name}: --replace needs the name of an expert of the checkpoint "
                f"({', '.join(known)}); leave --replace out to add one"
            )
    return {name: known.index(name) for name in experts}


def _records(
    old: Sidecar,
    models: Mapping[str, DenseModel],
    places: Mapping[str, int],
    packages: Packages,
) -> list[ExpertRecord]:
    """Return the records of all experts, those at `places` of their new models.

    Errors: `expert_records`.
    """
    records = list(old.experts)
    staying = [record for record in records if record.name not in models]
    # without a card the domain stays what it was: text and evaluation are found by it
    domains = {name: records[place].domain for name, place in places.items()}
    for record in expert_records(models, packages.cards, staying, domains):
        records[places[record.name]] = record
    return records


def _vectors(
    sidecar: Sidecar,
    places: Mapping[str, int],
    embeddings: DomainEmbeddings | None,
    packages: Packages,
) -> Floats:
    """Return the domain embeddings [n, m] of the new mixture; DataError for one that lacks."""
    vectors = sidecar.vectors.copy()
    # without new ones the text is taken for the old one's, and so is its place in P's input
    if embeddings is not None:
        check_encoder(sidecar, embeddings)
        # a card's row has the expert's name, one of a file that of the text
        domains = [
            name if name in packages.cards else sidecar.experts[place].domain
            for name, place in places.items()
        ]
        vectors[list(places.values())] = domain_vectors(embeddings, domains)
    return vectors


def _embeddings(reader: Headers, old: Sidecar, new: Sidecar, layer: int) -> Floats:
    """Return the router's weight [n, h] of one layer.

    Rows are as stored, but for experts whose domain embedding has changed.
    """
    stored = read_floats(reader, gate_name(layer))
    changed = (old.vectors != new.vectors).any(axis=1)
    if new.router.kind != "nexus" or not bool(changed.any()):
        return stored
    fresh = rows_of(new, layer, reader.info(gate_name(layer)).dtype)
    # as if they were appended: what they replace may be among the largest
    compared = np.concatenate([stored, fresh[changed]])
    check_expert_embeddings(compared, len(stored), layer)
    return np.where(changed[:, None], fresh, stored)
