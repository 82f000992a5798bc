"""Importing this makes transformers load the checkpoints that it has no class of its own for.

These are mixtures of families such as OLMo 2 (`nexus_<family>`), and those whose router reads a
running mean (`router.input: context`).

    import nexus_ds.hf
    model = AutoModelForCausalLM.from_pretrained(directory)

All others are stock models and need nothing.
Not covered: programs with models of their own. vLLM has a plugin (`serving/vllm_plugin`), the
others refuse the model type.
"""

from nexus_ds.checkpoint.hf_model import NexusMoeConfig, NexusMoeForCausalLM, register
from nexus_ds.checkpoint.native import register_all

__all__ = ["NexusMoeConfig", "NexusMoeForCausalLM"]

register()
register_all()
