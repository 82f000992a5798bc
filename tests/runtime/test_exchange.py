"""An all-to-all that travels while something else is computed: values, gradients, and the order in
which things happen."""

import pytest
import torch
import torch.distributed as dist

from nexus_ds.runtime.exchange import Exchange


@pytest.fixture
def group(tmp_path):
    """One rank that sends to itself."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


class Watched(Exchange):
    """Notes when it sends and when it waits."""

    def __init__(self, group, rows, log):
        super().__init__(group, [rows], [rows])
        self.log = log

    def _send(self, *arguments):
        self.log.append("send")
        return super()._send(*arguments)

    def _arrived(self):
        self.log.append("wait")
        super()._arrived()


class Noted(torch.autograd.Function):
    """Doubles its input and notes when each of its passes runs."""

    @staticmethod
    def forward(ctx, x, log):
        ctx.log = log
        log.append("compute")
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        ctx.log.append("compute")
        return 2 * gradient, None


def test_rows_and_gradients_arrive(group):
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    exchange = Exchange(group, [3], [3])
    received = exchange.wait(exchange.start(rows))
    assert torch.equal(received, rows) and received.data_ptr() != rows.data_ptr()
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    (received * weight).sum().backward()
    assert torch.equal(rows.grad, weight)


def test_what_is_computed_between_runs_while_rows_and_gradients_travel(group):
    log = []
    rows, x = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    exchange = Watched(group, 3, log)
    sent = exchange.start(rows)
    beside = Noted.apply(x, log)
    out = exchange.wait(sent) + beside
    assert log == ["send", "compute", "wait"]
    log.clear()
    out.sum().backward()
    assert log == ["send", "compute", "wait"]
    assert torch.equal(rows.grad, torch.ones(3, 2)) and torch.equal(x.grad, 2 * torch.ones(3, 2))


def test_the_way_back_swaps_what_is_sent_and_received():
    back = Exchange(None, [1, 2], [3, 4]).back()
    assert (back.sends, back.receives) == ([3, 4], [1, 2])


def test_nothing_to_send_and_no_gradients_asked_for(group):
    with torch.no_grad():
        exchange = Exchange(group, [0], [0])
        assert exchange.wait(exchange.start(torch.ones(0, 2))).shape == (0, 2)
