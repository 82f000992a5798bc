"""Slow links: what is asked for, its mistakes, and the arithmetic of the comparison."""

import argparse
from dataclasses import replace

import pytest

from nexus_ds.__main__ import main
from nexus_ds.commands.bench import add_links_arguments
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.benchmarks.slow_links import (
    LinkRun,
    StepTime,
    compare,
    describe,
    expected,
    link_run,
    parse_delay,
    peak,
    ways,
)

FAST, SLOW = 10e9 / 8, 100e6 / 8


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_links_arguments(parser)
    return parser.parse_args(words)


def made_up(seconds):
    """Return three rounds of {(way, speed): seconds}, each slower for all than the one before."""
    return [
        StepTime(
            way=way,
            speed=speed,
            collectives=7,
            seconds=factor * s,
            waits=s / 10,
            bytes=1000,
        )
        for factor in (1, 2, 3)
        for (way, speed), s in seconds.items()
    ]


def test_what_is_asked_for():
    words = ["--rates=100Mb,10Gb", "--steps=2", "--stage=2", "--delay=0.5ms"]
    links = link_run(arguments(*words))
    assert links == LinkRun(speeds=(FAST, SLOW), steps=2, stage=2, delay=0.0005)
    assert [way.expert for way in ways(2)] == [2, 2, 1]
    assert [way.overlap for way in ways(2)] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("0ms", 0.0), ("100us", 1e-4), ("2 ms", 2e-3), ("0.5s", 0.5)]
)
def test_delays_have_units(text, seconds):
    assert parse_delay(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rates", "fast"], "--rates: expected a size such as"),
        (["--ranks", "3"], "--ranks: expected 2 or 4"),
        (["--stage", "0"], "--stage: expected 1, 2 or 3, found 0"),
        (["--steps", "0"], "--steps: expected a number above 0, found 0"),
        (["--batch", "-1"], "--batch: expected a number above 0, found -1"),
        (
            ["--delay", "5"],
            "--delay: expected 0 or a time with its unit such as 100us, 1ms or 0.5s, found '5'",
        ),
        (
            ["--delay=-1ms"],
            "--delay: expected 0 or a time with its unit such as 100us, 1ms or 0.5s, found '-1ms'",
        ),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        link_run(arguments(*words))


def test_it_is_a_command(capsys):
    assert main(["bench", "links", "--ranks", "3"]) == 1
    assert capsys.readouterr().err.startswith("nexus-ds bench: --ranks: expected 2 or 4")


def test_the_comparisons_arithmetic():
    links = LinkRun(speeds=(FAST, SLOW))
    found = made_up(
        {
            ("overlapped", FAST): 1.0,
            ("plain", FAST): 1.25,
            ("zero_only", FAST): 2.0,
            ("overlapped", SLOW): 3.0,
            ("plain", SLOW): 4.0,
            ("zero_only", SLOW): 9.0,
        }
    )
    assert (found[-2].way, found[-2].speed) == ("plain", SLOW)
    found[-2] = replace(found[-2], seconds=2 * found[-2].seconds)
    fast, slow = compare(links, found)
    # noise that meets all ways of a round does not matter
    assert fast.overlap == pytest.approx([0.8, 0.8, 0.8])
    assert slow.overlap == pytest.approx([0.375, 0.75, 0.75])
    assert (fast.ratio[1], slow.ratio[1]) == (pytest.approx(2.0), pytest.approx(3.0))
    assert slow.to_json()["ways"]["overlapped"] == {
        "seconds": 6.0,
        "waits": pytest.approx(0.3),
        "bytes": 1000,
        "collectives": 7,
    }
    assert slow.expected_ratio > fast.expected_ratio
    table = describe(links, [fast, slow])
    assert "100 Mb " in table and "0.75 [0.38 0.75]" in table and "3.00 [3.00 3.00]" in table
    assert "100 Mb, 0.5 ms" in describe(replace(links, delay=0.0005), [fast, slow])


def test_the_plan_is_calibrated_to_the_step_on_the_fastest_link():
    links = LinkRun(speeds=(FAST, SLOW))
    step = expected(links, FAST, 1, peak(links, 1.5))
    assert step.seconds["computing"] == pytest.approx(1.5, rel=0.01)
    assert step.seconds["exposed"] == 0
