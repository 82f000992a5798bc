"""The plain PyTorch reference of a Nexus MoE layer: the oracle of the tests, one process, no DeepSpeed.

    y = E_0(x) + sum over the top-k of p_i E_i(x),   p = softmax(x P(D)^T)      (paper section 3)

Shapes: B batch, S sequence, T = B*S tokens, E routed experts, K chosen, H hidden, F inner width, M domain embedding.
Not covered: speed. Each expert runs on the tokens that chose it, one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.model.context import EPS
from nexus_ds.model.losses import attach_loss, load_balancing_loss, router_z_loss
from nexus_ds.model.router import Projection


class FeedForward(nn.Module):
    """SwiGLU feed-forward network without biases: [.., H] -> [.., H]."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ReferenceRouter(nn.Module):
    """Rows of the router: P(D) for `nexus`, a free matrix for `linear`."""

    def __init__(
        self,
        hidden_size: int,
        domain_inputs: Tensor | None,
        projection: Projection | None,
        experts: int,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.mean = None if mean is None else nn.Parameter(mean)
        self.register_buffer("domain_inputs", domain_inputs, persistent=False)
        self.gate = None if projection is not None else nn.Linear(hidden_size, experts, bias=False)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Return the router rows [E, H]."""
        if self.gate is not None:
            return self.gate.weight
        assert self.projection is not None and isinstance(self.domain_inputs, Tensor)
        return self.projection(self.domain_inputs.to(dtype))

    def read(self, hidden_states: Tensor) -> Tensor:
        """Return what is scored of hidden states [B, S, H]: [T, H], themselves or, with `mean`, a text's running mean."""
        if self.mean is None:
            return hidden_states.flatten(0, 1)
        means = [hidden_states[:, : end + 1].float().mean(1) for end in range(hidden_states.shape[1])]
        mean_TH = torch.stack(means, dim=1).flatten(0, 1)
        scale = torch.rsqrt(mean_TH.square().mean(-1, keepdim=True) + EPS)
        return (mean_TH * scale - self.mean.float()).to(hidden_states.dtype)


class ReferenceExperts(nn.Module):
    """The routed experts' weights, stacked as DeepSpeed stacks them: w1 gate, w3 up [E, F, H], w2 down [E, H, F]."""

    def __init__(self, experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, ffn_size))
        self.w3 = nn.Parameter(torch.empty(experts, ffn_size, hidden_size))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Return expert `expert` of tokens [t, H]."""
        return F.linear(F.silu(F.linear(x, self.w1[expert])) * F.linear(x, self.w3[expert]), self.w2[expert])


class ReferenceMoE(nn.Module):
    """One MoE layer: [B, S, H] -> [B, S, H]. After a forward pass `losses` holds the unit losses of that pass."""

    def __init__(
        self,
        router: ReferenceRouter,
        experts: ReferenceExperts,
        shared_experts: FeedForward,
        top_k: int,
        load_balance: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.top_k, self.load_balance, self.z_loss = top_k, load_balance, z_loss
        self.loss_scale = 1.0  # 1 / chunks that a batch is cut into; the caller scales the main loss by it too
        self.losses: dict[str, Tensor] = {}
        self.selected: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the shared expert's output plus the gated outputs of the chosen routed experts."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = F.linear(self.router.read(hidden_states), self.router.rows(x_TH.dtype))
        p_TE = F.softmax(logits_TE.float(), dim=-1)
        gate_TK, chosen_TK = torch.topk(p_TE, self.top_k, dim=-1)
        self.losses = {"load_balance": load_balancing_loss(p_TE, chosen_TK), "z": router_z_loss(logits_TE)}
        self.selected = chosen_TK
        total = self.load_balance * self.losses["load_balance"] + self.z_loss * self.losses["z"]
        if total.requires_grad:
            gate_TK = attach_loss(gate_TK, total, self.loss_scale)
        gate_TK = gate_TK.to(x_TH.dtype)  # as transformers: the gate is rounded to the compute dtype
        routed_TH = torch.zeros_like(x_TH)
        for expert in range(p_TE.shape[1]):
            token, slot = torch.where(chosen_TK == expert)
            routed_TH = routed_TH.index_add(0, token, self.experts(x_TH[token], expert) * gate_TK[token, slot, None])
        return (routed_TH + self.shared_experts(x_TH)).view_as(hidden_states)
