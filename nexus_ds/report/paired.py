"""Numbers of a comparison: means over seeds or windows, paired differences, and what may be said
about them.

Two contenders of one seed saw the same text in the same order and are scored on the same windows,
so it is their difference seed by seed that counts, not the difference of two means with their
spreads. Two models that are scored on the same windows differ window by window in the same way, and
many windows, unlike three seeds, carry a standard error.

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
from typing import TYPE_CHECKING, Any

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
"""Nats below which a difference is not called: paired differences of equal contenders vary by
0.003-0.03."""
ENOUGH = 3
"""Seeds from which on a difference is called better or worse."""


def spread(values: Mapping[str, float], digits: int = 3, signed: bool = False) -> Spread | None:
    """Return mean and sample standard deviation over seeds; None without any."""
    if not values:
        return None
    numbers = list(values.values())
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), deviation, digits, signed)


@dataclass(frozen=True)
class Paired:
    """Differences (one contender minus another; losses, so below 0 is better) by seed, at least
    one."""

    by_seed: Mapping[str, float]

    @property
    def spread(self) -> Spread:
        """Mean and deviation of the differences."""
        found = spread(self.by_seed, signed=True)
        assert found is not None, "no seed has both contenders"
        return found

    @property
    def agreement(self) -> str:
        """In how many seeds it is lower: '2 of 3'."""
        return f"{sum(value < 0 for value in self.by_seed.values())} of {len(self.by_seed)}"

    @property
    def outcome(self) -> str:
        """What may be said: better | worse (ENOUGH seeds), lower | higher (fewer), open.

        All seeds must have one sign and the mean must be at least LEAST.
        """
        values = list(self.by_seed.values())
        if (
            not (all(v < 0 for v in values) or all(v > 0 for v in values))
            or abs(statistics.fmean(values)) < LEAST
        ):
            return "open"
        below = values[0] < 0
        if len(values) < ENOUGH:
            return "lower" if below else "higher"
        return "better" if below else "worse"


def paired(values: Mapping[str, float], reference: Mapping[str, float]) -> Paired | None:
    """Return `values` minus `reference` over the seeds that both have; None if there are none."""
    common = {seed: value - reference[seed] for seed, value in values.items() if seed in reference}
    return Paired(common) if common else None


def quantile(freedom: float) -> float:
    """Return how many standard errors an interval of CONFIDENCE reaches to each side (Student's t;
    inf for freedom 0)."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) if freedom > 0 else math.inf


@dataclass(frozen=True)
class Difference:
    """A mean difference of two models' losses in nats per token over windows that both read; below
    0 is better."""

    mean: float
    error: float
    """Standard error of the mean; NaN for one window."""
    freedom: float
    """Degrees of freedom of the standard error: groups of windows less one; 0 for one window."""

    @property
    def noise(self) -> float:
        """How far the interval of CONFIDENCE reaches to each side of the mean; infinite for one
        window."""
        return quantile(self.freedom) * self.error if self.freedom > 0 else math.inf


def standard_error(values: Values) -> float:
    """Return the standard error of the mean of a number a window, in the order of the text; NaN for
    one window."""
    count, groups, mean = (
        len(values),
        min(len(values), GROUPS),
        statistics.fmean(map(float, values)),
    )
    if count < 2:
        return math.nan
    bounds = [count * group // groups for group in range(groups + 1)]
    sums = [
        math.fsum(float(v) - mean for v in values[start:end])
        for start, end in itertools.pairwise(bounds)
    ]
    return math.sqrt(groups / (groups - 1) * math.fsum(s * s for s in sums)) / count


def over_windows(before: Values, after: Values) -> Difference:
    """Return `after` minus `before`, losses of two models on the same windows (at least one), in
    the order of the text."""
    values = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    return Difference(
        statistics.fmean(values), standard_error(values), min(len(values), GROUPS) - 1
    )


def mean_difference(parts: Sequence[Difference]) -> Difference:
    """Return the mean of differences over different texts, each counting the same (freedom: Welch
    and Satterthwaite)."""
    mean = statistics.fmean(part.mean for part in parts)
    if any(part.freedom == 0 for part in parts):
        return Difference(mean, math.nan, 0)
    variances = [part.error**2 for part in parts]
    fourth = sum(v**2 / part.freedom for v, part in zip(variances, parts, strict=True))
    freedom = sum(variances) ** 2 / fourth if fourth > 0 else sum(part.freedom for part in parts)
    return Difference(mean, math.sqrt(sum(variances)) / len(parts), freedom)


def number(value: Any) -> float | None:
    """Return a finite number as float, anything else as None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def mean_loss(losses: Any, domains: Sequence[str]) -> float | None:
    """Return the mean of the domains' losses, each domain counting the same; None if one is
    missing."""
    found = [number((losses or {}).get(domain)) for domain in domains]
    kept = [value for value in found if value is not None]
    return statistics.fmean(kept) if kept and len(kept) == len(found) else None


def seeds_of(entry: Mapping[str, Any], budget: str | None = None) -> dict[str, dict[str, Any]]:
    """Return what was measured for each seed of a contender, or of an extension after `budget`
    tokens."""
    found = {seed: value or {} for seed, value in (entry.get("seeds") or {}).items()}
    if budget is not None:
        found = {
            seed: (value.get("budgets") or {}).get(budget) or {} for seed, value in found.items()
        }
    return found


def losses(
    entry: Mapping[str, Any], domains: Sequence[str], budget: str | None = None
) -> dict[str, float]:
    """Return the mean loss over `domains` by seed, of the seeds that have one."""
    found = {
        seed: mean_loss(value.get("loss"), domains)
        for seed, value in seeds_of(entry, budget).items()
    }
    return {seed: value for seed, value in found.items() if value is not None}


def measured(entry: Mapping[str, Any], key: str, budget: str | None = None) -> dict[str, float]:
    """Return the number `key` by seed, of the seeds that have one."""
    found = {seed: number(value.get(key)) for seed, value in seeds_of(entry, budget).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def budgets_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the finetune budgets of extensions in order, '0' (before any) first."""
    found = {
        b
        for entry in entries
        for seed in seeds_of(entry).values()
        for b in (seed.get("budgets") or {})
    }
    return sorted(found, key=float)
