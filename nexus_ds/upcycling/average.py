"""The plain average of dense models ("dense merging", paper section 4.2).

It is the simplest alternative to a mixture.
Not covered: checks of compatibility beyond names and shapes; upcycling the same models makes them
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nexus_ds.checkpoint.dense import DenseModel, open_dense
from nexus_ds.checkpoint.dense_settings import both_ropes
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.outputs import new_directory, write_json
from nexus_ds.upcycling.sources import Part, Source, mean_of
from nexus_ds.upcycling.writing import write_tensors


def average_dense(models: Sequence[Path], out: Path) -> None:
    """Write the equal-weight fp32 mean of dense models of one architecture to `out`.

    It is in the first one's dtype, with its tokenizer; weights are streamed.

    Raises:
        IncompatibleModelsError: a tensor that is missing or of another shape in one of them.
        CheckpointError: NaN, infinite or all-zero weights.
    """
    # as they lie in their files: the average is of their family
    opened = [open_dense(path).in_file() for path in models]
    first, *others = opened
    # before gigabytes are written
    for other in others:
        _check_shapes(first, other)
    names = first.reader.names()
    infos = {name: first.reader.info(name) for name in names}
    plan = {name: (info.dtype, info.shape) for name, info in infos.items()}
    # where weights are bad, messages name the model by its folder
    readers = [(f"model {model.directory.name}", model.reader) for model in opened]
    tensors: dict[str, Source] = {}
    for name in plan:
        parts = [Part(who, reader, name) for who, reader in readers]
        tensors[name] = mean_of(parts)
    config = both_ropes(first.config)
    with new_directory(out) as directory:
        write_tensors(directory, plan, tensors, "average", config)
        write_json(directory / "config.json", config)
        copy_tokenizer(models[0], directory)


def _check_shapes(first: DenseModel, other: DenseModel) -> None:
    """Raise IncompatibleModelsError unless `other` has all tensors of `first`, in their shapes."""
    theirs = other.reader
    for name in first.reader.names():
        shape = first.reader.info(name).shape
        if name not in theirs or theirs.info(name).shape != shape:
            raise IncompatibleModelsError(
                f"{other.directory} can't be averaged with {first.directory}: {name} differs; "
                "average models of one seed"
            )
