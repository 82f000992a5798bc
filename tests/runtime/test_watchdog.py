"""A rank that dies or stands still ends the run in time, named with what it was at; nothing else
does."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from launch import fork_ranks, start_ranks
from test_train import TRAIN, Z3, settings

from nexus_ds.errors import TrainingError
from nexus_ds.launch import EXIT_LOST, Position
from nexus_ds.runtime import watchdog
from nexus_ds.runtime.watchdog import Link, Place, Watchdog, stuck

WORKER = Path(__file__).parents[1] / "watchdog_worker.py"
LIMIT = 4.0  # seconds
SLACK = 20.0  # of a machine with too few cores for its work


# The judgement ------------------------------------------------------------------------------------


def place(number=0, age=0.0, patience=0.0, step=7):
    return Place("the forward pass", step, number, patience, age)


def test_who_came_least_far_is_named_first():
    assert stuck({0: place(age=9.9), 1: place(age=9.9)}, 10) == ""
    assert stuck({0: place(8, age=10.1), 1: place(7, age=4), 2: place(8, age=9)}, 10) == (
        "no progress: rank 1 in the forward pass of step 7, for 4s; rank 0 in the forward pass of "
        "step 7, for 10s; rank 2 in the forward pass of step 7, for 9s (the least far first)"
    )


def test_what_is_long_by_nature_has_its_own_limit():
    assert stuck({0: place(age=99, patience=100)}, 10) == ""
    assert "rank 0 in" in stuck({0: place(age=101, patience=100, step=0)}, 10)


def test_who_has_nothing_to_do_waits_for_ever_and_is_named_last():
    waiting = place(number=2, age=1e9, patience=60 * watchdog.WAITING)
    assert stuck({0: place(number=5, age=9), 1: waiting}, 10) == ""
    said = stuck({0: place(number=5, age=11), 1: waiting}, 10)
    assert said.startswith("no progress: rank 0 in") and "; rank 1 in" in said


def test_an_endless_patience_travels(link):
    mine, theirs = link
    waiting = place(number=2, patience=60 * watchdog.WAITING)
    theirs.send(vars(waiting))
    assert mine.receive(1.0) == "" and mine.place == waiting


def test_of_those_that_came_equally_far_the_one_that_does_something_else_is_named_first():
    waiting = replace(place(age=11), where="all_reduce")
    places = {0: waiting, 1: waiting, 2: replace(waiting, where="read"), 3: waiting}
    assert "no progress: rank 2 in the forward pass of step 7, for 11s (read); rank 0" in stuck(
        places, 10
    )


def test_many_ranks_are_not_all_named():
    said = stuck({rank: place(rank, age=11) for rank in range(64)}, 10)
    assert said.count("rank ") == 8 and "and 56 more" in said


@pytest.fixture
def link():
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    yield Link(mine, heard=0.0), Link(theirs, heard=0.0)
    mine.close()
    theirs.close()


def test_a_link_is_in_trouble_when_it_is_silent_or_closed(link):
    mine, theirs = link
    theirs.send(vars(place(3)))
    assert mine.receive(100.0) == "" and mine.place == place(3)
    assert mine.trouble(107.0, 10) == ""
    assert mine.trouble(108.0, 10) == (
        "is silent: its process stands still, or its node is lost; last heard 8s ago, in the "
        "forward pass of step 7, for 0s"
    )
    theirs.connection.close()
    assert mine.receive(101.0) == ""
    assert mine.trouble(101.0, 10).startswith("was lost: its process is gone; last heard 1s ago")


def test_who_said_farewell_is_not_lost_and_an_error_has_a_moment_to_be_everybodys(link):
    mine, theirs = link
    theirs.send({"left": ""})
    theirs.connection.close()
    mine.receive(100.0)
    mine.receive(100.0)
    assert mine.closed and mine.trouble(10_000.0, 10) == ""
    mine.left = "no space"
    assert mine.trouble(100.0 + watchdog.FAREWELL_SECONDS, 10) == ""
    assert mine.trouble(101.0 + watchdog.FAREWELL_SECONDS, 10) == "ended with an error: no space"


def test_a_torn_line_is_skipped_and_half_a_one_waited_for(link):
    mine, theirs = link
    theirs.connection.send(b'ase": "x"}\n{"end": ')
    assert mine.receive(1.0) == ""
    theirs.connection.send(b'"all end"}\n')
    assert mine.receive(1.0) == "all end"


# Who may come in ----------------------------------------------------------------------------------

SECRET = "s" * 32


@pytest.fixture
def entrance():
    """A door of rank 0, and a function that knocks there with some bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        door = watchdog._Door([server], SECRET)
        callers = []

        def knock(said=b""):
            caller = socket.create_connection(server.getsockname(), timeout=SLACK)
            callers.append(caller)
            caller.sendall(said)
            return caller

        yield door, knock
        door.close()
        for connection in [*callers, *door.found.values()]:
            connection.close()


