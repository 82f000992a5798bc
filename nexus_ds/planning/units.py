"""Sizes and speeds as people write them: 24GB, 80 GiB, 25Gb (a second).

Not covered: units above tera and below kilo.
"""

from __future__ import annotations

import re

from nexus_ds.errors import ConfigError

NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)([bB])(?:/s|ps)?")


def parse_bytes(text: str, option: str) -> float:
    """Return bytes: 24GB is 24e9, 24GiB is 24 x 2^30, 25Gb (bits) is 25e9 / 8.

    Raises:
        ConfigError: anything else; `option` says where it stood.
    """
    match = NUMBER.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise ConfigError(
            f"{option}: expected a size such as 24GB, 80GiB or (for a link, in bits) 25Gb, "
            f"found {text!r}"
        )
    number, prefix, binary, unit = match.groups()
    size = float(number)
    if prefix:
        power = "kmgt".index(prefix.lower()) + 1
        # binary: the i of 80GiB
        size *= (1024.0 if binary else 1000.0) ** power
    # a small b stands for bits
    return size / 8 if unit == "b" else size


def short(number: float) -> str:
    """Return a count with a prefix: 9093000000 is 9.09 G."""
    for prefix in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g} T"


def bits(speed: float) -> str:
    """Return bytes a second as a link's speed: 3.125e9 is 25 Gb."""
    return f"{short(8 * speed)}b"
