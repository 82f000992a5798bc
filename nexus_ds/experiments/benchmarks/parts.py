"""Where a step's time goes: stamps at the borders of modules, forward and backward.

A stamp is an autograd node that changes nothing. Autograd runs the newest nodes first, so a
module's backward pass lies between the stamp on its output and the stamp on its input, and nothing
of its siblings in between.
Not covered: modules whose inputs need no gradient, re-entrant checkpointing, more than one stream
on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    """Return what reads the host's seconds.

    With one thread on a CPU it is the process's own time, which other jobs disturb less.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


Moment = float | torch.cuda.Event
"""Seconds of the host's clock, or an event in the GPU's stream."""


def _passed(start: Moment, end: Moment) -> float:
    """Return the seconds between two moments of one kind."""
    if isinstance(start, torch.cuda.Event):
        # milliseconds
        return start.elapsed_time(cast(torch.cuda.Event, end)) / 1e3
    return cast(float, end) - start


@dataclass(frozen=True)
class _Border:
    """A part's module, entered or left in the forward pass."""

    clock: PartClock
    part: str
    entering: bool


class _Stamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, border: _Border) -> Tensor:
        ctx.border = border
        border.clock.stamp(border.part, border.entering)
        # a view: autograd passes over a node that returns its very input
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # the backward pass comes from the other side
        border: _Border = ctx.border
        border.clock.stamp(border.part, not border.entering)
        return gradients[0], None


def _learns(value: object) -> bool:
    """Return whether a backward pass goes through a value."""
    return isinstance(value, Tensor) and value.requires_grad


def _stamped(output: Any, border: _Border) -> Any:
    """Return what a module returned, with a stamp on it."""
    if isinstance(output, Tensor):
        return _Stamp.apply(output, border)
    # a router returns several; its gate values are the last that learn
    learning = [i for i, value in enumerate(output) if _learns(value)]
    last = learning[-1]
    marked = _Stamp.apply(output[last], border)
    return (*output[:last], marked, *output[last + 1 :])


class PartClock:
    """Adds up the time that modules of a model take; `watch` names them, `seconds` reads the clock.

    Args:
        device: the model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now = clock_of(device)
        self.stamps: list[tuple[str, bool, Moment]] = []
        self.handles: list[RemovableHandle] = []

    def stamp(self, part: str, entering: bool) -> None:
        """Note the moment at which a part is entered or left."""
        moment: Moment
        if self.device.type == "cuda":
            # waiting for the GPU here would slow down what is measured
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = self.now()
        self.stamps.append((part, entering, moment))

    def watch(self, part: str, module: nn.Module) -> None:
        """Count the module's time as `part`."""
        entry = _Border(self, part, entering=True)
        exit_ = _Border(self, part, entering=False)

        def before(
            _: nn.Module, args: tuple[object, ...], options: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            # transformers passes hidden states by position to some modules, by name to others
            values = [*args, *options.values()]
            learning = [i for i, value in enumerate(values) if _learns(value)]

            first = learning[0]
            values[first] = _Stamp.apply(values[first], entry)
            positional = values[: len(args)]
            named = zip(options, values[len(args) :], strict=True)
            return tuple(positional), dict(named)

        def after(_: nn.Module, __: object, output: Any) -> Any:
            return _stamped(output, exit_)

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
            # an event has no time before the GPU has passed it
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        begun: dict[str, Moment] = {}
        for part, entering, moment in self.stamps:
            if entering:
                begun[part] = moment
            else:
                passed = _passed(begun.pop(part), moment)
                found[part] = found.get(part, 0.0) + passed
        self.stamps.clear()
        return found


def _find(block: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        # torch has no way to ask whether there is one
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


def watch_model(model: nn.Module, clock: PartClock) -> None:
    """Watch attention, feed-forward block with its parts, and output layer.

    The model is one of `benchmarks.models`.
    """
    for layer in cast(nn.ModuleList, model.get_submodule("model.layers")):
        clock.watch("attention", layer.get_submodule("self_attn"))
        block = layer.get_submodule("mlp")
        mixture = False
        for part, paths in BLOCK_PARTS.items():
            module = _find(block, paths)
            if module is not None:
                clock.watch(part, module)
                mixture = True
        clock.watch("block" if mixture else "ffn", block)
    clock.watch("head + loss", model.get_submodule("lm_head"))


def shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    """Return each part's share of `total` seconds.

    Dispatch is what a block does besides its parts, rest the remainder.
    """
    known = dict(seconds)
    block = known.pop("block", None)
    if block is not None:
        inside = [known.get(part, 0.0) for part in BLOCK_PARTS]
        known["dispatch"] = block - sum(inside)
    known["rest"] = total - sum(known.values())
    return {part: known[part] / total for part in PARTS if part in known}
