"""Step times on slow links, measured, beside what `plan` expects of them.

Expert parallelism with and without overlap, and ZeRO alone, train the same model in turns.
Ranks are processes on this machine, each on its own limited link (see network.py); the model is
small and random.
Not covered: several ranks a node, GPUs; what `plan` expects knows no delay. More ranks than cores
wait for each other.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.benchmarks.network import run_ranks
from nexus_ds.planning import assumptions, traffic
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.sizes import Sizes
from nexus_ds.planning.units import bits, parse_bytes
from nexus_ds.report.page import Table, text_table

TIMEOUT = 1800.0  # seconds for all ranks
EMBEDDING = 384  # width of a domain embedding
TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s)")
TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
HEAD_SIZE = 64
WIDTH = 4  # bytes of an element: the ranks compute in fp32


@dataclass(frozen=True, kw_only=True)
class LinkRun:
    """What is measured: speeds of a rank's link, and the model's and batch's sizes."""

    speeds: tuple[float, ...]
    """Bytes a second, the fastest first."""
    ranks: int = 2
    stage: int = 3
    hidden: int = 256
    ffn: int = 512
    layers: int = 2
    experts: int = 4
    vocabulary: int = 1000
    length: int = 256
    batch: int = 8
    """Sequences a rank and step."""
    steps: int = 5
    delay: float = 0.0
    """Seconds from rank to rank, one way."""

    def sizes(self) -> Sizes:
        """Return the sizes by which `plan` counts."""
        heads = self.hidden // HEAD_SIZE
        return Sizes(
            vocabulary=self.vocabulary,
            hidden=self.hidden,
            layers=self.layers,
            heads=heads,
            kv_heads=heads,
            head_size=HEAD_SIZE,
            ffn=self.ffn,
            tied=True,
            experts=self.experts,
            projection=(EMBEDDING * 2 * self.hidden, self.hidden**2),
        )

    def layout(self, expert: int) -> Layout:
        """Return the layout with an expert-parallel size."""
        return Layout(
            stage=self.stage,
            offload="none",
            expert=expert,
            world=self.ranks,
            micro=self.batch,
            accumulation=1,
            checkpointing="none",
        )


@dataclass(frozen=True)
class Way:
    """A way of training."""

    name: str
    expert: int
    """Expert-parallel size."""
    overlap: bool
    """Whether all-to-alls travel while the shared expert computes."""


def ways(ranks: int) -> list[Way]:
    """Return the ways that are compared."""
    return [Way("overlapped", ranks, True), Way("plain", ranks, False), Way("zero_only", 1, False)]


@dataclass(frozen=True)
class StepTime:
    """What one step of rank 0 took."""

    way: str
    speed: float
    """Of the link, bytes a second."""
    collectives: int
    """That a step of this way has; counted once."""
    seconds: float
    """Until all ranks were through."""
    waits: float
    """Seconds of waiting for tokens."""
    bytes: int
    """Sent."""


@dataclass(frozen=True)
class Medians:
    """A way's steps at one speed; units as of StepTime."""

    seconds: float
    waits: float
    bytes: float
    collectives: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All ways at one speed of the link, measured and expected."""

    speed: float
    ways: dict[str, Medians]
    overlap: list[float]
    """Seconds of overlapped over plain: smallest, median and largest ratio of the rounds."""
    ratio: list[float]
    """Seconds of ZeRO alone over overlapped, likewise."""
    expected_bytes: dict[str, float]
    """Sent by a rank in a step, by way."""
    expected_ratio: float

    def to_json(self) -> dict[str, object]:
        """Return plain values by name."""
        return asdict(self)


def measure(links: LinkRun, which: list[Way] | None = None) -> list[StepTime]:
    """Return every step of rank 0, of the named ways or of all.

    Raises:
        LayoutError: limited links can't be made here, or a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        out = Path(folder) / "found.json"
        every = [asdict(way) for way in which or ways(links.ranks)]
        told = {"links": asdict(links), "ways": every, "out": str(out)}
        settings.write_text(json.dumps(told), encoding="utf-8")
        # by name: the ranks are processes of their own
        worker = "nexus_ds.experiments.benchmarks.slow_links_worker"
        run_ranks(worker, [str(settings)], links.ranks, TIMEOUT, links.delay)
        found = json.loads(out.read_text(encoding="utf-8"))
    return [StepTime(**step) for step in found]


def expected(links: LinkRun, speed: float, expert: int, tflops: float) -> traffic.Step:
    """Return what `plan` expects of a step, every rank a node of its own."""
    machine = Machine(
        gpus=links.ranks,
        nodes=links.ranks,
        gpu_memory=1.0,
        link=speed,
        tflops=tflops,
    )
    return traffic.step(links.sizes(), links.layout(expert), machine, WIDTH, links.length)


def peak(links: LinkRun, seconds: float) -> float:
    """Return the TFLOPS of a rank with which `plan` says `seconds` of computing for ZeRO alone."""
    flops, _ = traffic.token_flops(links.sizes(), links.length)
    return links.batch * links.length * flops / (seconds * assumptions.MFU) / 1e12


