"""The network between ranks: its switch, its mistakes, delay and bandwidth of real namespaces."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from nexus_ds.errors import LayoutError
from nexus_ds.experiments.benchmarks import network

FIRST, SECOND, THIRD, ALL = b"\2aaaaa", b"\2bbbbb", b"\2ccccc", b"\xff" * 6


def frame(receiver, sender, words):
    return bytes(network.HEADER) + receiver + sender + words


@pytest.fixture
def ports():
    """Three sockets, the far ends of what the switch takes for taps; it delays by 50 ms."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    for _, far in pairs:
        far.settimeout(5)
    thread = threading.Thread(
        target=network.forward, args=([near.fileno() for near, _ in pairs], 0.05)
    )
    thread.start()
    yield [far for _, far in pairs]
    for _, far in pairs:
        far.close()
    thread.join(5)
    assert not thread.is_alive()
    for near, _ in pairs:
        near.close()


def test_the_switch_learns_where_ranks_are_and_delays_every_frame(ports):
    started = time.monotonic()
    ports[0].send(frame(ALL, FIRST, b"who is there"))
    assert [port.recv(100) for port in ports[1:]] == [frame(ALL, FIRST, b"who is there")] * 2
    assert time.monotonic() - started >= 0.05
    started = time.monotonic()
    ports[1].send(frame(FIRST, SECOND, b"second"))
    ports[1].send(frame(FIRST, SECOND, b"in order"))
    assert ports[0].recv(100) == frame(FIRST, SECOND, b"second")
    assert time.monotonic() - started >= 0.05
    assert ports[0].recv(100) == frame(FIRST, SECOND, b"in order")
    ports[2].setblocking(False)
    with pytest.raises(BlockingIOError):
        ports[2].recv(100)


def test_a_rank_that_has_ended_stops_nobody(ports):
    ports[2].send(frame(ALL, THIRD, b"last words"))
    assert ports[0].recv(100)
    ports[2].close()
    ports[0].send(frame(THIRD, FIRST, b"too late"))
    ports[0].send(frame(ALL, FIRST, b"go on"))
    received = [ports[1].recv(100) for _ in range(2)]
    assert received == [frame(ALL, THIRD, b"last words"), frame(ALL, FIRST, b"go on")]


@pytest.fixture
def limited():
    """Skip where links can't be limited."""
    try:
        network.check()
    except LayoutError as error:
        pytest.skip(str(error))


@pytest.fixture
def delayed():
    """Skip where links can't be delayed."""
    try:
        network.check(delay=0.02)
    except LayoutError as error:
        pytest.skip(str(error))


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


def fake_tools(monkeypatch, folder, ip):
    for tool in network.TOOLS:
        (folder / tool).write_text("#!/bin/sh\nexit 0\n")
        (folder / tool).chmod(0o755)
    (folder / "unshare").write_text(f'#!/bin/sh\ncase "$*" in *tuntap*) {ip};; esac\n')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_machine_without_taps_is_told_so(monkeypatch, tmp_path):
    fake_tools(monkeypatch, tmp_path, "exit 0")
    monkeypatch.setattr(network, "TUN", tmp_path / "tun")
    network.check()  # nothing is missing without delay
    with pytest.raises(
        LayoutError,
        match=r"delay need .*/tun, readable and writable \(modprobe tun.*"
        r"found: no such file; without",
    ):
        network.check(delay=0.001)


def test_a_machine_that_allows_no_taps_is_told_so(monkeypatch, tmp_path):
    fake_tools(monkeypatch, tmp_path, "echo Operation not permitted >&2; exit 1")
    monkeypatch.setattr(network, "TUN", Path(os.devnull))
    with pytest.raises(
        LayoutError,
        match=r"links with delay need .*; found: Operation not permitted; without delay",
    ):
        network.check(delay=0.001)


def trip(folder, delay, speed, size):
    out = folder / "found.json"
    network.run_ranks("link_worker", [str(out), str(speed), str(size)], 2, 60, delay)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_message_takes_the_delay_there_and_back(delayed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert 0.04 <= trip(tmp_path, 0.02, 1e9, 1)["round_trip"] < 0.1
    assert trip(tmp_path, 0.0, 1e9, 1)["round_trip"] < 0.005


@pytest.mark.slow
def test_a_link_with_delay_is_as_fast_as_it_was_made(delayed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    speed, size = 100e6 / 8, 20_000_000
    seconds = trip(tmp_path, 0.005, speed, size)["seconds"]
    # cores may be busy; bits for bytes were eight times as much
    assert 0.9 * size / speed <= seconds <= 4 * size / speed


@pytest.mark.slow
def test_a_rank_that_fails_behind_a_delay_is_reported(delayed):
    with pytest.raises(
        LayoutError, match=r"a rank failed; its last words:\n(.|\n)*No module named"
    ):
        network.run_ranks("nexus_ds.nowhere", [], 2, 60, 0.001)


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
