"""What long work says of itself in a log."""

import pytest

from nexus_ds import progress
from nexus_ds.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0s"), (59.9, "59s"), (60, "1m00s"), (725, "12m05s"), (3600, "1h00m"), (11220, "3h07m")],
)
def test_a_duration_has_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands until it is moved."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    with Progress("embed", 20, "doc") as work:
        work.advance(4)
        clock[0] += 10
        work.advance(6)
        clock[0] += 10
        work.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "embed: 10/20 doc, 1.0 doc/s, 10s elapsed, 10s to go",
        "embed: 20/20 doc, 1.0 doc/s, 20s elapsed, 0s to go",
    ]


def test_nothing_is_said_of_the_rest_of_an_unknown_total(clock, capsys):
    with Progress("read", 0, "row") as work:
        clock[0] += 10
        work.advance(50)
    line = "read: 50 row, 5.0 row/s, 10s elapsed"
    assert capsys.readouterr().err.splitlines() == [line, line]


def test_work_that_fails_says_nothing_at_its_end(clock, capsys):
    with pytest.raises(ValueError), Progress("embed", 20, "doc"):
        raise ValueError
    assert capsys.readouterr().err == ""
