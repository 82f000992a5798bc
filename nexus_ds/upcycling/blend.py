"""Putting models together: what all of upcycling shares.

Every tensor of the output is a `Blend` (a weighted sum of stored tensors, in fp32; a single one is
copied exactly) or is given (expert embeddings).
Not covered: aligning models of different bases (permutations, other vocabularies); which rules
there are (`merge`); how it is written (`writing`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import (
    Iterable,
    Mapping,
    Sequence,
)
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.cards import (
    DomainCard,
    check_card,
    ffn_sha256,
)
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.model_card import stated_license
from nexus_ds.checkpoint.qwen2_moe import Role, Stored
from nexus_ds.checkpoint.records import (
    EncoderRecord,
    ExpertRecord,
    Step,
    portable,
    start_scale,
)
from nexus_ds.command_lines import EXPERT_NAME, EXPERT_NAMES
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.upcycling.compatible import note
from nexus_ds.upcycling.sources import Blend, Part

_COMPUTING = threading.Lock()
NO_DOMAINS: Mapping[str, str] = {}


def expert_start(
    part: Part,
    entry: Stored,
    lineage: list[Step],
    seed: Headers | None,
) -> Blend:
    """Return an expert's tensor: its dense model's, scaled as it is stored and as it starts.

    Args:
        part: the dense model's tensor.
        entry: the expert's.
        lineage: of the mixture; it says how experts start.
        seed: of the mixture; needed where routed experts go further than their branches.
    """
    scale = entry.scale
    shared = entry.role is Role.SHARED
    # linear in what it multiplies, as gate_proj is not
    if entry.part == "down_proj":
        scale *= start_scale(lineage, "shared" if shared else "routed")
    task = start_scale(lineage, "task")
    if shared or task == 1.0:
        return Blend([part], scale=scale)
    # `extend` has asked for it
    assert seed is not None
    branch = dataclasses.replace(part, weight=task)
    return Blend([branch, Part("seed", seed, entry.dense_name, 1.0 - task)], scale=scale)


def parse_experts(values: Iterable[str]) -> dict[str, Path]:
    """Parse the NAME=DIR of --expert, in the order given.

    Raises:
        ConfigError: another form, a name that is no plain word, or a name given twice.
    """
    experts: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not equals or not directory or not EXPERT_NAME.fullmatch(name):
            raise ConfigError(
                f"--expert {value!r}: expected NAME=DIR, with a name of {EXPERT_NAMES}"
            )
        if name in experts:
            raise ConfigError(
                f"--expert {name} is given twice; each expert needs a name of its own"
            )
        experts[name] = Path(directory)
    return experts


def domain_vectors(embeddings: DomainEmbeddings, names: Iterable[str]) -> Floats:
    """Return the raw domain embeddings [n, m] fp32 of experts.

    Raises:
        DataError: a domain that was not embedded; names those that were.
    """
    return np.stack([embeddings.vector(name) for name in names]).astype(np.float32)


def encoder_record(embeddings: DomainEmbeddings, names: Iterable[str]) -> EncoderRecord:
    """Return what the sidecar keeps of the encoder."""
    fewest = min(embeddings.documents.get(name, 0) for name in names)
    return EncoderRecord(
        embeddings.encoder,
        embeddings.revision,
        embeddings.dimension,
        fewest,
        True,
    )


def expert_records(
    models: Mapping[str, DenseModel],
    cards: Mapping[str, DomainCard],
    old: Sequence[ExpertRecord] = (),
    domains: Mapping[str, str] = NO_DOMAINS,
) -> list[ExpertRecord]:
    """Return what the sidecar keeps of experts; of those whose card names no hash of its weights
    the hash is told by `write_tensors`.

    Args:
        models: by the experts' names.
        cards: that say which domains these are.
        old: experts that stay beside them.
        domains: of experts without a card, by name; others of them are named by their domain.

    Raises:
        DataError: a card of other weights.
        CheckpointError: a card whose domain can't be a folder's name.
        ConfigError: a domain that another expert has.
    """
    taken = {expert.domain: expert.name for expert in old}
    records = []
    for name, model in models.items():
        # where nothing is to be compared before, they are hashed as they are copied
        sha256 = ""
        domain = domains.get(name, name)
        card = cards.get(name)
        if card:
            domain = card.domain
        if card and card.ffn_sha256:
            sha256 = ffn_sha256(model)
            check_card(name, card, sha256)
        # a card comes from elsewhere, and names a folder of text
        if not EXPERT_NAME.fullmatch(domain):
            raise CheckpointError(
                f"expert {name}: the domain {domain[:100]!r} of its card is no name of one; "
                f"expected {EXPERT_NAMES}"
            )
        if domain in taken:
            raise ConfigError(
                f"expert {name} is of the domain {domain}, as the expert {taken[domain]} is; "
                "expected a domain of its own: give it another name in the domain card"
            )
        taken[domain] = name
        source = portable(model.directory)
        records.append(ExpertRecord(name, domain, source, sha256, stated_license(model.directory)))
    return records


def note_other_seeds(seed: DenseModel, cards: Mapping[str, DomainCard]) -> None:
    """Say on stderr which cards name another seed than the one that is given.

    Not refused: a seed that was saved in another dtype is another by its hash alone, and
    `check_related` tells those that are others by their weights.
    """
    known = {name: card.seed_sha256 for name, card in cards.items() if card.seed_sha256}
    if not known:
        return
    own = ffn_sha256(seed)
    for name, sha256 in known.items():
        if sha256 != own:
            note(
                f"expert {name}: its card names another seed (FFN sha256 {sha256[:12]}) "
                f"than {seed.directory} ({own[:12]}); their weights are related all the same"
            )
