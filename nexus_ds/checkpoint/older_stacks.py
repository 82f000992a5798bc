"""Where transformers 4 (4.57.6 was run) makes something else of a mixture than 5 does; no torch.

All that a config.json can say in both ways is said so (`both_ropes`, `moe_config`); what is left is
told here, for `upcycle`, `extend` and `inspect` to say.
Not covered: what other programs make of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import filled, settings
from nexus_ds.checkpoint.families.record import FULL, LINEAR, DenseSettings
from nexus_ds.checkpoint.forms import PLAIN, QWEN3_NEXT, native_family

STOCK = (PLAIN[0], QWEN3_NEXT)
"""Forms that transformers has on its own."""
UNKNOWN = "it has no model of type {}; nexus_ds.hf is for transformers 5"


def unlike_transformers_4(config: ConfigJson) -> list[str]:
    """Return in sentences what transformers 4 computes otherwise, or refuses; mostly nothing.

    Args:
        config: config.json of a mixture.
    """
    sizes = settings(config)
    kind = config["model_type"]
    if native_family(kind):
        return [UNKNOWN.format(kind)]
    found = [*_windows(sizes), *_longrope(sizes, filled(config)["max_position_embeddings"])]
    if kind not in STOCK:
        found.append(UNKNOWN.format(kind))
    if kind == QWEN3_NEXT and LINEAR not in sizes.layer_types:
        # its cache looks for a layer of linear attention
        found.append("it generates with use_cache=False alone, and refuses else")
    elif kind != QWEN3_NEXT and sizes.query_width != sizes.hidden_size:
        found.append(
            f"it refuses {sizes.heads} heads of {sizes.head_dim} in a model of {sizes.hidden_size}"
        )
    return found


def _windows(sizes: DenseSettings) -> Iterator[str]:
    window = sizes.sliding_window
    if window is None:
        return
    if FULL in sizes.layer_types:
        yield f"it gives all layers the window of some: right for texts of up to {window} tokens"
    else:
        # its cache drops old keys, its mask counts them
        yield f"beyond {window} tokens it generates right with use_cache=False alone"


def _longrope(sizes: DenseSettings, positions: int) -> Iterator[str]:
    rope = sizes.rope
    if rope["rope_type"] != "longrope" or rope.get("attention_factor") is not None:
        return
    implied = positions / rope["original_max_position_embeddings"]
    if rope.get("factor") not in (None, implied):
        yield f"it takes {implied:g} for RoPE's factor of {rope['factor']:g}"
