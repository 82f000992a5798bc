"""Mixtures: how often each domain is drawn, and which block of text is sample number i.

Sample i is a pure function of the seed, the mixture and i: no state, no pass over the data, no
memory. So a run that is resumed, on any number of ranks, repeats nothing and loses nothing. Domains
follow a fixed cycle in which each has its whole number of slots; the k-th slot of a domain, counted
over all cycles, is block k of that domain's epochs, and each epoch visits all of its blocks once,
in an order of its own.

Both orders are keyed permutations: a Feistel network over pairs (row, column) of a grid just large
enough for the numbers to be permuted, walked again while it lands outside of them.

Not covered: mixtures that change while training, curricula, weights per document.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from nexus_ds.data.corpora import TokenFile
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.settings import DataConfig

ROUNDS = 4  # each of two half-rounds; three make a pseudorandom permutation (Luby, Rackoff 1988)
SHORTEST_CYCLE = 64  # samples
LONGEST_CYCLE = 8192
SLOT_ERROR = 0.01  # largest relative difference between a domain's slots in a cycle and its weight
SUM_ERROR = 1e-3  # of explicit weights


# A permutation is asked for again with every sample: one for each domain's epoch, and the cycle.
@lru_cache(maxsize=256)
def _hashers(key: str) -> list[hashlib.blake2b]:
    """Return the keyed hashes of the half-rounds of a permutation."""
    found = []
    for half in range(2 * ROUNDS):
        # blake2b takes keys of 64 bytes at most, and a domain's name may be longer
        text = f"{half} {key}".encode()
        half_key = hashlib.blake2b(text, digest_size=16).digest()
        hasher = hashlib.blake2b(key=half_key, digest_size=8)
        found.append(hasher)
    return found


def _keyed(hasher: hashlib.blake2b, value: int) -> int:
    # a copy, or the next value would be hashed after this one
    hasher = hasher.copy()
    hasher.update(value.to_bytes(9, "little"))
    return int.from_bytes(hasher.digest(), "little")


def permuted(index: int, size: int, key: str) -> int:
    """Return where `index` goes under the permutation of range(size) that belongs to `key`.

    Takes the same time for any `size`.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is outside of range({size})")
    hashers = _hashers(key)
    # the smallest near-square grid: fewer than `rows` of its places lie outside
    rows = math.isqrt(size - 1) + 1
    columns = math.ceil(size / rows)
    # cycle walking (Black, Rogaway 2002): from an index inside it comes back inside
    while True:
        row, column = divmod(index, columns)
        for first, second in zip(hashers[::2], hashers[1::2], strict=True):
            # each half moves by what the other says, so the step can be undone: a permutation
            row += _keyed(first, column)
            row %= rows
            column += _keyed(second, row)
            column %= columns
        index = row * columns + column
        if index < size:
            return index


# Weights ------------------------------------------------------------------------------------------


def domain_weights(mixture: DataConfig, tokens: Mapping[str, int]) -> dict[str, float]:
    """Return the share of samples of each domain; shares are above 0 and sum to 1.

    Args:
        mixture: `mixture` says how: proportional (to tokens) | uniform | explicit (`weights`, which
            sum to 1) | replay (`new_share` shared evenly by `new_domains`, the rest evenly by the
            others; paper section 2.3 and 4.1).
        tokens: training tokens of each domain of the mixture.

    Raises:
        ConfigError: domains that are unknown or missing, weights that are 0, negative, not numbers
            or don't sum to 1.
        DataError: a domain without tokens.
    """
    domains = list(tokens)
    if not domains:
        raise ConfigError("data.domains: the mixture has no domains; name at least one")
    _known("data.domains", mixture.domains, domains)
    empty = [domain for domain, count in tokens.items() if count <= 0]
    if empty:
        raise DataError(
            f"no training text in the domain {', '.join(empty)}; "
            "add text or leave it out of data.domains"
        )
    shares = _shares(mixture, tokens)
    # explicit weights may miss 1 by SUM_ERROR
    total = sum(shares.values())
    return {domain: share / total for domain, share in shares.items()}


