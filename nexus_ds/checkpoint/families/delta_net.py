"""Gated DeltaNet, the linear attention of Qwen3.5: its sizes and weights; no torch.

A layer of it keeps a state of fixed size instead of keys and values. Names and shapes are those of
transformers' class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KEYS = (
    "linear_conv_kernel_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
"""Of config.json, in the order of the fields of `DeltaNet`."""
FP32 = ("A_log", "norm.weight")
"""Weights that published files hold in fp32 beside others in bf16: a decay is exp(A_log)."""


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of one layer of linear attention."""

    kernel: int
    """Tokens that the convolution before it sees."""
    key_heads: int
    value_heads: int
    """A multiple of the key heads."""
    key_dim: int
    """Channels of a head's query, and of its key."""
    value_dim: int

    @classmethod
    def of(cls, linear: Mapping[str, int]) -> DeltaNet:
        """Return the sizes that `DenseSettings.linear` has."""
        return cls(*(linear[key] for key in KEYS))

    @property
    def keys(self) -> int:
        """Channels of all heads' queries, and of their keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all heads' values, and of the gate over them."""
        return self.value_heads * self.value_dim

    @property
    def mixed(self) -> int:
        """Channels that go through the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the weights of a layer by their names in it; `hidden` is the hidden size."""
        return {
            "dt_bias": (self.value_heads,),
            "A_log": (self.value_heads,),
            "conv1d.weight": (self.mixed, 1, self.kernel),
            "norm.weight": (self.value_dim,),
            "out_proj.weight": (hidden, self.values),
            "in_proj_qkv.weight": (self.mixed, hidden),
            "in_proj_z.weight": (self.values, hidden),
            "in_proj_b.weight": (self.value_heads, hidden),
            "in_proj_a.weight": (self.value_heads, hidden),
        }
