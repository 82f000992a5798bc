"""How step time and memory grow with experts, top-k, layers and sequence, and how the router's own
cost does.

One quantity is changed at a time; time ~ x^a is fitted by least squares on logarithms.
Not covered: several processes; memory on systems without /proc (0 there).
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return a of the best y = c x^a."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(log_x, log_y).slope


def router_law(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return what a router of one layer costs: for each token at the fewest and the most tokens,
    and for each expert.

    `expert_seconds` and `fixed_seconds` are the best t = fixed + expert * E at ROUTER_TOKENS
    tokens, `correlation` how well a straight line fits.
    """
    by_tokens = [(row["x"], row["seconds"]) for row in rows if row["quantity"] == "router tokens"]
    xs = [float(row["x"]) for row in rows if row["quantity"] == "router experts"]
    ys = [row["seconds"] for row in rows if row["quantity"] == "router experts"]
    fitted = statistics.linear_regression(xs, ys)
    (few, first), (many, last) = min(by_tokens), max(by_tokens)
    return {
        "few_tokens": few,
        "token_seconds_few": first / few,
        "many_tokens": many,
        "token_seconds_many": last / many,
        "fixed_seconds": fitted.intercept,
        "expert_seconds": fitted.slope,
        "correlation": statistics.correlation(xs, ys),
    }


class Memory:
    """Most memory that this process (or the GPU) held inside the context, above what it held at its
    beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(key + ":"))

    def __enter__(self) -> Memory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif Path("/proc/self/clear_refs").exists():
            release_memory()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif Path("/proc/self/clear_refs").exists():
            self.bytes = self._status("VmHWM") - self.before


def repeated(action: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median seconds of an action, each round as long as BUSY_SECONDS or once."""
    timed(action, device)
    count = max(1, round(BUSY_SECONDS / max(timed(action, device), 1e-6)))
    turns = [timed(lambda: [action() for _ in range(count)], device) / count for _ in range(rounds)]
    return statistics.median(turns)


def _point(
    shape: Shape, variant: str, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    with Memory(device) as memory, Batches(shape, device) as batches:
        model, tokens = build(variant, shape, device, dtype), batches.read()
        seconds = repeated(lambda: train_step(model, tokens), device, rounds)
    return {"seconds": seconds, "peak_bytes": float(memory.bytes)}


def sweep(
    base: Shape,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return step seconds and peak memory over all SWEEPS, one row a point: quantity, x, seconds,
    peak_bytes.

    `top_k` is changed among 8 experts or more, so that there is a choice.
    """
    rows: list[dict[str, Any]] = []
    _point(base, variant, device, dtype, 1)  # what is loaded or made at the first step is no growth
    for quantity, values in SWEEPS.items():
        for x in values:
            shape = replace(base, **{quantity: x})
            shape = replace(shape, experts=max(base.experts, 8)) if quantity == "top_k" else shape
            say(f"{quantity} {x}")
            rows.append(
                {"quantity": quantity, "x": x, **_point(shape, variant, device, dtype, rounds)}
            )
    return rows


def router_seconds(
    shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> float:
    """Return seconds of one layer's router (P, scores, losses) for `tokens` tokens, forward and
    backward."""
    torch.manual_seed(0)
    inputs_EM = nn.functional.normalize(torch.randn(shape.experts, shape.embedding), dim=-1).to(
        device
    )
    projection = Projection(shape.embedding, shape.hidden).to(device, dtype)
    router = NexusRouter(
        shape.hidden, Placement(shape.experts), shape.top_k, projection, inputs_EM, LOAD_BALANCE
    )
    router = router.to(device).train()
    x_TH = torch.randn(tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)

    def action() -> None:
        router.zero_grad(set_to_none=True)
        x_TH.grad = None
        router(x_TH)[0].sum().backward()

    synchronize(device)
    return repeated(action, device, rounds)


def router_sweep(
    base: Shape, device: torch.device, dtype: torch.dtype, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the router's seconds in one layer over ROUTER_SWEEPS: more experts, then more tokens
    for as many experts."""
    rows = []
    for quantity, values in ROUTER_SWEEPS.items():
        for x in values:
            say(f"router: {quantity} {x}")
            shape = replace(base, experts=x) if quantity == "experts" else base
            tokens = x if quantity == "tokens" else ROUTER_TOKENS
            seconds = router_seconds(shape, tokens, device, dtype, rounds)
            rows.append(
                {"quantity": f"router {quantity}", "x": x, "seconds": seconds, "peak_bytes": 0.0}
            )
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each quantity the exponents of time and (where measured) memory."""
    found = {}
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        mine = [row for row in rows if row["quantity"] == quantity]
        xs = [float(row["x"]) for row in mine]
        found[quantity] = {"seconds": exponent(xs, [row["seconds"] for row in mine])}
        if all(row["peak_bytes"] > 0 for row in mine):
            found[quantity]["peak_bytes"] = exponent(xs, [row["peak_bytes"] for row in mine])
    return found
