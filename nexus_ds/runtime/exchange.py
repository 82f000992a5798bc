"""An all-to-all of token rows that travels while its caller computes something else, forward and
backward.

`start` sends, `wait` returns the received rows. In the backward pass `wait` sends the gradients
back and `start` waits for
them: autograd runs the newest nodes first, so whatever was computed between the two has its
backward pass between them too.
Not covered: several exchanges at once in one object (one object carries one all-to-all).
"""

from __future__ import annotations

from typing import Any

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

    def __init__(self, group: Any, sends: list[int], receives: list[int]) -> None:
        self.group, self.sends, self.receives = group, sends, receives
        self.work: Any = None
        self.arriving: Any = None

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
        arriving = rows_NH.new_empty((sum(receives), rows_NH.shape[1]))
        self.work = dist.all_to_all_single(
            arriving, rows_NH.contiguous(), receives, sends, group=self.group, async_op=True
        )
        return arriving

    def _arrived(self) -> None:
        self.work.wait()
        self.work = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.arriving = exchange._send(rows_NH, exchange.sends, exchange.receives)
        return rows_NH  # a gradient has the rows that were sent, so must what links the two nodes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange._arrived()
        return gradients[0], None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent_NH: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._arrived()
        received, exchange.arriving = exchange.arriving, None
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        return exchange._send(gradients[0], exchange.receives, exchange.sends), None
