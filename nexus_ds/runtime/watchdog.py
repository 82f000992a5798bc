"""A rank that dies or stands still ends the run: who it was, at what, and the stacks of the others.

The main thread says at each step of its work what it is at (`at`). A thread of each rank tells that
to rank 0, over a connection of its own and many times within the limit. Rank 0 judges:

    a connection closes without a farewell      its process was killed: at once
    nothing is heard for most of the limit      its process stands still, or its node is lost
    what it is at has not changed for the limit its main thread is stuck, or waits for one that is

and tells all, which write their stacks and end with EXIT_LOST. The others judge rank 0 likewise.
Torch's store would not do: its client waits for ever for a server that stands still, and nobody
learns from it that a process is gone. A job that is suspended as a whole (SIGSTOP to all, and on)
is not ended: the time in which this thread did not run counts for nobody.
Not covered: a main thread that keeps the interpreter's lock in a single rank (its stack is written,
but nothing ends it); a process that can't die, since its driver hangs.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypedDict

from nexus_ds.errors import TrainingError
from nexus_ds.launch import EXIT_LOST, Position, meeting_point
from nexus_ds.progress import duration, say
from nexus_ds.runtime import ranks

if TYPE_CHECKING:
    import torch.distributed as dist

# Minutes that the main thread may be at one thing, where that is long by nature: making text and
# earlier stages, reading and saving what is as large as the model, and what is done layer by layer,
# of which each takes minutes on slow disks.
PREPARING = 24 * 60.0
SAVING = 4 * 60.0
LAYER = 60.0
WAITING = math.inf
"""For a rank that others have left nothing to do: theirs are watched."""
BEATS = 40  # within the limit
LONGEST_BEAT = 5.0  # seconds
# Of the limit: less than 1, so that who stands still is found before those that wait for it.
SILENCE = 0.75
LOOK_SECONDS = 0.25  # between two looks whether the run is over
# That an error waits for a judgement: mostly it is the loss of another rank that caused it.
JUDGEMENT_SECONDS = 6.0
GREETING_SECONDS = 10.0  # that a connection may take to say whose it is
LONGEST_GREETING = 1 << 10  # bytes
MOST_GUESTS = 128  # connections that have not said it: a process may have a thousand files
# That the others wait, once a rank has said farewell because of an error, for errors of their own:
# mostly it is the same one.
FAREWELL_SECONDS = 5.0
# That this rank's last words may take, to a terminal, pipe or disk that may not take them.
LAST_WORDS_SECONDS = 5.0


class Beat(TypedDict, total=False):
    """What is sent, one JSON object a line; each is of one kind."""

    phase: str
    step: int
    number: int
    patience: float
    age: float
    where: str
    left: str
    """A farewell: why this rank ends, '' when it is done."""
    end: str
    """The judgement: all end."""


@dataclass(frozen=True)
class Place:
    """What a main thread is at."""

    phase: str
    step: int
    """Optimizer step; 0: none."""
    number: int
    """How many places it was at before."""
    patience: float
    """Seconds that it may stay there; 0: the limit."""
    age: float = 0.0
    """Seconds that it has been there."""
    where: str = ""
    """Function and line that runs."""

    def __str__(self) -> str:
        step = f" of step {self.step}" if self.step else ""
        where = f" ({self.where})" if self.where else ""
        return f"{self.phase}{step}, for {duration(self.age)}{where}"


class _Main:
    """What this process's main thread is at; written by it alone."""

    place = Place("the start", 0, 0, 0.0)
    since = time.monotonic()


def at(phase: str, step: int = 0, minutes: float = 0.0) -> None:
    """Say what the main thread does from now on.

    Args:
        phase: in words.
        step: optimizer step, 0 for none.
        minutes: that it may take; 0: the limit of the run.
    """
    # In this order: the thread may find the new time with the old place, but not the reverse.
    _Main.since = time.monotonic()
    _Main.place = Place(phase, step, _Main.place.number + 1, 60 * minutes)


