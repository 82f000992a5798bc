"""The rig itself: what CUDA refuses is refused, what it takes is computed, and waits are counted.

That it is right about CUDA is read off torch's sources and documentation; nothing here shows it.
"""

import pytest
import torch
from pretend import GPU, TwoDevices, gpu, on_device, to_gpu, values

HOST = torch.arange(6.0).view(2, 3)


@pytest.fixture
def there():
    return to_gpu(HOST)


@pytest.mark.parametrize(
    "meet",
    [
        lambda here, there: there @ here.T,
        lambda here, there: there + here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.index_add_(0, torch.tensor([0, 1]), there),
        lambda here, there: torch.nn.functional.embedding(torch.tensor([0]), there),
        lambda here, there: here[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda here, there: there.normal_(generator=torch.Generator()),
    ],
)
def test_what_meets_on_two_devices_is_refused(there, meet):
    with gpu(), pytest.raises(TwoDevices):
        meet(HOST.clone(), there)


def test_a_number_in_a_tensor_of_the_host_may_meet_a_tensor_of_the_device(there):
    with gpu() as watch:
        found = there * torch.tensor(2.0)
    assert on_device(found) and torch.equal(values(found), 2 * HOST)
    assert not watch.waits


WAITING = {
    "value": lambda t: t.sum().item(),
    "value ": lambda t: bool((t > 0).any()),
    "size": lambda t: t[t > 2],
    "size ": lambda t: torch.bincount(t.long().flatten(), minlength=9),
    "size  ": lambda t: t[0].repeat_interleave(t[0].long()),
    "to host": lambda t: t.cpu(),
    "to host ": lambda t: t.tolist(),
    "to device": lambda t: HOST.to(GPU),
    "to device ": lambda t: HOST.pin_memory().to(GPU),
    "to device  ": lambda t: HOST.to(GPU, non_blocking=True),
    "to device   ": lambda t: torch.tensor([1.0], device=GPU),
    "to device    ": lambda t: t[torch.tensor([1])],
    "to device     ": lambda t: t.copy_(HOST),
}


@pytest.mark.parametrize("reason", WAITING)
def test_what_the_host_waits_for_is_counted_once(there, reason):
    with gpu() as watch:
        WAITING[reason](there)
    assert {wait.partition(": ")[2]: n for wait, n in watch.waits.items()} == {reason.strip(): 1}


def test_a_copy_from_pinned_memory_and_work_on_the_device_are_not_waited_for(there):
    with gpu() as watch:
        copied = HOST.pin_memory().to(GPU, non_blocking=True)
        out = torch.empty(2, 2, device=GPU)
        torch.mm(copied, there.T, out=out)
        out[1:].mul_(2)
        out[0].repeat_interleave(torch.ones_like(out[0]).long(), output_size=2)
        total = out.sum() + torch.full((), 1.0, device=GPU)
    assert not watch.waits
    product = HOST @ HOST.T
    assert float(values(total)) == float(product[0].sum() + 2 * product[1].sum() + 1)


def test_gradients_are_those_of_the_host():
    """Views, changes in place and inference mode included."""
    found = []
    for place in (lambda tensor: tensor.clone(), to_gpu):
        weight = torch.nn.Parameter(place(HOST))
        with gpu():
            product = weight * 1
            product[1:].mul_(3)
            (product.T @ weight).square().mean().backward()
            with torch.inference_mode():
                assert float(weight[:, 0].sum()) == 3.0
        found.append(values(weight.grad))
    assert torch.equal(*found)
