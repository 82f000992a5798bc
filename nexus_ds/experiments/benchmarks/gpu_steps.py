"""What `bench gpu` measures in processes of its own, and the models and text that it works on.

    python -m nexus_ds.experiments.benchmarks.gpu_steps NAME [ARGUMENT ...] [--small]

A step prints its figures as one line of JSON each time it has more of them, so that the ones before
it ran out of memory or time are kept. On a machine without a GPU it computes on the CPU.
Not covered: several GPUs; quality (the weights are random).
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nexus_ds.checkpoint.build import new_dense
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.data.corpora import open_source
from nexus_ds.data.domains import DomainEmbeddings, unit, write_domain_embeddings
from nexus_ds.data.tokenizer import open_tokenizer, train_tokenizer, vocabulary_size
from nexus_ds.experiments.benchmarks import layer_speed
from nexus_ds.experiments.benchmarks.layer_speed import synchronize, timed, train_step
from nexus_ds.experiments.benchmarks.models import COMPILED, PRESETS, Shape, build
from nexus_ds.launch import adopt_launcher, end
from nexus_ds.model.head import next_token_loss
from nexus_ds.outputs import new_directory, write_text
from nexus_ds.planning.layout import Layout, deepspeed_json
from nexus_ds.planning.memory import memory
from nexus_ds.planning.traffic import token_flops
from nexus_ds.progress import say
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import check_layout, deepspeed_config, start_engine
from nexus_ds.settings import Config
from nexus_ds.upcycling.upcycle import upcycled

Figures = dict[str, object]
"""Name with its unit: a number, a word, or figures of a part by name."""

SMALL = replace(PRESETS["tiny"], layers=1, batch=2, length=32)
LARGE = Shape(
    hidden=2560,
    layers=20,
    heads=20,
    ffn=10304,
    vocabulary=256000,
    experts=4,
    batch=1,
    length=2048,
)
"""The 9.1B mixture of the recipe nexus-2.8b."""
COMPARED = ("dense", "nexus-grouped", "transformers-grouped")
COMPARED_ON_GPU = (*COMPARED, *COMPILED)
TEXT_BYTES = {"train": 350_000, "validation": 60_000}  # of a domain
DOCUMENT_CHARACTERS = 8_000
EMBEDDING = 384  # width of a domain's vector
BRANCH_NOISE = 0.1  # of a weight's mean size: what training would have changed
ESTIMATED = "(estimated)"  # how `plan` marks what no allocator counts
WAITS = ("cudaStreamSynchronize", "cuStreamSynchronize", "cudaEventSynchronize")
GB = 1e9


def device_here() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(action: Callable[[], object], device: torch.device, repeat: int = 3) -> float:
    """Return the median seconds of an action that was done once before."""
    action()
    seconds = [timed(action, device) for _ in range(repeat)]
    return statistics.median(seconds)


def random_tokens(shape: Shape, device: torch.device) -> torch.Tensor:
    """Return random token ids [B, S+1] int64 under a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length + 1)
    return torch.randint(shape.vocabulary, size, generator=generator).to(device)


def tflops(shape: Shape, seconds: float) -> float:
    """Return TFLOPS of the active parameters in a forward and backward pass of `seconds`."""
    per_token, _ = token_flops(shape.sizes(), shape.length)
    flops = shape.tokens * per_token
    return flops / seconds / 1e12


# Steps --------------------------------------------------------------------------------------------


def machine(small: bool) -> Iterator[Figures]:
    """Yield versions, then the ceilings that the GPU reaches: a matrix product and a copy."""
    device = device_here()
    found: Figures = {**layer_speed.machine(device)}
    found["triton"] = importlib.util.find_spec("triton") is not None
    yield found
    found["matrix product TFLOPS"] = _product_tflops(64 if small else 8192, device)
    found["copy GB/s"] = _copy_speed(1 << 16 if small else 1 << 30, device)
    if device.type == "cuda":
        found |= _cuda_facts(device)
    yield found


def _product_tflops(width: int, device: torch.device) -> float:
    """Return TFLOPS of a product of two square matrices in bf16."""
    a = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    b = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    product = partial(torch.mm, a, b)
    took = seconds_of(product, device, 10)
    flops = 2 * width**3
    return flops / took / 1e12


