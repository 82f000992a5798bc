"""The domain card of a dense model: what a router has to know of the text that it was trained on.

With `domain_card.json` beside its weights a branch is a package: who puts a mixture together needs
neither the text nor an encoder, and who must not share the text gives away its embedding alone. The
embedding is raw, the mean of the documents' vectors of length one: the mixture that it enters
subtracts its own centre, which is the mean of what such cards say.

Not covered: how the text is embedded (`data.domains`); proof that a card tells the truth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np

from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.data.domains import DomainEmbeddings, read_domain_embeddings
from nexus_ds.errors import CheckpointError, ConfigError, DataError, IncompatibleModelsError
from nexus_ds.outputs import write_json

CARD = "domain_card.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class DomainCard:
    """What `domain_card.json` says, key by key."""

    domain: str
    license: str
    """Under which the model may be used, in the hub's words (apache-2.0); empty: not said."""
    encoder: str
    revision: str
    """sha256 over the encoder's weight files."""
    max_tokens: int
    """Tokens of one of the encoder's windows."""
    documents: int
    """Documents that were sampled and embedded."""
    windows: int
    """Windows of a document that were embedded at most."""
    sample_seed: int
    text_documents: int
    """Documents of the text that the sample was drawn from; 0: not counted."""
    text_bytes: int
    """UTF-8 bytes of the same."""
    seed_sha256: str
    """Of the FFN tensors of the model that this one was trained from; empty: not known."""
    ffn_sha256: str
    """Of this model's own, so that a card is not taken for another's; empty: not checked."""
    embedding: list[float]
    """Mean of the documents' vectors of length one; neither normalised nor centred."""


@dataclass(frozen=True)
class Packages:
    """What is known of branches besides their weights."""

    cards: Mapping[str, DomainCard] = field(default_factory=dict)
    """Of the experts whose embeddings come from there."""
    base: Path | None = None
    """Model that adapters among them are merged into; None: the one that they name."""


NO_PACKAGES = Packages()


def ffn_sha256(model: DenseModel) -> str:
    """Return the hash of a dense model's FFN tensors, as `nexus.json` has it of each expert."""
    return sha256_of_tensors(model.reader, model.ffn_names())


def card_of(
    embeddings: DomainEmbeddings,
    shares: Mapping[str, float],
    domain: str,
    license_name: str = "",
) -> DomainCard:
    """Return the card of a domain whose text is that of some embedded ones.

    Args:
        embeddings: of the text.
        shares: for each row's name its share of the text; together 1.
        domain: what the card calls it.
        license_name: of the model.
    """
    mean_M = np.zeros(embeddings.dimension, dtype=np.float32)
    for name, share in shares.items():
        mean_M += np.float32(share) * embeddings.vector(name)
    return DomainCard(
        domain=domain,
        license=license_name,
        encoder=embeddings.encoder,
        revision=embeddings.revision,
        max_tokens=embeddings.max_tokens,
        documents=sum(embeddings.documents[name] for name in shares),
        windows=embeddings.windows,
        sample_seed=embeddings.seed,
        text_documents=sum(embeddings.text_documents.get(name, 0) for name in shares),
        text_bytes=sum(embeddings.text_bytes.get(name, 0) for name in shares),
        seed_sha256="",
        ffn_sha256="",
        # a float32 as text is its shortest decimal, and that of its double reads back the same
        embedding=[float(value) for value in mean_M],
    )


def write_card(directory: Path, card: DomainCard) -> None:
    """Write or replace the card of the model in `directory`."""
    write_json(Path(directory) / CARD, {"format": FORMAT} | dataclasses.asdict(card))


def has_card(directory: Path) -> bool:
    """Return whether a directory holds a domain card."""
    return (Path(directory) / CARD).is_file()


def read_card(directory: Path) -> DomainCard:
    """Read the domain card beside a model.

    Raises:
        CheckpointError: none, damaged, or of another format.
    """
    value = read_json_object(Path(directory), CARD)
    where = Path(directory) / CARD
    found = value.pop("format", None)
    if found != FORMAT:
        raise CheckpointError(
            f"{where}: format {found!r}, this version reads {FORMAT}; make the card again"
        )
    hints = get_type_hints(DomainCard)
    if set(value) != set(hints):
        raise CheckpointError(
            f"{where}: found the keys {sorted(value)}, expected {sorted(hints)}; "
            "make the card again"
        )
    for key, kind in hints.items():
        _check_type(where, key, value[key], kind)
    card = DomainCard(**value)
    # as it will be used: fp32 has no number of 40 digits
    with np.errstate(over="ignore"):
        vector_M = np.array(card.embedding, np.float32)
    if not vector_M.any() or not np.isfinite(vector_M).all():
        raise CheckpointError(
            f"{where}: the embedding is empty, zero or has values that are not numbers; "
            "make the card again"
        )
    return card


