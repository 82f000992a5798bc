"""Step times on slow links: expert parallelism with and without overlap, and ZeRO alone, beside
what `plan` expects.

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
from typing import Any

from nexus_ds.errors import ConfigError
from nexus_ds.planning import assumptions, traffic
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.sizes import Sizes
from nexus_ds.planning.units import bits, parse_bytes

TIMEOUT = 1800.0  # seconds for all ranks
EMBEDDING = 384  # width of a domain embedding
TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s)")
TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
FIGURES = ("seconds", "waits", "bytes", "collectives")


@dataclass(frozen=True, kw_only=True)
class Links:
    """What is measured: speeds of a rank's link in bytes a second, the fastest first, and the
    model's and batch's sizes."""

    speeds: tuple[float, ...]
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
        heads = self.hidden // 64
        return Sizes(
            vocabulary=self.vocabulary,
            hidden=self.hidden,
            layers=self.layers,
            heads=heads,
            kv_heads=heads,
            head_size=64,
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
    """A way of training: expert-parallel size, and whether all-to-alls travel while the shared
    expert computes."""

    name: str
    expert: int
    overlap: bool


def ways(ranks: int) -> list[Way]:
    """Return the ways that are compared."""
    return [Way("overlapped", ranks, True), Way("plain", ranks, False), Way("zero_only", 1, False)]


def measure(links: Links, which: list[Way] | None = None) -> list[dict[str, Any]]:
    """Return `way`, `speed`, `seconds`, `waits` (seconds of waiting for tokens), `bytes` (sent) of
    every step of rank 0.

    `collectives` is how many of them a step has; it is counted once for each way.

    Raises:
        LayoutError: limited links can't be made here, or a rank failed.
    """
    from nexus_ds.experiments.benchmarks.network import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        settings, out = Path(folder) / "settings.json", Path(folder) / "found.json"
        every = [asdict(way) for way in which or ways(links.ranks)]
        settings.write_text(
            json.dumps({"links": asdict(links), "ways": every, "out": str(out)}), encoding="utf-8"
        )
        run_ranks(
            "nexus_ds.experiments.benchmarks.slow_links_worker",
            [str(settings)],
            links.ranks,
            TIMEOUT,
            links.delay,
        )
        return json.loads(out.read_text(encoding="utf-8"))


def expected(links: Links, speed: float, expert: int, tflops: float) -> traffic.Step:
    """Return what `plan` expects of a step, every rank a node of its own."""
    machine = Machine(
        gpus=links.ranks, nodes=links.ranks, gpu_memory=1.0, link=speed, tflops=tflops
    )
    return traffic.step(links.sizes(), links.layout(expert), machine, 4, links.length)


def peak(links: Links, seconds: float) -> float:
    """Return the TFLOPS of a rank with which a step of ZeRO alone computes for `seconds`, as `plan`
    counts."""
    flops, _ = traffic.token_flops(links.sizes(), links.length)
    return links.batch * links.length * flops / (seconds * assumptions.MFU) / 1e12


def _medians(found: list[dict[str, Any]], speed: float) -> dict[str, dict[str, float]]:
    """Return way: {seconds, waits, bytes, collectives} at a speed."""
    names = {f["way"] for f in found}
    return {
        name: {
            key: statistics.median(f[key] for f in found if (f["way"], f["speed"]) == (name, speed))
            for key in FIGURES
        }
        for name in names
    }


def _paired(found: list[dict[str, Any]], speed: float, way: str, other: str) -> list[float]:
    """Return smallest, median and largest ratio of a way's seconds to another's in the same
    round."""
    times = {
        name: [f["seconds"] for f in found if (f["way"], f["speed"]) == (name, speed)]
        for name in (way, other)
    }
    ratios = sorted(a / b for a, b in zip(times[way], times[other], strict=True))
    return [ratios[0], statistics.median(ratios), ratios[-1]]


def compare(links: Links, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each speed, what every way took (medians), and the measured and expected ratios.

    `overlap` is overlapped over plain expert parallelism, `ratio` ZeRO alone over overlapped:
    smallest, median and largest of the rounds. The plan's arithmetic is calibrated with one number,
    the step of ZeRO alone on the fastest link.
    """
    tflops = peak(links, _medians(found, links.speeds[0])["zero_only"]["seconds"])
    rows = []
    for speed in links.speeds:
        plan = {
            way.name: expected(links, speed, way.expert, tflops)
            for way in ways(links.ranks)
            if way.name != "plain"
        }
        rows.append(
            {
                "speed": speed,
                "ways": _medians(found, speed),
                "overlap": _paired(found, speed, "overlapped", "plain"),
                "ratio": _paired(found, speed, "zero_only", "overlapped"),
                "expected_bytes": {name: step.node_link_bytes for name, step in plan.items()},
                "expected_ratio": plan["zero_only"].step_seconds / plan["overlapped"].step_seconds,
            }
        )
    return rows


