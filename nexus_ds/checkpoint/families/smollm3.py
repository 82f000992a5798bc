"""SmolLM3: Llama without RoPE in every fourth layer."""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.record import FULL, SLIDING, Family


def turned(config: ConfigJson, kinds: Sequence[str]) -> Sequence[bool]:
    """Return what `no_rope_layers` says, 0 for a layer without RoPE, or its interval.

    No layers where neither is what it has to be.
    """
    stated, every = config["no_rope_layers"], config["no_rope_layer_interval"]
    if stated is None and type(every) is int and every > 0:
        # 0 at the end of each interval
        stated = [layer % every for layer in range(1, config["num_hidden_layers"] + 1)]
    # 1 stands for RoPE, whatever the key's name says
    return [bool(one) for one in stated] if isinstance(stated, list) else []


def windows_without_rope(config: ConfigJson) -> Sequence[str]:
    """Return windows, where they are in use, for the layers without RoPE."""
    # a window that is not in use is null by now
    one = FULL if config["sliding_window"] is None else SLIDING
    return [FULL if rope else one for rope in turned(config, ())]


SMOLLM3 = Family(
    name="smollm3",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    kinds=windows_without_rope,
    window_switch="use_sliding_window",
    nulls=("num_key_value_heads",),
    turned_layers=turned,
    mixture="",
)
