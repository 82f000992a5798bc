"""Train under faults for minutes on end: `python tests/soak.py --minutes 30` (make soak).

A mixture is trained once undisturbed. Then the same run, two ranks without a launcher as under
srun, is hit by one fault after the other and started again each time by the same command. The
faults come from a list of all kinds that a seed shuffles, and shuffles again when it is empty.
Whenever the run finishes, weights and losses are compared bit for bit with the undisturbed one, and
a new round begins, until the time is over and each kind was survived once.

As root under Linux each rank has a network of its own, which can be cut, and the run lies on a
small tmpfs, which can be full or read-only; elsewhere these faults are left out, and that is said.
Not covered: several machines (tests/slurm), GPUs, faults of the memory.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch import launched

TRAIN = Path(__file__).parents[1] / "nexus_ds" / "train.py"
DISK_BYTES = 200 << 20  # of the tmpfs: a few states of the demo's mixture, and its text
LIMIT = 0.5  # minutes, parallel.timeout_minutes: a machine with too few cores is slow, not stuck
# What is killed, stopped or told ends within the limit, and this on top: stacks, torch's teardown.
SLACK = 60.0
LOST = r"rank \d (was lost|is silent)|no progress: rank \d"


class SoakError(Exception):
    """A promise was broken."""


# Where it runs ------------------------------------------------------------------------------------


def _run(*words):
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, capture_output=True)


@contextmanager
def disk(folder):
    """Lay a small disk over a folder; yield whether that is allowed here."""
    folder.mkdir(parents=True)
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder))
    except (OSError, subprocess.CalledProcessError):
        yield False
        return
    try:
        yield True
    finally:
        _run("umount", "--lazy", str(folder))


class Network:
    """Two network namespaces and a cable between them; each rank lives in one."""

    def __init__(self):
        self.names = [f"soak{os.getpid()}-{rank}" for rank in range(2)]
        self.made = []

    def __enter__(self):
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
                self.made.append(name)
            one, two = self.names
            _run(*f"ip link add soak netns {one} type veth peer name soak netns {two}".split())
            for rank, name in enumerate(self.names):
                _run("ip", "-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "soak")
                _run("ip", "-n", name, "link", "set", "lo", "up")
                self.cable(rank, "up")
        except (OSError, subprocess.CalledProcessError):
            self.__exit__()
        return self

    def __exit__(self, *_):
        for name in self.made:
            with suppress(OSError, subprocess.CalledProcessError):
                _run("ip", "netns", "del", name)
        self.made = []

    def cable(self, rank, state):
        _run("ip", "-n", self.names[rank], "link", "set", "soak", state)

    def within(self, rank, command, environment):
        """Return command and environment as they are for a rank in its network."""
        if not self.made:
            return command, environment
        found = environment | {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "soak"}
        return ["nsenter", f"--net=/run/netns/{self.names[rank]}", *command], found


# One run ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training that is started again and again; each start has a log for each rank."""

    words: list[str]
    out: Path
    logs: Path
    network: Network
    ranks: list[subprocess.Popen] = field(default_factory=list)
    starts: int = 0

    @property
    def work(self):
        return Path(f"{self.out}.training")

    @property
    def states(self):
        return self.work / "states"

    def start(self):
        self.starts += 1
        self.ranks = []
        command = [sys.executable, str(TRAIN), *self.words, f"output={self.out}"]
        for rank, environment in enumerate(launched(2)):
            words, variables = self.network.within(rank, command, environment)
            with self._log(rank).open("wb") as log:
                self.ranks.append(
                    subprocess.Popen(
                        words,
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def _log(self, rank):
        return self.logs / f"{self.out.name}-{self.starts:03}-{rank}.log"

    def said(self):
        return "\n".join(self._log(rank).read_text(errors="replace") for rank in range(2))

    def alive(self):
        return [rank for rank in self.ranks if rank.poll() is None]

    def wait(self, seconds, happened=lambda: False):
        """Wait until something happens or a rank has ended; return whether it happened."""
        deadline = time.monotonic() + seconds
        while len(self.alive()) == 2 and time.monotonic() < deadline:
            if happened():
                return True
            time.sleep(0.005)
        return happened()

    def ended(self, seconds):
        """Return the exit codes of all ranks; SoakError if one is still there after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.alive():
            self.kill()
            raise SoakError(f"a rank was still there after {seconds:.0f}s:\n{self.said()[-3000:]}")
        return [rank.returncode for rank in self.ranks]

    def kill(self):
        for rank in self.alive():
            rank.kill()
            rank.wait()

    def steps(self):
        """Return (step, loss) of each line of the log that is whole, in order."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.work / "metrics.jsonl").read_text(errors="replace").splitlines():
                with suppress(ValueError, KeyError):
                    value = json.loads(line)
                    if value["kind"] == "train":
                        found.append((value["step"], value["loss"]))
        return found

    def saved(self):
        """Return the folders of all states, oldest first."""
        return sorted(self.states.glob("step_*"), key=lambda path: int(path.name[5:]))

    def weights(self):
        """Return the sha256 of each file of weights of the finished checkpoint."""
        return {
            str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.out.rglob("*.safetensors"))
        }


# Faults -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what it has to say.

    `hit(soak)` strikes while it trains; `at_rest(soak)` strikes what it left, after a kill of all
    ranks. `dying` and `resuming` are patterns of what is said at the end and by the next start.
    """

    hit: object = None
    at_rest: object = None
    dying: str = ""
    resuming: str = ""


def _kill_one(soak):
    soak.random.choice(soak.run.ranks).kill()


def _kill_in_save(soak):
    soak.run.wait(60, lambda: any(soak.run.states.glob("partial_*")))
    _kill_one(soak)


def _kill_all(soak):
    for rank in soak.run.ranks:
        rank.kill()


def _signal(number):
    return lambda soak: soak.random.choice(soak.run.ranks).send_signal(number)


def _fill(soak):
    """Take all room of the disk, but for what is written in the next moments."""
    ballast = soak.run.work.parent / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    soak.undo.append(ballast.unlink)


def _read_only(soak):
    folder = str(soak.run.work.parent)
    # A writer that has a file open keeps a disk from becoming so; bound to itself, it may.
    _run("mount", "--bind", folder, folder)
    _run("mount", "-o", "remount,ro,bind", folder)
    soak.undo.append(lambda: _run("umount", "--lazy", folder))


def _cut(soak):
    soak.network.cable(1, "down")
    soak.undo.append(lambda: soak.network.cable(1, "up"))


def _newest_file(soak):
    """Return a file of the newest state; states that were damaged before are not taken again."""
    folder = soak.run.saved()[-1]
    soak.damaged.add(folder.name)
    return soak.random.choice(sorted(folder.iterdir()))


def _truncate(soak):
    path = _newest_file(soak)
    os.truncate(path, soak.random.randrange(path.stat().st_size))


def _flip_in(path, choice):
    content = bytearray(path.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    path.write_bytes(content)


def _flip(soak):
    _flip_in(_newest_file(soak), soak.random)


def _delete(soak):
    _newest_file(soak).unlink()


def _tokens(soak):
    _flip_in(soak.random.choice(sorted(soak.tokens.glob("*-train-*.bin"))), soak.random)


def _latest(soak):
    (soak.run.states / "latest").write_text("")


DAMAGED = r"is damaged \(.*\) - using step \d+"
FAULTS = {
    "kill -9 of a rank": Fault(_kill_one, dying=LOST),
    "kill -9 of a rank amid a save": Fault(_kill_in_save, dying=LOST),
    "kill -9 of all ranks": Fault(_kill_all),
    "SIGSTOP of a rank": Fault(_signal(signal.SIGSTOP), dying=LOST),
    "SIGUSR1 to a rank": Fault(_signal(signal.SIGUSR1), dying="stopped by signal 10"),
    "SIGTERM to a rank": Fault(_signal(signal.SIGTERM), dying="stopped by signal 15"),
    "truncated file of the newest state": Fault(at_rest=_truncate, resuming=DAMAGED),
    "flipped bit in the newest state": Fault(at_rest=_flip, resuming=DAMAGED),
    "deleted file of the newest state": Fault(at_rest=_delete, resuming=DAMAGED),
    "emptied `latest`": Fault(at_rest=_latest),
    "flipped bit in the token cache": Fault(at_rest=_tokens, resuming="damaged and is made again"),
}
# What is foreseen names the folder, and what is met the file; of the board's files, which a library
# writes, nobody knows the need.
FULL = (
    r"/\S+: not enough space .*need [\d,]+ bytes, free [\d,]+"
    r"|No space left on device: (need [\d,]+ bytes more, )?free [\d,]+: '/"
)
ON_DISK = {
    "full disk": Fault(_fill, dying=FULL),
    "read-only disk": Fault(_read_only, dying="Read-only file system"),
}
ON_NETWORK = {"network of a rank cut": Fault(_cut, dying=LOST)}
STATES = ("truncated", "flipped bit in the newest", "deleted", "emptied")


# The soak -----------------------------------------------------------------------------------------


class Soak:
    """Runs words of train.py under faults.

    Args:
        words: for train.py, without output and data.cache.
        folder: new; states, weights and text lie on a small disk in it, logs beside that.
        seed: of faults, victims and times.
        pause: least and most seconds between two faults.
        say: gets a line on each event.
    """

    def __init__(self, words, folder, seed, pause, say=print):
        self.words, self.folder, self.seed, self.pause, self.say = words, folder, seed, pause, say
        self.drive, self.tokens = folder / "disk", folder / "disk" / "tokens"
        self.random = random.Random(seed)
        self.faults, self.left_out, self.queue = dict(FAULTS), [], []
        self.undo, self.damaged, self.expected = [], set(), ""
        self.survived, self.slowest = Counter(), {}
        self.rounds = self.repeated = 0
        self.network, self.run, self.losses = Network(), None, {}

    def soak(self, minutes):
        """Train undisturbed, then under faults for `minutes`; return what was survived.

        Raises:
            SoakError: it did not end as promised, or with other weights or losses.
        """
        with ExitStack() as stack:
            for more, allowed in (
                (ON_DISK, stack.enter_context(disk(self.drive))),
                (ON_NETWORK, bool(stack.enter_context(network := Network()).made)),
            ):
                self.faults |= more if allowed else {}
                self.left_out += [] if allowed else list(more)
            self.network = network
            self.queue = [name for name in self.queue if name in self.faults]
            stack.callback(lambda: self.run and self.run.kill())
            (self.folder / "logs").mkdir()
            started = time.monotonic()
            straight = self._undisturbed()
            self.say(f"undisturbed: {time.monotonic() - started:.0f}s, {len(self.losses)} steps")
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until or self.waiting() or not self.rounds:
                self._round(until, straight)
        return self.summary(minutes)

    def waiting(self):
        """Return the kinds of faults that were not survived yet, sorted."""
        return sorted(set(self.faults) - set(self.survived))

    def _new_run(self, name):
        words = [*self.words, f"data.cache={self.tokens}", f"parallel.timeout_minutes={LIMIT}"]
        return Run(words, self.drive / name, self.folder / "logs", self.network)

    def _undisturbed(self):
        self.run = self._new_run("straight")
        self.run.start()
        if self.run.ended(3600) != [0, 0]:
            raise SoakError(f"the undisturbed run failed:\n{self.run.said()[-3000:]}")
        self.losses = dict(self.run.steps())
        return self.run.weights()

    def _round(self, until, straight):
        self.run = self._new_run(f"round{self.rounds}")
        self.damaged = set()
        while not self._strike(until):
            pass
        if (found := self.run.weights()) != straight:
            raise SoakError(f"other weights: {found}, expected {straight}")
        if not self.run.out.exists() or any(self.run.states.glob("partial*")):
            raise SoakError(f"something is left: {sorted(self.drive.rglob('*'))}")
        if left := list(self.drive.glob(".*.tmp-*")):
            raise SoakError(f"something is left: {left}")
        self._compare_losses()
        self.rounds += 1
        self.say(f"round {self.rounds}: bit-equal after {self.run.starts} starts")
        shutil.rmtree(self.run.out)
        shutil.rmtree(self.run.work)

    def _compare_losses(self):
        """Each step's loss, of every time that it was done, is that of the undisturbed run."""
        steps = self.run.steps()
        wrong = [(step, loss) for step, loss in steps if self.losses.get(step) != loss]
        if wrong or {step for step, _ in steps} != set(self.losses):
            raise SoakError(f"{len(wrong)} losses of another course, the first: {wrong[:1]}")
        self.repeated += len(steps) - len(self.losses)

    def _strike(self, until):
        """Start the run and hit it; return whether it finished instead."""
        started = time.monotonic()
        done = len(self.run.steps())
        self.run.start()
        trains = self.run.wait(600, lambda: len(self.run.steps()) > done)
        if trains:
            self._resumed()
            self.say(f"  trains after {time.monotonic() - started:.0f}s")
            left = self.random.uniform(*self.pause) - (time.monotonic() - started)
            seconds = max(left, self.random.uniform(0, self.pause[0] / 2))
            if time.monotonic() + seconds > until and not self.waiting():
                seconds = 3600
            self.run.wait(seconds)
        if len(self.run.alive()) < 2:
            codes = self.run.ended(SLACK)
            if codes == [0, 0]:
                return True
            raise SoakError(f"ended with {codes} by itself:\n{self.run.said()[-3000:]}")
        self._hit(*self._next())
        return False

    def _resumed(self):
        expected, self.expected = self.expected, ""
        if not re.search(expected, self.run.said()):
            raise SoakError(f"the next start did not say {expected!r}:\n{self.run.said()[-3000:]}")

    def _next(self):
        """Return the next fault of the shuffled list; states are damaged while others are whole."""
        if not self.queue:
            # Of the second list on: first what a run did not feel, as it finished before.
            kinds = self.waiting() or sorted(self.faults)
            self.queue = self.random.sample(kinds, len(kinds))
        name = self.queue.pop()
        whole = [folder for folder in self.run.saved() if folder.name not in self.damaged]
        newest = self.run.saved()[-1:]
        if name.startswith(STATES) and (len(whole) < 2 or newest != whole[-1:]):
            self.queue.insert(0, name)
            name = "kill -9 of a rank"
        return name, self.faults[name]

    def _hit(self, name, fault):
        step = (self.run.steps() or [(0, 0)])[-1][0]
        since = time.monotonic()
        (fault.hit or _kill_all)(self)
        codes = self._wait_for_end(name)
        seconds = time.monotonic() - since
        said = self.run.said()
        for back in reversed(self.undo):
            back()
        self.undo = []
        if codes == [0, 0]:
            self.say(f"  {name} at step {step}: finished before it was felt")
            return
        if 0 in codes or not re.search(fault.dying, said):
            expected = f"{fault.dying!r} to be said and no rank to end with 0"
            raise SoakError(f"{name}: {codes}, expected {expected}:\n{said[-3000:]}")
        if fault.at_rest:
            fault.at_rest(self)
        self.expected = fault.resuming
        self.survived[name] += 1
        self.slowest[name] = max(seconds, self.slowest.get(name, 0.0))
        self.say(f"  {name} at step {step}: ended after {seconds:.1f}s with {codes}")

    def _wait_for_end(self, name):
        if name.startswith("SIGSTOP"):
            # Who stands still is ended by its launcher, once the others have ended.
            self.run.wait(60 * LIMIT + SLACK)
            if len(self.run.alive()) == 2:
                raise SoakError(f"nobody noticed the rank that stands still: {self.run.said()}")
            self.run.kill()
        return self.run.ended(60 * LIMIT + SLACK)

    def summary(self, minutes):
        """Return what was survived as lines."""
        total, steps = sum(self.survived.values()), len(self.losses)
        lines = [
            f"{total} faults in {minutes:g} minutes (seed {self.seed}); runs of {steps} steps "
            f"finished: {self.rounds},",
            "each with the bits of the undisturbed one; steps done again, each with the same loss: "
            f"{self.repeated}",
        ]
        lines += [
            f"  {count:3} x {name}: ended after {self.slowest[name]:.1f}s at most"
            for name, count in sorted(self.survived.items())
        ]
        lines += [f"  left out, not allowed here: {name}" for name in self.left_out]
        return "\n".join(lines)


# What is trained ---------------------------------------------------------------------------------


def tiny(nexus, text):
    """Return the words that train a test's checkpoint on its text; states are saved often."""
    return [
        *("--config", "demo"),
        f"model.path={nexus}",
        f"model.tokenizer={nexus}",
        f"data.path={text}",
        "data.domains=[alpha,beta,gamma]",
        "data.validation_domains=[alpha,gamma]",
        "data.sequence_length=16",
        "parallel.expert=2",
        "pipeline.run=unused",
        "training.tokens=0",
        "training.steps=200",
        "training.lr=1e-2",
        "training.batch_size=4",
        "training.log_every=1",
        "training.save_every=4",
        "training.keep_last=3",
        "training.eval_every=0",
        "training.eval_windows=4",
    ]


def demo_mixture(folder):
    """Make the mixture of tests/soak.yaml, if it is not there; return the words that train it."""
    words = ["--config", str(Path(__file__).with_name("soak.yaml")), f"pipeline.run={folder}"]
    if not (folder / "upcycled").exists():
        # Its stages train on one rank.
        command = [sys.executable, "-m", "nexus_ds", "stage", "upcycle", *words]
        subprocess.run([*command, "parallel.expert=1"], check=True, stdin=subprocess.DEVNULL)
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="of a run")
    parser.add_argument("--pause", type=float, nargs=2, default=(20, 60), help="seconds")
    parser.add_argument("--first", nargs="*", default=[], help="begins of faults that come first")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="new")
    parser.add_argument("--mixture", type=Path, default=Path("runs/soak-mixture"))
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"soak: {args.folder} is there, of a soak that failed; look at it and remove it")
    words = [*demo_mixture(args.mixture.absolute()), f"training.steps={args.steps}"]
    say = functools.partial(print, flush=True)
    soak = Soak(words, args.folder.absolute(), args.seed, args.pause, say)
    known = [*FAULTS, *ON_DISK, *ON_NETWORK]
    # The queue is taken from its end.
    for begin in reversed(args.first):
        soak.queue += [name for name in known if name.startswith(begin)]
    try:
        print(soak.soak(args.minutes))
    except SoakError as error:
        sys.exit(f"soak (seed {args.seed}): {error}")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
