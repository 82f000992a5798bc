"""Sizes and speeds as people write them."""

import pytest

from nexus_ds.errors import ConfigError
from nexus_ds.planning.units import bits, parse_bytes, short


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GB", 24e9),
        ("80 GiB", 80 * 2**30),
        ("25Gb", 25e9 / 8),
        ("25Gb/s", 25e9 / 8),
        ("100Gbps", 100e9 / 8),
        ("1.5TB", 1.5e12),
        ("512MiB", 2**29),
        ("3kB", 3e3),
    ],
)
def test_what_is_understood(text, value):
    assert parse_bytes(text, "--x") == value


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "0GB", "24 gigabytes", "1e9B", ""])
def test_what_is_not_is_refused(text):
    with pytest.raises(
        ConfigError, match=r"--gpu-memory: expected a size such as 24GB, 80GiB or .* 25Gb, found"
    ):
        parse_bytes(text, "--gpu-memory")


def test_counts_are_shown_short():
    assert [short(n) for n in (0, 950, 1234, 9.093e9, 5e14)] == [
        "0",
        "950",
        "1.23 k",
        "9.09 G",
        "500 T",
    ]


def test_a_links_speed_is_shown_in_bits():
    assert [bits(parse_bytes(text, "--link")) for text in ("25Gb", "300Mb", "25GB")] == [
        "25 Gb",
        "300 Mb",
        "200 Gb",
    ]
