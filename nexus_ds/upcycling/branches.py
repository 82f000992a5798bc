"""Dense branches beside the model that they are put together with: opened, and all checks made.

What is wrong is collected, so that a user is told everything at once; a model that can't be opened
is left out of the checks that compare.
Not covered: what the router's settings and domain embeddings have to be (`upcycle`, `extend`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nexus_ds.checkpoint.adapters import describe_merge, open_branch, tokenizer_home
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.tokenizer import check_tokenizer
from nexus_ds.upcycling.compatible import (
    Origin,
    Waived,
    check_models,
    difference_notes,
    note,
)
from nexus_ds.upcycling.same_tokenizers import (
    Alignment,
    Embedder,
    aligned,
    check_tokenizers,
    note_alignment,
)


def open_all(
    directories: Mapping[str, Path],
    problems: Problems,
    base: Path | None = None,
    seed: Path | None = None,
    fallback: Path | None = None,
) -> dict[str, DenseModel]:
    """Return the dense models, or adapters, that can be opened, by name.

    Says on stderr what is merged into what. `problems` collects why others can't be opened; other
    arguments and errors: `open_branch`.
    """
    models = {}
    for name, directory in directories.items():
        with problems.collected():
            models[name] = open_branch(directory, base, seed, fallback)
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
    check_models(origin, models, problems, waived)
    for text in difference_notes(origin, models):
        note(text)
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
    others = []
    if origin.rows == "none":
        others.append(own)
    else:
        branches.insert(0, own)
    kept = origin.rows == "kept"
    found = aligned(branches, others, kept)
    check_tokenizer(found.tokenizer, found.rows)
    note_alignment(branches, found)
    return found