def at_layer(phase: str, layer: int) -> None:
    """Say that the main thread is at one layer of a work that goes through all of them."""
    at(f"{phase}, layer {layer}", minutes=LAYER)


@dataclass
class Link:
    """The connection to another rank, and what is known of it."""

    connection: socket.socket
    heard: float
    """When it last spoke, of the monotonic clock."""
    place: Place = Place("the start", 0, 0, 0.0)
    left: str | None = None
    closed: bool = False
    received: bytes = b""

    def send(self, beat: Beat) -> None:
        """Send what fits into the connection's buffer; who does not read it is found silent."""
        # That the other end is gone is for `receive` to find: its farewell may lie there unread.
        with suppress(OSError):
            self.connection.send(json.dumps(beat).encode() + b"\n")

    def receive(self, now: float) -> str:
        """Take in what has come; return a judgement that was among it, else ''."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return ""
        except OSError:
            data = b""
        if data:
            self.heard = now
        else:
            self.closed = True
        *lines, self.received = (self.received + data).split(b"\n")
        ends = [self._take(line) for line in lines]
        return next((end for end in ends if end), "")

    def _take(self, line: bytes) -> str:
        try:
            beat: Beat = json.loads(line)
        except ValueError:
            return ""  # torn, since this rank stood still and the buffers were full
        if "phase" in beat:
            self.place = Place(**beat)  # type: ignore[misc]
        self.left = beat.get("left", self.left)
        return beat.get("end", "")

    def trouble(self, now: float, limit: float, grace: float = FAREWELL_SECONDS) -> str:
        """Return what is wrong with the process at the other end, '' for nothing.

        Args:
            now: of the monotonic clock.
            limit: seconds.
            grace: seconds that an error over there has to become one here.
        """
        silent = now - self.heard
        where = f"; last heard {duration(silent)} ago, in {self.place}"
        if self.left is not None:
            # Done, or soon told of the error by its own message.
            failed = self.left and silent > grace
            return f"ended with an error: {self.left}" if failed else ""
        if self.closed:
            return f"was lost: its process is gone{where}"
        if silent > SILENCE * limit:
            return f"is silent: its process stands still, or its node is lost{where}"
        return ""


def stuck(places: dict[int, Place], limit: float) -> str:
    """Return who makes no progress, '' if all do.

    The others soon wait for the one that stands still, so that all look alike: the ranks that have
    come least far are named first, and of these the ones that do what few do. Last come those that
    have nothing to do.

    Args:
        places: of the ranks.
        limit: seconds that each may be at one thing, unless it has its own patience.
    """
    if not any(place.age > (place.patience or limit) for place in places.values()):
        return ""
    doing = Counter(place.where for place in places.values())

    def far(rank: int) -> tuple[bool, int, int]:
        place = places[rank]
        idle = math.isinf(place.patience)
        return idle, place.number, doing[place.where]

    order = sorted(places, key=far)
    told = [f"rank {rank} in {places[rank]}" for rank in order[:8]]
    more = f" and {len(order) - 8} more" if len(order) > 8 else ""
    return f"no progress: {'; '.join(told)}{more} (the least far first)"


def _where() -> str:
    """Return the function and line that the main thread runs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    code = frame.f_code
    return f"{code.co_name}, {Path(code.co_filename).name}:{frame.f_lineno}"


