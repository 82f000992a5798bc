"""What layers of linear attention (Gated DeltaNet) cost beside their weights.

As transformers' own code computes them, in chunks of CHUNK tokens: kernels of
flash-linear-attention, which it takes on a GPU where they are installed, keep less and do about as
much arithmetic.
Source: Yang et al. 2024, Gated Delta Networks, section 3.3; `torch_chunk_gated_delta_rule` of
transformers 5.23.
Not covered: the state of generation, which grows with no text.
"""

from __future__ import annotations

from nexus_ds.checkpoint.families.delta_net import DeltaNet

CHUNK = 64
FP32 = 4
"""Bytes of an element: it is computed in fp32 whatever the weights are in."""


def linear_flops(net: DeltaNet) -> float:
    """Return the operations of one token in the forward pass of one layer.

    For each head products with the state [key_dim, value_dim] (its correction, its output, its
    update), and with the tokens of a chunk.
    """
    keys, values = net.key_dim, net.value_dim
    state = 6 * keys * values
    # two matrices of scores, two solutions of a triangular system, one product with the values
    chunk = CHUNK * (5 * keys + 3 * values)
    return float(net.value_heads * (state + chunk))


def linear_activations(net: DeltaNet, width: int) -> float:
    """Return bytes that one layer keeps for each token, for its backward pass.

    Args:
        net: its sizes.
        width: bytes of an element in the working precision.
    """
    # each value head has a query and a key of its own by then
    keys = net.value_heads * net.key_dim
    # where there is no cast to fp32 the tensor itself stays
    copies = 12 if width == FP32 else 8
    chunk = 5 * net.value_heads * CHUNK
    state = keys * net.value_dim / CHUNK
    scalars = 9 * net.value_heads
    inside = FP32 * (chunk + copies * keys + 6 * net.values + state + scalars)
    # before and after: what is convolved, the gated output
    return inside + width * (2 * net.mixed + 3 * net.values)
