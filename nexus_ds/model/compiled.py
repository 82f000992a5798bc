"""Norms, attention and feed-forward networks of a model whose many small operations are compiled.

On a GPU a decoder layer's element-wise operations take as long as half of its matrix products, each
a kernel that reads and writes all activations. torch.compile makes few kernels of them, part by
part: what routes stays as it is, since a compiler that leaves out a rounding to bf16 would let a
near tie go another way in training than in serving.
Not covered: ZeRO-3, whose linear layers are Python functions that the compiler breaks at.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nexus_ds.model.experts import RoutedExperts, compiled_elementwise


def parts_to_compile(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield what of a decoder layer is compiled as a whole: all but the MoE block, and of that the
    shared expert."""
    for part in layer.children():
        shared = getattr(part, "shared_experts", None)
        yield shared if isinstance(shared, nn.Module) else part


def compile_layers(model: nn.Module) -> None:
    """Compile the parts of every decoder layer at their first pass, in place.

    Args:
        model: dense or Nexus, with its layers under `model.layers`.
    """
    for layer in model.get_submodule("model.layers").children():
        for part in parts_to_compile(layer):
            part.compile()
    for part in model.modules():
        if isinstance(part, RoutedExperts):
            part.elementwise = compiled_elementwise(part.activation)