def describe(links: Links, rows: list[dict[str, Any]]) -> str:
    """Return the comparison as a table."""
    from nexus_ds.report.page import Table, text_table

    header = [
        "link",
        "way",
        "s/step",
        "waits for tokens s",
        "MB sent",
        "collectives",
        "overlapped / plain",
        "ZeRO alone / overlapped",
        "plan expects",
    ]
    cells, delay = [], f", {1000 * links.delay:g} ms" if links.delay else ""
    for row in rows:
        low, middle, high = row["overlap"]
        for way in ways(links.ranks):
            found = row["ways"][way.name]
            cells.append(
                [
                    bits(row["speed"]) + delay,
                    way.name,
                    f"{found['seconds']:.3f}",
                    f"{found['waits']:.3f}",
                    f"{found['bytes'] / 1e6:.1f}",
                    f"{found['collectives']:.0f}",
                    f"{middle:.2f} [{low:.2f} {high:.2f}]" if way.name == "overlapped" else "",
                    "{1:.2f} [{0:.2f} {2:.2f}]".format(*row["ratio"])
                    if way.name == "zero_only"
                    else "",
                    f"{row['expected_ratio']:.2f}" if way.name == "zero_only" else "",
                ]
            )
    return text_table(Table(header=header, rows=cells))


def parse_delay(text: str) -> float:
    """Return seconds: 100us is 1e-4, 1ms is 1e-3, 0 is 0.

    Raises:
        ConfigError: anything else, a number without unit included.
    """
    match = TIME.fullmatch(text.strip())
    if not match and text.strip() != "0":
        raise ConfigError(
            f"--delay: expected 0 or a time with its unit such as 100us, 1ms or 0.5s, found {text!r}"
        )
    return float(match[1]) * TIME_UNITS[match[2]] if match else 0.0


def links_of(args: argparse.Namespace) -> Links:
    """Return what the options ask for.

    Raises:
        ConfigError: a speed or delay that can't be read, or numbers that make no comparison.
    """
    speeds = tuple(
        sorted((parse_bytes(rate, "--rates") for rate in args.rates.split(",")), reverse=True)
    )
    if args.ranks not in (2, 4):
        raise ConfigError(f"--ranks: expected 2 or 4 (the model has 4 experts), found {args.ranks}")
    if args.stage not in (1, 2, 3):
        raise ConfigError(f"--stage: expected 1, 2 or 3, found {args.stage}")
    for name in ("batch", "ffn", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: expected a number above 0, found {getattr(args, name)}")
    return Links(
        speeds=speeds,
        ranks=args.ranks,
        stage=args.stage,
        batch=args.batch,
        ffn=args.ffn,
        steps=args.steps,
        delay=parse_delay(args.delay),
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    links = links_of(args)
    rows = compare(links, measure(links))
    print(
        json.dumps({"settings": asdict(links), "links": rows}, indent=2)
        if args.json
        else describe(links, rows)
    )
    return 0
