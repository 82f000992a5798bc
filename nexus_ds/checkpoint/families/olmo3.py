"""OLMo 3: OLMo 2 with windows in three of four layers; RoPE is stretched in the others alone."""

from collections.abc import Sequence

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.families.olmo2 import OLMO2
from nexus_ds.checkpoint.families.record import FULL, SLIDING, Family


def full_every_fourth(config: ConfigJson) -> Sequence[str]:
    """Return windows for all layers but the fourth, the eighth and so on."""
    # counted from 1: the last of each four is full
    layers = range(1, config["num_hidden_layers"] + 1)
    return [SLIDING if layer % 4 else FULL for layer in layers]


OLMO3 = Family(
    name="olmo3",
    defaults=OLMO2.defaults | {"sliding_window": 4096, "rope_theta": 500000.0},
    kinds=full_every_fourth,
    nulls=OLMO2.nulls,
    norms=OLMO2.norms,
    qk_norm="all",
    bias_keys=OLMO2.bias_keys,
    # its class takes a base beside rope_parameters for the layers without a window
    rope_bases={FULL: "rope_theta", SLIDING: ""},
    mixture="",
)
