"""EXAONE 4: norms as OLMo 2's, of each head's queries and keys; where there are windows, layers
without one have no RoPE."""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.olmo2 import OLMO2
from nexus_ds.checkpoint.families.record import SLIDING, Family, full_by_pattern


def with_windows_by_pattern(config: ConfigJson) -> Sequence[str]:
    """Return `full_by_pattern`, or no layers where there is no window."""
    # "LLLG" of the 32B divides nothing, and its file lists the layers besides
    return [] if config["sliding_window"] is None else full_by_pattern(config)


def turned(config: ConfigJson, kinds: Sequence[str]) -> Sequence[bool]:
    """Return RoPE for layers with a window, or for all where there is none."""
    # decided by the key alone: a window that no layer uses takes RoPE from all
    none = config["sliding_window"] is None
    return [none or kind == SLIDING for kind in kinds]


EXAONE4 = Family(
    name="exaone4",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    kinds=with_windows_by_pattern,
    # its class takes no null
    nulls=(),
    norms=OLMO2.norms,
    qk_norm="head",
    # no key of its config.json asks for a bias
    bias_keys=(),
    turned_layers=turned,
    mixture="",
)
