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

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.errors import CheckpointError, UnsupportedModelError

NEAR = 4
"""Numbers of fp32 that are tried on either side of a factor: two roundings lie behind it."""
STILL = 1e30
"""Factor of pairs that do not turn: at any position the sine is lost in rounding, the cosine 1.
JSON has no infinity."""


def attention_factor(rope: ConfigJson, config: ConfigJson) -> float:
    """Return by what transformers multiplies channels that turn, of queries and of keys.

    Args:
        rope: complete `rope_parameters`, of a kind that `over_the_whole_head` takes.
        config: filled.
    """
    if rope["rope_type"] == "default":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    first = rope["original_max_position_embeddings"]
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
        rope: `rope_parameters` of the channels that turn, all keys there.
        config: filled, with `head_dim` and `max_position_embeddings`.
        turned: channels of a head that turn.
        where: start of the messages.

    Raises:
        UnsupportedModelError: another kind of RoPE than default and longrope, an odd `turned`.
        CheckpointError: factors of another number of pairs.
    """
    kind, width = rope["rope_type"], config["head_dim"]
    if kind not in ("default", "longrope") or turned % 2 or width % 2:
        raise UnsupportedModelError(
            f"{where}: RoPE of type {kind!r} for {turned} of {width} channels of a head can't be "
            "expressed as Qwen2-MoE; expected default or longrope, and even numbers"
        )
    pairs = turned // 2
    whole = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    # where both lists are the same, how many positions came first decides nothing
    whole["original_max_position_embeddings"] = rope.get(
        "original_max_position_embeddings", config["max_position_embeddings"]
    )
    for key in ("short_factor", "long_factor"):
        factors = _checked(rope.get(key, [1.0] * pairs), pairs, f"{where}: {key}")
        whole[key] = _stretched(factors, rope["rope_theta"], turned, width)
    return rope | whole


def _checked(factors: object, pairs: int, what: str) -> list[float]:
    """Return factors of as many pairs; CheckpointError if they are anything else."""
    numbers = factors if isinstance(factors, list) else []
    if len(numbers) == pairs and all(type(x) in (int, float) and x > 0 for x in numbers):
        return numbers
    raise CheckpointError(
        f"{what} is {str(factors)[:100]}, expected {pairs} numbers above 0, one for each pair of "
        "channels that turn"
    )


def _stretched(factors: Sequence[float], base: float, turned: int, width: int) -> list[float]:
    """Return the factors of all pairs of a head that is `width` wide."""
    found = []
    for pair, factor in enumerate(factors):
        wanted = np.float32(1) / (np.float32(factor) * _wavelength(base, pair, turned))
        found.append(_factor(_wavelength(base, pair, width), wanted))
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
