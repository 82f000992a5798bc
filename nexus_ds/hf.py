"""Importing this makes transformers load checkpoints whose router reads a running mean
(`router.input: context`).

    import nexus_ds.hf
    model = AutoModelForCausalLM.from_pretrained(directory)

Checkpoints of the default `router.input: token` are stock Qwen2-MoE models and need nothing.
Not covered: vLLM, llama.cpp and other programs with models of their own; they refuse the model
type.
"""

from nexus_ds.checkpoint.hf_model import NexusMoeConfig, NexusMoeForCausalLM, register

__all__ = ["NexusMoeConfig", "NexusMoeForCausalLM"]

register()
