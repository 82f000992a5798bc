"""The router input `context`: the causal running mean of the hidden states instead of a token's.

    r_t = rms_norm(mean of x_1 .. x_t) - m
    x: what a token router would read; m: the mean of the normalised running means at the start

What domain a text is of shows in many tokens and hardly in one: rows that were never trained on a
domain find its text by this input, but not by single tokens. All tokens of a text tend to one
expert then; a window that holds several documents is read as one text.
Shapes: B sequences, S tokens, T = B*S, H hidden size.
Not covered: a reset at the borders of documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def running_mean(
    x_BSH: Tensor,
    valid_BS: Tensor | None = None,
    before: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the mean [B, S, H] fp32 of each token and those before it, and what to go on from.

    Args:
        x_BSH: hidden states.
        valid_BS: 0 for padding, which counts for nothing; None: no padding.
        before: (sum [B, H], count [B, 1]) of earlier tokens of the same texts; None: there are
            none. The same of all tokens so far is returned beside the mean.
    """
    # A sum over a whole text in bf16 would lose its last tokens.
    x_BSH = x_BSH.float()
    if valid_BS is None:
        valid_BS = torch.ones(x_BSH.shape[:2], device=x_BSH.device)
    valid_BS = valid_BS.float()

    sum_BSH = (x_BSH * valid_BS[..., None]).cumsum(1)
    count_BS = valid_BS.cumsum(1)
    if before is not None:
        sum_before_BH, count_before_B1 = before
        sum_BSH = sum_BSH + sum_before_BH[:, None]
        count_BS = count_BS + count_before_B1

    # Padding before the first token has nothing to be the mean of: zeros, not NaN.
    running_BSH = sum_BSH / count_BS.clamp_min(1)[..., None]
    return running_BSH, (sum_BSH[:, -1], count_BS[:, -1:])


def context_of(running_BSH: Tensor, mean_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the router reads [B, S, H], in the model's `dtype`.

    Args:
        running_BSH: running means, fp32.
        mean_H: what is common to all text, so that it decides nothing.
        dtype: of the model.
    """
    mean_square_BS1 = running_BSH.square().mean(-1, keepdim=True)
    normed_BSH = running_BSH * torch.rsqrt(mean_square_BS1 + EPS)
    return (normed_BSH - mean_H.float()).to(dtype)


def context(x_TH: Tensor, length: int, mean_H: Tensor) -> Tensor:
    """Return what the router reads of whole texts of `length` tokens, [T, H] in and out."""
    x_BSH = x_TH.view(-1, length, x_TH.shape[-1])
    running_BSH, _ = running_mean(x_BSH)
    return context_of(running_BSH, mean_H, x_TH.dtype).view_as(x_TH)
