"""The router input `context`: the causal running mean of the hidden states so far, instead of a
token's own.

    r_t = rms_norm(mean of x_1 .. x_t) - mean        x: what a token router would read

What domain a text is of shows in many tokens and hardly in one: rows that were never trained on a
domain find its text by this input, but not by single tokens. All tokens of a text tend to one
expert then; a window that holds several documents is read as one text.
Shapes: B sequences, S tokens, H hidden size.
Not covered: a reset at the borders of documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTEXT_MODEL = "nexus_moe"
"""`model_type` of checkpoints with this input: a stock Qwen2-MoE would route by single tokens."""
EPS = 1e-6


def running_mean(
    x_BSH: Tensor, valid_BS: Tensor | None = None, before: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the mean [B, S, H] fp32 of each token and those before it, and (sum [B, H], count [B,
    1]) after the last.

    Args:
        x_BSH: hidden states.
        valid_BS: 0 for padding, which counts for nothing; None: no padding.
        before: sum and count of earlier tokens of the same texts.
    """
    x_BSH = x_BSH.float()
    count_BS = (
        torch.ones(x_BSH.shape[:2], device=x_BSH.device) if valid_BS is None else valid_BS.float()
    )
    sums_BSH = (x_BSH * count_BS[..., None]).cumsum(1)
    count_BS = count_BS.cumsum(1)
    if before is not None:
        sums_BSH, count_BS = sums_BSH + before[0][:, None], count_BS + before[1]
    mean_BSH = sums_BSH / count_BS.clamp_min(1)[..., None]
    return mean_BSH, (sums_BSH[:, -1], count_BS[:, -1:])


def context_of(mean_BSH: Tensor, centre_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the router reads of running means [B, S, H] fp32, in the model's dtype."""
    scale = torch.rsqrt(mean_BSH.square().mean(-1, keepdim=True) + EPS)
    return (mean_BSH * scale - centre_H.float()).to(dtype)


def context(x_TH: Tensor, length: int, centre_H: Tensor) -> Tensor:
    """Return what the router reads of whole texts of `length` tokens, [T, H] in and out."""
    mean_BSH, _ = running_mean(x_TH.view(-1, length, x_TH.shape[-1]))
    return context_of(mean_BSH, centre_H, x_TH.dtype).view_as(x_TH)
