"""Losses and gradient of a chunk of logits: plain, as one function to compile, and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from nexus_ds.errors import ConfigError
from nexus_ds.model.scoring import _losses, _losses_and_gradient, compiled_score, score

VOCABULARY = 300


def chunk(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    logits_cV = 3 * torch.randn(rows, VOCABULARY, generator=generator)
    targets_c = torch.randint(VOCABULARY, (rows,), generator=generator)
    return logits_cV.to(dtype), targets_c


def by_autograd(logits_cV, targets_c, cap=None):
    wide_cV = logits_cV.double().requires_grad_()
    own_cV = wide_cV if cap is None else cap * torch.tanh(wide_cV / cap)
    losses_c = F.cross_entropy(own_cV, targets_c, reduction="none")
    losses_c.sum().backward()
    return losses_c.detach(), wide_cV.grad


def check(losses_c, error_cV, logits_cV, targets_c, cap=None):
    """Losses are fp32's in either precision; a gradient is rounded once, to that of the logits."""
    expected_c, expected_cV = by_autograd(logits_cV, targets_c, cap)
    assert losses_c.dtype == torch.float32 and error_cV.dtype == logits_cV.dtype
    torch.testing.assert_close(losses_c.double(), expected_c, rtol=1e-6, atol=1e-5)
    step = 1e-6 if logits_cV.dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(error_cV.double(), expected_cV, rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunks_losses_and_gradient_are_those_of_cross_entropy(dtype):
    logits_cV, targets_c = chunk(7, dtype)
    check(*score(logits_cV.clone(), targets_c, True), logits_cV, targets_c)
    losses_c, _ = score(logits_cV.clone(), targets_c, False)
    torch.testing.assert_close(losses_c.double(), by_autograd(logits_cV, targets_c)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_logits_are_capped_it_is_the_capped_ones(dtype):
    logits_cV, targets_c = chunk(7, dtype)
    check(*score(logits_cV.clone(), targets_c, True, 2.5), logits_cV, targets_c, 2.5)
    in_place_cV = logits_cV.clone()
    losses_c = _losses_and_gradient(in_place_cV, targets_c, 2.5)
    check(losses_c, in_place_cV, logits_cV, targets_c, 2.5)
    assert torch.equal(_losses(logits_cV, targets_c, 2.5), losses_c)
    alone_c, _ = score(logits_cV.clone(), targets_c, False, 2.5)
    torch.testing.assert_close(alone_c, losses_c, rtol=1e-6, atol=1e-6)
    assert float((losses_c - score(logits_cV, targets_c, False)[0]).abs().max()) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_computes_the_same_in_the_logits_place(dtype):
    logits_cV, targets_c = chunk(7, dtype)
    in_place_cV = logits_cV.clone()
    losses_c = _losses_and_gradient(in_place_cV, targets_c)
    check(losses_c, in_place_cV, logits_cV, targets_c)
    assert torch.equal(_losses(logits_cV, targets_c), losses_c)


def test_a_failing_compiler_is_said(monkeypatch):
    def compile_(function, **_):
        def failing(*_):
            raise torch._dynamo.exc.TorchDynamoException("no Triton here\nand a long trace")

        return failing

    monkeypatch.setattr(torch, "compile", compile_)
    expected = (
        r"training\.loss_kernel: torch\.compile failed: no Triton here; expected a compiler .*: "
        r"install it, or set training\.loss_kernel=eager$"
    )
    with pytest.raises(ConfigError, match=expected):
        compiled_score(4, VOCABULARY, torch.float32, torch.device("cpu"))


@pytest.fixture
def compiler():
    """torch's compiler as a new process finds it."""
    torch._dynamo.reset()
    counters.clear()
    yield inductor
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 2.5])
def test_compiled_for_chunks_of_all_lengths(cap, compiler):
    """The CPU's compiler stands for a GPU's: what is compiled, and for how many shapes, is one."""
    compiled = compiled_score(16, VOCABULARY, torch.bfloat16, torch.device("cpu"), cap)
    assert counters["stats"]["unique_graphs"] == 2
    for rows in (16, 5, 11):
        logits_cV, targets_c = chunk(rows, torch.bfloat16)
        in_place_cV = logits_cV.clone()
        losses_c, error_cV = compiled(in_place_cV, targets_c, True)
        assert error_cV is in_place_cV
        check(losses_c, error_cV, logits_cV, targets_c, cap)
        losses_c, _ = compiled(logits_cV, targets_c, False)
        expected_c, _ = by_autograd(logits_cV, targets_c, cap)
        torch.testing.assert_close(losses_c.double(), expected_c, rtol=1e-6, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so(compiler, tmp_path):
    # By its own `patch`: what pytest's puts back, torch's configuration then lacks
    missing = (None, str(tmp_path / "no-compiler"))
    without = compiler.patch({"cpp.cxx": missing, "force_disable_caches": True})
    with without, pytest.raises(ConfigError, match=r"torch\.compile failed"):
        compiled_score(4, VOCABULARY + 1, torch.float32, torch.device("cpu"))
