"""Language models inside of models that see: their config.json and their tensors; no torch.

A text alone is computed as by the language model on its own: of RoPE in three dimensions (Qwen's
mRoPE) all three are then the token's number. What sees is left out, and has no place in a mixture.
Not covered: training and running such a model here, for which the language model is to be saved on
its own first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nexus_ds.checkpoint.config_json import ConfigJson, read_config
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.errors import UnsupportedModelError


class Wrapper(NamedTuple):
    """What is around a language model."""

    family: str
    """Of its text, where that does not say, or in a word of its own."""
    defaults: ConfigJson
    """What its text's class takes for missing keys, unlike the family's own."""
    own: bool = False
    """Whether its text has a `model_type` of its own, but is of `family`."""
    tied: bool = False
    """Whether embeddings are the head where config.json does not say."""


_QWEN2_VL = Wrapper(
    "qwen2",
    {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_window_layers": 80,
        "rope_theta": 1e6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    own=True,
)
WRAPPERS: Mapping[str, Wrapper] = {
    "mistral3": Wrapper("mistral", {}, tied=True),
    # its first files leave out sizes that its class has anyway
    "gemma3": Wrapper(
        "gemma3_text",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
        tied=True,
    ),
    "llava": Wrapper("llama", {}),
    "llava_onevision": Wrapper("qwen2", {}),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": Wrapper(
        "qwen3", {"max_position_embeddings": 128000, "rope_theta": 500000.0}, own=True
    ),
    "qwen3_5": Wrapper("qwen3_5_text", {}, own=True),
}
"""By `model_type`."""
OUTER = ("dtype", "torch_dtype", "quantization_config", "transformers_weights")
"""Keys that are said of the whole model."""
IN_TEXT: Mapping[str, str] = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.layers.": "model.layers.",
    "model.embed_tokens.": "model.embed_tokens.",
    "model.norm.": "model.norm.",
    "lm_head.": "lm_head.",
}
"""How names of the text's tensors begin, in files of older and newer transformers, and on their
own."""


def text_config(config: ConfigJson) -> ConfigJson:
    """Return the config.json that the language model alone would have; of others their own."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None:
        return config
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        # older files of Qwen2-VL hold the text's keys beside vision_config
        inner = {key: value for key, value in config.items() if key != "vision_config"}
    found = wrapper.defaults | {"model_type": wrapper.family} | inner
    for key in OUTER:
        if key in config:
            found[key] = config[key]
    # some versions said it of the whole, others of the text; what the file holds decides in the end
    tied = "tie_word_embeddings"
    found[tied] = bool(config.get(tied, wrapper.tied)) or bool(inner.get(tied))
    # images alone would make its RoPE another one
    if wrapper.own:
        found["model_type"] = wrapper.family
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(found.get(key), dict):
                found[key] = _in_one_dimension(found[key])
    return found


def _in_one_dimension(rope: ConfigJson) -> ConfigJson:
    """Return Qwen's RoPE as it is of text."""
    found = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    for key in ("type", "rope_type"):
        if found.get(key) == "mrope":
            found[key] = "default"
    return found


def text_tensors(reader: Headers, config: ConfigJson) -> Headers:
    """Return the tensors of the language model under its own names; of other models all.

    Args:
        reader: the files' tensors.
        config: config.json as it stands on disk.
    """
    if config.get("model_type") not in WRAPPERS:
        return reader
    # what sees is passed over: no name of it begins so
    names = {}
    for name in reader.names():
        for start, own in IN_TEXT.items():
            if name.startswith(start):
                names[own + name.removeprefix(start)] = name
                break
    return reader.renamed(names)


def refuse_wrapper(directory: Path) -> None:
    """Raise UnsupportedModelError for a model that sees: its text alone can be trained."""
    kind = read_config(directory).get("model_type")
    if kind in WRAPPERS:
        raise UnsupportedModelError(
            f"{directory}: a {kind} is a language model within one that sees: upcycle and extend "
            "read its text, but to train it, save the language model on its own first: python -c "
            "'from nexus_ds.upcycling.average import average_dense; "
            f'average_dense(["{directory}"], "OUT")\''
        )
