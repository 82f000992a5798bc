"""What several models are to each other, and whether they can be put together; without torch.

The same checks as in `upcycle` and `extend`, but nothing is refused: all is told. Vocabularies are
compared by what their ids mean (`checkpoint.vocabulary`); whether a text splits the same way is for
transformers, when the models are put together.
Not covered: domain embeddings and router settings; options that would make up for a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.dense import DenseModel, open_dense
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.qwen2_moe import check_shared_gates, open_moe
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.relation import OUTSIDE, Relation, relation
from nexus_ds.checkpoint.values import Comparison
from nexus_ds.checkpoint.vocabulary import Vocabulary, read_vocabulary
from nexus_ds.errors import CheckpointError, IncompatibleModelsError, UnsupportedModelError
from nexus_ds.upcycling.compatible import (
    Origin,
    check_models,
    difference_notes,
    mixture_origin,
    seed_origin,
)


@dataclass
class Assessment:
    """What models could become together."""

    kind: str
    """seed and experts | extension | expert."""
    problems: list[str] = field(default_factory=list)
    """What stands against it, each with its remedy."""
    notes: list[str] = field(default_factory=list)
    """What differs without harm."""

    @property
    def possible(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON."""
        facts = {"as": self.kind, "possible": self.possible}
        return facts | {"problems": self.problems, "notes": self.notes}


def _shown(directory: Path) -> Headers:
    """Return a model's tensors under the names that all families and mixtures share.

    Of a model that can't become an expert, or none that this program has made, under its own: then
    those of one name are compared.
    """
    try:
        return open_moe(directory)[1] if is_nexus(directory) else open_dense(directory).reader
    except (CheckpointError, UnsupportedModelError):
        # what is wrong with it is told elsewhere
        return Headers(directory)


def _numbers(found: Comparison) -> dict[str, float | None]:
    """Return cosine and relative distance, to four places; None where there is none."""
    values = {"cosine": found.cosine, "distance": found.distance}
    return {key: None if math.isnan(x) else round(x, 4) for key, x in values.items()}


def related(first: Path, second: Path) -> dict[str, Any]:
    """Return how the second model's weights are related to the first's, from a sample; JSON.

    `cosine` is the median over attention matrices, `modules` has cosine and relative distance of
    each module over all layers, `layers` the same by layer, `unchanged` the modules that are equal.
    """
    found = relation(_shown(first), _shown(second))
    modules = found.modules()
    unchanged = [name for name, one in modules.items() if one.apart == 0 and one.first > 0]
    layers = {}
    for layer, inside in sorted(found.layers.items()):
        if layer != OUTSIDE:
            layers[str(layer)] = {name: _numbers(one) for name, one in inside.items()}
    cosine = found.cosine
    return {
        "to": str(first),
        "cosine": None if math.isnan(cosine) else round(cosine, 4),
        "says": _said(found, modules, unchanged),
        "modules": {name: _numbers(one) for name, one in modules.items()},
        "unchanged": unchanged,
        "layers": layers,
    }


def _said(found: Relation, modules: Mapping[str, Comparison], unchanged: Sequence[str]) -> str:
    """Return the evidence in words."""
    if math.isnan(found.cosine):
        return "nothing to compare: no attention matrix of the same name and shape"
    if found.unrelated:
        return f"unrelated: cosine {found.cosine:.2f} of attention matrices, a branch has about 0.9"
    if len(unchanged) == len(modules):
        return "the same weights, in the sample"
    moved = ", ".join(name for name in modules if name not in unchanged)
    return f"shares a base: cosine {found.cosine:.2f} of attention matrices; moved: {moved}"


def assess(directories: Sequence[Path]) -> Assessment | None:
    """Return whether models can be put together: the first as seed, or as the mixture to extend.

    Args:
        directories: of a dense model alone, of a seed and its branches, or of a Nexus checkpoint
            and branches.

    Returns:
        None where that is no question: a mixture alone, or several.
    """
    first, *others = directories
    # only a mixture that comes first can be extended
    mixtures = [path for path in directories if is_nexus(path)]
    if any(is_nexus(path) for path in others) or (mixtures and not others):
        return None
    kind = "seed and experts" if others else "expert"
    problems = Problems()
    models: dict[str, DenseModel] = {}
    # what can't be opened is told, and the others are compared
    for path in others:
        with problems.collected():
            models[str(path)] = open_dense(path)
    origin = None
    with problems.collected():
        origin = _mixture(first, problems) if mixtures else seed_origin(open_dense(first))
    notes = _checked(origin, models, problems) if origin else []
    found = list(map(str, problems.found))
    return Assessment("extension" if mixtures else kind, found, notes)


def _checked(origin: Origin, models: Mapping[str, DenseModel], problems: Problems) -> list[str]:
    """Make all checks that need no torch; return what differs without harm."""
    check_models(origin, models, problems)
    with problems.collected():
        _check_vocabularies(origin, models)
    return difference_notes(origin, models)


def _mixture(directory: Path, problems: Problems) -> Origin:
    config, reader = open_moe(directory)
    with problems.collected():
        check_shared_gates(reader, settings(config).layers)
    return mixture_origin(directory, config, reader)


def _check_vocabularies(origin: Origin, models: Mapping[str, DenseModel]) -> None:
    """Raise one error of all models whose ids mean something else than the first one's."""
    problems = Problems()
    own = _vocabulary(origin.directory, origin.settings.vocabulary, problems)
    for name, model in models.items():
        other = _vocabulary(model.directory, model.settings.vocabulary, problems)
        # one that can't be read is a problem already
        difference = own.difference(other) if own and other else None
        if own and other and difference:
            grew = own.grew_to(other) or other.grew_to(own)
            hint = "--align-vocab keeps them all" if grew else "train on one tokenizer"
            with problems.collected():
                raise IncompatibleModelsError(
                    f"{name}: its vocabulary is not that of {origin.directory}: "
                    f"{difference}; {hint}"
                )
    problems.refuse()


def _vocabulary(directory: Path, rows: int, problems: Problems) -> Vocabulary | None:
    """Return a model's vocabulary; `problems` collects one that is missing or too large."""
    with problems.collected():
        found = read_vocabulary(directory)
        if found is None:
            raise IncompatibleModelsError(
                f"{directory}: no tokenizer of a known form; copy the one that the model was "
                "trained with there"
            )
        if found.size > rows:
            raise IncompatibleModelsError(
                f"{directory}: the tokenizer has token ids up to {found.size - 1}, the model "
                f"embeds {rows}; give the tokenizer that the model was trained with"
            )
        return found
    return None