class Watchdog:
    """This rank's thread.

    Args:
        here: this rank.
        links: by rank; rank 0 has one to each, the others one to rank 0.
        limit: seconds.
    """

    def __init__(self, here: Position, links: dict[int, Link], limit: float) -> None:
        self.here = here
        self.links = links
        self.limit = limit
        self.beat = min(limit / BEATS, LONGEST_BEAT)
        self.woke = time.monotonic()
        self.forgiven = self.woke
        """Time before this counts for nobody."""
        self.grace = FAREWELL_SECONDS
        self._leaving = threading.Event()
        self._selector = selectors.DefaultSelector()
        for link in links.values():
            link.connection.setblocking(False)
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def await_judgement(self) -> None:
        """Wait with an error that the loss of another rank may have caused; end here if it did."""
        self.grace = 0.0
        if self.links:
            time.sleep(JUDGEMENT_SECONDS)

    def leave(self, reason: str) -> None:
        """Say farewell, '' when all is done, and end the thread."""
        self._leaving.set()
        self._thread.join()
        for link in self.links.values():
            link.send({"left": reason})
            link.connection.close()
        self._selector.close()

    def _run(self) -> None:
        try:
            while not self._leaving.is_set():
                # By a thread of its own that needs no lock of the interpreter: for a main thread
                # that keeps it, so that this one does not run.
                faulthandler.dump_traceback_later(self.limit, file=2)
                judgement = self._listen(time.monotonic() + self.beat)
                # Who leaves has nobody to lose any more: the others leave as well.
                if not judgement and not self._leaving.is_set():
                    judgement = self._judged(time.monotonic())
                if judgement:
                    self._end(judgement)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _listen(self, until: float) -> str:
        """Tell what this rank is at and hear the others; return a judgement from elsewhere."""
        now = time.monotonic()
        self._forgive(now)
        mine = vars(self._mine(now))
        for link in self.links.values():
            link.send(mine)  # type: ignore[arg-type]
        while (left := until - time.monotonic()) > 0:
            if self._leaving.wait(0.0 if self.links else left):
                return ""
            for key, _ in self._selector.select(min(left, LOOK_SECONDS)):
                speaker: Link = key.data
                if judgement := speaker.receive(time.monotonic()):
                    return judgement
                if speaker.closed:
                    self._selector.unregister(speaker.connection)
                    return ""  # to be judged at once
        return ""

    def _mine(self, now: float) -> Place:
        age = now - max(_Main.since, self.forgiven)
        return replace(_Main.place, age=age, where=_where())

    def _forgive(self, now: float) -> None:
        """Leave out what this thread slept beyond a beat: the job was suspended, the others too.

        For hours, or for half of each minute, where jobs take turns at the processors.
        """
        lost = now - self.woke - self.beat
        if lost > self.beat / 2:
            self.forgiven = min(now, max(_Main.since, self.forgiven) + lost)
            for link in self.links.values():
                link.heard = min(now, link.heard + lost)
        self.woke = now

    def _judged(self, now: float) -> str:
        """Return this rank's own judgement, '' if all is well."""
        self._forgive(now)
        for rank, link in self.links.items():
            if trouble := link.trouble(now, self.limit, self.grace):
                return f"rank {rank} {trouble}"
        if self.here.rank:
            return ""
        places = {0: self._mine(now)}
        for rank, link in self.links.items():
            if link.left is None:
                age = link.place.age + now - link.heard
                places[rank] = replace(link.place, age=age)
        return stuck(places, self.limit)

    def _end(self, judgement: str) -> None:
        for link in self.links.values():
            link.send({"end": judgement})
        mine = self._mine(time.monotonic())
        _last_words(f"rank {self.here.rank}, in {mine}: {judgement}")


def _last_words(told: str) -> NoReturn:
    """Say why this rank ends, with its stacks, and end it."""
    try:
        # Not where a full disk or a reader that stands still could keep it.
        late = threading.Timer(LAST_WORDS_SECONDS, os._exit, [EXIT_LOST])
        late.daemon = True
        late.start()
        say(f"train.py: {told}; this rank ends, its stacks:")
        _write_stacks()
    finally:
        # Without any teardown: the main thread may be in a collective that never returns.
        os._exit(EXIT_LOST)


