"""docs/families.md is what the tests' tables say, and the tests that it names are there."""

import ast
from dataclasses import replace

import family_page
import pytest
from family_page import CLAIMS, LOST, PAGE, ROOT, form_of, page, programs

from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.serving.targets import TARGETS


def test_the_page_is_the_table():
    made = "PYTHONPATH=. python tests/family_page.py"
    assert PAGE.read_text(encoding="utf-8") == page(), f"write it anew: {made}"


def test_another_row_is_another_page(monkeypatch):
    before = page()
    monkeypatch.setitem(family_page.KINDS, "llama-wide", ("llama", {}))
    assert before != page() and "llama-wide" in page()
    monkeypatch.delitem(family_page.ROWS, "qwen3")
    assert "| none |" in page()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.exact)
def test_a_claim_has_a_test(claim):
    path, _, name = claim.test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_form_is_told_of():
    forms = {form_of(family) for family in FAMILIES.values()}
    assert forms == set(LOST)
    assert forms <= {claim.form for claim in CLAIMS}


def test_programs_are_those_that_exports_go_by(monkeypatch):
    assert programs("qwen3_next") == "transformers 4, vLLM, SGLang, llama.cpp, Ollama"
    assert programs("nexus_<family>") == "vLLM (`nexus_olmo2`)"
    vllm = replace(TARGETS["vllm"], forms=("qwen2_moe",))
    monkeypatch.setitem(family_page.TARGETS, "vllm", vllm)
    assert programs("nexus_<family>") == "" and "vLLM" not in programs("qwen3_next")
    # versions and refusals stand once, where exports are written by them
    told = page()
    assert "serving.md#which-program-takes-what" in told
    assert not any(target.version in told for target in TARGETS.values())
    assert "## Which program takes what" in (ROOT / "docs" / "serving.md").read_text()