def _steps(found: list[StepTime], speed: float, way: str) -> list[StepTime]:
    """Return a way's steps at a speed, round by round."""
    return [step for step in found if step.way == way and step.speed == speed]


def _medians(steps: list[StepTime]) -> Medians:
    return Medians(
        seconds=statistics.median(step.seconds for step in steps),
        waits=statistics.median(step.waits for step in steps),
        bytes=statistics.median(step.bytes for step in steps),
        collectives=statistics.median(step.collectives for step in steps),
    )


def _paired(steps: list[StepTime], others: list[StepTime]) -> list[float]:
    """Return smallest, median and largest ratio of a way's seconds to another's in one round."""
    pairs = zip(steps, others, strict=True)
    ratios = sorted(step.seconds / other.seconds for step, other in pairs)
    return [ratios[0], statistics.median(ratios), ratios[-1]]


def compare(links: LinkRun, found: list[StepTime]) -> list[Comparison]:
    """Return, for each speed, what every way took and what `plan` expected.

    The plan's arithmetic is calibrated with one number, the step of ZeRO alone on the fastest link.
    """
    calibration = _steps(found, links.speeds[0], "zero_only")
    tflops = peak(links, _medians(calibration).seconds)
    rows = []
    for speed in links.speeds:
        steps = {way.name: _steps(found, speed, way.name) for way in ways(links.ranks)}
        # the plan knows no way without overlap
        overlapped = expected(links, speed, links.ranks, tflops)
        alone = expected(links, speed, 1, tflops)
        row = Comparison(
            speed=speed,
            ways={name: _medians(mine) for name, mine in steps.items()},
            overlap=_paired(steps["overlapped"], steps["plain"]),
            ratio=_paired(steps["zero_only"], steps["overlapped"]),
            expected_bytes={
                "overlapped": overlapped.node_link_bytes,
                "zero_only": alone.node_link_bytes,
            },
            expected_ratio=alone.step_seconds / overlapped.step_seconds,
        )
        rows.append(row)
    return rows


def _spread(ratios: list[float]) -> str:
    low, middle, high = ratios
    return f"{middle:.2f} [{low:.2f} {high:.2f}]"


HEADER = (
    "link",
    "way",
    "s/step",
    "waits for tokens s",
    "MB sent",
    "collectives",
    "overlapped / plain",
    "ZeRO alone / overlapped",
    "plan expects",
)


def describe(links: LinkRun, rows: list[Comparison]) -> str:
    """Return the comparison as a table."""
    cells = []
    delay = f", {1000 * links.delay:g} ms" if links.delay else ""
    for row in rows:
        # each ratio stands beside the way that it is about
        ratios = {
            "overlapped": [_spread(row.overlap), "", ""],
            "plain": ["", "", ""],
            "zero_only": ["", _spread(row.ratio), f"{row.expected_ratio:.2f}"],
        }
        for way in ways(links.ranks):
            found = row.ways[way.name]
            line = [
                bits(row.speed) + delay,
                way.name,
                f"{found.seconds:.3f}",
                f"{found.waits:.3f}",
                f"{found.bytes / 1e6:.1f}",
                f"{found.collectives:.0f}",
                *ratios[way.name],
            ]
            cells.append(line)
    return text_table(Table(header=HEADER, rows=cells))


def parse_delay(text: str) -> float:
    """Return seconds: 100us is 1e-4, 1ms is 1e-3, 0 is 0.

    Raises:
        ConfigError: anything else, a number without unit included.
    """
    if text.strip() == "0":
        return 0.0
    match = TIME.fullmatch(text.strip())
    if not match:
        raise ConfigError(
            "--delay: expected 0 or a time with its unit such as 100us, 1ms or 0.5s, "
            f"found {text!r}"
        )
    return float(match[1]) * TIME_UNITS[match[2]]


def link_run(args: argparse.Namespace) -> LinkRun:
    """Return what the options ask for.

    Raises:
        ConfigError: a speed or delay that can't be read, or numbers that make no comparison.
    """
    speeds = [parse_bytes(rate, "--rates") for rate in args.rates.split(",")]
    if args.ranks not in (2, 4):
        raise ConfigError(f"--ranks: expected 2 or 4 (the model has 4 experts), found {args.ranks}")
    if args.stage not in (1, 2, 3):
        raise ConfigError(f"--stage: expected 1, 2 or 3, found {args.stage}")
    for name in ("batch", "ffn", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: expected a number above 0, found {getattr(args, name)}")
    return LinkRun(
        speeds=tuple(sorted(speeds, reverse=True)),
        ranks=args.ranks,
        stage=args.stage,
        batch=args.batch,
        ffn=args.ffn,
        steps=args.steps,
        delay=parse_delay(args.delay),
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    links = link_run(args)
    rows = compare(links, measure(links))
    if args.json:
        told = {"settings": asdict(links), "links": [row.to_json() for row in rows]}
        print_text(json.dumps(told, indent=2))
    else:
        print_text(describe(links, rows))
    return 0
