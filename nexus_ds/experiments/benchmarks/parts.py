"""Where a step's time goes: stamps at the borders of modules, in the forward and in the backward
pass.

A stamp is an autograd node that changes nothing. Autograd runs the newest nodes first, so a
module's backward pass lies between the stamp on its output and the stamp on its input, and nothing
of its siblings in between.
Not covered: modules whose inputs need no gradient, re-entrant checkpointing, more than one stream
on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of a feed-forward block by part, for each kind of block; what is left of the block is
# `dispatch`.
BLOCK_PARTS = {
    "router": ("router", "layer.router", "gate", "moe.deepspeed_moe.gate"),
    "experts": ("experts", "layer.experts", "moe.deepspeed_moe.experts"),
    "shared expert": ("shared_experts", "layer.shared_experts", "shared_expert"),
}
PARTS = (
    "router",
    "dispatch",
    "experts",
    "shared expert",
    "ffn",
    "attention",
    "head + loss",
    "rest",
)
STEP_PARTS = (*PARTS, "optimizer", "data")


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return what reads the time on the host: with one thread on a CPU the process's own, which
    other jobs disturb less."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


class _Stamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, watch: PartClock, part: str, entering: bool) -> Tensor:
        ctx.watch, ctx.part, ctx.entering = watch, part, entering
        watch.stamp(part, entering)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.watch.stamp(ctx.part, not ctx.entering)
        return gradients[0], None, None, None


class PartClock:
    """Adds up the time that modules of a model take; `watch` names them, `seconds` reads the clock.

    Args:
        device: the model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.now = device, clock_of(device)
        self.stamps: list[tuple[str, bool, Any]] = []
        self.handles: list[Any] = []

    def stamp(self, part: str, entering: bool) -> None:
        """Note the moment at which a part is entered or left."""
        moment: Any = self.now()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.stamps.append((part, entering, moment))

    def watch(self, part: str, module: nn.Module) -> None:
        """Count the module's time as `part`."""

        def before(
            _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            values = list(args) + list(options.values())
            first = next(
                i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad
            )
            values[first] = _Stamp.apply(values[first], self, part, True)
            return tuple(values[: len(args)]), dict(zip(options, values[len(args) :], strict=True))

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return _Stamp.apply(output, self, part, False)
            # a router's gate
            last = max(i for i, v in enumerate(output) if isinstance(v, Tensor) and v.requires_grad)
            marked = _Stamp.apply(output[last], self, part, False)
            return (*output[:last], marked, *output[last + 1 :])

        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def remove(self) -> None:
        """Take the stamps off the model."""
        for handle in self.handles:
            handle.remove()

    def seconds(self) -> dict[str, float]:
        """Return seconds by part since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        begun: dict[str, Any] = {}
        for part, entering, moment in self.stamps:
            if entering:
                begun[part] = moment
            else:
                start = begun.pop(part)
                passed = (
                    moment - start
                    if isinstance(moment, float)
                    else start.elapsed_time(moment) / 1e3
                )
                found[part] = found.get(part, 0.0) + passed
        self.stamps.clear()
        return found


def _find(block: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


def watch_model(model: Any, clock: PartClock) -> None:
    """Watch attention, feed-forward block with its parts, and output layer of a model of
    `benchmarks.models`."""
    for layer in model.model.layers:
        clock.watch("attention", layer.self_attn)
        parts = {part: _find(layer.mlp, paths) for part, paths in BLOCK_PARTS.items()}
        for part, module in parts.items():
            if module is not None:
                clock.watch(part, module)
        clock.watch("block" if any(parts.values()) else "ffn", layer.mlp)
    clock.watch("head + loss", model.lm_head)


def shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    """Return each part's share of `total` seconds; dispatch is what a block does besides its parts,
    rest the remainder."""
    known = dict(seconds)
    block = known.pop("block", None)
    if block is not None:
        known["dispatch"] = block - sum(known.get(part, 0.0) for part in BLOCK_PARTS)
    known["rest"] = total - sum(known.values())
    return {part: known[part] / total for part in PARTS if part in known}
