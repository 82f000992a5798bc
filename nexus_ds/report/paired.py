"""Numbers of a comparison: means over seeds, paired differences, and what may be said about them.

Two contenders of one seed saw the same text in the same order and are scored on the same windows, so it is their
difference seed by seed that counts, not the difference of two means with their spreads.

Not covered: significance tests (three seeds carry none), spreads over other data or another tokenizer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ds.report.page import Spread

LEAST = 0.01
"""Nats below which a difference is not called: paired differences of equal contenders vary by 0.003-0.03."""
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
    """Differences (one contender minus another; losses, so below 0 is better) by seed, at least one."""

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
        if not (all(v < 0 for v in values) or all(v > 0 for v in values)) or abs(statistics.fmean(values)) < LEAST:
            return "open"
        below = values[0] < 0
        if len(values) < ENOUGH:
            return "lower" if below else "higher"
        return "better" if below else "worse"


def paired(values: Mapping[str, float], reference: Mapping[str, float]) -> Paired | None:
    """Return `values` minus `reference` over the seeds that both have; None if there are none."""
    common = {seed: value - reference[seed] for seed, value in values.items() if seed in reference}
    return Paired(common) if common else None


def number(value: Any) -> float | None:
    """Return a finite number as float, anything else as None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def mean_loss(losses: Any, domains: Sequence[str]) -> float | None:
    """Return the mean of the domains' losses, each domain counting the same; None if one is missing."""
    found = [number((losses or {}).get(domain)) for domain in domains]
    kept = [value for value in found if value is not None]
    return statistics.fmean(kept) if kept and len(kept) == len(found) else None


def seeds_of(entry: Mapping[str, Any], budget: str | None = None) -> dict[str, dict[str, Any]]:
    """Return what was measured for each seed of a contender, or of an extension after `budget` tokens."""
    found = {seed: value or {} for seed, value in (entry.get("seeds") or {}).items()}
    if budget is not None:
        found = {seed: (value.get("budgets") or {}).get(budget) or {} for seed, value in found.items()}
    return found


def losses(entry: Mapping[str, Any], domains: Sequence[str], budget: str | None = None) -> dict[str, float]:
    """Return the mean loss over `domains` by seed, of the seeds that have one."""
    found = {seed: mean_loss(value.get("loss"), domains) for seed, value in seeds_of(entry, budget).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def measured(entry: Mapping[str, Any], key: str, budget: str | None = None) -> dict[str, float]:
    """Return the number `key` by seed, of the seeds that have one."""
    found = {seed: number(value.get(key)) for seed, value in seeds_of(entry, budget).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def budgets_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the finetune budgets of extensions in order, '0' (before any) first."""
    found = {b for entry in entries for seed in seeds_of(entry).values() for b in (seed.get("budgets") or {})}
    return sorted(found, key=float)