def _copy_speed(size: int, device: torch.device) -> float:
    """Return the GB/s at which the device copies `size` bytes of its own memory."""
    source = torch.empty(size, device=device, dtype=torch.uint8)
    took = seconds_of(source.clone, device, 10)
    # each byte is read and written
    moved = 2 * size
    return moved / took / GB


def _cuda_facts(device: torch.device) -> Figures:
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    kept = torch.cuda.memory_reserved(device)
    return {
        "CUDA": str(torch.version.cuda),
        "capability": f"{major}.{minor}",
        "memory GB": total / GB,
        # What the driver counts and the allocator doesn't: `plan` estimates it.
        "context GB": (total - free - kept) / GB,
    }


def profiled(model: nn.Module, tokens_BS: torch.Tensor, device: torch.device) -> Figures:
    """Profile one forward and backward pass; print the profiler's table of it.

    Kernels and their time are read off the device's own events. The time of the operators that
    launched them holds the same time again, so a sum over all events would count it twice.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        train_step(model, tokens_BS)
        synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = recorded.key_averages()
    # for whoever reads the log: the figures below don't say which kernel is slow
    print_text(averages.table(sort_by=order, row_limit=40, max_name_column_width=70))
    return count_events(recorded.events() or ())


def count_events(events: Iterable[torch.autograd.profiler_util.FunctionEvent]) -> Figures:
    """Return the device's busy time, its kernels and copies, and how often the host waited for it.

    A host wait is a stream synchronisation: `.item()`, `.tolist()`, `nonzero` and copies from
    memory that is not pinned each do one. The synchronisation of the whole device at the end of the
    measurement is not among them.
    """
    found = {
        "device busy ms": 0.0,
        "kernels": 0,
        "copies and fills": 0,
        "host waits": 0,
        "numbers read by the host": 0,
        "operators": 0,
    }
    for event in events:
        name = event.name
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found["device busy ms"] += event.time_range.elapsed_us() / 1e3
            moved = name.startswith(("Memcpy", "Memset"))
            found["copies and fills" if moved else "kernels"] += 1
        elif event.device_type == DeviceType.CPU:
            found["host waits"] += name in WAITS
            found["numbers read by the host"] += name == "aten::_local_scalar_dense"
            found["operators"] += name.startswith("aten::")
    return {**found}


def step_figures(model: nn.Module, shape: Shape, device: torch.device) -> Figures:
    """Return the time of a forward and backward pass, and how long the host takes to launch it.

    Where the host waits for the device within the pass, its time has the device's in it.
    """
    tokens_BS = random_tokens(shape, device)
    action = partial(train_step, model, tokens_BS)
    took = seconds_of(action, device)
    started = time.perf_counter()
    action()
    launched = time.perf_counter() - started
    synchronize(device)
    peak = layer_speed.peak_tflops(device)
    reached = tflops(shape, took)
    return {
        "ms": 1e3 * took,
        "host ms": 1e3 * launched,
        "tokens/s": shape.tokens / took,
        "TFLOPS": reached,
        "MFU": reached / peak if peak else None,
    }


def step_profile(small: bool) -> Iterator[Figures]:
    """Yield a step's time, its profile, and the shares of its parts at the 470M size."""
    device = device_here()
    shape = SMALL if small else PRESETS["470m"]
    model = build("nexus-grouped", shape, device, torch.bfloat16)
    found: Figures = {}
    for batch in (1, shape.batch):
        at = replace(shape, batch=batch)
        found[f"{batch} x {shape.length} tokens"] = step_figures(model, at, device)
        yield found
    tokens_BS = random_tokens(shape, device)
    found |= profiled(model, tokens_BS, device)
    yield found
    shares, _ = layer_speed.part_shares(model, tokens_BS, device)
    found["shares of the time"] = dict(shares)
    yield found


