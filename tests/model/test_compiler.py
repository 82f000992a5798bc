"""What is said where torch's compiler fails."""

import pytest
import torch

from nexus_ds.errors import ConfigError
from nexus_ds.model.compiler import check_compiler, saying_why

CPU = torch.device("cpu")


def failing_compiler(function, **_):
    def failing(*_):
        raise torch._dynamo.exc.TorchDynamoException("no Triton here\nand a long trace")

    return failing


def test_a_failing_compiler_names_the_setting_and_what_to_do(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing_compiler)
    expected = (
        r"^training\.layer_kernels: torch\.compile failed: no Triton here; expected a compiler "
        r"\(Triton for GPUs, g\+\+ for CPUs\): install it, or set training\.layer_kernels=eager$"
    )
    with pytest.raises(ConfigError, match=expected):
        check_compiler(CPU, "training.layer_kernels")


def test_no_memory_is_not_taken_for_no_compiler():
    with pytest.raises(torch.OutOfMemoryError), saying_why("training.loss_kernel"):
        raise torch.OutOfMemoryError("CUDA out of memory")
