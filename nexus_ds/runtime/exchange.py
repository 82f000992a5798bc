"""An all-to-all of token rows that travels while its caller computes, forward and backward.

`start` sends, `wait` returns the received rows. In the backward pass `wait` sends the gradients
back and `start` waits for them: autograd runs the newest nodes first, so whatever was computed
between the two has its backward pass between them too.
Shapes: n and N rows, sent or received, H hidden size.
Not covered: several exchanges at once in one object (one object carries one all-to-all).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """One all-to-all of rows [n, H] within a process group.

    Args:
        group: the ranks that exchange.
        sends: rows for each rank of the group.
        receives: rows from each rank of the group.
    """

    def __init__(self, group: dist.ProcessGroup, sends: list[int], receives: list[int]) -> None:
        self.group = group
        self.sends = sends
        self.receives = receives
        self.work: dist.Work | None = None
        self.arriving: Tensor | None = None

    def back(self) -> Exchange:
        """Return the exchange that takes rows back where this one got them from."""
        return Exchange(self.group, self.receives, self.sends)

    def start(self, rows_NH: Tensor) -> Tensor:
        """Send rows, ordered by receiving rank; return them for `wait` and for nothing else."""
        return _Start.apply(rows_NH, self)

    def wait(self, sent_NH: Tensor) -> Tensor:
        """Return the received rows, ordered by sending rank."""
        return _Wait.apply(sent_NH, self)

    def _send(self, rows_NH: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        arriving_NH = rows_NH.new_empty((sum(receives), rows_NH.shape[1]))
        self.work = dist.all_to_all_single(
            arriving_NH,
            rows_NH.contiguous(),
            output_split_sizes=receives,
            input_split_sizes=sends,
            group=self.group,
            async_op=True,
        )
        return arriving_NH

    def _arrived(self) -> None:
        assert self.work is not None, "wait comes once after each start"
        self.work.wait()
        self.work = None


class _Context(Protocol):
    """What autograd keeps of a pass for its backward pass."""

    exchange: Exchange


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, rows_NH: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.arriving = exchange._send(rows_NH, exchange.sends, exchange.receives)
        # A gradient has the rows that were sent, so must what links the two nodes.
        return rows_NH

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange._arrived()
        return gradients[0], None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, sent_NH: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._arrived()
        received_NH = exchange.arriving
        assert received_NH is not None
        exchange.arriving = None  # or the rows would live as long as the graph
        return received_NH

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        # Gradients of received rows go back to who sent these; `_Start.backward` waits for them.
        exchange = ctx.exchange
        return exchange._send(gradients[0], exchange.receives, exchange.sends), None
