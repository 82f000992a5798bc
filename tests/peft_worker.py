"""Adapters that PEFT has made, and what it merges of them; for a Python that has PEFT.

Arguments: a folder to write into, and the dense models."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

MODULES = ["q_proj", "v_proj", "gate_proj", "down_proj", "lm_head"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"layers.1.mlp.gate_proj": 9},
}
KINDS = {"plain": False, "rslora": True}
"""Whether an adapter is scaled by the root of its rank."""


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)


def main(out, *bases):
    """Write OUT/NAME-KIND, an adapter with its PEFT's merge in merged.safetensors, of each base."""
    for base in map(Path, bases):
        for kind, rooted in KINDS.items():
            folder = Path(out) / f"{base.name}-{kind}"
            config = LoraConfig(
                r=4,
                lora_alpha=6,
                target_modules=MODULES,
                use_rslora=rooted,
                # as it begins, an adapter adds nothing
                init_lora_weights=False,
                **PATTERNS,
            )
            torch.manual_seed(0)
            get_peft_model(load(base), config).save_pretrained(folder)
            merged = PeftModel.from_pretrained(load(base), folder).merge_and_unload()
            save_file(merged.state_dict(), folder / "merged.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
