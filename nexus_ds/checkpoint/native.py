"""Any dense family's own model of transformers, with Qwen2-MoE's block in place of each FFN.

It is the form `nexus_<family>` on disk, and in memory what a translated form is computed as. The
classes are made on demand and registered with transformers' Auto classes; no code lies in a
checkpoint.
Not covered: families that build their layers' FFN under another name than `mlp`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import NATIVE, as_source, native_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Class = Any
"""A class of transformers that is found, or made, at run time, or one of its instances."""
MIXTURE_KEYS: dict[str, object] = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0,
}
"""What the block asks of a configuration beyond the dense family's."""


def dense_classes(family: str) -> tuple[Class, Class, Class]:
    """Return transformers' classes of a dense family: configuration, decoder, language model."""
    # transformers is imported here: checkpoints of Qwen2-MoE's form never get here
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config = CONFIG_MAPPING[family]
    return config, MODEL_MAPPING[config], MODEL_FOR_CAUSAL_LM_MAPPING[config]


@functools.cache
def mixture_classes(family: str) -> tuple[Class, Class]:
    """Return configuration and language model of a family's native form, after registering them."""
    # as above
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    dense, decoder, language_model = dense_classes(family)
    name = native_class(family).removesuffix("ForCausalLM")
    keys = dict(MIXTURE_KEYS)
    record = FAMILIES[family]
    if record.activation_key != "hidden_act":
        keys["hidden_act"] = record.activations[0]
    kinds = {key: type(value) for key, value in keys.items()}
    fields = {"model_type": NATIVE + family, "__annotations__": kinds, **keys}
    config_class = type(f"{name}Config", (dense,), fields)

    def init_decoder(self: Class, config: PretrainedConfig) -> None:
        decoder.__init__(self, config)
        for layer in self.layers:
            layer.mlp = Qwen2MoeSparseMoeBlock(config)
        self.post_init()

    # vLLM's compiler asks of all arguments whether they are of the type that is named
    init_decoder.__annotations__ = {"config": config_class}
    made = {"config_class": config_class, "__init__": init_decoder}
    model_class = type(f"{name}Model", (decoder,), made)

    def init_language_model(self: Class, config: PretrainedConfig) -> None:
        language_model.__init__(self, config)
        self.model = model_class(config)
        self.post_init()

    made = {"config_class": config_class, "__init__": init_language_model}
    causal_class = type(f"{name}ForCausalLM", (language_model,), made)
    AutoConfig.register(NATIVE + family, config_class, exist_ok=True)
    # serving programs build the decoder alone
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)
    stacks = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(NATIVE + family, stacks, overwrite=True)
    return config_class, causal_class


def register_all() -> None:
    """Make transformers' Auto classes know every family's native form that is one on disk."""
    for family in FAMILIES.values():
        if not family.mixture:
            mixture_classes(family.name)


def _made(config_class: Class, config: ConfigJson, tied: bool) -> PretrainedConfig:
    source = as_source(config) | {"tie_word_embeddings": tied}
    return config_class(**{key: value for key, value in source.items() if key != "model_type"})


def make_buffers(model: PreTrainedModel) -> None:
    """Take the buffers of a model off the meta device: they are computed, no file has them."""
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config)
    embeddings = model.model.embed_tokens
    # Gemma's, in the dtype that its weights have
    scale = getattr(embeddings, "scalar_embed_scale", None)
    if scale is not None:
        embeddings.embed_scale = torch.full_like(embeddings.embed_scale, scale, device="cpu")


def _on_meta(model_class: Class, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model on the meta device, but for its buffers."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    make_buffers(model)
    return model


def empty_dense(config: ConfigJson, tied: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Return the dense family's own model without FFNs and without memory for its weights."""
    config_class, _, language_model = dense_classes(as_source(config)["model_type"])
    model = _on_meta(language_model, _made(config_class, config, tied), dtype)
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    return model


def empty_mixture(config: ConfigJson, tied: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Return the family's own model with Qwen2-MoE's blocks, without memory for its weights."""
    config_class, causal_class = mixture_classes(as_source(config)["model_type"])
    return _on_meta(causal_class, _made(config_class, config, tied), dtype)
