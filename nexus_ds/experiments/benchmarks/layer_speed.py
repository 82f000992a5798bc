"""Training speed of the compared models: interleaved rounds, ratios within a round, and where the
time goes.

A round times every model once, one after the other, each round beginning with another; a ratio
compares two times of one round, so that a machine that slows down for a while slows both (on a CPU
with one thread it is CPU time that counts). Forward and backward pass are timed together; optimizer
and data apart.
Not covered: several processes, communication.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_ds.data.corpora import TokenFile
from nexus_ds.data.mixture import Sampler
from nexus_ds.experiments.benchmarks.models import Shape, build
from nexus_ds.experiments.benchmarks.parts import PartClock, clock_of, shares, watch_model
from nexus_ds.model.head import next_token_loss
from nexus_ds.planning.traffic import token_flops

PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}
"""TFLOPS of GPUs in dense bf16, by a part of their name."""
BUSY_SECONDS = 0.3
"""A round times a model for at least this long: as many steps as it takes."""
PART_STEPS = 3


@dataclass
class Measured:
    """What one model took."""

    name: str
    parameters: int
    loss: float
    seconds: list[float] = field(default_factory=list)
    """Forward and backward pass of one step, by round."""
    optimizer: float = 0.0
    """Seconds of an AdamW update."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of a step's time with its optimizer and data."""
    peak_bytes: int = 0
    """Most memory that the GPU held; 0 on a CPU."""


@dataclass(frozen=True)
class Ratio:
    """Speed over that of the baseline, over the rounds."""

    median: float
    low: float
    high: float


def machine(device: torch.device) -> dict[str, Any]:
    """Return in words what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")
    }
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that an action takes."""
    synchronize(device)
    now = clock_of(device)
    started = now()
    action()
    synchronize(device)
    return now() - started


class Batches:
    """Random token ids, read from a file as a training run reads them. Use as a context; the file
    goes with it."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.next = shape, device, 0

    def __enter__(self) -> Batches:
        self.folder = tempfile.TemporaryDirectory()
        tokens, dtype = (
            64 * self.shape.tokens,
            "uint16" if self.shape.vocabulary <= 2**16 else "uint32",
        )
        path = Path(self.folder.name) / "tokens.bin"
        np.random.default_rng(0).integers(self.shape.vocabulary, size=tokens).astype(dtype).tofile(
            path
        )
        file = TokenFile(
            path=path, dtype=dtype, tokens=tokens, documents=1, skipped=0, fingerprint=""
        )
        self.sampler = Sampler({"random": file}, {"random": 1.0}, self.shape.length, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def read(self) -> Tensor:
        """Return the next batch [B, S+1] on the device."""
        samples = [self.sampler.sample(self.next + i).tokens for i in range(self.shape.batch)]
        self.next += self.shape.batch
        return torch.from_numpy(np.stack(samples)).to(self.device)


def train_step(model: Any, tokens_BS: Tensor) -> Tensor:
    """Do one forward and backward pass into empty gradients; return the loss."""
    model.zero_grad(set_to_none=True)
    loss, _ = next_token_loss(model, tokens_BS)
    loss.backward()
    return loss.detach()


def _train_steps(model: Any, tokens_BS: Tensor, count: int) -> None:
    for _ in range(count):
        train_step(model, tokens_BS)


def optimizer_seconds(model: Any, device: torch.device) -> float:
    """Return the median time of a fused AdamW update that changes nothing (learning rate 0)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    optimizer.step()  # allocates the moments
    return statistics.median(timed(optimizer.step, device) for _ in range(3))


def part_shares(
    model: Any, tokens_BS: Tensor, device: torch.device
) -> tuple[dict[str, float], float]:
    """Return each part's share of forward and backward pass, and the seconds of one."""
    clock = PartClock(device)
    watch_model(model, clock)
    train_step(model, tokens_BS)
    clock.seconds()
    steps = max(
        PART_STEPS, round(BUSY_SECONDS / timed(lambda: train_step(model, tokens_BS), device))
    )
    clock.seconds()
    total = timed(lambda: [train_step(model, tokens_BS) for _ in range(steps)], device)
    found = shares(clock.seconds(), total)
    clock.remove()
    return found, total / steps


def measure(
    names: Sequence[str],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    say: Callable[[str], None],
) -> tuple[list[Measured], float]:
    """Time the named models.

    Args:
        names: of `models.VARIANTS`.
        shape: their sizes.
        device: where they compute.
        dtype: working dtype.
        rounds: how often each is timed.
        say: gets a line of progress now and then.

    Returns:
        What each took, and the seconds that reading one batch takes.
    """
    with Batches(shape, device) as batches:
        tokens = batches.read()
        models, found, steps = {}, {}, {}
        for name in names:
            say(f"building {name}")
            models[name] = model = build(name, shape, device, dtype)
            loss = float(train_step(model, tokens))
            one_step = timed(partial(train_step, model, tokens), device)
            steps[name] = max(1, round(BUSY_SECONDS / one_step))
            model.zero_grad(set_to_none=True)
            found[name] = Measured(name, sum(p.numel() for p in model.parameters()), loss)
        reading = []
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            started = time.perf_counter()  # waiting for a disk counts
            batches.read()
            synchronize(device)
            reading.append(time.perf_counter() - started)
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                model, count = models[name], steps[name]
                seconds = timed(partial(_train_steps, model, tokens, count), device)
                found[name].seconds.append(seconds / count)
                # so that one model's gradients are there at a time
                model.zero_grad(set_to_none=True)
        data = statistics.median(reading)
        say("shares of the step")
        for name in names:
            _detail(found[name], models.pop(name), tokens, device, data)
    return list(found.values()), data


def _detail(
    result: Measured, model: Any, tokens_BS: Tensor, device: torch.device, data: float
) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found, seconds = part_shares(model, tokens_BS, device)
    result.optimizer = optimizer_seconds(model, device)
    step = seconds + result.optimizer + data
    result.shares = {part: share * seconds / step for part, share in found.items()}
    result.shares |= {"optimizer": result.optimizer / step, "data": data / step}
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
    del model
    gc.collect()


def ratio(result: Measured, baseline: Measured) -> Ratio:
    """Return the speed of `result` over that of `baseline`, round by round."""
    ratios = sorted(b / r for b, r in zip(baseline.seconds, result.seconds, strict=True))
    return Ratio(statistics.median(ratios), ratios[0], ratios[-1])


def peak_tflops(device: torch.device) -> float | None:
    """Return the GPU's peak in dense bf16 where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def summary(
    results: list[Measured], data: float, shape: Shape, baseline: str, device: torch.device
) -> list[dict[str, Any]]:
    """Return one row for each model, with plain values."""
    base = next(r for r in results if r.name == baseline)
    flops, peak = shape.tokens * token_flops(shape.sizes(), shape.length)[0], peak_tflops(device)
    rows = []
    for result in results:
        seconds, compared = statistics.median(result.seconds), ratio(result, base)
        tflops = flops / seconds / 1e12
        rows.append(
            {
                "model": result.name,
                "parameters": result.parameters,
                "loss": result.loss,
                "step_seconds": seconds,
                "tokens_per_second": shape.tokens / seconds,
                "ratio": compared.median,
                "ratio_low": compared.low,
                "ratio_high": compared.high,
                "active_tflops": tflops,
                "mfu": tflops / peak if peak else None,
                "optimizer_seconds": result.optimizer,
                "data_seconds": data,
                "peak_bytes": result.peak_bytes or None,
                "shares": result.shares,
                "rounds": result.seconds,
            }
        )
    return rows
