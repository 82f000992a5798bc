"""One rank that times a Nexus layer on a limited link (not a test).

Its shared expert is a stand-in for an accelerator: it sleeps.

python -m overlap_worker OUT.json SPEED,SPEED,... SECONDS

Sleeping takes no core, so that figures are those of a machine that computes elsewhere, however busy
this one is. OUT.json lists {speed, overlapped, plain, medians, bytes}: least seconds of a forward
and backward pass of all rounds, {way: median of the rounds}, and bytes that rank 0 sends in one.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nexus_ds.experiments.benchmarks import network
from nexus_ds.experiments.benchmarks.slow_links import LinkRun
from nexus_ds.experiments.benchmarks.slow_links_worker import random_llama
from nexus_ds.launch import end
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.nexus_moe import NexusMoE, Placement

HIDDEN, TOKENS, ROUNDS = 256, 2048, 8


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * ctx.seconds)  # a matrix product has two in its backward pass
        return gradient, None


class Sleeper(torch.nn.Module):
    """A projection that takes its time."""

    def __init__(self, projection, seconds):
        super().__init__()
        self.projection, self.seconds = projection, seconds

    def forward(self, x):
        return _Sleep.apply(self.projection(x), self.seconds)


def timed(forward, layer, x):
    dist.barrier()
    started = time.perf_counter()
    forward(layer, x).sum().backward()
    dist.barrier()
    return time.perf_counter() - started


def main():
    out, speeds, seconds = Path(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3])
    rank = int(os.environ["RANK"])
    network.join(rank)
    internals.start(2)
    links = LinkRun(speeds=(1.0,), layers=1, hidden=HIDDEN, ffn=16)
    model = random_llama(links, Placement(4, 2, rank))
    layer = model.model.layers[0].mlp
    layer.set_deepspeed_parallelism()
    shared = layer.shared_experts
    # three projections, each one part forward and two backward
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(shared, name, Sleeper(getattr(shared, name), seconds / 9))
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator, requires_grad=True)
    ways = {"overlapped": NexusMoE.forward, "plain": internals.AutoEPMoELayer.forward}
    found = []
    for speed in map(float, speeds):
        dist.barrier()
        network.limit(speed)
        times, before = {name: [] for name in ways}, network.sent()
        for _ in range(ROUNDS):
            for name, forward in ways.items():
                times[name].append(timed(forward, layer, x))
        sent = (network.sent() - before) / ROUNDS / len(ways)
        medians = {name: statistics.median(t) for name, t in times.items()}
        found.append(
            {
                "speed": speed,
                "bytes": sent,
                "medians": medians,
                **{name: min(t) for name, t in times.items()},
            }
        )
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
