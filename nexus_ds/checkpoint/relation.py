"""How two models' weights are related, told from a sample of their bytes; without torch.

What descends from one start keeps its direction: the cosine of attention matrices is about 0.9
between a branch and its seed, and 0 between models of different origin, even where sizes and
tokenizer agree. Norms are alike in all models and decide nothing.
A sample (`values.sample`) has 32,768 values of a tensor: of a large one the cosine is known to
about 0.01, and what changed outside of the sample goes unseen.
Not covered: models whose rows or heads were permuted, which look unrelated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nexus_ds.checkpoint.headers import Headers, kept_open
from nexus_ds.checkpoint.json_files import DIGITS
from nexus_ds.checkpoint.values import FLOATS, Comparison, sample

UNRELATED = 0.1
"""Median cosine of attention matrices below which models have nothing to do with each other.

Measured in the demo, whose learning rates are high: branches and their seed 0.94; the trained seed
and its own random start, a thousand steps before, 0.22; the same and another random start 0 give or
take 0.01 (0.03 in the smallest models of tests).
"""
ATTENTION = "self_attn"
OUTSIDE = -1
"""Number of the layer of what stands outside of the layers."""


def module_of(name: str) -> tuple[int, str]:
    """Return the layer of a tensor (OUTSIDE) and the module in it, by transformers' own names.

    model.layers.3.self_attn.q_proj.weight: (3, "self_attn"); lm_head.weight: (OUTSIDE, "lm_head").
    """
    words = name.removeprefix("model.").split(".")
    if words[0] == "layers" and len(words) > 2 and DIGITS.fullmatch(words[1]):
        return int(words[1]), words[2]
    return OUTSIDE, words[0]


@dataclass
class Relation:
    """What two models have in common, by layer and module."""

    layers: dict[int, dict[str, Comparison]] = field(default_factory=dict)
    """For each layer, and OUTSIDE, its modules; of the second model to the first."""
    attention: list[float] = field(default_factory=list)
    """Cosine of each attention matrix."""

    @property
    def cosine(self) -> float:
        """Median cosine of attention matrices; NaN without any that has one."""
        with warnings.catch_warnings():
            # numpy warns of what NaN says
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(np.nanmedian(self.attention)) if self.attention else float("nan")

    @property
    def unrelated(self) -> bool:
        """Whether the models have nothing to do with each other; False where nothing tells."""
        return self.cosine < UNRELATED

    def modules(self) -> dict[str, Comparison]:
        """Return each module's comparison over all layers."""
        total: dict[str, Comparison] = {}
        for modules in self.layers.values():
            for module, found in modules.items():
                total.setdefault(module, Comparison()).join(found)
        return total


def relation(first: Headers, second: Headers, names: Iterable[str] | None = None) -> Relation:
    """Compare what two models have in common.

    Args:
        first, second: their tensors; those of one name and shape are compared, of any float dtype.
        names: only these; None: all.
    """
    found = Relation()
    # damaged weights have non-numbers, which make NaN of the sums
    with kept_open(), np.errstate(all="ignore"):
        for name in first.names() if names is None else names:
            if not _comparable(first, second, name):
                continue
            layer, module = module_of(name)
            seen = Comparison()
            seen.add(sample(first, name), sample(second, name))
            found.layers.setdefault(layer, {}).setdefault(module, Comparison()).join(seen)
            if module == ATTENTION and len(first.info(name).shape) == 2:
                found.attention.append(seen.cosine)
    return found


def _comparable(first: Headers, second: Headers, name: str) -> bool:
    if name not in first or name not in second:
        return False
    a, b = first.info(name), second.info(name)
    return a.shape == b.shape and a.dtype in FLOATS and b.dtype in FLOATS
