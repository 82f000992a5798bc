"""What micro-batches tell of losses and routing, summed on the device over a stretch of steps.

Shapes: B sequences, S tokens of one, T = B S tokens, D domains, E routed experts, K chosen ones a
token. Sums are float64: a log interval may hold more tokens than float32 counts exactly (2^24).
Not covered: when a stretch begins and ends, and where its numbers go (`loop`, `metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_ds.runtime.nexus_moe import NexusMoE
from nexus_ds.runtime.ranks import all_reduce_sum


@dataclass(frozen=True)
class RouterNumbers:
    """Means over layers, forward passes and ranks of what the routers did."""

    load_balance: float
    """Unit load-balancing loss; 1 where tokens are spread evenly."""
    z: float
    """Unit z-loss."""
    gate: float
    """Largest probability of a token."""
    load_min: float
    """Share of the assignments at the expert that has the fewest."""
    load_max: float
    """Share of the assignments at the expert that has the most."""


class Tally:
    """Sums over a stretch of batches: loss and tokens per domain, routing per domain and expert.

    Args:
        domains: number of domains D.
        experts: number of routed experts E; 0 for a dense model.
        device: where the sums are kept; no pass waits for them.
    """

    def __init__(self, domains: int, experts: int, device: torch.device) -> None:
        self.experts = experts
        self.loss_D = torch.zeros(domains, dtype=torch.float64, device=device)
        self.tokens_D = torch.zeros_like(self.loss_D)
        self.routed_DE = torch.zeros(domains, max(experts, 1), dtype=torch.float64, device=device)
        # load balance, z, gate, passes of a layer
        self.router_4 = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, losses_BS: Tensor, domain_B: Tensor, layers: Sequence[NexusMoE]) -> None:
        """Add one forward pass.

        Args:
            losses_BS: loss of each token in nats.
            domain_B: index of each sequence's domain, int64.
            layers: whose routers have just seen these tokens.
        """
        length = losses_BS.shape[1]
        tokens_B = torch.full_like(domain_B, length, dtype=torch.float64)
        self.loss_D.index_add_(0, domain_B, losses_BS.detach().double().sum(1))
        self.tokens_D.index_add_(0, domain_B, tokens_B)
        domain_T = domain_B.repeat_interleave(length)
        for layer in layers:
            self._add_routing(layer, domain_T)

    def _add_routing(self, layer: NexusMoE, domain_T: Tensor) -> None:
        seen = layer.router.latest
        assert seen is not None, "the layer has had no forward pass"
        cell_TK = domain_T[:, None] * self.experts + seen.selected_TK
        ones = torch.ones(cell_TK.numel(), dtype=torch.float64, device=cell_TK.device)
        self.routed_DE.view(-1).scatter_add_(0, cell_TK.reshape(-1), ones)
        one_pass = torch.ones_like(seen.z)
        values_4 = torch.stack([seen.load_balance, seen.z, seen.gate_T1.mean(), one_pass])
        self.router_4 += values_4.double()

    def reduced(self) -> Tally:
        """Sum over all ranks (all must call); return self."""
        for tensor in (self.loss_D, self.tokens_D, self.routed_DE, self.router_4):
            all_reduce_sum(tensor)
        return self

    def losses(self, names: Sequence[str]) -> dict[str, float]:
        """Return the mean loss per domain that was seen, nats a token."""
        pairs = zip(names, self.loss_D.tolist(), self.tokens_D.tolist(), strict=True)
        return {name: loss / tokens for name, loss, tokens in pairs if tokens}

    def mean_loss(self) -> float:
        """Return the mean loss over all tokens, in nats."""
        return float(self.loss_D.sum() / self.tokens_D.sum().clamp_min(1))

    def router(self) -> RouterNumbers | None:
        """Return what the routers did; None for a dense model."""
        if not self.experts:
            return None
        balance, z, gate, passes = self.router_4.tolist()
        share_E = self.routed_DE.sum(0) / self.routed_DE.sum().clamp_min(1)
        return RouterNumbers(
            load_balance=balance / passes,
            z=z / passes,
            gate=gate / passes,
            load_min=float(share_E.min()),
            load_max=float(share_E.max()),
        )

    def routing(self, names: Sequence[str], experts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return {domain: {expert: share of its assignments, mean over layers}} of domains seen."""
        if not self.experts:
            return {}
        found = {}
        for name, counts_E in zip(names, self.routed_DE.tolist(), strict=True):
            total = sum(counts_E)
            if total:
                shares = (count / total for count in counts_E)
                found[name] = dict(zip(experts, shares, strict=True))
        return found
