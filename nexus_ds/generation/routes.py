"""Where a model sends each token while it generates: its own routers' decisions, read as they fall.

Shapes: B prompts, S new tokens of each, T = B*S, E routed experts, K chosen ones a token, L layers
that have a router.
Not covered: counts over whole texts (`evaluation.passes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from nexus_ds.checkpoint.loading import routers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decision(NamedTuple):
    """Where a token was sent: of each of the L routers the first expert, and its weight."""

    experts: Sequence[int]
    weights: Sequence[float]


class Routes:
    """Reads decisions at a model's routers: `with Routes(model, B) as routes: ...`."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: int,
    ) -> None:
        """Watch passes of a mixture over `prompts` sequences."""
        self.routers = list(routers_of(model).values())
        self.prompts = prompts
        self.handles = []
        for router in self.routers:
            handle = router.register_forward_hook(self._hook)
            self.handles.append(handle)
        self.found: dict[nn.Module, list[Tensor]] = {}

    def __enter__(self) -> Routes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(
        self,
        router: nn.Module,
        inputs: object,
        output: tuple[Tensor, ...],
    ) -> None:
        # transformers 5: (logits, gate values, indices), the likeliest expert first
        _, weight_TK, chosen_TK = output
        # weights of an expert's number would be rounded in bf16: both go as float64
        expert_T = chosen_TK[:, 0].double()
        weight_T = weight_TK[:, 0].double()
        first_T2 = torch.stack([expert_T, weight_T], dim=-1)
        # all sequences of a pass are of one length, with padding
        first_BS2 = first_T2.view(self.prompts, -1, 2)
        self.found.setdefault(router, []).append(first_BS2)

    def take(self) -> list[list[Decision]]:
        """Return, for each sequence, decisions on the tokens that came since the last call."""
        parts = []
        for router in self.routers:
            first_BS2 = torch.cat(self.found[router], dim=1)
            parts.append(first_BS2)
        self.found = {}
        # one copy from the device, not one for each layer
        first_BSL2 = torch.stack(parts, dim=2).tolist()
        return [_decisions(row) for row in first_BSL2]


def _decisions(row: list[list[list[float]]]) -> list[Decision]:
    """Return decisions on a row's tokens, which are lists of an expert's number and weight."""
    decisions = []
    for token in row:
        experts = []
        weights = []
        for expert, weight in token:
            experts.append(int(expert))
            weights.append(weight)
        decisions.append(Decision(experts, weights))
    return decisions


def first_choice(
    decision: Decision,
    place: int | None,
) -> tuple[int, float]:
    """Return the expert that a token is shown with, and its weight.

    Args:
        decision: on the token.
        place: of the router among those of the model, whose own decision it is; None: the expert
            that most routers chose first (of several the one with more weight), with its mean
            weight there.
    """
    if place is not None:
        return decision.experts[place], decision.weights[place]
    votes: dict[int, list[float]] = {}
    for expert, weight in zip(decision.experts, decision.weights, strict=True):
        votes.setdefault(expert, []).append(weight)

    def strength(expert: int) -> tuple[int, float]:
        weights = votes[expert]
        return len(weights), sum(weights)

    chosen = max(votes, key=strength)
    count, total = strength(chosen)
    return chosen, total / count
