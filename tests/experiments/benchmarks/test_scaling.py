"""Fits on known numbers, memory of known size, and the router's arithmetic.

It is flat a token and linear in experts.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nexus_ds.experiments.benchmarks import scaling
from nexus_ds.experiments.benchmarks.models import Shape
from nexus_ds.experiments.benchmarks.scaling import (
    Memory,
    Point,
    exponent,
    exponents,
    router_law,
    router_sweep,
    sweep,
)
from nexus_ds.model.router import Projection
from nexus_ds.runtime.nexus_moe import NexusRouter, Placement

CPU = torch.device("cpu")
SHAPE = Shape(
    hidden=32, layers=1, heads=2, ffn=24, vocabulary=60, experts=3, batch=2, length=16, embedding=8
)


def test_the_exponent_of_a_power_law_is_found():
    xs = [2.0, 4.0, 8.0, 64.0]
    assert exponent(xs, [5 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert exponent(xs, [7.0] * 4) == pytest.approx(0.0)
    rows = [Point("layers", x, seconds=x, peak_bytes=0.0) for x in (1, 2)]
    assert exponents(rows) == {"layers": {"seconds": pytest.approx(1.0)}}


def test_the_routers_law_is_read_off_the_points():
    rows = [Point("router experts", x, 0.5 + 0.25 * x, 0.0) for x in (2, 4, 64)]
    rows += [Point("router tokens", x, 3.0 + x, 0.0) for x in (100, 300)]
    law = router_law(rows)
    assert (law["fixed_seconds"], law["expert_seconds"], law["correlation"]) == pytest.approx(
        (0.5, 0.25, 1.0)
    )
    assert (law["few_tokens"], law["token_seconds_few"]) == (100, pytest.approx(1.03))
    assert (law["many_tokens"], law["token_seconds_many"]) == (300, pytest.approx(1.01))


def test_memory_is_that_of_the_context_alone():
    torch.ones(40_000_000)  # 160 MB, gone before
    with Memory(CPU) as memory:
        torch.ones(20_000_000)
    assert memory.bytes == pytest.approx(80e6, rel=0.1)


def test_every_point_of_the_sweeps_is_there(monkeypatch):
    monkeypatch.setattr(scaling, "BUSY_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "SWEEPS", {"experts": (2, 4), "top_k": (1, 2), "length": (8,)})
    monkeypatch.setattr(scaling, "ROUTER_SWEEPS", {"experts": (2, 4), "tokens": (8, 16)})
    rows = sweep(SHAPE, "nexus-loop", CPU, torch.float32, 1, print)
    rows += router_sweep(SHAPE, CPU, torch.float32, 1, print)
    assert [(row.quantity, row.x) for row in rows] == [
        ("experts", 2),
        ("experts", 4),
        ("top_k", 1),
        ("top_k", 2),
        ("length", 8),
        ("router experts", 2),
        ("router experts", 4),
        ("router tokens", 8),
        ("router tokens", 16),
    ]
    assert all(row.seconds > 0 for row in rows)


def operations(experts, tokens):
    """Return operations of a router's forward and backward pass, those of P apart."""
    projection = Projection(8, 32)
    inputs = torch.randn(experts, 8)
    router = NexusRouter(32, Placement(experts), 1, projection, inputs, 0.01)
    with FlopCounterMode(display=False) as all_of_it:
        router(torch.randn(tokens, 32, requires_grad=True))[0].sum().backward()
    with FlopCounterMode(display=False) as alone:
        projection(inputs).sum().backward()
    return all_of_it.get_total_flops() - alone.get_total_flops(), alone.get_total_flops()


def test_the_routers_arithmetic_is_flat_a_token_and_linear_in_experts():
    scores, of_p = operations(4, 64)
    assert scores == 3 * 2 * 64 * 4 * 32  # x E^T and its two gradients
    assert operations(4, 128) == (2 * scores, of_p)  # P costs nothing more for more tokens
    assert operations(8, 64) == (2 * scores, 2 * of_p)
