"""The forms that a mixture can have on disk, and the dense family that each was made of; no torch.

Everything between two files speaks the family's own names (`stored` of `qwen2_moe` is the table):
a form is a way to write them down so that stock transformers computes the same.

    qwen2_moe        what Llama, Mistral and Qwen2 become; the family's names as they are
    nexus_moe        the same with routers that read a running mean
    qwen3_next       what Qwen3 and Qwen3.5 become; translated at the file (`qwen3_next`,
                     `qwen3_5`)
    nexus_<family>   any family with its FFNs replaced, names as they are (`native`); transformers
                     knows it after `import nexus_ds.hf`

A form is chosen by the family's record (`Family.mixture`).
"""

from __future__ import annotations

from nexus_ds.checkpoint.config_json import CONTEXT_MODEL, ConfigJson
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.errors import CheckpointError

NATIVE = "nexus_"
SOURCE = "nexus_source"
"""Key of a translated config.json: what the dense family's own would say differently."""
PLAIN = ("qwen2_moe", CONTEXT_MODEL)
QWEN3_NEXT = "qwen3_next"
MIXTURES = (*PLAIN, QWEN3_NEXT, *(NATIVE + name for name in FAMILIES))
"""`model_type` of what dense families become."""
LINEAR_ATTENTION = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
}
"""Of layers that a translated Qwen3 has none of; serving programs ask for the keys."""
TWICE = ("full_attention_interval", "partial_rotary_factor", SOURCE)
"""Keys of a Qwen3-Next beside those that say the same, where other programs look for it."""


def native_family(model_type: object) -> str | None:
    """Return the dense family of a native form; None for every other model."""
    name = str(model_type).removeprefix(NATIVE)
    return name if str(model_type).startswith(NATIVE) and name in FAMILIES else None


def native_class(family: str) -> str:
    """Return the name of the language model's class in a family's native form."""
    words = "".join(word.title() for word in family.split("_"))
    return f"Nexus{words}ForCausalLM"


def translated(config: ConfigJson) -> bool:
    """Return whether weights are written otherwise than the family has them (`qwen3_next`)."""
    return config.get("model_type") == QWEN3_NEXT


def reordered(config: ConfigJson) -> bool:
    """Return whether a config.json is of a Qwen3-Next that was a Qwen3.5 (`qwen3_5`)."""
    source = config.get(SOURCE)
    if not translated(config) or not isinstance(source, dict):
        return False
    family = FAMILIES.get(str(source.get("model_type")))
    return family is not None and family.linear


def as_source(config: ConfigJson, where: str = "config.json") -> ConfigJson:
    """Return the config.json that the dense family's own class would read.

    That of a dense model, and of a Qwen2-MoE, is its own. Keys of the mixture stay.

    Raises:
        CheckpointError: a Qwen3-Next that was not made here.
    """
    model_type = config.get("model_type")
    family = native_family(model_type)
    if family:
        return config | {"model_type": family}
    if model_type != QWEN3_NEXT:
        return config
    source = config.get(SOURCE)
    if not isinstance(source, dict) or str(source.get("model_type")) not in FAMILIES:
        raise CheckpointError(
            f"{where}: a Qwen3-Next whose {SOURCE} is {source!r}, expected the dense family that "
            "it was made of; give one that nexus-ds upcycle has made"
        )
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: rope_parameters is {str(rope)[:100]}, expected an object")
    rope = dict(rope)
    foreign: tuple[str, ...] = TWICE
    if not reordered(config):
        # the class's own default is a quarter of the head, so it is said; a dense Qwen3 has no such
        # key, nor layers of linear attention
        rope.pop("partial_rotary_factor", None)
        foreign += tuple(LINEAR_ATTENTION)
    kept = {key: value for key, value in config.items() if key not in foreign}
    kept.pop("rope_scaling", None)
    return kept | {"rope_parameters": rope} | source
