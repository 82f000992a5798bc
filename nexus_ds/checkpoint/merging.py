"""Ways to merge branches of one seed, other than the mean: rules for `assembly`, in numpy.

Sources of a piece are the seed and then its branches; t_i is what branch i adds to the seed, w_i
its weight.

    Ties      each t_i is cut down to its largest values, the sign of the weighted sum is elected
              for each value, and those that have it are averaged (Yadav et al., arXiv 2306.01708)
    DareTies  each t_i loses values at random, the others are scaled up to make good for them; signs
              are elected as above, and those that have it are added, by w_i / sum of all w (Yu et
              al., arXiv 2311.03099; as mergekit's dare_ties with weights that add up to one)

    ByRow     no seed among its sources: of each row the mean, weighed as that row says

A share is kept of each tensor, not of the whole model.
Not covered: RegMean of whole matrices, Fisher information.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.assembly import Blocks, Rule

HALF = 1 << 16
"""Values of half of a number's bits."""


def _from_top(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """Return the bin that the `wanted` largest values end in, and how many of them lie there."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    passed = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - passed


class Threshold:
    """The magnitude that a share of all values reaches, exactly, of values that pass by twice.

    The bits of magnitudes are in their order: the first turn counts the upper half of them, the
    second the lower half of those that share the threshold's upper one.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.upper_counts = np.zeros(HALF, np.int64)
        self.lower_counts = np.zeros(HALF, np.int64)
        self.upper = -1
        """Upper half of the threshold's bits, once it is known."""
        self.left = 0
        """Values that are kept of those with that half."""
        self.value = np.float32(-1)
        """The threshold, once it is known."""

    def see(self, values: Floats, turn: int) -> None:
        """Count a block; `turn` is 0 or 1."""
        bits = np.abs(values).view(np.uint32)
        upper = bits >> 16
        if turn == 0:
            self.upper_counts += np.bincount(upper, minlength=HALF)
            return
        if self.upper < 0:
            kept = max(1, round(self.share * int(self.upper_counts.sum())))
            self.upper, self.left = _from_top(self.upper_counts, kept)
        lower = bits[upper == self.upper] & (HALF - 1)
        self.lower_counts += np.bincount(lower, minlength=HALF)

    def settle(self) -> None:
        """Know the threshold, when both turns are over."""
        lower, _ = _from_top(self.lower_counts, self.left)
        bits = np.array([self.upper * HALF + lower], np.uint32)
        self.value = bits.view(np.float32)[0]


def _changes(blocks: Blocks) -> list[Floats]:
    """Return what each branch adds to the seed; it takes the branches' place in memory."""
    seed, *branches = blocks
    for branch in branches:
        branch -= seed
    return branches


def _elect(changes: Sequence[Floats], weights: Sequence[float]) -> list[NDArray[np.bool_]]:
    """Weigh the changes in place; return where each has the sign of their sum."""
    total = np.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        change *= np.float32(weight)
        total += change
    positive = total >= 0
    found = []
    for change in changes:
        # a zero has neither sign
        found.append(np.where(positive, change > 0, change < 0))
    return found


class Ties(Rule):
    """See the module.

    Args:
        weights: of the branches.
        density: share of each change that is kept, in (0, 1].
    """

    def __init__(self, weights: Sequence[float], density: float) -> None:
        self.weights = weights
        self.thresholds = [Threshold(density) for _ in weights]
        # all of it is kept without a look
        self.looks = 2 if density < 1 else 0

    def look(
        self,
        blocks: Blocks,
        first: int,
        turn: int,
    ) -> None:
        """Count the magnitudes of all changes."""
        changes = _changes(blocks)
        for change, threshold in zip(changes, self.thresholds, strict=True):
            threshold.see(change, turn)

    def __call__(self, blocks: Blocks, first: int) -> Floats:
        """Return the seed and the mean of the changes that have the elected sign."""
        changes = _changes(blocks)
        for change, threshold in zip(changes, self.thresholds, strict=True):
            if first == 0 and self.looks:
                threshold.settle()
            change[np.abs(change) < threshold.value] = 0
        agreeing = _elect(changes, self.weights)
        total = np.zeros_like(blocks[0])
        divisor = np.zeros_like(total)
        for change, weight, where in zip(changes, self.weights, agreeing, strict=True):
            total += change * where
            divisor += np.float32(weight) * where
        # where nobody changes a value there is nothing to divide
        divisor[divisor == 0] = 1
        return blocks[0] + total / divisor


class DareTies(Rule):
    """See the module.

    Args:
        weights: of the branches.
        density: share of each change that is kept, in (0, 1].
        seed: what the losses of each branch are drawn by: the same for a tensor in any run.
    """

    def __init__(
        self,
        weights: Sequence[float],
        density: float,
        seed: Sequence[int],
    ) -> None:
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        self.density = density
        self.chances = []
        for number in range(len(weights)):
            self.chances.append(np.random.default_rng([*seed, number]))

    def __call__(self, blocks: Blocks, first: int) -> Floats:
        """Return the seed and the sum of the changes that have the elected sign."""
        changes = _changes(blocks)
        for change, chance in zip(changes, self.chances, strict=True):
            # drawn one after the other, so that the length of blocks does not matter
            drawn = chance.random(len(change), np.float32)
            change[drawn >= self.density] = 0
            change /= np.float32(self.density)
        agreeing = _elect(changes, self.weights)
        total = blocks[0]
        for change, where in zip(changes, agreeing, strict=True):
            total += change * where
        return total


class ByRow(Rule):
    """See the module.

    With the counts of tokens as weights of an embedding's rows it is what RegMean (Jin et al.,
    arXiv 2212.09849) makes of a layer whose inputs are one-hot: their Gram matrix is diagonal. Of
    an output layer's rows it is nearly what Fisher information makes of them (docs/merging.md).

    Args:
        weights_NV: of each branch in each row, fp32; a row's add up to 1.
        width: values of a row.
    """

    def __init__(self, weights_NV: Floats, width: int) -> None:
        self.weights_NV = weights_NV
        self.width = width

    def __call__(self, blocks: Blocks, first: int) -> Floats:
        """Return the weighted mean of the blocks, row by row."""
        total = np.zeros_like(blocks[0])
        # a block may begin and end within a row
        rows = np.arange(first, first + len(total)) // self.width
        for block, weights_V in zip(blocks, self.weights_NV, strict=True):
            block *= weights_V[rows]
            total += block
        return total
