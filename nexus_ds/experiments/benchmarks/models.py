"""The models that are compared: one skeleton, one set of weights, and a feed-forward block of each
kind.

Every mixture computes the same function (a test compares their losses), so that their times compare
the same work. The dense
model has as many active parameters: one feed-forward network as wide as the shared and the chosen
routed experts together.
Shapes: E routed experts, K chosen, H hidden size, F inner width, M width of a domain embedding.
Not covered: expert parallelism and ZeRO; one process, plain PyTorch, so that layers are compared
and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexus_ds.errors import ConfigError
from nexus_ds.model.experts import FeedForward
from nexus_ds.model.head import use_loss_head
from nexus_ds.model.losses import attach_loss
from nexus_ds.model.router import Projection, init_projection, layer_generator
from nexus_ds.planning.sizes import Sizes
from nexus_ds.runtime.deepspeed_internals import AutoEPMoELayer, capacity_moe
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement

LOAD_BALANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a comparison."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    experts: int
    batch: int
    """Sequences a step."""
    length: int
    """Tokens of a sequence."""
    top_k: int = 1
    embedding: int = 384

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    def sizes(self) -> Sizes:
        """Return the sizes by which `plan` counts parameters and arithmetic."""
        width = self.hidden
        return Sizes(
            vocabulary=self.vocabulary,
            hidden=width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_size=width // self.heads,
            ffn=self.ffn,
            tied=True,
            experts=self.experts,
            top_k=self.top_k,
            projection=(self.embedding * 2 * width, width * width),
        )


PRESETS = {
    "tiny": Shape(
        hidden=96, layers=3, heads=3, ffn=256, vocabulary=2048, experts=4, batch=8, length=128
    ),
    "cpu": Shape(
        hidden=512, layers=4, heads=8, ffn=1408, vocabulary=8192, experts=4, batch=8, length=256
    ),
    "470m": Shape(
        hidden=1024,
        layers=18,
        heads=16,
        ffn=2432,
        vocabulary=256000,
        experts=6,
        batch=4,
        length=2048,
    ),
}
"""tiny: the demo's; cpu: large enough for matrix products to dominate; 470m: the recipe
nexus-470m."""


def preset(name: str) -> Shape:
    """Return a preset; ConfigError if there is none of that name."""
    if name not in PRESETS:
        raise ConfigError(
            f"--preset: unknown preset {name!r}; expected one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]


@dataclass
class Parts:
    """Weights of one layer's feed-forward block, in the form that NexusMoE takes."""

    experts: list[FeedForward]
    shared: FeedForward
    projection: Projection
    inputs_EM: Tensor

    def rows(self) -> Tensor:
        """Return the router rows [E, H]."""
        return self.projection(self.inputs_EM.to(self.shared.down_proj.weight.dtype)).detach()


def _nexus(parts: Parts, shape: Shape, grouped_mm: bool) -> nn.Module:
    place = Placement(shape.experts)
    router = NexusRouter(
        shape.hidden, place, shape.top_k, parts.projection, parts.inputs_EM, LOAD_BALANCE
    )
    return NexusMoE(place, parts.experts, parts.shared, router, grouped_mm)


class _AutoEP(nn.Module):
    """DeepSpeed's expert-parallel layer as it is, with a Nexus router: its own dispatch and its own
    loop over experts."""

    def __init__(self, parts: Parts, shape: Shape) -> None:
        super().__init__()
        layer: Any = _nexus(parts, shape, True)
        layer.experts.use_grouped_mm = False
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return AutoEPMoELayer.forward(self.layer, x)


