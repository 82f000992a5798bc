"""What micro-batches tell of losses and routing, summed on the device over a stretch of steps.

Shapes: B sequences, S tokens of one, D domains, E routed experts, K chosen ones a token, N = S K
assignments of a sequence, L layers. Sums are float64: a log interval may hold more tokens than
float32 counts exactly (2^24).
Not covered: when a stretch begins and ends, and where its numbers go (`loop`, `metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_ds.runtime.nexus_moe import NexusMoE, RouterStatistics
from nexus_ds.runtime.ranks import all_reduce_sum

Routing = dict[str, dict[str, float]]
"""{domain: {expert: share of the domain's assignments}}."""


@dataclass(frozen=True)
class RouterNumbers:
    """Means over layers, forward passes and ranks of what the routers did."""

    load_balance: float
    """Unit load-balancing loss; 1 where tokens are spread evenly."""
    z: float | None
    """Unit z-loss; None where its coefficient is 0, so that no router computes it."""
    gate: float
    """Largest probability of a token."""
    load_min: float
    """Share of the assignments at the expert that has the fewest."""
    load_max: float
    """Share of the assignments at the expert that has the most."""


def _seen(layer: NexusMoE) -> RouterStatistics:
    assert layer.router.latest is not None, "the layer has had no forward pass"
    return layer.router.latest


class Tally:
    """Sums over a stretch of batches: loss and tokens per domain, routing per domain and expert.

    Args:
        domains: number of domains D.
        experts: number of routed experts E; 0 for a dense model.
        device: where the sums are kept; no pass waits for them.
    """

    def __init__(self, domains: int, experts: int, device: torch.device) -> None:
        self.experts = experts
        self.domain_D1 = torch.arange(domains, device=device)[:, None]
        self.expert_E = torch.arange(experts, device=device)
        self.loss_D = torch.zeros(domains, dtype=torch.float64, device=device)
        self.tokens_D = torch.zeros_like(self.loss_D)
        # A dense model has one column, which nothing is added to.
        self.routed_DE = self.loss_D.new_zeros(domains, max(experts, 1))
        # Load balance, z, gate, passes of a layer.
        self.router_4 = self.loss_D.new_zeros(4)

    def add(
        self,
        losses_BS: Tensor,
        domain_B: Tensor,
        layers: Sequence[NexusMoE],
        learned_BS: Tensor | None = None,
    ) -> None:
        """Add one forward pass.

        Args:
            losses_BS: loss of each token in nats; 0 of those that are not learned.
            domain_B: index of each sequence's domain, int64.
            layers: whose routers have just seen these tokens.
            learned_BS: which of them are learned, bool; None: all.
        """
        # Sums over what is compared, not additions at an index: those are atomic on a GPU, slow
        # where as many meet as here, and in no certain order.
        mine_DB = self.domain_D1 == domain_B
        loss_B = losses_BS.detach().double().sum(1)
        self.loss_D += torch.where(mine_DB, loss_B, 0.0).sum(1)
        if learned_BS is None:
            self.tokens_D += mine_DB.sum(1) * losses_BS.shape[1]
        else:
            learned_B = learned_BS.sum(1)
            self.tokens_D += torch.where(mine_DB, learned_B, 0).sum(1)
        if layers:
            self._add_routing([_seen(layer) for layer in layers], mine_DB)

    def _add_routing(self, seen: list[RouterStatistics], mine_DB: Tensor) -> None:
        """Add what the routers of all layers, L of them, did in one pass."""
        sequences = mine_DB.shape[1]
        counts = []
        for router in seen:
            chosen_BN1 = router.selected_TK.view(sequences, -1, 1)
            counts.append((chosen_BN1 == self.expert_E).sum(1))
        count_BE = torch.stack(counts).sum(0)
        self.routed_DE += torch.where(mine_DB[:, :, None], count_BE, 0).sum(1)
        balance_L = torch.stack([router.load_balance for router in seen])
        computed = [router.z for router in seen if router.z is not None]
        z_L = torch.stack(computed) if computed else torch.full_like(balance_L, math.nan)
        gate_L = torch.stack([router.gate_T1 for router in seen]).mean(1)
        self.router_4[:3] += torch.stack([balance_L, z_L, gate_L]).double().sum(1)
        self.router_4[3] += len(seen)

    def _sums(self) -> tuple[Tensor, ...]:
        return self.loss_D, self.tokens_D, self.routed_DE, self.router_4

    def copies(self) -> list[Tensor]:
        """Return what was summed so far, for `back_to`."""
        return [tensor.clone() for tensor in self._sums()]

    def back_to(self, copies: Sequence[Tensor]) -> None:
        """Forget what was added since `copies` were taken."""
        for tensor, kept in zip(self._sums(), copies, strict=True):
            tensor.copy_(kept)

    def reduced(self) -> Tally:
        """Sum over all ranks (all must call); return self."""
        for tensor in self._sums():
            all_reduce_sum(tensor)
        return self

    def is_empty(self) -> bool:
        """Return whether nothing was added that stayed."""
        return not self.tokens_D.any()

    def losses(self, names: Sequence[str]) -> dict[str, float]:
        """Return the mean loss per domain that was seen, nats a token that is learned."""
        sums = zip(names, self.loss_D.tolist(), self.tokens_D.tolist(), strict=True)
        return {name: loss / tokens for name, loss, tokens in sums if tokens}

    def mean_loss(self) -> float:
        """Return the mean loss over all tokens that are learned, in nats."""
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
            z=None if math.isnan(z) else z / passes,
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