def speed(small: bool) -> Iterator[Figures]:
    """Yield tokens/s of the Nexus layer against a dense model and transformers' grouped layer."""
    device = device_here()
    shape = SMALL if small else PRESETS["470m"]
    rounds = 1 if small else 3
    names = COMPARED if small else COMPARED_ON_GPU
    results, data = layer_speed.measure(names, shape, device, torch.bfloat16, rounds, say)
    found: Figures = {}
    for row in layer_speed.summary(results, data, shape, "dense", device):
        found[row.model] = {
            "tokens/s": row.tokens_per_second,
            "over dense": row.ratio,
            "MFU": row.mfu,
            "AdamW ms": 1e3 * row.optimizer_seconds,
            "router": row.shares.get("router"),
            "head + loss": row.shares.get("head + loss"),
        }
    yield found


def _engine_settings(micro: int, checkpointing: str) -> Config:
    return load_config(
        "demo",
        [
            "model.path=unused",
            "model.dtype=bf16",
            f"training.batch_size={micro}",
            f"training.micro_batch_size={micro}",
            f"training.activation_checkpointing={checkpointing}",
        ],
    )


def peak_memory(small: bool, stage: str, checkpointing: str, micro: str) -> Iterator[Figures]:
    """Yield the peak memory of a layout at the 470M size, and what `plan` says of it.

    Args:
        small: tiny sizes.
        stage: of ZeRO, 1 to 3.
        checkpointing: a value of training.activation_checkpointing.
        micro: sequences a forward pass.
    """
    shape = replace(SMALL if small else PRESETS["470m"], batch=int(micro))
    layout = _one_rank(int(stage), shape.batch, checkpointing)
    planned = memory(shape.sizes(), layout, 2, shape.length, 1).gpu
    total = sum(planned.values())
    estimated = [size for name, size in planned.items() if name.endswith(ESTIMATED)]
    found: Figures = {
        "planned tensors GB": (total - sum(estimated)) / GB,
        "planned GB": total / GB,
    }
    yield found
    step = _engine_step(shape, layout)
    device = device_here()
    _forget_the_start(device)
    found["ms"] = 1e3 * seconds_of(step, device)
    if device.type == "cuda":
        found |= _peaks(device, total)
    yield found


def _one_rank(stage: int, micro: int, checkpointing: str) -> Layout:
    return Layout(
        stage=stage,
        offload="none",
        expert=1,
        world=1,
        micro=micro,
        accumulation=1,
        checkpointing=checkpointing,
    )


def _forget_the_start(device: torch.device) -> None:
    # `plan` counts the run and not its start, which holds the model twice.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: torch.device, planned: float) -> Figures:
    """Return the most memory since the statistics were reset, and its ratio to the plan's."""
    free, total = torch.cuda.mem_get_info(device)
    # The allocator keeps what it took, so what the driver counts now is the peak.
    used = total - free
    return {
        "tensors GB": torch.cuda.max_memory_allocated(device) / GB,
        "reserved GB": torch.cuda.max_memory_reserved(device) / GB,
        "used GB": used / GB,
        "used / planned": used / planned,
    }


def _engine_step(shape: Shape, layout: Layout) -> Callable[[], None]:
    """Return what does one optimizer step of a DeepSpeed engine on one rank."""
    adopt_launcher()
    internals.start(5)
    config = _engine_settings(layout.micro, layout.checkpointing)
    values = deepspeed_json(shape.sizes(), layout)
    _, batch = check_layout(values, config, 1, 1, shape.experts)
    model = build("nexus-grouped", shape, internals.device(), torch.bfloat16)
    if layout.stage == 3:
        partition = internals.partitioner(deepspeed_config(values, config, batch))
        partition(model)
    engine = start_engine(model, values, config, batch)
    tokens_BS = random_tokens(shape, engine.device)
    engine.train()

    def step() -> None:
        loss, _ = next_token_loss(engine, tokens_BS)
        engine.backward(loss)
        engine.step()

    return step