def _check_type(where: Path, key: str, value: object, kind: type) -> None:
    inner = get_args(kind)
    good = type(value) is (get_origin(kind) or kind)
    if good and isinstance(value, list):
        # a whole number is a float that lost its point
        good = all(type(item) in (*inner, int) for item in value)
    if not good:
        raise CheckpointError(f"{where}: {key} is {str(value)[:100]!r}, expected {kind}")


def embeddings_of(cards: Mapping[str, DomainCard]) -> DomainEmbeddings:
    """Return what the cards of experts say as one table of embeddings, a row for each name.

    Raises:
        IncompatibleModelsError: cards of different encoders.
    """
    encoders = {(card.revision, len(card.embedding)) for card in cards.values()}
    if len(encoders) > 1:
        made = [f"{name}: {card.encoder} {card.revision[:12]}" for name, card in cards.items()]
        listed = "; ".join(made)
        raise IncompatibleModelsError(
            f"the domain cards come from different encoders ({listed}), expected one: embed the "
            "domains again with the same encoder (nexus-ds card DIR --encoder NAME --overwrite)"
        )
    first = next(iter(cards.values()))
    return DomainEmbeddings(
        names=list(cards),
        vectors=np.array([card.embedding for card in cards.values()], dtype=np.float32),
        encoder=first.encoder,
        revision=first.revision,
        max_tokens=first.max_tokens,
        windows=first.windows,
        documents={name: card.documents for name, card in cards.items()},
        seed=first.sample_seed,
        # where the text lies is nothing that a card tells
        data="",
    )


def read_cards(experts: Mapping[str, Path]) -> dict[str, DomainCard]:
    """Return the domain card of each expert.

    Raises:
        ConfigError: names all experts without one.
        CheckpointError: a damaged card.
    """
    bare = [f"{name} ({path})" for name, path in experts.items() if not has_card(path)]
    if bare:
        raise ConfigError(
            f"no domain card ({CARD}) of {', '.join(bare)}: give --domains FILE with the "
            "embeddings of all experts' domains (nexus-ds embed), or make the cards: "
            "nexus-ds card DIR --data DIR --domain NAME"
        )
    return {name: read_card(path) for name, path in experts.items()}


def embeddings_for(
    domains: str | None, experts: Mapping[str, Path], seed: Path | None = None
) -> tuple[DomainEmbeddings, dict[str, DomainCard]]:
    """Return the embeddings of experts' domains, and the cards that they come from.

    Args:
        domains: file of `nexus-ds embed`, in whose place no card is read; None: the cards'.
        experts: directory of each dense model by name.
        seed: the one that needs no card, as an expert whose router has free rows.

    Raises:
        DataError: the file is missing or of another kind.
        ConfigError, CheckpointError, IncompatibleModelsError: cards that are missing, damaged, or
            of different encoders.
    """
    if domains:
        return read_domain_embeddings(Path(domains)), {}
    # However its path is spelled, or linked to.
    place = seed and Path(seed).resolve()
    bare_seed = [
        name
        for name, path in experts.items()
        if Path(path).resolve() == place and not has_card(path)
    ]
    described = {name: path for name, path in experts.items() if name not in bare_seed}
    cards = read_cards(described or experts)
    return embeddings_of(cards), cards


def check_card(name: str, card: DomainCard, sha256: str) -> None:
    """Raise DataError where an expert's card is that of other weights.

    Args:
        name: of the expert, for the message.
        card: its card.
        sha256: of its FFN tensors, `ffn_sha256`.
    """
    if card.ffn_sha256 and card.ffn_sha256 != sha256:
        raise DataError(
            f"expert {name}: its {CARD} is of other weights (FFN sha256 {card.ffn_sha256[:12]}, "
            f"these have {sha256[:12]}), and may be of other text: make it again with nexus-ds "
            "card, or, if the same weights were only cast, let its ffn_sha256 be empty"
        )
