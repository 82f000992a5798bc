"""RoPE that turns part of a head, said as one of a whole head; no torch.

longrope divides the frequency of each pair of channels by a factor of its own: pairs that turn get
the factor that gives their frequency again, all others one that stops them. The factors are found
for frequencies in fp32, as transformers computes them: nearly all agree to the last bit, the others
are an ulp away, as those of two devices may be.
longrope also multiplies the channels that turn (`attention_factor`); of a whole head it would
multiply all. So that factor becomes 1, and whoever reads the weights multiplies the queries.
Not covered: kinds of RoPE whose frequencies are more than the base and factors by pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nexus_ds.checkpoint.config_json import LARGEST, ConfigJson, number
from nexus_ds.errors import CheckpointError, UnsupportedModelError

NEAR = 4
"""Numbers of fp32 that are tried on either side of a factor: two roundings lie behind it."""
STILL = LARGEST
"""Factor of pairs that do not turn: at any position the sine is lost in rounding, the cosine 1.
JSON has no infinity."""
FIRST_POSITIONS = "original_max_position_embeddings"
"""Key of how many positions a model was first trained on."""
LEAST_BASE = 2.0
"""yarn divides by the base's logarithm; no model has one near it."""
MOST_CHANNELS = 1 << 14
"""Of a head: lists as long as it is wide are made for it; heads of models have 512 at most."""
NUMBERS = ("factor", "attention_factor", "low_freq_factor", "high_freq_factor")
NONE_AT_0 = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Keys of more numbers; of these 0 says as much as null."""


def check_rope(rope: ConfigJson, needed: Sequence[str], pairs: int, where: str) -> None:
    """Check what RoPE computes with, of whatever kind.

    Args:
        rope: `rope_parameters` with a base.
        needed: keys that its kind does not do without; others may be null.
        pairs: of channels that turn.
        where: start of the messages.

    Raises:
        CheckpointError: what is no number, or none that can be computed with.
    """
    for key in (*NUMBERS, *NONE_AT_0):
        value = rope.get(key)
        unset = value is None or (key in NONE_AT_0 and value == 0)
        if key in needed or not unset:
            number(value, f"{where}: {key}")
    first = rope.get(FIRST_POSITIONS)
    # longrope divides by its logarithm
    if (FIRST_POSITIONS in needed or first is not None) and (type(first) is not int or first < 2):
        raise CheckpointError(
            f"{where}: {FIRST_POSITIONS} is {repr(first)[:100]}, "
            "expected a whole number of at least 2"
        )
    _check_pairs(rope, needed, pairs, where)


def _check_pairs(rope: ConfigJson, needed: Sequence[str], pairs: int, where: str) -> None:
    """Raise CheckpointError for factors that are not those of `pairs`, or stand in no order."""
    for key in ("short_factor", "long_factor"):
        if key in needed:
            _check_factors(rope[key], pairs, f"{where}: {key}")
    low, high = "low_freq_factor", "high_freq_factor"
    # llama3 divides by how far they are apart
    if high in needed and not rope[low] < rope[high]:
        raise CheckpointError(
            f"{where}: {high} is {rope[high]}, expected a number above {low}, {rope[low]}"
        )


def attention_factor(rope: ConfigJson, config: ConfigJson) -> float:
    """Return by what transformers multiplies channels that turn, of queries and of keys.

    Args:
        rope: `rope_parameters` that `check_rope` takes, of a kind that `over_the_whole_head` takes.
        config: filled.
    """
    if rope["rope_type"] == "default":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    first = rope[FIRST_POSITIONS]
    factor = rope.get("factor")
    if factor is None:
        factor = config["max_position_embeddings"] / first
    return math.sqrt(1 + math.log(factor) / math.log(first)) if factor > 1 else 1.0


def over_the_whole_head(
    rope: ConfigJson, config: ConfigJson, turned: int, where: str
) -> ConfigJson:
    """Return the rope_parameters (longrope) of a whole head in which only some channels turn.

    Pair i is that of channels i and i + half of the head; the first `turned / 2` pairs turn.

    Args:
        rope: `rope_parameters` of the channels that turn, which `check_rope` takes.
        config: filled, with `head_dim` and `max_position_embeddings`.
        turned: channels of a head that turn.
        where: start of the messages.

    Raises:
        UnsupportedModelError: another kind of RoPE than default and longrope, an odd `turned`,
            heads wider than any model's.
    """
    kind, width = rope["rope_type"], config["head_dim"]
    _check_channels(kind, turned, width, where)
    pairs = turned // 2
    whole = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    # where both lists are the same, how many positions came first decides nothing
    whole[FIRST_POSITIONS] = rope.get(FIRST_POSITIONS) or config["max_position_embeddings"]
    for key in ("short_factor", "long_factor"):
        factors = rope[key] if kind == "longrope" else [1.0] * pairs
        whole[key] = _stretched(factors, rope["rope_theta"], turned, width)
    return rope | whole


def _check_channels(kind: str, turned: int, width: int, where: str) -> None:
    """Raise UnsupportedModelError for what `over_the_whole_head` can't say."""
    odd = turned % 2 or width % 2 or max(turned, width) > MOST_CHANNELS
    if kind not in ("default", "longrope") or odd:
        raise UnsupportedModelError(
            f"{where}: RoPE of type {kind!r} for {turned} of {width} channels of a head can't be "
            "expressed as Qwen2-MoE; expected default or longrope, and even numbers of at most "
            f"{MOST_CHANNELS}"
        )


def _check_factors(factors: object, pairs: int, what: str) -> None:
    """Raise CheckpointError for anything but factors of as many pairs."""
    if not isinstance(factors, list) or len(factors) != pairs:
        raise CheckpointError(
            f"{what} is {str(factors)[:100]}, expected {pairs} numbers, one for each pair of "
            "channels that turn"
        )
    for index, factor in enumerate(factors):
        number(factor, f"{what}[{index}]")


def _stretched(factors: Sequence[float], base: float, turned: int, width: int) -> list[float]:
    """Return the factors of all pairs of a head that is `width` wide."""
    found = []
    for pair, factor in enumerate(factors):
        # of the largest factors and bases an infinite one, whose inverse is 0
        with np.errstate(over="ignore"):
            wanted = np.float32(1) / (np.float32(factor) * _wavelength(base, pair, turned))
        still = wanted <= 1 / STILL
        found.append(STILL if still else _factor(_wavelength(base, pair, width), wanted))
    return found + [STILL] * (width // 2 - len(factors))


def _wavelength(base: float, pair: int, width: int) -> np.float32:
    """Return what a pair's frequency is the inverse of, rounded where transformers rounds it."""
    exponent = np.float32(2 * pair) / np.float32(width)
    return np.float32(base ** float(exponent))


def _factor(wavelength: np.float32, wanted: np.float32) -> float:
    """Return the factor of a wavelength whose inverse is `wanted` to the last bit."""
    start = np.float32(1 / (float(wanted) * float(wavelength)))
    candidates = [start]
    for towards in (np.float32(np.inf), np.float32(0)):
        step = start
        for _ in range(NEAR):
            step = np.nextafter(step, towards)
            candidates.append(step)
    apart = [abs(float(np.float32(1) / (one * wavelength)) - float(wanted)) for one in candidates]
    return float(candidates[apart.index(min(apart))])
