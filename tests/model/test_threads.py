"""One thread for small tensors, and as many as before afterwards."""

import pytest
import torch

from nexus_ds.model.threads import one_thread


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_and_then_as_many_as_before():
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_as_a_decorator_also_after_an_error():
    @one_thread()
    def failing():
        assert torch.get_num_threads() == 1
        raise KeyError("x")

    for _ in range(2):
        with pytest.raises(KeyError):
            failing()
        assert torch.get_num_threads() == 2
