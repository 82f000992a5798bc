"""What a micro-batch tells about losses and routing, summed on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_ds.runtime.engine import (
    all_reduce_sum,
)


class Tally:
    """Sums over a stretch of batches: loss and tokens per domain, assignments per domain and routed
    expert."""

    def __init__(self, domains: int, experts: int, device: torch.device) -> None:
        self.loss_D = torch.zeros(domains, dtype=torch.float64, device=device)
        self.tokens_D = torch.zeros_like(self.loss_D)
        self.routed_DE = torch.zeros(domains, max(experts, 1), dtype=torch.float64, device=device)
        # load balance, z, gate, layer passes
        self.router_3 = torch.zeros(4, dtype=torch.float64, device=device)
        self.experts = experts

    def add(self, losses_BS: Tensor, domain_B: Tensor, layers: list[Any]) -> None:
        """Add one forward pass: losses [B, S], the domain of each sequence, and the layers' last
        routing."""
        self.loss_D.index_add_(0, domain_B, losses_BS.detach().double().sum(1))
        self.tokens_D.index_add_(
            0, domain_B, torch.full_like(domain_B, losses_BS.shape[1], dtype=torch.float64)
        )
        for layer in layers:
            seen = layer.router.latest
            domain_T = domain_B.repeat_interleave(losses_BS.shape[1])
            cell_TK = domain_T[:, None] * self.experts + seen.selected_TK
            ones = torch.ones(cell_TK.numel(), dtype=torch.float64, device=cell_TK.device)
            self.routed_DE.view(-1).scatter_add_(0, cell_TK.reshape(-1), ones)
            values = [seen.load_balance, seen.z, seen.gate_T1.mean(), torch.ones_like(seen.z)]
            self.router_3 += torch.stack(values).double()

    def reduced(self) -> Tally:
        """Sum over all ranks (all must call); return self."""
        for tensor in (self.loss_D, self.tokens_D, self.routed_DE, self.router_3):
            all_reduce_sum(tensor)
        return self

    def losses(self, names: list[str]) -> dict[str, float]:
        """Return the mean loss per domain that was seen, nats a token."""
        pairs = zip(names, self.loss_D.tolist(), self.tokens_D.tolist(), strict=True)
        return {name: loss / tokens for name, loss, tokens in pairs if tokens}

    def mean_loss(self) -> float:
        """Return the mean loss over all tokens."""
        return float(self.loss_D.sum() / self.tokens_D.sum().clamp_min(1))

    def router(self) -> dict[str, float]:
        """Return unit losses, mean gate and the smallest and largest share of assignments of a
        routed expert."""
        if not self.experts:
            return {}
        balance, z, gate, passes = self.router_3.tolist()
        share_E = self.routed_DE.sum(0) / self.routed_DE.sum().clamp_min(1)
        return {
            "load_balance": balance / passes,
            "z": z / passes,
            "gate": gate / passes,
            "load_min": float(share_E.min()),
            "load_max": float(share_E.max()),
        }

    def routing(self, names: list[str], experts: list[str]) -> dict[str, dict[str, float]]:
        """Return the share of each seen domain's assignments per routed expert, mean over
        layers."""
        if not self.experts:
            return {}
        total_D = self.routed_DE.sum(1).tolist()
        rows = zip(names, self.routed_DE.tolist(), total_D, strict=True)
        return {n: dict(zip(experts, (c / t for c in row), strict=True)) for n, row, t in rows if t}
