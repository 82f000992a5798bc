"""Whether the tokenizers of models that are put together mean the same, and what of them is kept.

As transformers reads them: what its class makes of a text counts, not what the files look like.
With `aligned`, vocabularies may have grown: the new checkpoint embeds every token, with rows from
those models that know it.
Shapes: V rows of the new embeddings.
Not covered: vocabularies in which an id means two things.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.qwen2_moe import Stored
from nexus_ds.checkpoint.tokenizer import (
    TokenizerMeaning,
    chat_templates,
    read_tokenizer,
    same_tokenizer_files,
)
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.upcycling.compatible import note
from nexus_ds.upcycling.sources import Blend, Stack


def check_tokenizers(reference: Path, others: Mapping[str, Path]) -> None:
    """Check that ids mean the same to models; say on stderr what is not taken from `others`.

    A token in another role (another end of a document) is a note: `reference`'s is kept. So is a
    chat template.

    Args:
        reference: checkpoint whose tokenizer the new one gets.
        others: for each expert's name its model's directory.

    Raises:
        IncompatibleModelsError: another vocabulary or another way to split a text; names the first
            differences of each.
        CheckpointError, UnsupportedModelError: a tokenizer that can't be read.
    """
    problems = Problems()
    # read when first needed: equal files are told apart by their hashes alone
    own = None
    for name, directory in others.items():
        if same_tokenizer_files(reference, directory):
            continue
        own = own or read_tokenizer(reference)
        with problems.collected():
            _check_tokenizer(name, directory, reference, own)
    problems.refuse()


def _check_tokenizer(name: str, directory: Path, reference: Path, own: TokenizerMeaning) -> None:
    other = read_tokenizer(directory)
    difference = own.difference(other)
    if difference is None:
        note_differences(name, directory, reference, own, other)
        return
    added = other.beyond(own) is None or own.beyond(other) is None
    grown = "Tokens were only added: --align-vocab keeps them all. " if added else ""
    raise IncompatibleModelsError(
        f"the tokenizer of expert {name} ({directory}) is not that of {reference}: "
        f"{difference}; experts of one model must be trained on one tokenizer. {grown}"
        "If no text of this one held what differs, copy the tokenizer files of "
        f"{reference} over those in {directory}"
    )


def note_differences(
    name: str,
    directory: Path,
    reference: Path,
    own: TokenizerMeaning,
    other: TokenizerMeaning,
) -> None:
    """Say on stderr what of an expert's tokenizer is not taken along, though ids mean the same.

    Args:
        name, directory: of the expert.
        reference: directory whose tokenizer is kept.
        own, other: what the two mean.
    """
    for text in [*_role_notes(own, other), *_template_notes(reference, directory)]:
        note(f"expert {name}: {text}")


def _role_notes(own: TokenizerMeaning, other: TokenizerMeaning) -> list[str]:
    roles = own.other_roles(other)
    if not roles:
        return []
    return [
        f"{'; '.join(roles)}: every id means the same, and the new checkpoint keeps the latter; "
        "its tokenizer_config.json can change it"
    ]


def _template_notes(reference: Path, directory: Path) -> list[str]:
    own = chat_templates(reference)
    other = chat_templates(directory)
    # the texts alone: the same template may lie in either of two files
    same = list(own.values()) == list(other.values())
    if not other or same:
        return []
    kept = f"that of {reference}" if own else "none"
    return [
        f"its chat template ({', '.join(other)} in {directory}) is not taken along, "
        f"the new checkpoint has {kept}: copy it there, as chat_template.jinja, "
        "to chat as this expert does"
    ]


# Vocabularies that grew ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedder:
    """A model that gives rows to the new embeddings, or that they have to suit."""

    who: str
    """Names it in messages."""
    directory: Path
    rows: int
    """Of its embeddings."""


@dataclass(frozen=True)
class Alignment:
    """Which rows of embeddings and head each model gives."""

    tokenizer: Path
    """The model's whose tokenizer has every token."""
    counts: np.ndarray
    """[models, V] bool: whether a row is taken from a model, in the order they were given."""

    @property
    def rows(self) -> int:
        """V, the rows of the new embeddings."""
        return int(self.counts.shape[1])

    def pieces(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yield [start, stop) of rows that come from the same models, and those models' numbers."""
        changes = np.diff(self.counts.astype(np.int8), axis=1).any(axis=0)
        borders = [int(row) + 1 for row in np.flatnonzero(changes)]
        for start, stop in pairwise([0, *borders, self.rows]):
            yield start, stop, [int(i) for i in np.flatnonzero(self.counts[:, start])]

    def recorded(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return the rows that some models alone give, by `start:stop`, as nexus.json has them.

        Args:
            names: of all models, in the order they were given.
        """
        pieces = list(self.pieces())
        return {
            f"{start}:{stop}": [names[index] for index in models]
            for start, stop, models in pieces
            if len(models) < len(names) and len(pieces) > 1
        }

    def blend(self, whole: Blend) -> Blend | Stack:
        """Return the rows of a blend of all models, each from those that it is taken from.

        Weights are divided by their sum over these models, so that no row is scaled down because
        some lack it.
        """
        pieces = list(self.pieces())
        if len(pieces) == 1:
            return _some(whole, pieces[0][2])
        # rows that nobody has trained may be zeros: the rows of padding are a piece of their own
        lenient = replace(whole, parts=[replace(part, zeros=True) for part in whole.parts])
        some = [(start, stop, _some(lenient, models)) for start, stop, models in pieces]
        return Stack(tuple(some))


def by_row(blend: Blend, entry: Stored, alignment: Alignment | None) -> Blend | Stack:
    """Return a blend of all models, row by row where a row stands for a token and may be missing.

    Args:
        blend: of the models that `alignment` was made for, in that order.
        entry: the tensor that it becomes.
        alignment: None: all models have all rows.
    """
    of_tokens = entry.dense_name in (EMBEDDING, HEAD)
    return alignment.blend(blend) if alignment and of_tokens else blend


def _some(whole: Blend, models: Sequence[int]) -> Blend:
    """Return the weighted mean of some parts, the plain one where all weigh nothing."""
    if len(models) == len(whole.parts):
        return whole
    parts = [whole.parts[index] for index in models]
    total = sum(part.weight for part in parts)
    if len(parts) == 1 or not total:
        parts = [replace(part, weight=1.0) for part in parts]
        total = float(len(parts))
    return Blend(parts, divisor=total)


def aligned(
    models: Sequence[Embedder], others: Sequence[Embedder] = (), kept: bool = False
) -> Alignment:
    """Return how embeddings of vocabularies that only grew are put together.

    A row comes from all models whose tokenizer has its id; one that no tokenizer has (padding) from
    all models that have the row.

    Args:
        models: those that give rows.
        others: those whose tokens must mean the same, though they give no rows: a seed.
        kept: whether rows that the first model gives come from it alone.

    Raises:
        IncompatibleModelsError: an id that means two things, or a text that splits in two ways.
        CheckpointError, UnsupportedModelError: a tokenizer that can't be read.
    """
    everyone = [*others, *models]
    meanings = [read_tokenizer(model.directory) for model in everyone]
    # of equals the first: the seed's, or the checkpoint's
    largest = max(range(len(everyone)), key=lambda i: (len(meanings[i].tokens), -i))
    home = everyone[largest].directory
    problems = Problems()
    for model, meaning in zip(everyone, meanings, strict=True):
        with problems.collected():
            _check_grown(model, meaning, home, meanings[largest])
    problems.refuse()
    # padding counts, too: a head may have been trained on it
    total = max(model.rows for model in models)
    counts = _counts(models, meanings[len(others) :], total)
    if kept:
        counts[1:, counts[0]] = False
    return Alignment(home, counts)


def _counts(
    models: Sequence[Embedder], meanings: Sequence[TokenizerMeaning], total: int
) -> np.ndarray:
    """Return whether each of `total` rows is taken from each model, [models, V] bool."""
    counts = np.zeros((len(models), total), bool)
    for row, model, meaning in zip(counts, models, meanings, strict=True):
        row[[index for index in meaning.tokens if index < model.rows]] = True
    nobody = np.asarray(~counts.any(axis=0))
    for row, model in zip(counts, models, strict=True):
        row[: model.rows] |= nobody[: model.rows]
    return counts


def _check_grown(
    model: Embedder, meaning: TokenizerMeaning, kept: Path, largest: TokenizerMeaning
) -> None:
    """Raise IncompatibleModelsError unless the largest vocabulary has a model's, and more."""
    difference = largest.beyond(meaning)
    if difference:
        raise IncompatibleModelsError(
            f"the tokenizer of {model.who} ({model.directory}) did not grow to that of {kept}: "
            f"{difference}; --align-vocab is for tokens that were added at ids of their own: "
            "give the tokens that only one model has ids that no other one uses, and move the "
            "rows of its embeddings along"
        )


def note_alignment(models: Sequence[Embedder], found: Alignment) -> None:
    """Say on stderr which rows come from which models, where not all give them."""
    names = [model.who for model in models]
    for rows, who in found.recorded(names).items():
        start, stop = map(int, rows.split(":"))
        note(f"rows {start} to {stop - 1} of the embeddings come from {', '.join(who)} alone")
    note(f"the tokenizer is that of {found.tokenizer}")
