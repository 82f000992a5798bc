"""Signals ask for a stop: they are remembered, and every rank learns of one that any rank got."""

import os
import signal

import pytest

from nexus_ds.runtime import signals
from nexus_ds.runtime.signals import StopRequest

ASKING = (
    *(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT),
    *(signal.SIGHUP, signal.SIGUSR2, signal.SIGQUIT, signal.SIGXCPU),
)


@pytest.fixture
def request_():
    before = {number: signal.getsignal(number) for number in ASKING}
    # nohup ignores one of them, a shell without jobs two more of what it starts in the background
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_remembered_and_ends_nothing(request_, number):
    assert request_.agreed() == 0
    os.kill(os.getpid(), number)
    assert request_.received == number
    assert request_.agreed() == request_.agreed() == number


def test_what_another_rank_got_counts_here(request_, monkeypatch):
    told = []
    monkeypatch.setattr(
        signals, "all_reduce_max", lambda value: told.append(value) or max(value, 15.0)
    )
    assert request_.agreed() == 15
    os.kill(os.getpid(), signal.SIGUSR1)
    request_.agreed()
    assert told == [0.0, float(signal.SIGUSR1)]


def test_what_nohup_ignores_stays_ignored(request_):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert request_.received == 0