def large(small: bool) -> Iterator[Figures]:
    """Yield forward and backward pass of the 9.1B mixture, with one and with two sequences.

    Without an optimizer: its states alone are 109 GB.
    """
    device = device_here()
    shape = SMALL if small else LARGE
    model = build("nexus-grouped", shape, device, torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    found: Figures = {"parameters": parameters}
    for batch in (1, 2):
        at = replace(shape, batch=batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        figures = step_figures(model, at, device)
        if device.type == "cuda":
            figures["peak GB"] = torch.cuda.max_memory_allocated(device) / GB
        found[f"{batch} x {shape.length} tokens"] = figures
        yield found


# Models and text ----------------------------------------------------------------------------------


def make_inputs(out: Path) -> None:
    """Write a mixture of the demo's size, the seed and branches that it was made of, and text.

    The weights are random: the steps measure time, memory and agreement, which don't depend on
    what a model has learnt.

    Args:
        out: new directory; gets text/, tokenizer/, seed/, branches/DOMAIN/, domains.safetensors and
            mixture/.
    """
    config = load_config("demo", ["stage=moe", "router.warm_start=none"])
    domains = config.pipeline.domains
    with new_directory(out) as folder:
        texts: list[str] = []
        for domain in domains:
            texts += _write_text(folder / "text" / domain, domain)
        train_tokenizer(iter(texts), config.pipeline.vocabulary, folder / "tokenizer")
        _write_dense(folder, config)
        embeddings = random_embeddings(domains)
        write_domain_embeddings(folder / "domains.safetensors", embeddings)
        experts = {domain: folder / "branches" / domain for domain in domains}
        mixture = upcycled(folder / "seed", experts, embeddings, config)
        (folder / "mixture").mkdir()
        mixture.write(folder / "mixture", None, config.router, config.seed)


def random_embeddings(domains: Sequence[str]) -> DomainEmbeddings:
    """Return unit vectors [D, M] float32 in random directions, which are nearly at right angles."""
    vectors = np.random.default_rng(0).standard_normal((len(domains), EMBEDDING), np.float32)
    return DomainEmbeddings(
        names=list(domains),
        vectors=unit(vectors),
        encoder="random",
        revision="0" * 64,
        max_tokens=256,
        windows=1,
        documents=dict.fromkeys(domains, 1),
        seed=0,
        data="text",
    )


def _write_text(out: Path, domain: str) -> list[str]:
    """Write a domain's text; return what is to train on."""
    source = open_source("demo")
    out.mkdir(parents=True)
    found: dict[str, list[str]] = {}
    for split, limit in TEXT_BYTES.items():
        documents = source.documents(domain, split, "error", limit)
        texts = [document.text[:DOCUMENT_CHARACTERS] for document in documents]
        rows = [json.dumps({"text": text}) for text in texts]
        write_text(out / f"{split}.jsonl", "\n".join(rows) + "\n")
        found[split] = texts
    return found["train"]


def _write_dense(folder: Path, config: Config) -> None:
    """Write the seed, and for each domain a branch: the seed with noise of its own."""
    tokenizer = open_tokenizer(folder / "tokenizer")
    vocabulary = vocabulary_size(tokenizer)
    branches = [f"branches/{domain}" for domain in config.pipeline.domains]
    for number, name in enumerate(["seed", *branches]):
        model = new_dense(config.model, vocabulary, tokenizer.eos_token_id, config.seed)
        if number:
            add_noise(model, torch.Generator().manual_seed(number))
        model.save_pretrained(folder / name)
        copy_tokenizer(folder / "tokenizer", folder / name)


@torch.no_grad()
def add_noise(model: nn.Module, generator: torch.Generator) -> None:
    """Move every weight by noise of BRANCH_NOISE times their mean size, in place."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = BRANCH_NOISE * parameter.abs().mean()
        parameter.add_(size * noise)


STEPS: dict[str, Callable[..., Iterator[Figures]]] = {
    "machine": machine,
    "profile": step_profile,
    "speed": speed,
    "memory": peak_memory,
    "large": large,
}


def main(words: list[str]) -> int:
    """Do one step, printing its figures."""
    small = "--small" in words
    name, *arguments = [word for word in words if word != "--small"]
    if name == "inputs":
        make_inputs(Path(arguments[0]))
        return 0
    for found in STEPS[name](small, *arguments):
        print_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    # A step that has started DeepSpeed leaves gloo's threads; see `end`.
    end(main(sys.argv[1:]))
