"""The clock on the parts: forward and backward time goes to the module that spends it."""

import time

import pytest
import torch
from torch import nn

from nexus_ds.experiments.benchmarks.models import VARIANTS, Shape, build
from nexus_ds.experiments.benchmarks.parts import PartClock, clock_of, shares, watch_model
from nexus_ds.model.head import next_token_loss

CPU = torch.device("cpu")
SHAPE = Shape(
    hidden=32, layers=2, heads=2, ffn=24, vocabulary=60, experts=3, batch=2, length=16, embedding=8
)


def busy(seconds):
    """Use up CPU time, which is what a single thread is measured by."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        busy(forward)
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        busy(ctx.backward_seconds)
        return gradient, None, None


class Worker(nn.Module):
    def __init__(self, forward, backward):
        super().__init__()
        self.seconds = forward, backward

    def forward(self, x):
        return _Work.apply(x, *self.seconds)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Worker(0.02, 0.08), Worker(0.06, 0.01)

    def forward(self, x):
        return self.one(x) + self.two(x)


def test_two_branches_get_their_own_forward_and_backward_time():
    block, clock = Branches(), PartClock(CPU)
    for part, module in (("one", block.one), ("two", block.two), ("both", block)):
        clock.watch(part, module)
    x = torch.ones(4, requires_grad=True)
    block(x * 1.0).sum().backward()
    found = clock.seconds()
    # at least: a machine may take the processor away meanwhile
    assert found["one"] >= 0.095 and found["two"] >= 0.065
    assert found["both"] >= found["one"] + found["two"]
    assert torch.equal(x.grad, torch.full((4,), 2.0)) and clock.seconds() == {}
    clock.remove()
    block(x)
    assert clock.seconds() == {}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_has_its_parts_and_they_add_up(name):
    model, clock = build(name, SHAPE, CPU, torch.float32), PartClock(CPU)
    watch_model(model, clock)
    now = clock_of(CPU)
    started = now()
    loss, _ = next_token_loss(model, torch.arange(34).view(2, 17))
    loss.backward()
    found = shares(clock.seconds(), now() - started)
    blocks = {"ffn"} if name == "dense" else {"router", "dispatch", "experts", "shared expert"}
    assert set(found) == {"attention", "head + loss", "rest", *blocks}
    assert sum(found.values()) == pytest.approx(1.0) and all(share > 0 for share in found.values())