@contextmanager
def _bounded(here: Position, seconds: float) -> Iterator[None]:
    """End this process if what is done inside takes longer.

    Torch's client waits for ever for a server that stands still, whatever it was told.
    """
    done = threading.Event()
    threading.Thread(target=_end_late, args=[here, done, seconds], daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _end_late(here: Position, done: threading.Event, seconds: float) -> None:
    # Counted, not read from a clock, which goes on while a job is suspended.
    for _ in range(math.ceil(seconds / LOOK_SECONDS)):
        if done.wait(LOOK_SECONDS):
            return
    address, port = meeting_point(here)
    _last_words(
        f"rank {here.rank}, in the start: the store of the ranks at {address}:{port} does not "
        "answer; the process of rank 0, or of its torchrun, stands still, or its node is lost"
    )


def _write_stacks() -> None:
    """Write the stacks of all threads to the process's stderr, not to a test's that catches it."""
    # By way of memory: faulthandler keeps the interpreter's lock while it writes, so that behind a
    # full pipe no thread could end the process.
    with open(os.memfd_create("stacks"), "w+b") as memory:
        faulthandler.dump_traceback(memory.fileno(), all_threads=True)
        memory.seek(0)
        stacks = memory.read()
    while stacks:
        stacks = stacks[os.write(2, stacks) :]


@dataclass(eq=False)
class _Guest:
    """Whoever has connected to rank 0 and not yet said who it is: a rank, or anybody else."""

    connection: socket.socket
    until: float
    """When it is shown out, of the monotonic clock."""
    said: bytes = b""

    def hear(self) -> bool:
        """Take in what has come of a line; return whether no more is awaited."""
        try:
            while len(self.said) < LONGEST_GREETING and not self.said.endswith(b"\n"):
                # one by one: what follows the line is for the watchdog
                byte = self.connection.recv(1)
                if not byte:
                    return True
                self.said += byte
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def rank(self, secret: str) -> int | None:
        """Return whose connection it is; None if it is nobody's who knows the secret."""
        try:
            told = json.loads(self.said)
            return int(told["rank"]) if told["secret"] == secret else None
        # a scanner of ports, or a rank that died on the way, which is found missing
        except (ValueError, TypeError, KeyError, RecursionError):
            return None


class _Door:
    """Where the other ranks reach rank 0. Strangers may reach it too: none keeps a rank waiting."""

    def __init__(self, servers: list[socket.socket], secret: str) -> None:
        self.secret = secret
        self.found: dict[int, socket.socket] = {}
        self.guests: list[_Guest] = []
        self.selector = selectors.DefaultSelector()
        for server in servers:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ)

    def look(self, seconds: float) -> None:
        """Wait so long for somebody to come or speak; show out who has said nothing for long."""
        for key, _ in self.selector.select(seconds):
            if isinstance(key.fileobj, socket.socket) and key.data is None:
                self._open(key.fileobj)
            elif key.data in self.guests and key.data.hear():
                self._part(key.data, key.data.rank(self.secret))
        for guest in [guest for guest in self.guests if guest.until < time.monotonic()]:
            self._part(guest)

    def close(self) -> None:
        """Show out all that are no ranks."""
        for guest in list(self.guests):
            self._part(guest)
        self.selector.close()

    def _open(self, server: socket.socket) -> None:
        # one that has gone again, or too many files: the others, and the next look, are served
        with suppress(OSError):
            connection, _ = server.accept()
            connection.setblocking(False)
            guest = _Guest(connection, time.monotonic() + GREETING_SECONDS)
            self.selector.register(connection, selectors.EVENT_READ, guest)
            self.guests.append(guest)
        if len(self.guests) > MOST_GUESTS:
            # ranks speak at once, so the oldest is none
            self._part(self.guests[0])

    def _part(self, guest: _Guest, rank: int | None = None) -> None:
        """Be done with a guest: keep its connection if it is a rank's."""
        self.guests.remove(guest)
        self.selector.unregister(guest.connection)
        if rank is None:
            guest.connection.close()
        else:
            self.found[rank] = guest.connection


