"""Checkpoints of the router input `context` as a transformers model.

It is a Qwen2-MoE whose routers read a running mean. `register` makes AutoConfig and
AutoModelForCausalLM know the model type; `import nexus_ds.hf` does it for users. In generation each
layer's cache keeps one vector more, the sum of the router inputs so far.
Shapes: B sequences, S tokens, T = B*S, H hidden size.
Not covered: static, quantised and offloaded caches (refused), assisted generation; vLLM, which has
a model of its own (`serving/vllm_context`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeDecoderLayer,
    Qwen2MoeModel,
    Qwen2MoeTopKRouter,
)

from nexus_ds.checkpoint.config_json import CONTEXT_MODEL
from nexus_ds.errors import UnsupportedModelError
from nexus_ds.model.context import context_of, running_mean


class _Sum:
    """What a cache layer adds to its keys and values: the router inputs so far."""

    so_far: tuple[Tensor, Tensor] | None = None
    """Their sum [B, H] and count [B, 1]."""

    def _take(self, index: Tensor) -> None:
        if self.so_far is not None:
            self.so_far = self.so_far[0][index], self.so_far[1][index]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.so_far = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.so_far is None:
            return
        sum_BH, _ = self.so_far
        rows = torch.arange(len(sum_BH), device=sum_BH.device)
        self._take(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        # the inputs of single tokens are gone: only their sum is kept
        if tokens_to_remove and self.so_far is not None:
            raise UnsupportedModelError(
                f"a router that reads a running mean can't take {tokens_to_remove} tokens back; "
                "generate without an assistant"
            )


class _SumLayer(_Sum, DynamicLayer):
    """Full attention."""


class _SlidingSumLayer(_Sum, DynamicSlidingWindowLayer):
    """Sliding-window attention: the running mean still is over all tokens."""


def summing(cache: Any, config: Any) -> Any:
    """Return a cache whose layers keep running sums.

    That is a new one, or the given one if it has them or is still empty.

    Raises:
        UnsupportedModelError: another kind of cache, or one that was filled without sums.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if cache.layers and isinstance(cache.layers[0], _Sum):
        return cache
    # a subclass may keep its layers elsewhere, and an offloaded one moves them about
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not plain or cache.get_seq_length():
        raise UnsupportedModelError(
            f"this model needs an empty DynamicCache to start from, "
            f"found {type(cache).__name__} with {cache.get_seq_length()} tokens; "
            "leave the cache's implementation to the default"
        )
    layers: list[DynamicLayer] = []
    for kind in config.layer_types:
        sliding = kind == "sliding_attention"
        layers.append(_SlidingSumLayer(config.sliding_window) if sliding else _SumLayer())
    cache.layers = layers
    return cache


class ContextRouter(Qwen2MoeTopKRouter):
    """Scores tokens by the running mean of the router inputs of their text."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mean = nn.Parameter(torch.zeros(config.hidden_size))
        self.reads: tuple[int, Tensor | None, Any] | None = None

    @contextmanager
    def reading(
        self,
        length: int,
        valid_BS: Tensor | None = None,
        memory: Any = None,
    ) -> Iterator[None]:
        """Say what is read inside the context.

        Args:
            length: new tokens of each text.
            valid_BS: 0 for padding; None: no padding.
            memory: the layer's cache, whose sums go on.
        """
        self.reads = length, valid_BS, memory
        try:
            yield
        finally:
            self.reads = None

    def forward(self, hidden_states: Tensor) -> Any:
        """Return logits [T, E], gate values and choices [T, K] of inputs [T, H]."""
        assert self.reads is not None
        length, valid_BS, memory = self.reads
        x_BSH = hidden_states.view(-1, length, hidden_states.shape[-1])
        mean_BSH, after = running_mean(x_BSH, valid_BS, memory.so_far if memory else None)
        if memory is not None:
            memory.so_far = after
        return super().forward(context_of(mean_BSH, self.mean, x_BSH.dtype))


class NexusMoeDecoderLayer(Qwen2MoeDecoderLayer):
    """A decoder layer that tells its router what this very pass reads.

    It does so inside of what activation checkpointing repeats: a pass that is made again, while
    others have been made in between, reads its own text's length and padding. Caches are left out
    there (transformers takes them away).
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp.gate = ContextRouter(config)
        self.index = layer_idx

    def forward(
        self, hidden_states: Tensor, *args: Any, valid_BS: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As a Qwen2-MoE's, with `valid_BS` (0 for padding; None: no padding) for the router."""
        cache: Any = kwargs.get("past_key_values")
        memory = None if cache is None else cache.layers[self.index]
        gate: Any = self.mlp.gate
        with gate.reading(hidden_states.shape[1], valid_BS, memory):
            return super().forward(hidden_states, *args, **kwargs)


class NexusMoeConfig(Qwen2MoeConfig):
    """A Qwen2-MoE's settings under another name."""

    model_type = CONTEXT_MODEL


class NexusMoeModel(Qwen2MoeModel):
    """A Qwen2-MoE whose routers read running means."""

    config_class = NexusMoeConfig
    _no_split_modules = ["NexusMoeDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            NexusMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run as a Qwen2-MoE does.

        Its layers are told which tokens are padding, and their caches keep sums.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache or past_key_values is not None:
            past_key_values = summing(past_key_values, self.config)
        length = given.shape[1] if given is not None else 0
        valid_BS = None
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                raise UnsupportedModelError(
                    "this model needs to know which tokens are padding: "
                    "give attention_mask as [sequences, tokens]"
                )
            # it tells of the tokens in the cache, too; the sums have those already
            valid_BS = attention_mask[:, -length:]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            valid_BS=valid_BS,
            **kwargs,
        )


class NexusMoeForCausalLM(Qwen2MoeForCausalLM):
    """The language model that `AutoModelForCausalLM` loads for `model_type` nexus_moe."""

    config_class = NexusMoeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = NexusMoeModel(config)
        self.post_init()


def register() -> None:
    """Make transformers' Auto classes know the model; further calls change nothing."""
    AutoConfig.register(CONTEXT_MODEL, NexusMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(NexusMoeConfig, NexusMoeForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(CONTEXT_MODEL, mapping, overwrite=True)
