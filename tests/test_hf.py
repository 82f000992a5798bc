"""`import nexus_ds.hf` is what teaches transformers a model whose router reads a running mean."""

import subprocess
import sys

import pytest
from transformers import AutoConfig

from nexus_ds import hf
from nexus_ds.checkpoint import hf_model


def test_the_import_registers_the_very_classes_that_serve(context_dir):
    assert hf.NexusMoeForCausalLM is hf_model.NexusMoeForCausalLM
    assert type(AutoConfig.from_pretrained(context_dir)) is hf.NexusMoeConfig


LOAD = """
import sys
from transformers import AutoModelForCausalLM
if sys.argv[2] == "hf":
    import nexus_ds.hf
model, report = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], local_files_only=True, output_loading_info=True
)
assert not report["missing_keys"] and not report["unexpected_keys"], report
print(type(model).__name__)
"""


@pytest.mark.slow
def test_transformers_alone_refuses_it_by_name_and_one_import_makes_it_load(context_dir):
    def load(how):
        return subprocess.run(
            [sys.executable, "-c", LOAD, str(context_dir), how],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    alone = load("alone")
    assert alone.returncode and "nexus_moe" in alone.stderr
    assert load("hf").stdout.strip() == "NexusMoeForCausalLM"
