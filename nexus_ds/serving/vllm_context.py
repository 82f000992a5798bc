"""vLLM's model for routers that read a running mean (`nexus_moe`): its Qwen2-MoE, with other gates.

The mean of x_1 .. x_t is what causal attention gives for values x if all its logits are equal: with
queries of zeros. So each router has an attention of its own, whose cache holds what was read. vLLM
pages, shares and frees it as it does any other; prompts in pieces, batches, shared prefixes and
tokens that are taken back need nothing more.
Its price is memory: a token's x stands there as key and as value, in every layer.
Shapes: T tokens of all requests, H hidden size, h the part of H of one rank.
Only vLLM imports this, by the name that `vllm_plugin` gives it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM, Qwen2MoeSparseMoeBlock

from nexus_ds.model.context import context_of


class ContextGate(GateLinear):
    """Scores tokens by the running mean of what the MoE blocks of their text have read."""

    def __init__(self, hidden: int, experts: int, heads: int, cache: CacheConfig, at: str) -> None:
        """Make a gate without weights.

        Args:
            hidden: H.
            experts: rows.
            heads: of the layer's own attention, which has their width; ranks share them.
            cache: vLLM's.
            at: its name in the model.
        """
        super().__init__(hidden, experts, prefix=at)
        self.mean = nn.Parameter(torch.empty(hidden), requires_grad=False)
        own_heads = heads // get_tensor_model_parallel_world_size()
        self.width = own_heads * (hidden // heads)
        # The mean is over all tokens, whatever the layer's own attention sees.
        whole = copy.copy(cache)
        whole.sliding_window = None
        self.attention = Attention(
            own_heads,
            hidden // heads,
            scale=1.0,
            cache_config=whole,
            prefix=f"{at}.attention",
        )

    def forward(self, x_TH: Tensor) -> tuple[Tensor, None]:
        """Return logits [T, E] of inputs [T, H], as vLLM's gates do with a bias beside them."""
        start = get_tensor_model_parallel_rank() * self.width
        x_Th = x_TH[:, start : start + self.width].contiguous()
        equal_Th = torch.zeros_like(x_Th)
        mean_TH = self.attention(equal_Th, x_Th, x_Th)
        if self.width < x_TH.shape[1]:
            mean_TH = tensor_model_parallel_all_gather(mean_TH)
        logits, bias = super().forward(context_of(mean_TH.float(), self.mean, x_TH.dtype))
        return logits, bias


class NexusMoeForCausalLM(Qwen2MoeForCausalLM):
    """The language model that vLLM makes for `model_type` nexus_moe."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Make vLLM's model and put the gates into its MoE blocks."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for name, block in list(self.named_modules(prefix=prefix)):
            # layers of other ranks of a pipeline have none
            if isinstance(block, Qwen2MoeSparseMoeBlock):
                block.gate = ContextGate(
                    self.config.hidden_size,
                    self.config.num_experts,
                    self.config.num_attention_heads,
                    vllm_config.cache_config,
                    f"{name}.gate",
                )
