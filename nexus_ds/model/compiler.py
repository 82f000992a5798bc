"""torch's compiler where it is optional: does it work here, and what to say where it doesn't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nexus_ds.errors import ConfigError


@contextmanager
def saying_why(setting: str) -> Iterator[None]:
    """Let what is compiled inside fail with the setting that asked for it.

    Raises:
        ConfigError: torch.compile fails, for want of a compiler as a rule.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # Of several classes; Dynamo's own are of this one.
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{setting}: torch.compile failed: {reason}; expected a compiler (Triton for GPUs, g++ "
            f"for CPUs): install it, or set {setting}=eager"
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1


def check_compiler(device: torch.device, setting: str) -> None:
    """Compile and run a small function on a device.

    Raises:
        ConfigError: that fails; it names the setting.
    """
    with saying_why(setting):
        torch.compile(_probe, fullgraph=True)(torch.zeros(2, device=device))
