"""One rank of the benchmark of slow links: python -m
nexus_ds.experiments.benchmarks.slow_links_worker SETTINGS.json

Not covered: GPUs (the ranks compute on the CPU).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_ds.experiments.benchmarks import network
from nexus_ds.experiments.benchmarks.slow_links import EMBEDDING, Links, Way
from nexus_ds.launch import end, position
from nexus_ds.model.experts import FeedForward
from nexus_ds.model.head import next_token_loss
from nexus_ds.model.router import Projection, centre_of, condition, init_projection, layer_generator
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import (
    Batch,
    check_layout,
    deepspeed_config,
    moe_layers,
    set_learning_rate,
    start_engine,
)
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement
from nexus_ds.settings import Config

WARM_UP = 2  # steps: ZeRO-3 learns the order of the modules in the first


def build(links: Links, where: Placement) -> Any:
    """Return a random Llama whose feed-forward networks are Nexus layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=links.vocabulary,
            hidden_size=links.hidden,
            intermediate_size=links.ffn,
            tie_word_embeddings=True,
            num_hidden_layers=links.layers,
            num_attention_heads=links.hidden // 64,
            num_key_value_heads=links.hidden // 64,
        )
    )
    vectors = torch.randn(links.experts, EMBEDDING)
    inputs = condition(vectors, centre_of(vectors))
    for index, layer in enumerate(model.model.layers):
        projection = Projection(EMBEDDING, links.hidden)
        init_projection(projection, inputs, "balanced", 0.5, layer_generator(0, index))
        shared = FeedForward(links.hidden, links.ffn)
        with torch.random.fork_rng():  # as many experts as this rank has
            local = [FeedForward(links.hidden, links.ffn) for _ in range(where.local_slots)]
        layer.mlp = NexusMoE(
            where, local, shared, NexusRouter(links.hidden, where, 1, projection, inputs), False
        )
    return model


def start(links: Links, way: Way) -> Any:
    """Return an engine for one way of training."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = Config()
    config.model.dtype, config.parallel.expert = "fp32", way.expert
    config.training.batch_size = links.batch * world
    values: dict[str, Any] = {
        "zero_optimization": {"stage": links.stage, "stage3_param_persistence_threshold": 1000}
    }
    check_layout(values, config, world, world, links.experts)
    batch = Batch(links.batch, 1)
    model = build(links, Placement(links.experts, way.expert, rank % way.expert))
    if links.stage == 3:
        internals.partitioner(deepspeed_config(values, config, batch))(model)
    engine = start_engine(model, values, config, batch)
    if not way.overlap:  # DeepSpeed's own forward pass
        for layer in moe_layers(engine.module):
            layer.forward = MethodType(internals.AutoEPMoELayer.forward, layer)  # type: ignore[method-assign]
    set_learning_rate(engine, 1e-4)
    engine.train()
    return engine


class Waits:
    """Counts the seconds in which this rank does nothing but wait for all-to-alls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.exchange = dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Exchange as torch does; an asynchronous exchange returns what `wait` can be called on."""
        started = time.perf_counter()
        work = self.exchange(*arguments, **settings)
        self.seconds += time.perf_counter() - started
        return _Work(self, work)


class _Work:
    def __init__(self, waits: Waits, work: Any) -> None:
        self.waits, self.work = waits, work

    def wait(self) -> None:
        started = time.perf_counter()
        self.work.wait()
        self.waits.seconds += time.perf_counter() - started


def step(engine: Any, tokens: Tensor, waits: Waits) -> dict[str, float]:
    """Do one step; return its seconds until all ranks are through, those spent waiting for tokens,
    and bytes sent."""
    dist.barrier()
    before, started, waits.seconds = network.sent(), time.perf_counter(), 0.0
    engine.backward(next_token_loss(engine, tokens)[0])
    engine.step()
    dist.barrier()
    return {
        "seconds": time.perf_counter() - started,
        "waits": waits.seconds,
        "bytes": network.sent() - before,
    }


def collectives(engine: Any, tokens: Tensor, waits: Waits) -> int:
    """Do one step; return how many collectives this rank takes part in, without the barriers around
    it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(engine, tokens, waits)
    names = [event.name for event in profile.events() if event.name.startswith("gloo:")]
    return len(names) - names.count("gloo:barrier")


def measure(links: Links, ways: list[Way]) -> list[dict[str, Any]]:
    """Return what every step of every way took, at every speed; the ways take turns, so that noise
    meets all alike."""
    network.limit(links.speeds[0])
    engines = [start(links, way) for way in ways]
    generator, waits = torch.Generator().manual_seed(1 + dist.get_rank()), Waits()
    tokens = torch.randint(links.vocabulary, (links.batch, links.length + 1), generator=generator)
    for _ in range(WARM_UP):
        for engine in engines:
            step(engine, tokens, waits)
    counts = [collectives(engine, tokens, waits) for engine in engines]
    found = []
    for speed in links.speeds:
        network.limit(speed)
        for _ in range(links.steps):
            for engine, way, count in zip(engines, ways, counts, strict=True):
                figures = step(engine, tokens, waits)
                found.append({"way": way.name, "speed": speed, "collectives": count, **figures})
    return found


def main() -> None:
    """Measure every way at every speed; rank 0 writes OUT."""
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    network.join(position().rank)
    internals.start(10)
    found = measure(Links(**values["links"]), [Way(**way) for way in values["ways"]])
    if dist.get_rank() == 0:
        Path(values["out"]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
