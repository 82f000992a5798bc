"""The plain average of dense models ("dense merging", paper section 4.2): the simplest alternative
to a mixture.

Not covered: checks of compatibility beyond names and shapes; upcycling the same models makes them
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nexus_ds.checkpoint.families import both_ropes, open_dense
from nexus_ds.checkpoint.tensors import DTYPES, TensorWriter
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.outputs import new_directory, write_json


def average_dense(models: Sequence[Path], out: Path) -> None:
    """Write the equal-weight fp32 mean of dense models of one architecture to `out`, in the first
    one's dtype.

    Raises:
        IncompatibleModelsError: a tensor that is missing or of another shape in one of them.
    """
    opened = [open_dense(path) for path in models]
    first = opened[0].reader
    for other in opened[1:]:
        different = [
            n
            for n in first.names()
            if n not in other.reader or other.reader.info(n).shape != first.info(n).shape
        ]
        if different:
            raise IncompatibleModelsError(
                f"{other.directory} can't be averaged with {opened[0].directory}: {different[0]} differs; "
                "average models of one seed"
            )
    plan = {name: (first.info(name).dtype, first.info(name).shape) for name in first.names()}
    with new_directory(out) as directory:
        with TensorWriter(directory, plan) as writer:
            for name, (dtype, _) in plan.items():
                mean = torch.stack([model.reader.read(name).float() for model in opened]).mean(0)
                writer.write(name, mean.to(DTYPES[dtype]))
        write_json(directory / "config.json", both_ropes(opened[0].config))
        copy_tokenizer(models[0], directory)