def _shares(mixture: DataConfig, tokens: Mapping[str, int]) -> dict[str, float]:
    """Return numbers in the proportions of the mixture."""
    domains = list(tokens)
    if mixture.mixture == "proportional":
        return {domain: float(count) for domain, count in tokens.items()}
    if mixture.mixture == "uniform":
        return dict.fromkeys(domains, 1.0)
    if mixture.mixture == "explicit":
        return _explicit(mixture.weights, domains)
    if mixture.mixture == "replay":
        return _replay(mixture.new_domains, mixture.new_share, domains)
    raise ConfigError(
        f"data.mixture: unknown value {mixture.mixture!r}; "
        "known: proportional, uniform, explicit, replay"
    )


def _known(key: str, named: list[str] | Mapping[str, float], domains: list[str]) -> None:
    unknown = [domain for domain in named if domain not in domains]
    if unknown:
        raise ConfigError(
            f"{key}: unknown domain {', '.join(unknown)}; the mixture has: {', '.join(domains)}"
        )


def _explicit(weights: Mapping[str, float], domains: list[str]) -> dict[str, float]:
    _known("data.weights", weights, domains)
    missing = [domain for domain in domains if domain not in weights]
    if missing:
        raise ConfigError(
            f"data.weights: no weight for {', '.join(missing)}; "
            "give one, or leave it out of data.domains"
        )
    for domain, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"data.weights.{domain}: expected a number above 0, found {weight}")
    total = sum(weights.values())
    if abs(total - 1) > SUM_ERROR:
        mended = ", ".join(f"{domain}: {weights[domain] / total:.4g}" for domain in domains)
        raise ConfigError(
            f"data.weights: shares sum to {total:.6g}, expected 1; "
            f"in the same proportions: {mended}"
        )
    return {domain: weights[domain] for domain in domains}


def _replay(new: list[str], share: float, domains: list[str]) -> dict[str, float]:
    _known("data.new_domains", new, domains)
    old = [domain for domain in domains if domain not in new]
    if not new or not old:
        raise ConfigError(
            "data.new_domains: replay needs new and old domains, "
            f"found new: {', '.join(new) or 'none'}, old: {', '.join(old) or 'none'}"
        )
    # NaN fails too
    if not 0 < share < 1:
        raise ConfigError(f"data.new_share: expected a share between 0 and 1, found {share}")
    # not len(new), where a domain may stand twice
    each_new = share / (len(domains) - len(old))
    each_old = (1 - share) / len(old)
    return {domain: each_new if domain in new else each_old for domain in domains}


def slots(weights: Mapping[str, float], length: int) -> dict[str, int]:
    """Share `length` slots by largest remainder; every domain gets at least one."""
    exact = {domain: weight * length for domain, weight in weights.items()}
    counts = {domain: max(int(share), 1) for domain, share in exact.items()}
    # a slot given to a domain that has less than one by right may leave none
    left = max(length - sum(counts.values()), 0)
    # those that lost most by rounding come first; the sort is stable, so ties keep their order
    gained = {domain: counts[domain] - exact[domain] for domain in weights}
    for domain in sorted(weights, key=gained.__getitem__)[:left]:
        counts[domain] += 1
    return counts


