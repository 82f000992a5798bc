"""docs/families.md is what the tests' tables say, and the tests that it names are there."""

import ast

import family_page
import pytest
from family_page import CLAIMS, LOST, PAGE, ROOT, RUNTIMES, form_of, page

from nexus_ds.checkpoint.families.table import FAMILIES


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
    assert forms == set(RUNTIMES) == set(LOST)
    assert forms <= {claim.form for claim in CLAIMS}
