"""The models that are compared: one skeleton, one set of weights, a block of each kind.

Every mixture computes the same function (a test compares their losses), so that their times compare
the same work. The dense model has as many active parameters: one feed-forward network as wide as
the shared and the chosen routed experts together.
Shapes: E routed experts, K chosen, H hidden size, F inner width, M width of a domain embedding.
Not covered: expert parallelism and ZeRO; one process, plain PyTorch, so that layers are compared
and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nexus_ds.checkpoint.projection_module import from_state
from nexus_ds.checkpoint.records import RouterRecord
from nexus_ds.errors import ConfigError
from nexus_ds.model.compiled import compile_layers
from nexus_ds.model.experts import FeedForward
from nexus_ds.model.head import use_loss_head
from nexus_ds.model.losses import attach_loss
from nexus_ds.model.router import Projection
from nexus_ds.planning.sizes import Sizes
from nexus_ds.runtime.deepspeed_internals import AutoEPMoELayer, capacity_moe, looped_experts
from nexus_ds.runtime.nexus_moe import NexusMoE, NexusRouter, Placement
from nexus_ds.upcycling.new_router import layer_draws, new_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2MoeConfig

LOAD_BALANCE = 0.01
"""Weight of the load-balancing loss: the recipes' default."""


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
        hidden=96,
        layers=3,
        heads=3,
        ffn=256,
        vocabulary=2048,
        experts=4,
        batch=8,
        length=128,
    ),
    "cpu": Shape(
        hidden=512,
        layers=4,
        heads=8,
        ffn=1408,
        vocabulary=8192,
        experts=4,
        batch=8,
        length=256,
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

    def expert_embeddings(self) -> Tensor:
        """Return e_i = P(d_i) of all experts [E, H], in the weights' dtype."""
        dtype = self.shared.down_proj.weight.dtype
        return self.projection(self.inputs_EM.to(dtype)).detach()


def _nexus(parts: Parts, shape: Shape, *, grouped_mm: bool) -> NexusMoE:
    place = Placement(shape.experts)
    router = NexusRouter(
        shape.hidden, place, shape.top_k, parts.projection, parts.inputs_EM, LOAD_BALANCE
    )
    return NexusMoE(place, parts.experts, parts.shared, router, grouped_mm)


class _AutoEP(nn.Module):
    """DeepSpeed's expert-parallel layer as it is, with a Nexus router.

    Dispatch and the loop over experts are its own.
    """

    def __init__(self, parts: Parts, shape: Shape) -> None:
        super().__init__()
        self.layer = _nexus(parts, shape, grouped_mm=False)
        self.layer.experts = looped_experts(self.layer.experts)

    def forward(self, x: Tensor) -> Tensor:
        return AutoEPMoELayer.forward(self.layer, x)


def _copied(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach())


def _transformers(parts: Parts, shape: Shape, *, implementation: str) -> nn.Module:
    """Return a stock block that computes what NexusMoE does."""
    # transformers takes a second to load, which other verbs should not pay
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = skeleton_config(shape)
    config._experts_implementation = implementation
    # without memory and numbers: every weight is put in below
    with torch.device("meta"):
        block = Qwen2MoeSparseMoeBlock(config)
    # transformers stacks gate over up: [E, 2F, H]
    gate_up = []
    for expert in parts.experts:
        both = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
        gate_up.append(both)
    block.experts.gate_up_proj = _copied(torch.stack(gate_up))
    down = [expert.down_proj.weight for expert in parts.experts]
    block.experts.down_proj = _copied(torch.stack(down))
    embeddings_EH = parts.expert_embeddings()
    block.gate.weight = _copied(embeddings_EH)
    own, shared = block.shared_expert, parts.shared
    own.gate_proj.weight = _copied(shared.gate_proj.weight)
    own.up_proj.weight = _copied(shared.up_proj.weight)
    # A gate of zeros halves the shared expert (sigmoid(0) = 1/2): its output is doubled.
    own.down_proj.weight = _copied(2 * shared.down_proj.weight)
    block.shared_expert_gate.weight = _copied(torch.zeros_like(embeddings_EH[:1]))
    return block


class _Native(nn.Module):
    """DeepSpeed's layer beside a shared expert; its balancing loss rides on the output."""

    def __init__(self, parts: Parts, shape: Shape, *, drop_tokens: bool) -> None:
        super().__init__()
        self.moe = capacity_moe(
            parts.experts, parts.expert_embeddings(), top_k=shape.top_k, drop_tokens=drop_tokens
        )
        self.shared_expert = parts.shared

    def forward(self, x: Tensor) -> Tensor:
        routed, balance, _ = self.moe(x)
        shared = self.shared_expert(x)
        return attach_loss(routed, LOAD_BALANCE * balance, 1.0) + shared


def _dense(parts: Parts, shape: Shape) -> nn.Module:
    weight = parts.shared.down_proj.weight
    # as wide as all that a token visits: the shared expert and top-k others
    width = shape.ffn * (1 + shape.top_k)
    dense = FeedForward(shape.hidden, width)
    return dense.to(weight.device, weight.dtype)


VARIANTS: dict[str, Callable[[Parts, Shape], nn.Module]] = {
    "dense": _dense,
    "nexus-loop": partial(_nexus, grouped_mm=False),
    "nexus-grouped": partial(_nexus, grouped_mm=True),
    "autoep-loop": _AutoEP,
    "transformers-eager": partial(_transformers, implementation="eager"),
    "transformers-grouped": partial(_transformers, implementation="grouped_mm"),
    "deepspeed": partial(_Native, drop_tokens=False),
    "deepspeed-drop": partial(_Native, drop_tokens=True),
}
"""dense: equal active parameters; autoep-loop: what NexusMoE is built on; deepspeed: deepspeed.moe
without dropped tokens; deepspeed-drop: with its defaults, where tokens beyond an expert's capacity
are dropped (less work)."""


COMPILED = {"dense-compiled": "dense", "nexus-compiled": "nexus-grouped"}
"""Variants with compiled layers (training.layer_kernels), which want a compiler: name to the same
without."""


def skeleton_config(shape: Shape) -> Qwen2MoeConfig:
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


def random_projection(inputs_EM: Tensor, hidden_size: int, layer: int) -> Projection:
    """Return the P of one layer that a new mixture of the seed 0 gets, in the paper's form."""
    router = RouterRecord(
        kind="nexus",
        depth=2,
        width=0,
        projection="swiglu",
        row_norm="free",
        input="token",
        centre=True,
        top_k=1,
    )
    draws = layer_draws(0, layer)
    state = new_state(router, inputs_EM.numpy(), hidden_size, "balanced", 0.5, draws)
    return from_state(router, state)


def _parts(shape: Shape, layer: int, dtype: torch.dtype, inputs_EM: Tensor) -> Parts:
    """Return the same random weights for every variant."""
    torch.manual_seed(layer)
    experts = [FeedForward(shape.hidden, shape.ffn).to(dtype) for _ in range(shape.experts)]
    shared = FeedForward(shape.hidden, shape.ffn).to(dtype)
    projection = random_projection(inputs_EM.cpu(), shape.hidden, layer)
    projection = projection.to(inputs_EM.device, dtype)
    return Parts(experts, shared, projection, inputs_EM)


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return one variant with its random weights, in training mode.

    Args:
        name: of VARIANTS or COMPILED.
        shape: its sizes.
        device: where it computes.
        dtype: working dtype.
    """
    from transformers import Qwen2MoeForCausalLM

    config = skeleton_config(shape)
    # cheap dense blocks, replaced below
    config.num_experts = 0
    generator = torch.Generator().manual_seed(0)
    vectors_EM = torch.randn(shape.experts, shape.embedding, generator=generator)
    inputs_EM = nn.functional.normalize(vectors_EM, dim=-1).to(device)
    with torch.device(device):
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM._from_config(config, dtype=dtype)
        layers = cast(nn.ModuleList, model.get_submodule("model.layers"))
        for index, layer in enumerate(layers):
            parts = _parts(shape, index, dtype, inputs_EM)
            layer.mlp = VARIANTS[COMPILED.get(name, name)](parts, shape)
    use_loss_head(model)
    if name in COMPILED:
        compile_layers(model)
    return model.train()
