"""The domain card that the training of a branch leaves in its directory.

It is made before the first step, on one rank: text that can't be read and an encoder that is not
there are told before hours are spent. Until the branch is written it lies beside its states, with a
record of what it was made of: a start with another text, seed or setting makes it again.

Not covered: cards of models that were trained elsewhere (the verb `card`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from nexus_ds.checkpoint.cards import (
    card_of,
    ffn_sha256,
    has_card,
    read_card,
    write_card,
)
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.model_card import stated_license
from nexus_ds.checkpoint.sidecar import content_fingerprint
from nexus_ds.data.domains import DomainEmbeddings, embed_domains, read_domain_embeddings
from nexus_ds.data.encoder_files import weights_hash
from nexus_ds.data.sentence_encoder import SentenceEncoder, encoder_directory
from nexus_ds.data.sources import open_source
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.outputs import new_file, write_text
from nexus_ds.pipeline import BRANCH, places
from nexus_ds.sealed import read_sealed, seal
from nexus_ds.settings import Config

# Of each domain's text, from its beginning: the ranks wait meanwhile.
LOOKED_AT = 1 << 30
# Beside the waiting card: what it was made of.
RECORD = "domain_card.made_of.json"


def wants_card(config: Config) -> bool:
    """Return whether this run leaves a domain card."""
    return config.stage == BRANCH and config.pipeline.card


def _made_before(config: Config, revision: str) -> DomainEmbeddings | None:
    """Return the run's own embedding of the branch's text, None if there is none yet."""
    where = places(config)
    for path in (where.domains, where.new_domains):
        if not path.is_file():
            continue
        try:
            found = read_domain_embeddings(path)
        # another's file in this place: whoever reads it for itself says so
        except DataError:
            continue
        same = (found.revision, found.seed, found.data) == (
            revision,
            config.seed,
            config.data.path,
        )
        if same and set(config.data.domains) <= set(found.names):
            return found
    return None


def _revision(config: Config) -> str:
    """Return the hash of the encoder's weights; ConfigError if it is not on this machine."""
    try:
        return weights_hash(encoder_directory(config.pipeline.encoder))
    except ConfigError as error:
        raise ConfigError(
            f"{error}. It is for the branch's domain card: pipeline.card=false trains without one"
        ) from error


def _made_of(
    config: Config, shares: Mapping[str, float], revision: str, license_name: str
) -> dict[str, object]:
    """Return all that the card depends on, as JSON."""
    pipe, data = config.pipeline, config.data
    source = open_source(data.path)
    return {
        "domain": config.branch,
        "license": license_name,
        "model at the start": content_fingerprint(Path(config.model.path)),
        "data.path": data.path,
        "text": {domain: source.fingerprint(domain, "train") for domain in data.domains},
        "shares": dict(shares),
        "encoder": [pipe.encoder, revision],
        "pipeline.embedding_documents": pipe.embedding_documents,
        "seed": config.seed,
        "data.max_bytes": data.max_bytes,
        "data.on_bad_row": data.on_bad_row,
    }


def _lies_there(work: Path, facts: dict[str, object]) -> bool:
    """Return whether the card in `work` was made of just this; without a record nobody knows."""
    try:
        return has_card(work) and read_sealed(work / RECORD) == facts
    except (OSError, ValueError):
        return False


def _embedded(config: Config, revision: str) -> DomainEmbeddings:
    """Return the embeddings of the text that the branch is trained on."""
    pipe, data = config.pipeline, config.data
    found = _made_before(config, revision)
    if found:
        return found
    return embed_domains(
        open_source(data.path),
        data.domains,
        SentenceEncoder(pipe.encoder),
        pipe.embedding_documents,
        config.seed,
        max_bytes=data.max_bytes or LOOKED_AT,
        on_bad_row=data.on_bad_row,
    )


def prepare_card(config: Config, shares: Mapping[str, float], work: Path) -> None:
    """Make the card of a branch that is about to be trained, unless it lies in `work` already.

    One that was made of something else is made again: of a run that was killed before its first
    state, or whose result was removed, nothing else tells that its text was another.

    Args:
        config: of the run.
        shares: of each domain in the text.
        work: the run's folder of states.

    Raises:
        ConfigError: no such encoder on this machine.
        DataError: text that is missing or damaged.
        CheckpointError: a seed that can't be read.
    """
    seed = Path(config.model.path)
    license_name = config.model.license or stated_license(seed)
    revision = _revision(config)
    facts = _made_of(config, shares, revision, license_name)
    if _lies_there(work, facts):
        return
    card = card_of(_embedded(config, revision), shares, config.branch, license_name)
    work.mkdir(parents=True, exist_ok=True)
    # First, for a kill in between: an older record must not speak for the new card.
    (work / RECORD).unlink(missing_ok=True)
    write_card(work, dataclasses.replace(card, seed_sha256=ffn_sha256(open_dense(seed))))
    with new_file(work / RECORD, overwrite=True) as temporary:
        write_text(temporary, seal(facts))


def place_card(config: Config, directory: Path) -> None:
    """Write the prepared card beside the weights in `directory`, with their hash."""
    card = read_card(Path(config.output + ".training"))
    write_card(directory, dataclasses.replace(card, ffn_sha256=ffn_sha256(open_dense(directory))))
