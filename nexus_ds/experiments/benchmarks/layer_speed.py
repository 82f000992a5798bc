"""Training speed of the compared models, round by round, and where the time goes.

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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nexus_ds.data.corpora import TokenFile
from nexus_ds.data.mixture import Sampler
from nexus_ds.experiments.benchmarks.models import COMPILED, Shape, build
from nexus_ds.experiments.benchmarks.parts import PartClock, clock_of, shares, watch_model
from nexus_ds.model.head import next_token_loss
from nexus_ds.planning.traffic import token_flops

PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}
"""TFLOPS of GPUs in dense bf16, by a part of their name; from the vendor's data sheets, without
sparsity."""
BUSY_SECONDS = 0.3
"""A round times a model for at least this long: as many steps as it takes."""
PART_STEPS = 3
"""Steps over which the parts of a step are added up, at least."""
OPTIMIZER_STEPS = 3
FILE_BATCHES = 64
"""Batches of random tokens on disk; more would change nothing but the time to write them."""


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
    """Of a step's time with its optimizer and data; of a compiled model these two alone."""
    peak_bytes: int = 0
    """Most memory that the GPU held; 0 on a CPU."""


@dataclass(frozen=True)
class Ratio:
    """Speed over that of the baseline, over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One model's row of the comparison."""

    model: str
    parameters: int
    loss: float
    step_seconds: float
    """Of forward and backward pass, median of the rounds."""
    tokens_per_second: float
    ratio: float
    """Of speeds, this model's over the baseline's: median of the rounds."""
    ratio_low: float
    ratio_high: float
    active_tflops: float
    """Arithmetic of a Nexus model of the same shape, over this model's time."""
    mfu: float | None
    """Share of the GPU's peak; None where that is not known."""
    optimizer_seconds: float
    data_seconds: float
    peak_bytes: int | None
    shares: dict[str, float]
    """Of a step's time with its optimizer and data, by part."""
    rounds: list[float]
    """Seconds of a step, by round."""

    def to_json(self) -> dict[str, object]:
        """Return plain values by name."""
        return asdict(self)