def cycle_slots(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the slots of each domain in the shortest cycle that meets the weights.

    Within SLOT_ERROR of each, or in the longest cycle as well as can be.

    Raises:
        ConfigError: a weight too small for the longest cycle.
    """
    tiny = [domain for domain, weight in weights.items() if weight * LONGEST_CYCLE < 0.5]
    if tiny:
        raise ConfigError(
            f"data.weights: the share of {', '.join(tiny)} is below 1 in {2 * LONGEST_CYCLE}; "
            "leave it out"
        )
    for length in range(SHORTEST_CYCLE, LONGEST_CYCLE):
        counts = slots(weights, length)
        if _meets(counts, weights):
            return counts
    return slots(weights, LONGEST_CYCLE)


def _meets(counts: Mapping[str, int], weights: Mapping[str, float]) -> bool:
    """Return whether slots agree with weights."""
    total = sum(counts.values())
    for domain, weight in weights.items():
        error = abs(counts[domain] / total - weight)
        if error > SLOT_ERROR * weight:
            return False
    return True


# Samples ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One block of text."""

    domain_index: int
    """Place of its domain in the mixture."""
    block: int
    """Its number in the domain's token file."""
    tokens: np.ndarray
    """[length + 1] int64: inputs are all but the last, labels all but the first; in the place of an
    id that is no label ~id, which is negative."""


class Sampler:
    """Sample number i of a mixture, for any i >= 0, as a pure function of (seed, mixture, i).

    Args:
        files: token file of each domain.
        weights: share of each domain, summing to 1 (`domain_weights`); its order is that of
            `domain_index`.
        length: inputs of a sample, in tokens.
        seed: another seed, another order.

    Raises:
        ConfigError: weights for other domains than `files`.
        DataError: a domain with less than one block.
    """

    def __init__(
        self,
        files: Mapping[str, TokenFile],
        weights: Mapping[str, float],
        length: int,
        seed: int,
    ) -> None:
        if set(files) != set(weights):
            raise ConfigError(
                f"weights are for {', '.join(weights)}, text is there for {', '.join(files)}; "
                "give the same"
            )
        self.domains = list(weights)
        self.length = length
        self.seed = seed
        self.files = [files[domain] for domain in self.domains]
        self.blocks = [file.blocks(length) for file in self.files]
        pairs = zip(self.domains, self.blocks, strict=True)
        short = [domain for domain, blocks in pairs if not blocks]
        if short:
            raise DataError(
                f"{', '.join(short)}: less text than one block of {length} tokens; "
                "add text or shorten blocks"
            )
        counts = cycle_slots(weights)
        self.counts = [counts[domain] for domain in self.domains]
        self.cycle = sum(self.counts)
        self.ends = list(accumulate(self.counts))
        """Where the slots of each domain end in a cycle."""

    def locate(self, i: int) -> tuple[int, int]:
        """Return (domain index, block number) of sample `i` without reading it."""
        cycle, position = divmod(i, self.cycle)
        slot = permuted(position, self.cycle, f"{self.seed} cycle {cycle}")
        domain = bisect_right(self.ends, slot)
        count = self.counts[domain]
        start = self.ends[domain] - count
        # the domain's own numbering, over all cycles: none is drawn twice in an epoch
        occurrence = cycle * count + slot - start
        blocks = self.blocks[domain]
        epoch, place = divmod(occurrence, blocks)
        key = f"{self.seed} {self.domains[domain]} {epoch}"
        return domain, permuted(place, blocks, key)

    def sample(self, i: int) -> Sample:
        """Return sample `i`."""
        domain, block = self.locate(i)
        tokens = self.files[domain].marked(block, self.length)
        return Sample(domain, block, tokens)

    __getitem__ = sample

    def labels(self, first: int, count: int) -> int:
        """Return how many labels samples `first` to `first + count` have, of all domains."""
        total = 0
        # microseconds a sample: a byte a token is read, and no id
        for i in range(first, first + count):
            domain, block = self.locate(i)
            total += self.files[domain].labels(block, self.length)
        return total

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often the first `samples` samples go through each domain's text, about."""
        cycles = samples / self.cycle
        passed = zip(self.domains, self.counts, self.blocks, strict=True)
        return {domain: cycles * count / blocks for domain, count, blocks in passed}

    def fingerprint(self) -> str:
        """Return the sha256 over all that decides sample i: text, mixture, length and seed."""
        facts = [str(self.seed), str(self.length)]
        for domain, file, count in zip(self.domains, self.files, self.counts, strict=True):
            facts.append(f"{domain} {file.fingerprint} {count}")
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()
