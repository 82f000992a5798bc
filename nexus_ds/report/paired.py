"""Statistics of paired differences: over seeds, over windows of text, and what may be said of them.

Two models of one seed saw the same text in the same order and are scored on the same windows, so it
is their difference seed by seed that counts, not the difference of two means with their spreads.
Two models that are scored on the same windows differ window by window in the same way, and many
windows, unlike three seeds, carry a standard error.

Windows lie evenly over a domain's text, in its order, and those of one document resemble one
another: neighbours are taken together as GROUPS stretches of text, and these as independent. (On
the demo's text the differences of adjacent windows correlate by 0.4 to 0.6. Were windows
independent, the standard error over all of them would have been a fifth of the spread that was
found from one part of the text to another; with groups it is two thirds, and with few windows near
to it.) So the standard error is that of other text of the domain; it is too small where the text
has fewer documents than groups, and another seed's training is no part of it.

Not covered: significance over seeds (three carry none), other domains, another tokenizer.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nexus_ds.report.page import Spread

if TYPE_CHECKING:
    import numpy as np

    Values = Sequence[float] | np.ndarray

CONFIDENCE = 0.95
"""Of the intervals around a difference over windows; 2.3 standard errors with GROUPS groups."""
GROUPS = 10
"""Stretches of text whose means are taken as independent; the fewer, the longer the documents may
be."""
LEAST = 0.01
"""Nats below which a difference is not called: paired differences of equal methods vary by
0.003-0.03."""
ENOUGH = 3
"""Seeds from which on a difference is called better or worse."""


def number(value: object) -> float | None:
    """Return a finite number (a whole one as int), anything else as None."""
    # Python counts True as a number; a file's `true` is none.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


# Over seeds ---------------------------------------------------------------------------------------


def spread(values: Mapping[str, float], digits: int = 3, signed: bool = False) -> Spread | None:
    """Return mean and sample standard deviation over seeds; None without any."""
    if not values:
        return None
    numbers = list(values.values())
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), deviation, digits, signed)


@dataclass(frozen=True)
class Paired:
    """Differences by seed, at least one: losses of one method minus those of another.

    Below 0 is better.
    """

    by_seed: Mapping[str, float]

    @property
    def spread(self) -> Spread:
        """Mean and deviation of the differences."""
        found = spread(self.by_seed, signed=True)
        assert found is not None, "no seed has both methods"
        return found

    @property
    def agreement(self) -> str:
        """In how many seeds it is lower: '2 of 3'."""
        lower = sum(value < 0 for value in self.by_seed.values())
        return f"{lower} of {len(self.by_seed)}"

    @property
    def outcome(self) -> str:
        """What may be said: better | worse (ENOUGH seeds), lower | higher (fewer), open.

        All seeds must have one sign and the mean must be at least LEAST.
        """
        values = self.by_seed.values()
        below = all(value < 0 for value in values)
        above = all(value > 0 for value in values)
        one_sign = below or above
        if not one_sign or abs(statistics.fmean(values)) < LEAST:
            return "open"
        # Two seeds share a sign by chance every second time.
        if len(values) < ENOUGH:
            return "lower" if below else "higher"
        return "better" if below else "worse"


def paired(values: Mapping[str, float], reference: Mapping[str, float]) -> Paired | None:
    """Return `values` minus `reference` over the seeds that both have; None if there are none."""
    common = {}
    for seed, value in values.items():
        if seed in reference:
            common[seed] = value - reference[seed]
    return Paired(common) if common else None


# Over windows -------------------------------------------------------------------------------------


def quantile(freedom: float) -> float:
    """Return how many standard errors an interval of CONFIDENCE reaches to each side.

    That is Student's t with `freedom` degrees of freedom; infinite for 0.
    """
    if freedom <= 0:
        return math.inf
    # Imported here: what draws figures alone needs no interval, and scipy takes 0.2 s.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


@dataclass(frozen=True)
class Difference:
    """A mean difference of two models' losses (nats per token) over windows that both read.

    Below 0 is better.
    """

    mean: float
    error: float
    """Standard error of the mean; NaN for one window."""
    freedom: float
    """Degrees of freedom of the standard error: groups of windows less one; 0 for one window."""

    @property
    def noise(self) -> float:
        """How far the interval of CONFIDENCE reaches to each side; infinite for one window."""
        # NaN times infinity would be NaN, which no comparison finds too wide.
        if self.freedom <= 0:
            return math.inf
        return quantile(self.freedom) * self.error


def mean_loss(values: Values, labels: Values | None = None) -> float:
    """Return the mean of a number a window; with labels that of all labels together.

    Args:
        values, labels: see `standard_error`.
    """
    numbers = [float(value) for value in values]
    if labels is None:
        return statistics.fmean(numbers)
    weights = [float(label) for label in labels]
    return statistics.fmean(numbers, weights)


def standard_error(values: Values, labels: Values | None = None) -> float:
    """Return the standard error of the mean of a number a window; NaN for one window.

    With S_g the sum over the windows of stretch g of (value - mean), G stretches and n windows:

        error = sqrt(G / (G - 1) * sum_g S_g²) / n

    For stretches of one window (n <= GROUPS) this is the usual s / sqrt(n). Else it is that of a
    ratio estimate over clusters (Cochran, Sampling Techniques, on ratio estimates), so that
    stretches of unequal length count by their windows. Of chats, whose windows have more or fewer
    answer tokens, each window counts by these: the mean is that over tokens, and n their number.

    Args:
        values: [W] numbers in the order of the text.
        labels: [W] answer tokens of each window, above 0; None: all have as many.
    """
    count = len(values)
    if count < 2:
        return math.nan
    groups = min(count, GROUPS)
    numbers = [float(value) for value in values]
    mean = mean_loss(numbers, labels)
    weights = [1.0] * count
    if labels is not None:
        weights = [float(label) for label in labels]
    # Stretches of neighbours, as equal in length as they can be.
    bounds = [count * group // groups for group in range(groups + 1)]
    sums = []
    for start, end in itertools.pairwise(bounds):
        stretch = zip(weights[start:end], numbers[start:end], strict=True)
        sums.append(math.fsum(weight * (value - mean) for weight, value in stretch))
    squares = math.fsum(deviation * deviation for deviation in sums)
    return math.sqrt(groups / (groups - 1) * squares) / math.fsum(weights)


def over_windows(before: Values, after: Values, labels: Values | None = None) -> Difference:
    """Return `after` minus `before`, losses of two models on the same windows.

    Args:
        before, after: [W] nats per token in the order of the text, at least one.
        labels: see `standard_error`.
    """
    # What makes a window easy or hard for both models cancels in the pair.
    values = []
    for old, new in zip(before, after, strict=True):
        values.append(float(new) - float(old))
    freedom = min(len(values), GROUPS) - 1
    return Difference(mean_loss(values, labels), standard_error(values, labels), freedom)


def mean_difference(parts: Sequence[Difference]) -> Difference:
    """Return the mean of k differences over different texts, each counting the same.

    The texts are independent: error = sqrt(sum e_i²) / k, with Welch and Satterthwaite's degrees
    of freedom (sum e_i²)² / sum(e_i⁴ / freedom_i).
    """
    mean = statistics.fmean(part.mean for part in parts)
    # One part of unknown noise makes that of the whole unknown.
    if any(part.freedom == 0 for part in parts):
        return Difference(mean, math.nan, 0)
    variances = [part.error**2 for part in parts]
    fourth = 0.0
    for variance, part in zip(variances, parts, strict=True):
        fourth += variance**2 / part.freedom
    freedom = float(sum(part.freedom for part in parts))
    # Without noise in any part it would be 0 / 0.
    if fourth > 0:
        freedom = sum(variances) ** 2 / fourth
    return Difference(mean, math.sqrt(sum(variances)) / len(parts), freedom)