def machine(device: torch.device) -> dict[str, str | int]:
    """Return in words what the figures were measured on."""
    found: dict[str, str | int] = {
        "device": _device_name(device) or _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in ("torch", "deepspeed", "transformers"):
        found[package] = importlib.metadata.version(package)
    return found


def _device_name(device: torch.device) -> str:
    """Return the GPU's name; nothing for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _processor() -> str:
    """Return the CPU's name where the system tells it (Linux on x86), else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes."""
    # a GPU works behind the host: before and after, or other work would be timed with it
    synchronize(device)
    now = clock_of(device)
    started = now()
    action()
    synchronize(device)
    return now() - started


class Batches:
    """Random token ids, read from a file as a training run reads them.

    Use as a context; the file goes with it.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.next = 0

    def __enter__(self) -> Batches:
        self.folder = tempfile.TemporaryDirectory()
        tokens = FILE_BATCHES * self.shape.tokens
        dtype = "uint16" if self.shape.vocabulary <= 2**16 else "uint32"
        path = Path(self.folder.name) / "tokens.bin"
        ids = np.random.default_rng(0).integers(self.shape.vocabulary, size=tokens)
        ids.astype(dtype).tofile(path)
        file = TokenFile(
            path=path,
            dtype=dtype,
            tokens=tokens,
            documents=1,
            skipped=0,
            fingerprint="",
        )
        self.sampler = Sampler({"random": file}, {"random": 1.0}, self.shape.length, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def read(self) -> Tensor:
        """Return the next batch [B, S+1] on the device."""
        start = self.next
        self.next += self.shape.batch
        samples = [self.sampler.sample(i) for i in range(start, self.next)]
        tokens_BS = np.stack([sample.tokens for sample in samples])
        return torch.from_numpy(tokens_BS).to(self.device)


def train_step(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Do one forward and backward pass into empty gradients; return the loss []."""
    model.zero_grad(set_to_none=True)
    loss, _ = next_token_loss(model, tokens_BS)
    loss.backward()
    return loss.detach()


def _train_steps(model: nn.Module, tokens_BS: Tensor, count: int) -> None:
    for _ in range(count):
        train_step(model, tokens_BS)


def _steps_of(model: nn.Module, tokens_BS: Tensor, device: torch.device) -> int:
    """Return how many steps fill BUSY_SECONDS."""
    action = partial(train_step, model, tokens_BS)
    # a clock may see nothing of a short action
    once = max(timed(action, device), 1e-6)
    return max(1, round(BUSY_SECONDS / once))


def optimizer_seconds(model: nn.Module, device: torch.device) -> float:
    """Return the median time of a fused AdamW update that changes nothing (learning rate 0)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    # the first allocates the moments
    optimizer.step()
    seconds = [timed(optimizer.step, device) for _ in range(OPTIMIZER_STEPS)]
    return statistics.median(seconds)


def part_shares(
    model: nn.Module, tokens_BS: Tensor, device: torch.device
) -> tuple[dict[str, float], float]:
    """Return each part's share of forward and backward pass, and the seconds of one."""
    clock = PartClock(device)
    watch_model(model, clock)
    # the stamps' own first step
    train_step(model, tokens_BS)
    steps = max(PART_STEPS, _steps_of(model, tokens_BS, device))
    # what was counted so far goes
    clock.seconds()
    action = partial(_train_steps, model, tokens_BS, steps)
    total = timed(action, device)
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
        tokens_BS = batches.read()
        contest = []
        for name in names:
            say(f"building {name}")
            model = build(name, shape, device, dtype)
            contest.append(_Entry(name, model, tokens_BS, device))
        # or the last one would stay in memory after its turn
        del model
        reading = []
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            # the wall clock: waiting for a disk counts
            started = time.perf_counter()
            batches.read()
            synchronize(device)
            reading.append(time.perf_counter() - started)
            # another one begins each round: who runs first finds other caches and clocks
            first = turn % len(contest)
            for entry in [*contest[first:], *contest[:first]]:
                entry.run()
    data_seconds = statistics.median(reading)
    say("shares of the step")
    found = []
    while contest:
        # taken out of the list, so that its memory is free for the next
        found.append(contest.pop(0).detailed(data_seconds))
        # a model and its hooks refer to each other in circles
        gc.collect()
    return found, data_seconds


class _Entry:
    """One model that is timed, and what it took so far."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokens_BS: Tensor,
        device: torch.device,
    ) -> None:
        self.model = model
        self.tokens_BS = tokens_BS
        self.device = device
        # the first step allocates and warms up; its loss shows that all models do the same work
        loss = float(train_step(model, tokens_BS))
        self.steps = _steps_of(model, tokens_BS, device)
        model.zero_grad(set_to_none=True)
        parameters = sum(p.numel() for p in model.parameters())
        self.result = Measured(name, parameters, loss)

    def run(self) -> None:
        """Time one round."""
        action = partial(_train_steps, self.model, self.tokens_BS, self.steps)
        self.result.seconds.append(timed(action, self.device) / self.steps)
        # so that one model's gradients are there at a time
        self.model.zero_grad(set_to_none=True)

    def detailed(self, data_seconds: float) -> Measured:
        """Return the result with the shares of a step, its optimizer and its peak memory."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        result = self.result
        found: dict[str, float] = {}
        seconds = statistics.median(result.seconds)
        # A clock's stamps inside a compiled part would be compiled with it.
        if result.name in COMPILED:
            train_step(self.model, self.tokens_BS)
        else:
            found, seconds = part_shares(self.model, self.tokens_BS, self.device)
        result.optimizer = optimizer_seconds(self.model, self.device)
        step = seconds + result.optimizer + data_seconds
        result.shares = {part: share * seconds / step for part, share in found.items()}
        result.shares["optimizer"] = result.optimizer / step
        result.shares["data"] = data_seconds / step
        if cuda:
            result.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        return result


def ratio(result: Measured, baseline: Measured) -> Ratio:
    """Return the speed of `result` over that of `baseline`, round by round."""
    rounds = zip(baseline.seconds, result.seconds, strict=True)
    # within a round both met the same noise
    ratios = [base / own for base, own in rounds]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def peak_tflops(device: torch.device) -> float | None:
    """Return the GPU's peak in dense bf16 where it is known."""
    name = _device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def summary(
    results: list[Measured],
    data: float,
    shape: Shape,
    baseline: str,
    device: torch.device,
) -> list[Speed]:
    """Return one row for each model.

    Args:
        results: of `measure`.
        data: seconds that reading one batch takes.
        shape: of the models.
        baseline: name of the model that ratios are taken against.
        device: where they computed.
    """
    base = next(result for result in results if result.name == baseline)
    per_token, _ = token_flops(shape.sizes(), shape.length)
    flops = shape.tokens * per_token
    peak = peak_tflops(device)
    rows = []
    for result in results:
        seconds = statistics.median(result.seconds)
        compared = ratio(result, base)
        tflops = flops / seconds / 1e12
        row = Speed(
            model=result.name,
            parameters=result.parameters,
            loss=result.loss,
            step_seconds=seconds,
            tokens_per_second=shape.tokens / seconds,
            ratio=compared.median,
            ratio_low=compared.low,
            ratio_high=compared.high,
            active_tflops=tflops,
            mfu=tflops / peak if peak else None,
            optimizer_seconds=result.optimizer,
            data_seconds=data,
            peak_bytes=result.peak_bytes or None,
            shares=result.shares,
            rounds=result.seconds,
        )
        rows.append(row)
    return rows
