"""How step time and memory grow with experts, top-k, layers and sequence; the router's own cost.

One quantity is changed at a time; time ~ x^a is fitted by least squares on logarithms.
Not covered: several processes; memory on systems without /proc (0 there).
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from nexus_ds.experiments.benchmarks.layer_speed import (
    BUSY_SECONDS,
    Batches,
    synchronize,
    timed,
    train_step,
)
from nexus_ds.experiments.benchmarks.models import LOAD_BALANCE, Shape, build
from nexus_ds.model.router import Projection
from nexus_ds.runtime.deepspeed_internals import release_memory
from nexus_ds.runtime.nexus_moe import NexusRouter, Placement

SWEEPS: dict[str, tuple[int, ...]] = {
    "experts": (2, 4, 8, 16, 32, 64),
    "top_k": (1, 2, 4),
    "layers": (1, 2, 4, 8),
    "length": (64, 128, 256, 512, 1024),
}
ROUTER_SWEEPS: dict[str, tuple[int, ...]] = {
    "experts": (2, 4, 8, 16, 32, 64),
    "tokens": (1024, 2048, 4096, 8192, 16384),
}
ROUTER_TOKENS = 4096
"""Tokens while experts grow."""
CHOICE = 8
"""Experts, at least, while top-k grows, so that there is a choice."""
PEAK_RESET = Path("/proc/self/clear_refs")
"""Takes a 5, and the peak of this process's memory (VmHWM) starts again from here; see proc(5)."""


@dataclass(frozen=True)
class Point:
    """What a step took at one value of a quantity that is changed."""

    quantity: str
    x: int
    seconds: float
    peak_bytes: float
    """Above what was held before; 0: not measured."""

    def to_json(self) -> dict[str, object]:
        """Return plain values by name."""
        return asdict(self)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return a of the best y = c x^a."""
    log_x = [math.log(x) for x in xs]
    log_y = [math.log(y) for y in ys]
    return statistics.linear_regression(log_x, log_y).slope


def router_law(rows: list[Point]) -> dict[str, float]:
    """Return what a router of one layer costs for each token and for each expert.

    Tokens: `token_seconds_few` at the fewest, `token_seconds_many` at the most. Experts:
    `expert_seconds` and `fixed_seconds` are the best t = fixed + expert * E at ROUTER_TOKENS
    tokens, `correlation` how well a straight line fits.
    """
    by_tokens = [row for row in rows if row.quantity == "router tokens"]
    few = min(by_tokens, key=lambda row: row.x)
    many = max(by_tokens, key=lambda row: row.x)
    by_experts = [row for row in rows if row.quantity == "router experts"]
    xs = [float(row.x) for row in by_experts]
    ys = [row.seconds for row in by_experts]
    fitted = statistics.linear_regression(xs, ys)
    return {
        "few_tokens": few.x,
        "token_seconds_few": few.seconds / few.x,
        "many_tokens": many.x,
        "token_seconds_many": many.seconds / many.x,
        "fixed_seconds": fitted.intercept,
        "expert_seconds": fitted.slope,
        "correlation": statistics.correlation(xs, ys),
    }


class Memory:
    """Most memory that was held inside the context, above what was held at its beginning.

    Of the GPU, or of this process; 0 where the system does not tell (it needs /proc).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def _status(self, key: str) -> int:
        """Return bytes; /proc counts in KiB."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        for line in status.splitlines():
            if line.startswith(f"{key}:"):
                _, kibibytes, _ = line.split()
                return int(kibibytes) * 1024
        raise OSError(f"/proc/self/status has no line {key}")

    def __enter__(self) -> Memory:
        # models of earlier measurements refer to themselves, and would be freed while this runs
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif PEAK_RESET.exists():
            # what the allocator keeps would be taken for free, and hide what the step needs
            release_memory()
            PEAK_RESET.write_text("5")
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif PEAK_RESET.exists():
            peak = self._status("VmHWM")
        else:
            return
        self.bytes = peak - self.before


def repeated(action: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of an action, each round as long as BUSY_SECONDS or once."""
    # warms up
    timed(action, device)
    # a clock may see nothing of a short action
    once = max(timed(action, device), 1e-6)
    count = max(1, round(BUSY_SECONDS / once))

    def turn() -> None:
        for _ in range(count):
            action()

    seconds = [timed(turn, device) for _ in range(rounds)]
    # the median: another job on the machine slows single rounds
    return statistics.median(seconds) / count


