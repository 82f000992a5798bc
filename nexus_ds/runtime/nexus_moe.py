"""NexusMoE: a layer whose router reads P(D), on DeepSpeed's expert-parallel one (paper section 2).

Shapes: B sequences, S tokens of one, T = B S tokens, E routed experts, K chosen experts a token,
N = T K rows for experts, H hidden size, F inner width, M width of a domain embedding. Slots are the
places where experts live: `slots` is E rounded up to a multiple of the expert-parallel size, vacant
slots are never chosen and hold zeros.
Not covered: capacity and token dropping (the layer is dropless), renormalised gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.model.context import context
from nexus_ds.model.experts import ExpertOrder, FeedForward, RoutedExperts
from nexus_ds.model.losses import attach_loss, load_balancing_loss, router_z_loss
from nexus_ds.model.router import Projection
from nexus_ds.runtime.deepspeed_internals import (
    DeepSpeedMoE,
    DeepSpeedRouter,
    count_tokens_per_expert,
    grouped_products,
    mark_replicated,
)
from nexus_ds.runtime.exchange import Exchange


@dataclass(frozen=True)
class Placement:
    """Where experts live: expert e is on rank e % ep_size of its expert-parallel group.

    One after the other over the ranks, so that vacant slots are spread too: no rank has two more
    experts than another.
    """

    experts: int
    """Routed experts E of the model."""
    ep_size: int = 1
    """Ranks over which they are spread."""
    ep_rank: int = 0
    """This rank among them."""

    @property
    def local_slots(self) -> int:
        """Slots of one rank."""
        return -(-self.experts // self.ep_size)

    @property
    def slots(self) -> int:
        """Slots of all ranks of the group."""
        return self.local_slots * self.ep_size

    def slot(self, expert: int) -> int:
        """Return the slot of a routed expert."""
        return (expert % self.ep_size) * self.local_slots + expert // self.ep_size

    def expert_at(self, slot: int) -> int | None:
        """Return the routed expert in a slot, or None for a vacant one."""
        rank, local_slot = divmod(slot, self.local_slots)
        expert = local_slot * self.ep_size + rank
        return expert if expert < self.experts else None

    def local_experts(self) -> list[int | None]:
        """Return the routed experts of this rank, in slot order."""
        first = self.ep_rank * self.local_slots
        return [self.expert_at(slot) for slot in range(first, first + self.local_slots)]


@dataclass
class RouterStatistics:
    """What the router did in its last forward pass, detached.

    The next pass overwrites it, a recomputed one too. (DeepSpeed's own count of tokens per expert
    grows with every pass, recomputation and evaluation included.)
    """

    selected_TK: Tensor
    """Chosen routed experts, int64."""
    gate_T1: Tensor
    """Largest probability of each token, fp32."""
    load_balance: Tensor
    """Unit load-balancing loss, scalar."""
    z: Tensor | None
    """Unit z-loss, scalar; None where its coefficient is 0: nobody asked for it."""


class NexusRouter(DeepSpeedRouter):
    """Scores tokens against expert embeddings P(D), or free ones, and carries the router's losses.

    Args:
        hidden_size: H.
        placement: which expert is in which slot.
        top_k: K.
        projection: P; None for a linear router with free expert embeddings.
        domain_inputs_EM: what P reads, fp32; None without P.
        load_balance: coefficient of the load-balancing loss.
        z_loss: coefficient of the z-loss.
        mean_H: what is subtracted of the running mean of a text's hidden states, where that is the
            scored input (see `context`); None: each token scores by itself.
    """

    loss_scale: float
    """1 / gradient accumulation steps: the engine scales the main loss by it, so must this."""
    latest: RouterStatistics | None

    def __init__(
        self,
        hidden_size: int,
        placement: Placement,
        top_k: int,
        projection: Projection | None,
        domain_inputs_EM: Tensor | None,
        load_balance: float = 0.0,
        z_loss: float = 0.0,
        mean_H: Tensor | None = None,
    ) -> None:
        super().__init__(hidden_size=hidden_size, slots=placement.slots, top_k=top_k)
        self.projection = projection
        if projection is None:
            self.gate: nn.Linear = nn.Linear(hidden_size, placement.experts, bias=False)
        self.register_buffer("domain_inputs", domain_inputs_EM, persistent=False)
        self.mean = None if mean_H is None else nn.Parameter(mean_H)
        self.length = 0  # of the texts; set in each pass of the layer, so in a recomputed one too
        slots_E = torch.tensor([placement.slot(e) for e in range(placement.experts)])
        self.register_buffer("slot_of_expert", slots_E, persistent=False)
        self.in_order = placement.ep_size == 1
        self.load_balance = load_balance
        self.z_loss = z_loss
        self.loss_scale = 1.0
        self.latest = None

    def logits(self, x_TH: Tensor) -> Tensor:
        """Return x E^T, [T, E] in the dtype of x."""
        if self.mean is not None:
            x_TH = context(x_TH, self.length, self.mean)
        if self.projection is None:
            return self.gate(x_TH)
        assert isinstance(self.domain_inputs, Tensor)
        # P is reached by a module call, so that ZeRO-3 gathers its weights, and reads in the
        # compute dtype: serving has its rows written down in that.
        embeddings_EH = self.projection(self.domain_inputs.to(x_TH.dtype))
        return F.linear(x_TH, embeddings_EH)

    def forward(
        self, x: Tensor, expert_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate values [T, K] fp32, chosen slots [T, K], tokens per slot [slots]."""
        logits_TE = self.logits(x)
        p_TE = F.softmax(logits_TE.float(), dim=-1)
        gate_TK, chosen_TK = torch.topk(p_TE, self.top_k, dim=-1)
        counts_E = count_tokens_per_expert(chosen_TK, p_TE.shape[1])
        load_balance = load_balancing_loss(p_TE, counts_E, self.top_k)
        z = router_z_loss(logits_TE) if self.z_loss else None
        self.latest = RouterStatistics(
            selected_TK=chosen_TK.detach(),
            gate_T1=gate_TK[:, 0].detach(),
            load_balance=load_balance.detach(),
            z=None if z is None else z.detach(),
        )
        if torch.is_grad_enabled() and self.training:
            # Read off the layer after the pass, a loss would have no gradient under re-entrant
            # activation checkpointing, and nothing would say so.
            gate_TK = attach_loss(gate_TK, load_balance, self.loss_scale * self.load_balance)
            if z is not None:
                gate_TK = attach_loss(gate_TK, z, self.loss_scale * self.z_loss)
        # Serving rounds the gate to the compute dtype before it multiplies; training does the same
        # or routes differ.
        gate_TK = gate_TK.to(x.dtype).float()
        return gate_TK, *self._in_slots(chosen_TK, counts_E)

    def _in_slots(self, chosen_TK: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts' slots [T, K] and the rows of each slot [slots]."""
        # One rank has its experts in their own order, and no vacant slot among them.
        if self.in_order:
            return chosen_TK, counts_E
        assert isinstance(self.slot_of_expert, Tensor)
        counts_S = counts_E.new_zeros(self.num_experts)
        counts_S.index_copy_(0, self.slot_of_expert, counts_E)
        return self.slot_of_expert[chosen_TK], counts_S


class _Source(nn.Module):
    """The block that DeepSpeed's layer copies from; other ranks' experts are on the meta device."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        placement: Placement,
        local: list[FeedForward],
        shared: FeedForward,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, placement.slots, bias=False)
        with torch.device("meta"):
            elsewhere = FeedForward(hidden_size, ffn_size)
        before = placement.ep_rank * placement.local_slots
        after = placement.slots - before - placement.local_slots
        self.experts = nn.ModuleList([elsewhere] * before + local + [elsewhere] * after)
        self.shared_expert = shared


class NexusMoE(DeepSpeedMoE):
    """One Nexus layer under DeepSpeed: y = E_0(x) + sum over the top-k of p_i E_i(x).

    The input and the output are [B, S, H].

    Args:
        placement: which experts live on this rank.
        local: this rank's experts in slot order; a vacant slot is a FeedForward of zeros.
        shared: the seed's feed-forward network, always on with weight 1.
        router: scores and auxiliary losses.
        grouped_mm: grouped matrix products instead of a loop over experts.
    """

    router: NexusRouter
    shared_experts: FeedForward

    def __init__(
        self,
        placement: Placement,
        local: list[FeedForward],
        shared: FeedForward,
        router: NexusRouter,
        grouped_mm: bool,
    ) -> None:
        ffn_size, hidden_size = shared.gate_proj.weight.shape
        super().__init__(
            _Source(hidden_size, ffn_size, placement, local, shared),
            slots=placement.slots,
            top_k=router.top_k,
            hidden_size=hidden_size,
            ffn_size=ffn_size,
            ep_size=placement.ep_size,
            ep_rank=placement.ep_rank,
            grouped_mm=grouped_mm,
        )
        self.placement = placement
        self.router = router
        mark_replicated(router)
        self.grouped_mm = grouped_mm
        products = grouped_products(self.experts) if grouped_mm else None
        self.experts = RoutedExperts(self.experts, products, shared.activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the shared expert's output plus the gated routed ones, [B, S, H]."""
        self.router.length = hidden_states.shape[-2]
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate_TK, slots_TK, counts_E = self.router(x_TH)
        if self.ep_size == 1:
            order, routed_NH = self._routed(x_TH, slots_TK, counts_E)
            shared_TH = self.shared_experts(x_TH)
        else:
            order = ExpertOrder(slots_TK)
            routed_NH, shared_TH = self._all_to_all(x_TH, order.dispatch(x_TH), counts_E)
        return (order.combine(routed_NH, gate_TK) + shared_TH).view_as(hidden_states)

    def _routed(
        self, x_TH: Tensor, slots_TK: Tensor, counts_E: Tensor
    ) -> tuple[ExpertOrder, Tensor]:
        """Return an order of rows and, in that order, the outputs of this rank's experts.

        Args:
            x_TH: tokens, or rows that were sent here (then K is 1).
            slots_TK: the places of their experts on this rank.
            counts_E: rows of each.
        """
        if not self.grouped_mm:
            order = ExpertOrder(slots_TK)
            return order, self.experts(order.dispatch(x_TH), counts_E)
        order = ExpertOrder(slots_TK, spare=self.num_local_experts)
        return order, self.experts(order.dispatch(x_TH), counts_E + 1)

    def _all_to_all(self, x_TH: Tensor, rows_NH: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs of the routed experts [N, H], by all-to-all, and of the shared one [T, H].

        The shared expert is computed while rows travel: gate and up projections on the way there,
        the down projection on the way back. Under autograd their backward passes hide the
        gradients' ways alike (docs/slow-links.md). The order of the lines here is that overlap.
        """
        plan = self.split_plan(rows_NH, counts_E)
        assert self.ep_group is not None, "the engine has not joined the layer's ranks yet"
        there = Exchange(self.ep_group, plan.input_splits, plan.output_splits)
        back = there.back()
        shared = self.shared_experts

        sent_NH = there.start(rows_NH)
        inner_TF = shared.inner(x_TH)
        arrived_NH = there.wait(sent_NH)

        # From the order of the senders to that of the experts, and back.
        slots_N1 = _slots_of_arrivals(plan.local_counts_by_source, len(arrived_NH))
        local_counts_E = plan.local_counts_by_source.sum(0, dtype=torch.int32)
        order, outputs_NH = self._routed(arrived_NH, slots_N1, local_counts_E)

        sent_NH = back.start(order.restore(outputs_NH))
        shared_TH = shared.down_proj(inner_TF)
        return back.wait(sent_NH), shared_TH


def _slots_of_arrivals(counts_RE: Tensor, rows: int) -> Tensor:
    """Return the local slots [N, 1] of rows ordered by sending rank and, of each, by expert.

    Args:
        counts_RE: rows from each of the R ranks of the group for each expert of this one.
        rows: their sum N; told, since asking the device for it would wait.
    """
    ends = torch.cumsum(counts_RE.flatten(), 0)
    row_N1 = torch.arange(rows, device=counts_RE.device)[:, None]
    # The stretch of a row is the first that ends behind it.
    return torch.searchsorted(ends, row_N1, right=True) % counts_RE.shape[1]
