"""What micro-batches tell of losses and routing, summed on the device over a stretch of steps.

Shapes: B sequences, S tokens of one, T = B S tokens, D domains, E routed experts, K chosen ones a
token, N = T K assignments. Sums are float64: a log interval may hold more tokens than float32
counts exactly (2^24).
Not covered: when a stretch begins and ends, and where its numbers go (`loop`, `metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_ds.runtime.nexus_moe import NexusMoE
from nexus_ds.runtime.ranks import all_reduce_sum

Routing = dict[str, dict[str, float]]
"""{domain: {expert: share of the domain's assignments}}."""


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
        # A dense model has one column, which nothing is added to.
        self.routed_DE = self.loss_D.new_zeros(domains, max(experts, 1))
        # Load balance, z, gate, passes of a layer.
        self.router_4 = self.loss_D.new_zeros(4)

    def add(self, losses_BS: Tensor, domain_B: Tensor, layers: Sequence[NexusMoE]) -> None:
        """Add one forward pass.

        Args:
            losses_BS: loss of each token in nats.
            domain_B: index of each sequence's domain, int64.
            layers: whose routers have just seen these tokens.
        """
        length = losses_BS.shape[1]
        tokens_B = torch.full_like(domain_B, length, dtype=torch.float64)
        loss_B = losses_BS.detach().double().sum(1)
        self.loss_D.index_add_(0, domain_B, loss_B)
        self.tokens_D.index_add_(0, domain_B, tokens_B)
        domain_T = domain_B.repeat_interleave(length)
        for layer in layers:
            self._add_routing(layer, domain_T)

    def _add_routing(self, layer: NexusMoE, domain_T: Tensor) -> None:
        seen = layer.router.latest
        assert seen is not None, "the layer has had no forward pass"
        # One scatter into the flattened table: (domain, expert) is domain * E + expert.
        cell_N = (domain_T[:, None] * self.experts + seen.selected_TK).flatten()
        one_N = torch.ones_like(cell_N, dtype=torch.float64)
        self.routed_DE.view(-1).scatter_add_(0, cell_N, one_N)
        gate = seen.gate_T1.mean()
        values_4 = torch.stack([seen.load_balance, seen.z, gate, torch.ones_like(gate)])
        self.router_4 += values_4.double()

    def reduced(self) -> Tally:
        """Sum over all ranks (all must call); return self."""
        for tensor in (self.loss_D, self.tokens_D, self.routed_DE, self.router_4):
            all_reduce_sum(tensor)
        return self

    def losses(self, names: Sequence[str]) -> dict[str, float]:
        """Return the mean loss per domain that was seen, nats a token."""
        sums = zip(names, self.loss_D.tolist(), self.tokens_D.tolist(), strict=True)
        return {name: loss / tokens for name, loss, tokens in sums if tokens}

    def mean_loss(self) -> float:
        """Return the mean loss over all tokens, in nats."""
        tokens = self.tokens_D.sum().clamp_min(1)
        return float(self.loss_D.sum() / tokens)

    def router(self) -> RouterNumbers | None:
        """Return what the routers did; None for a dense model."""
        if not self.experts:
            return None
        balance, z, gate, passes = self.router_4.tolist()
        count_E = self.routed_DE.sum(0)
        share_E = count_E / count_E.sum().clamp_min(1)
        return RouterNumbers(
            load_balance=balance / passes,
            z=z / passes,
            gate=gate / passes,
            load_min=float(share_E.min()),
            load_max=float(share_E.max()),
        )

    def routing(self, names: Sequence[str], experts: Sequence[str]) -> Routing:
        """Return the routing of the domains that were seen, mean over layers."""
        if not self.experts:
            return {}
        found = {}
        for name, counts_E in zip(names, self.routed_DE.tolist(), strict=True):
            total = sum(counts_E)
            if total:
                shares = (count / total for count in counts_E)
                found[name] = dict(zip(experts, shares, strict=True))
        return found