def _measured(
    shape: Shape,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> tuple[float, float]:
    """Return the seconds of a step and its peak memory in bytes."""
    with Memory(device) as memory, Batches(shape, device) as batches:
        model = build(variant, shape, device, dtype)
        tokens_BS = batches.read()
        action = partial(train_step, model, tokens_BS)
        seconds = repeated(action, device, rounds)
    return seconds, float(memory.bytes)


def sweep(
    base: Shape,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    say: Callable[[str], None],
) -> list[Point]:
    """Return step seconds and peak memory over all SWEEPS.

    `top_k` is changed among CHOICE experts or more.
    """
    # what is loaded or made at the first step is no growth
    _measured(base, variant, device, dtype, 1)
    rows = []
    for quantity, values in SWEEPS.items():
        start = base
        if quantity == "top_k":
            experts = max(base.experts, CHOICE)
            start = replace(base, experts=experts)
        for x in values:
            say(f"{quantity} {x}")
            shape = replace(start, **{quantity: x})
            seconds, peak_bytes = _measured(shape, variant, device, dtype, rounds)
            rows.append(Point(quantity, x, seconds, peak_bytes))
    return rows


def router_seconds(
    shape: Shape,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> float:
    """Return seconds of one layer's router (P, scores, losses), forward and backward."""
    torch.manual_seed(0)
    router = _router(shape, device, dtype)
    x_TH = torch.randn(tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)

    def action() -> None:
        router.zero_grad(set_to_none=True)
        x_TH.grad = None
        scores, *_ = router(x_TH)
        scores.sum().backward()

    synchronize(device)
    return repeated(action, device, rounds)


def _router(shape: Shape, device: torch.device, dtype: torch.dtype) -> NexusRouter:
    """Return a random router in training mode."""
    vectors_EM = torch.randn(shape.experts, shape.embedding)
    inputs_EM = nn.functional.normalize(vectors_EM, dim=-1)
    projection = Projection(shape.embedding, shape.hidden)
    router = NexusRouter(
        shape.hidden,
        Placement(shape.experts),
        shape.top_k,
        projection.to(device, dtype),
        inputs_EM.to(device),
        LOAD_BALANCE,
    )
    # in training it adds the balancing loss, which is part of its cost
    return router.to(device).train()


def router_sweep(
    base: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    say: Callable[[str], None],
) -> list[Point]:
    """Return the router's seconds in one layer over ROUTER_SWEEPS.

    First with more experts, then with more tokens for as many experts.
    """
    rows = []
    for quantity, values in ROUTER_SWEEPS.items():
        for x in values:
            say(f"router: {quantity} {x}")
            shape, tokens = base, ROUTER_TOKENS
            if quantity == "experts":
                shape = replace(base, experts=x)
            else:
                tokens = x
            seconds = router_seconds(shape, tokens, device, dtype, rounds)
            rows.append(Point(f"router {quantity}", x, seconds, 0.0))
    return rows


def exponents(rows: list[Point]) -> dict[str, dict[str, float]]:
    """Return for each quantity the exponents of time and (where measured) memory."""
    found = {}
    # each once, in the order in which they were changed
    for quantity in dict.fromkeys(row.quantity for row in rows):
        mine = [row for row in rows if row.quantity == quantity]
        xs = [float(row.x) for row in mine]
        seconds = [row.seconds for row in mine]
        peaks = [row.peak_bytes for row in mine]
        fitted = {"seconds": exponent(xs, seconds)}
        # a 0 was not measured, and has no logarithm
        if min(peaks) > 0:
            fitted["peak_bytes"] = exponent(xs, peaks)
        found[quantity] = fitted
    return found
