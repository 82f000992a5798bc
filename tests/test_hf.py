"""`import nexus_ds.hf` is what teaches transformers a model whose router reads a running mean."""

import subprocess
import sys

import pytest
from transformers import AutoConfig

from nexus_ds import hf
from nexus_ds.checkpoint import hf_model
from tests.checkpoint.test_native import SIZES
from tests.checkpoint.test_qwen3_next import mixture


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


def load(directory, how):
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(directory), how],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_transformers_alone_refuses_it_by_name_and_one_import_makes_it_load(context_dir):
    alone = load(context_dir, "alone")
    assert alone.returncode and "nexus_moe" in alone.stderr
    assert load(context_dir, "hf").stdout.strip() == "NexusMoeForCausalLM"


@pytest.mark.slow
def test_a_family_without_a_stock_class_too(tmp_path, dense_dir):
    mixture(tmp_path, dense_dir, "olmo2", SIZES, "fp32", 1)
    alone = load(tmp_path / "out", "alone")
    assert alone.returncode and "nexus_olmo2" in alone.stderr
    assert load(tmp_path / "out", "hf").stdout.strip() == "NexusOlmo2ForCausalLM"
