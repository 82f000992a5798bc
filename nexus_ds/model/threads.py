"""How many threads torch computes with.

Not covered: numpy's own, whose products of small tensors the package leaves to numpy's loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, for many small tensors; also as a decorator.

    Several share work that takes less time than to wait for each other, and they wait busily: on
    cores that others use as well, ten times as long as the work takes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
