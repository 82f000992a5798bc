"""What vLLM loads at its start where this package is installed beside it (vllm.general_plugins).

Mixtures in a form of their own (`nexus_<family>`) are computed by vLLM's backend for models of
transformers: it takes the family's attention and norms as they are and puts its own kernels in
place of attention and experts. Those whose routers read a running mean are computed by its own
Qwen2-MoE with other gates (`vllm_context`).
Not covered: Gemma, whose experts some versions of that backend gate by SiLU whatever config.json
says (its moe.py, read), and whose caps it was not seen to know.
"""

from __future__ import annotations

from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import native_class

CONTEXT = "nexus_ds.serving.vllm_context:NexusMoeForCausalLM"
BACKEND = "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"


def register() -> None:
    """Make vLLM, and transformers within it, know the native forms; further calls change nothing.

    Raises:
        ImportError: vLLM is not installed.
    """
    # only vLLM itself calls this, so it is there and has loaded torch
    from vllm import ModelRegistry

    # as above
    from nexus_ds.hf import NexusMoeForCausalLM

    # a name: vLLM imports the module where it serves such a model
    ModelRegistry.register_model(NexusMoeForCausalLM.__name__, CONTEXT)
    # its backend builds the decoder that transformers' Auto classes name, which `hf` registers
    for family in FAMILIES.values():
        # what is not registered is refused
        if not family.mixture and family.activations[0] == "silu":
            ModelRegistry.register_model(native_class(family.name), BACKEND)
