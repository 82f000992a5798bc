"""Sizes and speeds as people write them: 24GB, 80 GiB, 25Gb (a second).

Not covered: units above tera and below kilo.
"""

from __future__ import annotations

import re

from nexus_ds.errors import ConfigError

PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)([bB])(?:/s|ps)?")


def parse_bytes(text: str, option: str) -> float:
    """Return bytes: 24GB is 24e9, 24GiB is 24 x 2^30, 25Gb (bits) is 25e9 / 8.

    Raises:
        ConfigError: anything else; `option` says where it stood.
    """
    match = NUMBER.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise ConfigError(
            f"{option}: expected a size such as 24GB, 80GiB or (for a link, in bits) 25Gb, found {text!r}"
        )
    number, prefix, binary, unit = float(match[1]), match[2].lower(), bool(match[3]), match[4]
    factor = PREFIXES[prefix] if prefix else 1.0
    if binary and prefix:
        factor = 1024.0 ** ("kmgt".index(prefix) + 1)
    return number * factor / (8 if unit == "b" else 1)


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
