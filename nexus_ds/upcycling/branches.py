"""Dense branches beside the model that they are put together with: opened, and all checks made.

What is wrong is collected, so that a user is told everything at once; a model that can't be opened
is left out of the checks that compare.
Not covered: what the router's settings and domain embeddings have to be (`upcycle`, `extend`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_ds.checkpoint.adapters import describe_merge, open_branch, tokenizer_home
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.families.record import DenseSettings, dense_weights
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.tokenizer import check_tokenizer
from nexus_ds.upcycling.blend import read_generation_config
from nexus_ds.upcycling.compatible import (
    Waived,
    check_alike,
    check_related,
    check_sample,
    note,
    traits,
)
from nexus_ds.upcycling.same_tokenizers import (
    Alignment,
    Embedder,
    aligned,
    check_tokenizers,
    note_alignment,
)

TIED, POSITIONS = "tie_word_embeddings", "max_position_embeddings"


@dataclass(frozen=True)
class Origin:
    """What branches are put beside: their seed, or the mixture that they are added to."""

    who: str
    """seed | checkpoint."""
    directory: Path
    reader: Headers
    settings: DenseSettings
    family: str | None
    """None of a mixture, which is of none: what it computes stands in the settings."""
    names: Iterable[str]
    """Tensors whose values must be sound."""
    averaged: bool
    """Whether its own embeddings are part of the new ones."""

    def traits(self) -> dict[str, object]:
        """Return what branches must agree with."""
        return ({"family": self.family} if self.family else {}) | vars(self.settings)


def seed_origin(model: DenseModel) -> Origin:
    """Return a seed as what its branches are compared with."""
    names = dense_weights(model.settings)
    return Origin("seed", model.directory, model.reader, model.settings, model.family, names, False)


def open_all(
    directories: Mapping[str, Path],
    problems: Problems,
    base: Path | None = None,
    seed: Path | None = None,
) -> dict[str, DenseModel]:
    """Return the dense models, or adapters, that can be opened, by name.

    Says on stderr what is merged into what. `problems` collects why others can't be opened; other
    arguments and errors: `open_branch`.
    """
    models = {}
    for name, directory in directories.items():
        with problems.collected():
            models[name] = open_branch(directory, base, seed)
    for name, model in models.items():
        merged = describe_merge(model)
        if merged:
            note(f"expert {name}: {merged}")
    return models


def check_branches(
    origin: Origin, models: Mapping[str, DenseModel], waived: Waived, problems: Problems
) -> Alignment | None:
    """Check that dense models fit what they are put beside; say on stderr what differs harmlessly.

    Args:
        origin: their seed or mixture.
        models: for each expert's name its model.
        waived: differences that are no mistake.
        problems: collects what is wrong.

    Returns:
        How embeddings are put together where vocabularies may have grown, else None.
    """
    found = {name: traits(model) for name, model in models.items()}
    if origin.family is None:
        found = {name: vars(model.settings) for name, model in models.items()}
    # an expert may be of the seed's name
    who = f"the {origin.who}" if origin.who in models else origin.who
    with problems.collected():
        check_alike({who: origin.traits()} | found, waived)
    with problems.collected():
        check_related(f"the {origin.who} {origin.directory}", origin.reader, models, waived)
    with problems.collected():
        check_sample(origin.who, origin.reader, origin.names)
    for name, model in models.items():
        with problems.collected():
            check_sample(f"expert {name}", model.reader, dense_weights(model.settings))
    with problems.collected():
        # only to refuse one that asks for code; who writes reads it again
        read_generation_config(origin.directory)
    _note_differences(origin, models)
    with problems.collected():
        return _checked_tokenizers(origin, models, waived)
    return None


def _checked_tokenizers(
    origin: Origin, models: Mapping[str, DenseModel], waived: Waived
) -> Alignment | None:
    """Check that the new checkpoint's tokenizer suits all models and its embeddings."""
    if not waived.vocabulary:
        check_tokenizers(
            origin.directory, {name: tokenizer_home(model) for name, model in models.items()}
        )
        check_tokenizer(origin.directory, origin.settings.vocabulary)
        return None
    own = Embedder(f"the {origin.who}", origin.directory, origin.settings.vocabulary)
    branches = [
        Embedder(f"expert {name}", tokenizer_home(model), model.settings.vocabulary)
        for name, model in models.items()
    ]
    if origin.averaged:
        branches = [own, *branches]
    found = aligned(branches, [] if origin.averaged else [own])
    check_tokenizer(found.tokenizer, found.rows)
    note_alignment(branches, found)
    return found


def _note_differences(origin: Origin, models: Mapping[str, DenseModel]) -> None:
    """Say on stderr what differs in configurations and is carried or left behind all the same."""
    own = read_json_object(origin.directory, "config.json")
    for name, model in models.items():
        other = model.config
        # an adapter has none of its own
        if (model.directory / "config.json").is_file():
            other = read_json_object(model.directory, "config.json")
        # lengths that RoPE depends on are compared with the settings
        if other.get(POSITIONS) != own.get(POSITIONS):
            note(
                f"expert {name}: {POSITIONS} is {other.get(POSITIONS)}, the new checkpoint has "
                f"{own.get(POSITIONS)}, that of {origin.directory}"
            )
        if other.get(TIED) and not model.settings.tied_embeddings:
            note(
                f"expert {name}: config.json ties the embeddings, but {model.directory} has a head "
                "of its own: it is taken, as transformers does; tools that go by config.json "
                "compute something else with that model"
            )