def _transformers(parts: Parts, shape: Shape, implementation: str) -> nn.Module:
    """Return a stock block: the shared expert is halved by its gate, so its down projection is
    doubled."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = skeleton_config(shape)
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen2MoeSparseMoeBlock(config)
    stacked = torch.stack(
        [torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in parts.experts]
    )
    block.experts.gate_up_proj = nn.Parameter(stacked.detach())
    block.experts.down_proj = nn.Parameter(
        torch.stack([e.down_proj.weight for e in parts.experts]).detach()
    )
    block.gate.weight = nn.Parameter(parts.rows())
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(parts.shared, name).weight.detach()
        getattr(block.shared_expert, name).weight = nn.Parameter(
            2 * weight if name == "down_proj" else weight
        )
    block.shared_expert_gate.weight = nn.Parameter(torch.zeros_like(parts.rows()[:1]))
    return block


class _Native(nn.Module):
    """DeepSpeed's layer beside a shared expert; its balancing loss rides on the output."""

    def __init__(self, parts: Parts, shape: Shape, drop_tokens: bool) -> None:
        super().__init__()
        self.moe = capacity_moe(
            parts.experts, parts.rows(), top_k=shape.top_k, drop_tokens=drop_tokens
        )
        self.shared_expert = parts.shared

    def forward(self, x: Tensor) -> Tensor:
        routed, balance, _ = self.moe(x)
        return attach_loss(routed, LOAD_BALANCE * balance, 1.0) + self.shared_expert(x)


def _dense(parts: Parts, shape: Shape) -> nn.Module:
    weight = parts.shared.down_proj.weight
    return FeedForward(shape.hidden, shape.ffn * (1 + shape.top_k)).to(weight.device, weight.dtype)


VARIANTS: dict[str, Callable[[Parts, Shape], nn.Module]] = {
    "dense": _dense,
    "nexus-loop": lambda parts, shape: _nexus(parts, shape, False),
    "nexus-grouped": lambda parts, shape: _nexus(parts, shape, True),
    "autoep-loop": _AutoEP,
    "transformers-eager": lambda parts, shape: _transformers(parts, shape, "eager"),
    "transformers-grouped": lambda parts, shape: _transformers(parts, shape, "grouped_mm"),
    "deepspeed": lambda parts, shape: _Native(parts, shape, False),
    "deepspeed-drop": lambda parts, shape: _Native(parts, shape, True),
}
"""dense: equal active parameters; autoep-loop: what NexusMoE is built on; deepspeed: deepspeed.moe
without dropped tokens; deepspeed-drop: with its defaults, where tokens beyond an expert's capacity
are dropped (less work)."""


def skeleton_config(shape: Shape) -> Any:
    """Return the transformers configuration that all variants share."""
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        moe_intermediate_size=shape.ffn,
        shared_expert_intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        qkv_bias=False,
        bos_token_id=None,
        eos_token_id=0,
    )


def _parts(shape: Shape, layer: int, dtype: torch.dtype, inputs_EM: Tensor) -> Parts:
    """Return the same random weights for every variant."""
    torch.manual_seed(layer)
    experts = [FeedForward(shape.hidden, shape.ffn).to(dtype) for _ in range(shape.experts)]
    shared = FeedForward(shape.hidden, shape.ffn).to(dtype)
    projection = Projection(shape.embedding, shape.hidden).cpu()
    init_projection(projection, inputs_EM.cpu(), "balanced", 0.5, layer_generator(0, layer))
    return Parts(experts, shared, projection.to(inputs_EM.device, dtype), inputs_EM)


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Return one variant with its random weights, in training mode.

    Args:
        name: of VARIANTS.
        shape: its sizes.
        device: where it computes.
        dtype: working dtype.
    """
    from transformers import Qwen2MoeForCausalLM

    config = skeleton_config(shape)
    config.num_experts = 0  # cheap dense blocks, replaced below
    vectors = torch.randn(
        shape.experts, shape.embedding, generator=torch.Generator().manual_seed(0)
    )
    inputs_EM = nn.functional.normalize(vectors, dim=-1).to(device)
    with torch.device(device):
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM._from_config(config, dtype=dtype)
        for index, layer in enumerate(model.model.layers):
            layer.mlp = VARIANTS[name](_parts(shape, index, dtype, inputs_EM), shape)
    use_loss_head(model)
    return model.train()