def greeting(rank, secret=SECRET):
    return json.dumps({"rank": rank, "secret": secret}).encode() + b"\n"


def let_in(door, count):
    """Look until so many ranks are in."""
    deadline = time.monotonic() + SLACK
    while len(door.found) < count:
        assert time.monotonic() < deadline
        door.look(0.01)


STRANGERS = {
    "nested": b"[" * 1023 + b"\n",
    "no UTF-8": b"\xff\xfe\xfd\n",
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "a number that is none": b"NaN\n",
    "a list": b"[1]\n",
    "a text": b'"secret"\n',
    "half a character": b'{"secret": "\\ud800", "rank": 1}\n',
    "no secret": b'{"rank": 1}\n',
    "another secret": greeting(1, "t" * 32),
    "no rank": json.dumps({"secret": SECRET}).encode() + b"\n",
    "a rank that is none": greeting("x"),
    "a rank of a list": greeting([]),
    "an endless line": b"x" * 5000,
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_shown_out_and_the_ranks_come_in(entrance, said):
    """1,023 brackets ended the run in a RecursionError, before the secret was looked at."""
    door, knock = entrance
    stranger = knock(said)
    knock(greeting(1))
    let_in(door, 1)
    with suppress(ConnectionResetError):  # what it said and nobody read
        assert stranger.recv(1) == b""
    assert list(door.found) == [1] and door.guests == []


def test_who_says_nothing_or_little_keeps_nobody_waiting(entrance):
    door, knock = entrance
    silent, slow = knock(), knock(greeting(1)[:9])
    knock().close()
    knock(greeting(2))
    since = time.monotonic()
    let_in(door, 1)
    assert list(door.found) == [2] and time.monotonic() - since < watchdog.GREETING_SECONDS
    # a rank on a slow network has the time that there is
    slow.sendall(greeting(1)[9:])
    let_in(door, 2)
    [guest] = door.guests
    guest.until = 0.0
    door.look(0.01)
    assert silent.recv(1) == b"" and door.guests == []


def test_many_that_say_nothing_take_no_more_than_their_room(entrance, monkeypatch):
    monkeypatch.setattr(watchdog, "MOST_GUESTS", 3)
    door, knock = entrance
    crowd = []
    for _ in range(5):
        crowd.append(knock())
        door.look(SLACK)
    assert len(door.guests) == 3
    assert crowd[0].recv(1) == crowd[1].recv(1) == b""
    knock(greeting(1))
    let_in(door, 1)


def test_what_follows_a_greeting_is_left_for_the_watchdog(entrance):
    door, knock = entrance
    knock(greeting(1) + b'{"left": "no space"}\n')
    let_in(door, 1)
    found = Link(door.found[1], heard=0.0)
    found.receive(1.0)
    assert found.left == "no space"


class Store:
    """What the ranks meet at, as far as it is used."""

    def __init__(self, addresses=("127.0.0.1",)):
        self.values = {f"here/{rank}": name.encode() for rank, name in enumerate(addresses, 1)}

    def set(self, key, value):
        self.values[key] = value

    def multi_get(self, keys):
        return [self.values[key] for key in keys]


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(watchdog.ranks, "join", lambda seconds: found)
    monkeypatch.setattr(watchdog.ranks._Meeting, "store", found)
    return found


def test_strangers_that_go_on_knocking_do_not_move_the_limit(monkeypatch, store):
    looked = []
    monkeypatch.setattr(watchdog._Door, "look", lambda door, seconds: looked.append(seconds))
    with pytest.raises(TrainingError) as caught:
        watchdog._connect(Position(0, 2, 1, "node"), 0.05)
    assert looked and store.values["watchdog"]
    assert str(caught.value) == (
        "rank 1 came to the store and did not connect to rank 0 within 0s; look at the log there, "
        "or for a firewall between the nodes"
    )


def test_who_has_come_is_told_who_has_not(monkeypatch):
    mine, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        door = watchdog._Door([server], SECRET)
        door.found[1] = mine
        error = watchdog._unconnected(door, [2, 3], 60.0)
        door.close()
    told = Link(theirs, 0.0)
    assert told.receive(1.0) == str(error) and str(error).startswith("rank 2, 3 came to the store")
    theirs.close()


def bound(addresses):
    """Return where the door of rank 0 listens for ranks that come by these addresses."""
    servers = watchdog._listening(addresses, 3)
    found = {name: server.getsockname()[0] for name, server in servers.items()}
    for server in servers.values():
        server.close()
    return found


def test_rank_0_listens_where_the_others_reach_it_and_nowhere_else(capfd):
    assert bound(["127.0.0.1"] * 3) == {"127.0.0.1": "127.0.0.1"}
    # a name that leads elsewhere on the machine itself than on other nodes
    both = ["127.0.1.1", "127.0.0.1"]
    assert bound(both) == {name: name for name in both}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("address", ["192.0.2.1", ""])
def test_an_address_that_is_not_the_machine_s_own_opens_all_and_is_told(address, capfd):
    """As behind a translation of addresses; 192.0.2.1 is no machine's."""
    assert bound(["127.0.0.1", address]) in ({"": "::"}, {"": "0.0.0.0"})
    said = capfd.readouterr().err
    assert "rank 0 listens at all of its addresses until the others have come" in said
    assert f"'{address}'" in said


def test_no_connection_to_rank_0_is_an_error_that_says_so(monkeypatch, store):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(store, "get", lambda key: json.dumps([{"127.0.0.1": port}, SECRET]), False)
    with pytest.raises(TrainingError) as caught:
        watchdog._connect(Position(1, 2, 1, "node"), 80.0)
    assert re.match(r"no connection to rank 0 within 30s \(.*refused\); look at", str(caught.value))


# The thread ---------------------------------------------------------------------------------------


@contextmanager
def dog(rank, links, limit, monkeypatch):
    """A watchdog whose process does not end: it tells with which code it would."""
    ended = []

    def leave(code):
        ended.append(code)
        dog._leaving.set()

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    watchdog.at("a test")
    dog = Watchdog(Position(rank, len(links) + 1, 1, "node"), links, limit)
    yield dog, ended
    with suppress(OSError):
        dog.leave("")


def until(condition, seconds=SLACK):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_single_rank_that_is_stuck_ends_with_its_stack(monkeypatch, capfd):
    with dog(0, {}, 0.5, monkeypatch) as (_, ended):
        until(lambda: ended)
    said = capfd.readouterr().err
    assert ended == [EXIT_LOST]
    assert re.search(
        r"train.py: rank 0, in a test, for \d+s \(.*\): no progress: rank 0 in a test", said
    )
    assert "in until" in said, "the stack of the main thread"


STUCK = """
import time
from nexus_ds.launch import Position
from nexus_ds.runtime import watchdog

watchdog.LAST_WORDS_SECONDS = 1.0
watchdog.at("the forward pass", 7)
watchdog.Watchdog(Position(0, 1, 1, "node"), {}, 0.5)
time.sleep(3600)
"""


def stuck_process(stderr):
    """Start a rank that is stuck and ends after its limit of half a second."""
    return subprocess.Popen([sys.executable, "-c", STUCK], stderr=stderr)


def test_a_full_disk_under_the_log_does_not_keep_a_stuck_rank():
    with open("/dev/full", "w") as full:
        assert stuck_process(full).wait(30) == EXIT_LOST


@pytest.mark.parametrize("free", [0, 600])
def test_a_log_whose_reader_stands_still_does_not_keep_a_stuck_rank(free):
    """With room for nothing, or for the judgement but not for the stacks."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * (size - free))
    rank = stuck_process(writer)
    try:
        assert rank.wait(30) == EXIT_LOST
    finally:
        rank.kill()
    said = os.read(reader, size)[size - free :]
    assert (b"no progress: rank 0 in the forward pass of step 7" in said) == bool(free)
    os.close(reader)
    os.close(writer)


def test_a_single_rank_that_goes_on_is_left_alone(monkeypatch, capfd):
    with dog(0, {}, 6.0, monkeypatch) as (_, ended):
        for step in range(40):
            watchdog.at("a test", step)
            time.sleep(0.2)
    assert ended == [] and capfd.readouterr().err == ""
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_time_in_which_the_whole_job_stood_still_counts_for_nobody(monkeypatch):
    mine, theirs = socket.socketpair()
    with dog(0, {1: Link(mine, time.monotonic())}, 60.0, monkeypatch) as (found, _):
        found._leaving.set()
        found._thread.join(SLACK)
        later = time.monotonic() + 1000
        assert found._judged(later) == ""
        # looks as it looks while it runs
        looks = [found._judged(later + look * found.beat) for look in range(40)]
        assert looks[20] == "" and "rank 1 is silent" in looks[-1]
    theirs.close()


def test_a_job_that_runs_by_turns_has_its_whole_limit(monkeypatch):
    """Fifteen seconds on, thirty off: three turns are 135 s of the clock, and 45 s of the job."""
    with dog(0, {}, 60.0, monkeypatch) as (found, _):
        found._leaving.set()
        found._thread.join(SLACK)
        now = time.monotonic()
        monkeypatch.setattr(watchdog._Main, "since", now)
        found.woke = found.forgiven = now
        for _ in range(3):
            for _ in range(10):
                now += found.beat
                assert found._judged(now) == ""
            now += 30
            assert found._judged(now) == ""
        looks = [found._judged(now + look * found.beat) for look in range(20)]
    assert looks[1] == "" and "no progress: rank 0 in a test" in looks[-1]


def test_a_rank_that_stood_still_between_two_looks_tells_no_age_of_that_time(monkeypatch):
    """Stopped as a whole after it judged: what it sends next is not held against it."""
    mine, theirs = socket.socketpair()
    with dog(1, {0: Link(mine, time.monotonic())}, 60.0, monkeypatch) as (found, _):
        found._leaving.set()
        found._thread.join(SLACK)
        theirs.recv(1 << 16)
        monkeypatch.setattr(watchdog._Main, "since", time.monotonic() - 1000)
        found.woke = found.forgiven = time.monotonic() - 1000
        found._listen(0.0)
        assert json.loads(theirs.recv(1 << 16))["age"] < 60
    theirs.close()


def test_a_judgement_of_rank_0_reaches_the_others(monkeypatch, capfd):
    mine, theirs = socket.socketpair()
    with dog(2, {0: Link(mine, time.monotonic())}, 60.0, monkeypatch) as (_, ended):
        theirs.sendall(b'{"end": "rank 1 was lost"}\n')
        until(lambda: ended)
    said = capfd.readouterr().err
    assert re.search(
        r"train.py: rank 2, in a test, for \d+s \(.*\): rank 1 was lost; this rank", said
    )
    theirs.close()


def test_a_farewell_that_lies_unread_counts_although_sending_fails(monkeypatch, capfd):
    """Many ranks end at once: rank 0 writes to some whose last words it has yet to read."""
    links = {}
    for rank in (1, 2, 3):
        mine, theirs = socket.socketpair()
        theirs.sendall(b'{"left": ""}\n')
        theirs.close()
        links[rank] = Link(mine, time.monotonic())
    with dog(0, links, 60.0, monkeypatch) as (_, ended):
        until(lambda: ended or all(link.closed for link in links.values()))
    assert ended == [] and capfd.readouterr().err == ""
    assert [link.left for link in links.values()] == [""] * 3


def test_who_leaves_judges_nobody_any_more(monkeypatch):
    mine, theirs = socket.socketpair()
    monkeypatch.setattr(Watchdog, "_listen", lambda self, until: self._leaving.set() or "")
    with dog(0, {1: Link(mine, 0.0, closed=True)}, 60.0, monkeypatch) as (found, ended):
        found._thread.join(SLACK)
    assert ended == []
    theirs.close()


# Real ranks ---------------------------------------------------------------------------------------


def launched(what, world=3):
    ranks = fork_ranks([WORKER, LIMIT, what], world)
    if what == "go":
        until(lambda: all("going" in Path(rank.out).read_text() for rank in ranks), 120)
    return ranks


def ended(ranks):
    """Return what each rank said and its exit code."""
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    return said, [rank.returncode for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_before_it_comes_is_named_within_the_limit(victim):
    """A stuck import, a dead mount: the others waited a day, and then did not know for whom."""
    ranks = launched(f"absent:{victim}")
    since = time.monotonic()
    said, codes = ended([rank for index, rank in enumerate(ranks) if index != victim])
    assert time.monotonic() - since < LIMIT + SLACK
    os.kill(ranks[victim].pid, signal.SIGKILL)
    ended([ranks[victim]])
    assert codes == [1, 1], said
    told = (
        rf"NEXUS rank {victim} did not come within 4s.*; look at the log there \(a process that "
        r"hangs before it trains, a node that is lost\), or for a firewall; where ranks start that"
        r" far apart, raise parallel.timeout_minutes\n"
    )
    assert all(re.search(told, text) for text in said), said


@pytest.mark.slow
def test_a_store_that_does_not_answer_keeps_no_rank():
    """Rank 0 stands still once it serves: torch's client would wait for ever."""
    ranks = launched("serving")
    said, codes = ended(ranks[1:])
    os.kill(ranks[0].pid, signal.SIGKILL)
    ended(ranks[:1])
    assert codes == [EXIT_LOST] * 2, said
    told = r"rank \d, in the start: the store of the ranks at 127.0.0.1:\d+ does not answer; the"
    assert all(re.search(told, text) and re.search("in _(meet|reach)", text) for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_at_once(victim):
    ranks = launched("go")
    os.kill(ranks[victim].pid, signal.SIGKILL)
    since = time.monotonic()
    said, codes = ended(ranks)
    assert time.monotonic() - since < SLACK
    assert codes == [-signal.SIGKILL if rank == victim else EXIT_LOST for rank in range(3)], said
    for rank in {0, 1, 2} - {victim}:
        judged = (
            rf"train.py: rank {rank}, in a pass of step \d+, for \d+s \(.*\): rank {victim} was "
            r"lost: its process is gone; last heard \d+s ago, in (a pass of step \d+|the \w+), for "
        )
        assert re.search(judged, said[rank]), said[rank]
        assert "in main" in said[rank] and "Traceback" not in said[rank]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_ends_the_run_within_the_limit(victim):
    ranks = launched("go")
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    since = time.monotonic()
    others = [rank for index, rank in enumerate(ranks) if index != victim]
    said, codes = ended(others)
    assert LIMIT / 4 < time.monotonic() - since < LIMIT + SLACK
    assert codes == [EXIT_LOST] * 2, said
    assert all(f"rank {victim} is silent: its process stands still" in text for text in said)
    os.kill(ranks[victim].pid, signal.SIGCONT)
    _, [code] = ended([ranks[victim]])
    assert code not in (0, 1), "it goes on alone"


@pytest.mark.slow
def test_a_rank_whose_main_thread_is_stuck_is_named_and_shows_where():
    said, codes = ended(launched("stuck"))
    assert codes == [EXIT_LOST] * 3, said
    named = (
        r"no progress: rank 1 in a pass of step 5, for \d+s \(sleep_for_ever, watchdog_worker.py:"
    )
    assert all(re.search(named, text) for text in said), said
    assert "in sleep_for_ever" in said[1] and "in sleep_for_ever" not in said[0] + said[2]


@pytest.mark.slow
def test_an_error_of_one_rank_alone_is_told_by_the_others():
    said, codes = ended(launched("error"))
    assert codes == [EXIT_LOST, 1, EXIT_LOST], said
    assert "NEXUS a row is damaged" in said[1]
    assert all("rank 1 ended with an error: a row is damaged" in said[rank] for rank in (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["done", "late"])
def test_a_run_in_order_ends_without_a_word(what):
    said, codes = ended(launched(what))
    assert codes == [0, 0, 0], said
    for text in said:
        # a machine that stands still for the limit has stacks shown, which judge nobody
        assert "going\n" in text and text.endswith("done\n") and "train.py" not in text, text


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_goes_on():
    ranks = launched("go")
    for number, seconds in ((signal.SIGSTOP, 2 * LIMIT), (signal.SIGCONT, 2.0)):
        for rank in ranks:
            os.kill(rank.pid, number)
        time.sleep(seconds)
    os.kill(ranks[0].pid, signal.SIGKILL)
    said, codes = ended(ranks)
    assert codes == [-signal.SIGKILL, EXIT_LOST, EXIT_LOST]
    assert all("rank 0 was lost" in text for text in said[1:]), "they were at work again"


@pytest.mark.slow
def test_a_training_whose_rank_stands_still_ends_and_keeps_its_state(
    tmp_path, nexus_dir, text_folder
):
    """SIGSTOP of one of two ranks, by train.py itself; nobody noticed before for four hours."""
    more = ("training.steps=100000", "training.save_every=2", "training.log_every=1")
    words = settings(
        nexus_dir, text_folder, tmp_path / "out", *more, "parallel.timeout_minutes=0.4"
    )
    ranks = start_ranks([TRAIN, "--deepspeed", Z3, "--config", "demo", *words], 2)
    states = tmp_path / "out.training" / "states"
    until(lambda: (states / "latest").exists() or ranks[0].poll() is not None, 240)
    ranks[1].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    said = ranks[0].communicate(timeout=240)[0]
    assert time.monotonic() - since < 24 + SLACK
    ranks[1].kill()
    ranks[1].communicate(timeout=60)
    assert ranks[0].returncode == EXIT_LOST, said
    # Which place is the machine's affair: a quick one validates, trains and saves within one beat,
    # and the last that was heard of rank 1 is where it was then.
    place = r"in [\w ']+, for \d+s \(.*\)"
    judged = (
        f"rank 0, {place}: rank 1 is silent: its process stands still, or its node is lost; "
        rf"last heard \d+s ago, {place}; this rank ends, its stacks:"
    )
    assert re.search(judged, said), said
    assert "in loop" in said, "the stacks show where rank 0 waits"
    assert list(states.glob("step_*"))
