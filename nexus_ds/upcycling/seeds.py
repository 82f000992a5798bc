"""The seed of a mixture that was put together before: told from models that are only its relatives.

Branches are related to their seed, so that relation alone lets any of them pass for it.
Not covered: a seed in another dtype than it had, whose hash is another: it is said, not refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nexus_ds.checkpoint.cards import ffn_sha256
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.records import Step, UpcycleStep, portable
from nexus_ds.errors import IncompatibleModelsError


def seed_hashes(seed: DenseModel) -> dict[str, str]:
    """Return what an upcycling records of a seed that later experts need again: by its dtype the
    hash of its FFN tensors. All of them are read."""
    return {seed.dtype: ffn_sha256(seed)}


def check_seed(lineage: Sequence[Step], seed: DenseModel) -> str:
    """Compare a model with the seed that a mixture was made of.

    Args:
        lineage: of the mixture.
        seed: the model that is given as its seed.

    Returns:
        Why nobody can tell whether it is the seed; empty where it is, or where nothing is known.

    Raises:
        IncompatibleModelsError: it is another model.
    """
    for step in lineage:
        if isinstance(step, UpcycleStep):
            return _compared(step, seed)
    return ""


def _compared(step: UpcycleStep, seed: DenseModel) -> str:
    recorded = step.seed_sha256
    if seed.dtype in recorded:
        expected, found = recorded[seed.dtype], ffn_sha256(seed)
        if found == expected:
            return ""
        raise IncompatibleModelsError(
            f"{seed.directory} is not the seed: its feed-forward networks have sha256 "
            f"{found[:12]}, those of the seed {step.seed_model} had {expected[:12]}; expected the "
            "model that the mixture was made of, as it was then: its experts go on from there"
        )
    if recorded:
        return (
            f"{seed.directory} is {seed.dtype}, the seed {step.seed_model} was "
            f"{', '.join(recorded)}: whether it is the seed can't be told; give it as it was"
        )
    # as `portable` records it, of whatever place
    name = Path(portable(seed.directory)).name
    if name == Path(step.seed_model).name:
        return ""
    return (
        f"{seed.directory} is called {name}, the seed {step.seed_model}, and the checkpoint has no "
        "hash of it (an older version wrote it): make sure that it is the seed"
    )