def _listening(addresses: list[str], backlog: int) -> dict[str, socket.socket]:
    """Return a server at each address by which other ranks reach this machine, and at no other.

    Where one of them is not this machine's own (translated on the way), or a rank knows none: one
    server at all addresses, by the name ''.
    """
    servers: dict[str, socket.socket] = {}
    try:
        for address in set(addresses):
            if not address:
                raise OSError("a rank does not know its address")
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            servers[address] = socket.create_server((address, 0), family=family, backlog=backlog)
    except OSError as error:
        for server in servers.values():
            server.close()
        wanted = sorted(set(addresses))
        say(
            "rank 0 listens at all of its addresses until the others have come: "
            f"at {wanted}, by which they reach it, it can't ({error})"
        )
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        servers = {
            "": socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=dual)
        }
    return servers


def _accept(here: Position, store: dist.Store, limit: float) -> dict[int, socket.socket]:
    """Return the connections of all other ranks to rank 0; TrainingError beyond the limit."""
    secret = secrets.token_hex(16)
    deadline = time.monotonic() + limit
    servers = _listening(ranks.addresses_of_rank_0(here), here.world)
    ports = {address: server.getsockname()[1] for address, server in servers.items()}
    store.set("watchdog", json.dumps([ports, secret]))
    door = _Door(list(servers.values()), secret)
    try:
        while absent := sorted(set(range(1, here.world)) - set(door.found)):
            # whoever goes on knocking does not move it
            if time.monotonic() > deadline:
                raise _unconnected(door, absent, limit)
            door.look(LOOK_SECONDS)
    finally:
        door.close()
        for server in servers.values():
            server.close()
    return door.found


def _unconnected(door: _Door, absent: list[int], limit: float) -> TrainingError:
    """Tell those that have come who has not; return the error."""
    who = f"{ranks.names(absent)} came to the store and did not connect to rank 0"
    what = "look at the log there, or for a firewall between the nodes"
    told = f"{who} within {duration(limit)}; {what}"
    for connection in door.found.values():
        Link(connection, 0.0).send({"end": told})
        connection.close()
    return TrainingError(told)


def _reach_rank_0(here: Position, store: dist.Store, limit: float) -> socket.socket:
    """Return this rank's connection to rank 0; OSError if there is none within the limit."""
    ports, secret = json.loads(store.get("watchdog"))
    mine = ranks.addresses_of_rank_0(here)[here.rank - 1]
    port = ports.get(mine) or ports[""]
    connection = socket.create_connection((mine or meeting_point(here)[0], port), timeout=limit)
    greeting = json.dumps({"rank": here.rank, "secret": secret})
    connection.sendall(greeting.encode() + b"\n")
    return connection


def _connect(here: Position, limit: float) -> dict[int, Link]:
    """Return this rank's links; TrainingError if the ranks don't reach each other."""
    with _bounded(here, limit + JUDGEMENT_SECONDS):
        store = ranks.join(limit)
    # All were there a moment ago; before those inside find rank 0 silent, which waits at its door.
    short = SILENCE / 2 * limit
    try:
        with _bounded(here, limit):
            if here.rank == 0:
                connections = _accept(here, store, short)
            else:
                connections = {0: _reach_rank_0(here, store, short)}
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"no connection to rank 0 within {duration(short)} ({error}); look at its log, or for "
            "a firewall between the nodes"
        ) from error
    now = time.monotonic()
    for connection in connections.values():
        # A judgement must be on its way before the process ends.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {rank: Link(connection, now) for rank, connection in connections.items()}


@contextmanager
def watched(here: Position, minutes: float) -> Iterator[None]:
    """Watch this run inside the context. All ranks must enter; they meet at the store.

    Args:
        here: this rank.
        minutes: the limit.

    Raises:
        TrainingError: the ranks do not meet.
    """
    limit = 60 * minutes
    at("the start")
    dog = Watchdog(here, _connect(here, limit) if here.world > 1 else {}, limit)
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError):
            dog.await_judgement()
        dog.leave(str(error) or repr(error))
        raise
    dog.leave("")
