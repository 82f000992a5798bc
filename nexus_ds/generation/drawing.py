"""How the next token is chosen: the likeliest, or drawn at a temperature out of the top p.

A draw is a number of [0, 1) and the place where the summed probabilities pass it. The numbers are
made beforehand, on the CPU: a prompt's are its own, whatever stands beside it in a batch, whatever
the device, and however many tokens are asked for.
Shapes: B prompts, N tokens that may be added, S tokens so far, V vocabulary.
Not covered: top-k, beams, penalties (a checkpoint's generation_config.json can ask for those).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEEDS = 1 << 63


@dataclass(frozen=True)
class Drawing:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0: always the likeliest."""
    top_p: float = 1.0
    """Drawn from the likeliest tokens whose probabilities together reach it."""
    seed: int = 0
    """Of the first prompt; the next one has the next seed."""


def numbers(
    seed: int,
    count: int,
    tokens: int,
) -> Tensor:
    """Return float64 numbers [B, N] of [0, 1) for `count` prompts, the first one's by `seed`."""
    rows = []
    for row in range(count):
        own = (seed + row) % SEEDS
        # of the CPU: those of two devices draw other numbers of one seed
        generator = torch.Generator().manual_seed(own)
        numbers_N = torch.rand(
            tokens,
            generator=generator,
            dtype=torch.float64,
        )
        rows.append(numbers_N)
    return torch.stack(rows)


def shares(
    scores_BV: Tensor,
    drawing: Drawing,
) -> Tensor:
    """Return the probabilities (float64 [B, V], they sum to 1) that tokens are drawn with."""
    # in fp64: sums over a large vocabulary in fp32 would move what lies at its end
    scaled_BV = scores_BV.double() / drawing.temperature
    probability_BV = scaled_BV.softmax(dim=-1)
    sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True)
    # A token is in while those before it don't reach p; the first one always is.
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    kept_BV = before_BV < drawing.top_p
    kept_BV[:, 0] = True
    chosen_BV = torch.where(kept_BV, sorted_BV, 0.0)
    nothing_BV = torch.zeros_like(probability_BV)
    found_BV = nothing_BV.scatter(1, token_BV, chosen_BV)
    total_B1 = found_BV.sum(dim=-1, keepdim=True)
    return found_BV / total_B1


class Drawn:
    """What transformers calls a logits processor: it leaves the drawn token as the likeliest."""

    def __init__(
        self,
        drawing: Drawing,
        numbers_BN: Tensor,
        length: int,
    ) -> None:
        """Draw with `numbers_BN` for prompts of `length` tokens, padding included."""
        self.drawing = drawing
        self.numbers_BN = numbers_BN
        self.length = length

    def __call__(
        self,
        input_ids: Tensor,
        scores: Tensor,
    ) -> Tensor:
        """Return scores [B, V] of which one a row is finite, for tokens [B, S] and their scores."""
        # told by the length alone, so that nothing counts along
        step = input_ids.shape[1] - self.length
        number_B1 = self.numbers_BN[:, step : step + 1]
        share_BV = shares(scores, self.drawing)
        passed_BV = share_BV.cumsum(dim=-1)
        # The sum is 1 but for rounding, and a number beyond it would be no token's.
        number_B1 = number_B1 * passed_BV[:, -1:]
        token_B1 = torch.searchsorted(passed_BV, number_B1, right=True)
        # transformers takes the likeliest of what is left
        ruled_out_BV = torch.full_like(scores, -torch.inf)
        return ruled_out_BV.scatter(1, token_B1, 0.0)
