"""What is done to a chunk of logits: its losses and, in training, its gradient.

Two ways with one result. `score` is plain PyTorch; it passes over fp32 copies of the logits several
times. `compiled_score` has torch.compile make one kernel that reads the logits twice and writes the
gradient into their place: 2 bytes of memory a logit in bf16 instead of 8.
Liger's fused linear cross-entropy (liger-kernel 0.8.5) is not used. It cuts tokens into so many
chunks as the vocabulary is wider than the hidden size, of 64 tokens for 8192 tokens, 256k and 1024,
and each chunk reads and writes the weight's whole gradient; it waits for the device once a pass.
Shapes: c tokens of a chunk, V vocabulary.
Not covered: products with the weight (`head`), label smoothing, ignored targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ds.model.compiler import saying_why

Score = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""(logits [c, V], targets [c], whether to learn) -> (losses [c] fp32, gradient [c, V]).

The gradient of the sum of the losses by the logits is softmax(logits) - one_hot(target), in their
dtype; without learning it means nothing. The logits may be overwritten. Where a model caps its
logits, losses are of the capped ones, in fp32, and the gradient is by those that come.
"""


def _capped(logits_cV: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits_cV / cap) * cap


def score(
    logits_cV: Tensor, targets_c: Tensor, learn: bool, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return losses and gradient of a chunk in plain PyTorch; see `Score`."""
    dtype = logits_cV.dtype
    targets_c1 = targets_c[:, None]
    # Under their own name the first ones go before there are second ones.
    logits_cV = logits_cV.float()
    capped_cV = None
    if cap is not None:
        # In place, as below.
        logits_cV.div_(cap).tanh_().mul_(cap)
        capped_cV = logits_cV
    log_p_cV = F.log_softmax(logits_cV, dim=-1)
    del logits_cV
    losses_c = -log_p_cV.gather(1, targets_c1)[:, 0]
    if not learn:
        return losses_c, log_p_cV
    # In place: a second tensor as wide as the vocabulary would double the memory of a chunk.
    error_cV = log_p_cV.exp_()
    minus_1_c1 = error_cV.new_full((1, 1), -1.0).expand_as(targets_c1)
    error_cV.scatter_add_(1, targets_c1, minus_1_c1)
    if capped_cV is not None and cap is not None:
        tanh_cV = capped_cV.div_(cap)
        slope_cV = tanh_cV.square_().neg_().add_(1)
        error_cV *= slope_cV
        # else they would be there beside the rounded gradient
        del capped_cV, tanh_cV, slope_cV
    return losses_c, error_cV.to(dtype)


def _losses(logits_cV: Tensor, targets_c: Tensor, cap: float | None = None) -> Tensor:
    wide_cV = logits_cV.float()
    if cap is not None:
        wide_cV = _capped(wide_cV, cap)
    chosen_c = wide_cV.gather(1, targets_c[:, None])[:, 0]
    return torch.logsumexp(wide_cV, dim=-1) - chosen_c


def _losses_and_gradient(logits_cV: Tensor, targets_c: Tensor, cap: float | None = None) -> Tensor:
    """Return the losses; the logits become their gradient."""
    wide_cV = logits_cV.float()
    if cap is not None:
        wide_cV = _capped(wide_cV, cap)
    targets_c1 = targets_c[:, None]
    log_sum_c1 = torch.logsumexp(wide_cV, dim=-1, keepdim=True)
    losses_c1 = log_sum_c1 - wide_cV.gather(1, targets_c1)
    # A comparison and no scatter: it fuses with what is around it.
    columns_V = torch.arange(logits_cV.shape[1], device=logits_cV.device)
    one_hot_cV = columns_V == targets_c1
    error_cV = torch.exp(wide_cV - log_sum_c1) - one_hot_cV.float()
    if cap is not None:
        slope_cV = 1 - (wide_cV / cap).square()
        error_cV = error_cV * slope_cV
    logits_cV.copy_(error_cV)
    return losses_c1[:, 0]


def compiled_score(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    cap: float | None = None,
) -> Score:
    """Return the same, compiled for a vocabulary and tried on a chunk of `rows` tokens.

    Raises:
        ConfigError: torch.compile fails, for want of a compiler as a rule.
    """
    losses = torch.compile(_losses, fullgraph=True)
    losses_and_gradient = torch.compile(_losses_and_gradient, fullgraph=True)

    # Always so: a kernel is compiled anew where gradients are recorded.
    @torch.no_grad()
    def compiled(logits_cV: Tensor, targets_c: Tensor, learn: bool) -> tuple[Tensor, Tensor]:
        # One kernel for chunks of all lengths; the width is a constant of it.
        for tensor in (logits_cV, targets_c):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        run = losses_and_gradient if learn else losses
        return run(logits_cV, targets_c, cap), logits_cV

    # As many rows as will come: how a kernel is laid out depends on what it saw first.
    logits_cV = torch.zeros(rows, vocabulary, dtype=dtype, device=device)
    targets_c = torch.zeros(rows, dtype=torch.int64, device=device)
    with saying_why("training.loss_kernel"):
        compiled(logits_cV, targets_c, False)
        compiled(logits_cV, targets_c, True)
    return compiled
