"""Slow links: the comparison's arithmetic, its mistakes, and (full) real ranks on limited links."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nexus_ds.__main__ import main
from nexus_ds.commands.bench import add_links_arguments
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.experiments.benchmarks import network
from nexus_ds.experiments.benchmarks.slow_links import (
    Links,
    compare,
    describe,
    expected,
    links_of,
    measure,
    parse_delay,
    peak,
    ways,
)
from nexus_ds.planning.traffic import exposed_all_to_all

FAST, SLOW = 10e9 / 8, 100e6 / 8


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_links_arguments(parser)
    return parser.parse_args(words)


def made_up(seconds):
    """Return a measurement of three rounds: {(way, speed): seconds}, a second and a third round
    that are slower for all."""
    return [
        {
            "way": way,
            "speed": speed,
            "seconds": factor * s,
            "waits": s / 10,
            "bytes": 1000,
            "collectives": 7,
        }
        for factor in (1, 2, 3)
        for (way, speed), s in seconds.items()
    ]


def test_what_is_asked_for():
    links = links_of(
        arguments("--rates", "100Mb,10Gb", "--steps", "2", "--stage", "2", "--delay", "0.5ms")
    )
    assert links == Links(speeds=(FAST, SLOW), steps=2, stage=2, delay=0.0005)
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
        links_of(arguments(*words))


def test_it_is_a_command(capsys):
    assert main(["bench", "links", "--ranks", "3"]) == 1
    assert capsys.readouterr().err.startswith("nexus-ds bench: --ranks: expected 2 or 4")


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        LayoutError, match="limited links need unshare, ip, tc; not found: unshare, ip, tc"
    ):
        network.check()


def test_a_machine_that_allows_no_namespaces_is_told_so(monkeypatch, tmp_path):
    for tool in network.TOOLS:
        (tmp_path / tool).write_text(
            "#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n"
        )
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(
        LayoutError, match=r"as root or with unprivileged user namespaces.*Operation not permitted"
    ):
        network.check()


def test_the_comparisons_arithmetic():
    links = Links(speeds=(FAST, SLOW))
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
    found[-2]["seconds"] *= 2  # the last plain step on the slow link
    fast, slow = compare(links, found)
    # noise that meets all ways of a round does not matter
    assert fast["overlap"] == pytest.approx([0.8, 0.8, 0.8])
    assert slow["overlap"] == pytest.approx([0.375, 0.75, 0.75])
    assert (fast["ratio"][1], slow["ratio"][1]) == (pytest.approx(2.0), pytest.approx(3.0))
    assert slow["ways"]["overlapped"] == {
        "seconds": 6.0,
        "waits": pytest.approx(0.3),
        "bytes": 1000,
        "collectives": 7,
    }
    assert slow["expected_ratio"] > fast["expected_ratio"]
    table = describe(links, [fast, slow])
    assert "100 Mb " in table and "0.75 [0.38 0.75]" in table and "3.00 [3.00 3.00]" in table
    assert "100 Mb, 0.5 ms" in describe(replace(links, delay=0.0005), [fast, slow])


def test_the_plan_is_calibrated_to_the_step_on_the_fastest_link():
    links = Links(speeds=(FAST, SLOW))
    step = expected(links, FAST, 1, peak(links, 1.5))
    assert step.seconds["computing"] == pytest.approx(1.5, rel=0.01)
    assert step.seconds["exposed"] == 0


@pytest.fixture
def limited():
    """Skip where links can't be limited."""
    try:
        network.check()
    except LayoutError as error:
        pytest.skip(str(error))


SHARED = 0.3  # seconds that the stand-in for the shared expert takes, forward and backward


@pytest.mark.slow
@pytest.mark.full
def test_overlap_saves_what_the_plan_says(limited, tmp_path, monkeypatch):
    """The shared expert sleeps, as a host does whose accelerator computes: no core is needed, so a
    busy machine passes too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    out, speeds = tmp_path / "found.json", (300e6 / 8, SLOW)
    network.run_ranks("overlap_worker", [str(out), ",".join(map(str, speeds)), str(SHARED)], 2, 200)
    slow = json.loads(out.read_text())
    sent = [found["bytes"] / found["speed"] for found in slow]
    saved = sum(found["plain"] - found["overlapped"] for found in slow)
    assert saved > 0.7 * sum(seconds - exposed_all_to_all(seconds, SHARED) for seconds in sent)


@pytest.fixture(scope="module")
def rows():
    """Two ranks with little to compute, on a fast and on a slow link."""
    try:
        network.check()
    except LayoutError as error:
        pytest.skip(str(error))
    links = Links(speeds=(FAST, SLOW), layers=2, batch=2, steps=3)
    return compare(links, measure(links))


@pytest.mark.slow
@pytest.mark.full
def test_real_ranks_send_the_bytes_that_the_plan_expects(rows):
    for row in rows:
        for way, sent in row["expected_bytes"].items():
            assert row["ways"][way]["bytes"] == pytest.approx(sent, rel=0.05), way
        # two layers: rows there and back, forward and backward, and once how many
        all_to_alls = 2 * (4 + 1)
        assert (
            row["ways"]["overlapped"]["collectives"]
            == row["ways"]["plain"]["collectives"]
            > all_to_alls
        )
        assert row["ways"]["zero_only"]["collectives"] < row["ways"]["overlapped"]["collectives"]


@pytest.mark.slow
@pytest.mark.full
def test_real_ranks_on_a_slow_link_gain_from_expert_parallelism_as_the_plan_says(rows):
    fast, slow = rows
    floor = slow["expected_bytes"]["zero_only"] / slow["speed"]
    assert slow["ways"]["zero_only"]["seconds"] > floor  # the link is as slow as it was made
    assert slow["ratio"][1] > max(1.2, fast["ratio"][1])
    assert slow["ratio"][1] == pytest.approx(slow["expected_ratio"], rel=0.3)


@pytest.mark.slow
def test_a_rank_that_fails_is_reported_with_its_last_words(limited):
    with pytest.raises(
        LayoutError, match=r"a rank failed; its last words:\n(.|\n)*No module named"
    ):
        network.run_ranks("nexus_ds.nowhere", [], 2, 60)


def test_ranks_that_take_too_long_are_ended(limited):
    with pytest.raises(
        LayoutError, match="the ranks were not done after 0 s; use fewer steps or faster links"
    ):
        network.run_ranks("nexus_ds.nowhere", [], 2, 0.01)
