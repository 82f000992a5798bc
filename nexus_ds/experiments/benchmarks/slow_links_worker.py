"""One rank of the benchmark of slow links.

python -m nexus_ds.experiments.benchmarks.slow_links_worker SETTINGS.json

Not covered: GPUs (the ranks compute on the CPU).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_ds.checkpoint.expert_rows import centre_of, condition
from nexus_ds.experiments.benchmarks import network
from nexus_ds.experiments.benchmarks.models import random_projection
from nexus_ds.experiments.benchmarks.slow_links import (
    EMBEDDING,
    HEAD_SIZE,
    LinkRun,
    StepTime,
    Way,
)
from nexus_ds.launch import end, position
from nexus_ds.model.experts import FeedForward
from nexus_ds.model.head import next_token_loss
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 2  # steps: ZeRO-3 learns the order of the modules in the first
PERSISTENT = 1000  # elements: at DeepSpeed's 100,000 ZeRO-3 would cut little of so small a model
LEARNING_RATE = 1e-4
TIMEOUT_MINUTES = 10


def random_llama(links: LinkRun, where: Placement) -> PreTrainedModel:
    """Return a random Llama whose feed-forward networks are Nexus layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # the same on every rank
    torch.manual_seed(0)
    heads = links.hidden // HEAD_SIZE
    config = LlamaConfig(
        vocab_size=links.vocabulary,
        hidden_size=links.hidden,
        intermediate_size=links.ffn,
        tie_word_embeddings=True,
        num_hidden_layers=links.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    model = LlamaForCausalLM(config)
    vectors_EM = torch.randn(links.experts, EMBEDDING).numpy()
    inputs_EM = torch.from_numpy(condition(vectors_EM, centre_of(vectors_EM)))
    layers = cast(nn.ModuleList, model.get_submodule("model.layers"))
    for index, layer in enumerate(layers):
        layer.mlp = _nexus_layer(links, where, inputs_EM, index)
    return model


def _nexus_layer(links: LinkRun, where: Placement, inputs_EM: Tensor, index: int) -> NexusMoE:
    projection = random_projection(inputs_EM, links.hidden, index)
    shared = FeedForward(links.hidden, links.ffn)
    # ranks have different numbers of experts, but must draw the same numbers after them
    with torch.random.fork_rng():
        local = [FeedForward(links.hidden, links.ffn) for _ in range(where.local_slots)]
    router = NexusRouter(links.hidden, where, 1, projection, inputs_EM)
    return NexusMoE(where, local, shared, router, False)


def start(links: LinkRun, way: Way) -> internals.Engine:
    """Return an engine for one way of training."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    config = Config()
    config.model.dtype = "fp32"
    config.parallel.expert = way.expert
    config.training.batch_size = links.batch * world
    zero = {"stage": links.stage, "stage3_param_persistence_threshold": PERSISTENT}
    values: dict[str, Any] = {"zero_optimization": zero}
    check_layout(values, config, world, world, links.experts)
    batch = Batch(links.batch, 1)
    where = Placement(links.experts, way.expert, rank % way.expert)
    model = random_llama(links, where)
    if links.stage == 3:
        partition = internals.partitioner(deepspeed_config(values, config, batch))
        partition(model)
    engine = start_engine(model, values, config, batch)
    if not way.overlap:
        # DeepSpeed's own forward pass, in which nothing overlaps
        for layer in moe_layers(engine.module):
            plain = MethodType(internals.AutoEPMoELayer.forward, layer)
            layer.forward = plain  # type: ignore[method-assign]
    set_learning_rate(engine, LEARNING_RATE)
    engine.train()
    return engine


class Waits:
    """Counts the seconds in which this rank does nothing but wait for all-to-alls.

    From when it is made it stands in the place of torch's own function.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.exchange: Callable[..., Any] = dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(self, *arguments: Any, **settings: Any) -> _Work:
        """Exchange as torch does; an asynchronous exchange returns what `wait` can be called on."""
        started = time.perf_counter()
        work = self.exchange(*arguments, **settings)
        self.seconds += time.perf_counter() - started
        return _Work(self, work)


class _Work:
    """An exchange under way, or one that is over: then nobody waits for it."""

    def __init__(self, waits: Waits, work: dist.Work | None) -> None:
        self.waits = waits
        self.work = work

    def wait(self) -> None:
        assert self.work is not None, "only an asynchronous exchange is waited for"
        started = time.perf_counter()
        self.work.wait()
        self.waits.seconds += time.perf_counter() - started


class Figures(NamedTuple):
    """What a step took: seconds until all ranks are through, those of waiting, bytes sent."""

    seconds: float
    waits: float
    bytes: int


def step(engine: internals.Engine, tokens_BS: Tensor, waits: Waits) -> Figures:
    """Do one step on token ids [B, S+1]; return what it took."""
    dist.barrier()
    sent_before = network.sent()
    waits.seconds = 0.0
    started = time.perf_counter()
    loss, _ = next_token_loss(engine, tokens_BS)
    engine.backward(loss)
    engine.step()
    # a step is over when the slowest rank is through
    dist.barrier()
    seconds = time.perf_counter() - started
    sent = network.sent() - sent_before
    return Figures(seconds, waits.seconds, sent)


def collectives(engine: internals.Engine, tokens_BS: Tensor, waits: Waits) -> int:
    """Do one step; return the collectives of this rank, without the barriers around the step."""
    # gloo works on the CPU, and the profiler sees each collective there by its name
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step(engine, tokens_BS, waits)
    every = [event.name for event in profile.events()]
    names = [name for name in every if name.startswith("gloo:")]
    return len(names) - names.count("gloo:barrier")


def measure(links: LinkRun, ways: list[Way]) -> list[StepTime]:
    """Return what every step of every way took, at every speed.

    The ways take turns, so that noise meets all alike.
    """
    network.limit(links.speeds[0])
    engines = [start(links, way) for way in ways]
    waits = Waits()
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    size = (links.batch, links.length + 1)
    tokens_BS = torch.randint(links.vocabulary, size, generator=generator)
    for _ in range(WARM_UP):
        for engine in engines:
            step(engine, tokens_BS, waits)
    counts = [collectives(engine, tokens_BS, waits) for engine in engines]
    found = []
    for speed in links.speeds:
        network.limit(speed)
        for _ in range(links.steps):
            for engine, way, count in zip(engines, ways, counts, strict=True):
                figures = step(engine, tokens_BS, waits)
                found.append(StepTime(way.name, speed, count, *figures))
    return found


def main() -> None:
    """Measure every way at every speed; rank 0 writes OUT."""
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    network.join(position().rank)
    internals.start(TIMEOUT_MINUTES)
    links = LinkRun(**values["links"])
    ways = [Way(**way) for way in values["ways"]]
    found = measure(links, ways)
    if dist.get_rank() == 0:
        steps = [asdict(step_time) for step_time in found]
        Path(values["out"]).write_text(json.dumps(steps), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
