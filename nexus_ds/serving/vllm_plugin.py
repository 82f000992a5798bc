"""What vLLM loads at its start where this package is installed beside it (vllm.general_plugins).

Mixtures in a form of their own (`nexus_<family>`) are computed by vLLM's backend for models of
transformers: it takes the family's attention and norms as they are and puts its own kernels in
place of attention and experts.
Not covered: routers that read a running mean; Gemma, whose experts some versions of that backend
gate by SiLU whatever config.json says (its moe.py, read), and whose caps it was not seen to know.
"""

from __future__ import annotations

from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import native_class

BACKEND = "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"


def register() -> None:
    """Make vLLM, and transformers within it, know the native forms; further calls change nothing.

    Raises:
        ImportError: vLLM is not installed.
    """
    # only vLLM itself calls this, so it is there and has loaded torch
    from vllm import ModelRegistry

    # as above
    from nexus_ds.checkpoint.native import register_all

    # its backend builds the decoder that transformers' Auto classes name
    register_all()
    for family in FAMILIES.values():
        # what is not registered is refused
        if not family.mixture and family.activations[0] == "silu":
            ModelRegistry.register_model(native_class(family.name), BACKEND)
