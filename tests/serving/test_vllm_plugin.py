"""What vLLM is told at its start: the forms that transformers has no class of its own for."""

import importlib
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.serving.vllm_plugin import register

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_each_native_form_is_registered(monkeypatch):
    from transformers import AutoConfig

    found = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    register()
    own = [family.name for family in FAMILIES.values() if not family.mixture]
    # read by name, since it imports vLLM
    place, _, name = found.pop("NexusMoeForCausalLM").partition(":")
    assert find_spec(place).origin.endswith("serving/vllm_context.py")
    assert name == "NexusMoeForCausalLM"
    assert len(found) == len([name for name in own if not name.startswith("gemma")])
    assert "NexusOlmo2ForCausalLM" in found
    # its kernels would gate experts by SiLU
    assert "NexusGemma2ForCausalLM" not in found
    assert set(found.values()) == {
        "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"
    }
    # its backend builds the decoder by the configuration
    assert AutoConfig.for_model("nexus_olmo2").num_experts_per_tok == 1
    assert AutoConfig.for_model("nexus_moe").model_type == "nexus_moe"


def test_the_package_names_what_vllm_loads():
    entries = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]
    place, _, name = entries["vllm.general_plugins"]["nexus_ds"].partition(":")
    assert getattr(importlib.import_module(place), name) is register
