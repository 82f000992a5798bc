"""docs/serving.md is what the table of programs says, and its commands run."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import serving_page
from serving_page import MODEL, PAGE, commands, page

from nexus_ds.__main__ import build_parser, main
from nexus_ds.serving.targets import TARGETS

TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
DIRECTORIES = ("transformers4", "vllm", "sglang", "hub")
OURS = [line for line in LINES if line.startswith("nexus-ds ")]


def test_the_page_is_the_table():
    made = "PYTHONPATH=. python tests/serving_page.py"
    assert page() == TEXT, f"write it anew: {made}"


def test_another_fact_is_another_page(monkeypatch):
    name, target = next(iter(TARGETS.items()))
    monkeypatch.setitem(serving_page.TARGETS, name, replace(target, version="9.9"))
    assert "| 9.9 |" in page() and page() != TEXT


@pytest.mark.parametrize("name", TARGETS)
def test_every_program_has_its_row_its_commands_and_its_refusals(name):
    target = TARGETS[name]
    [row] = [line for line in TEXT.splitlines() if f"`--for {name}`" in line]
    for word in (target.program, target.version, target.writes, *target.forms):
        assert word in row
    for rule in (*target.rules, *target.notes):
        assert f"{rule.what}: it {rule.why}" in row
    assert commands(target) in TEXT and "DIR" not in commands(target)


@pytest.fixture
def here(nexus_dir, tmp_path, monkeypatch):
    """A folder as the page has it: a mixture, with a chat template, and prompts."""
    shutil.copytree(nexus_dir, tmp_path / MODEL)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (tmp_path / MODEL / "chat_template.jinja").write_text(template)
    rows = [{"prompt": "tree leaf"}, {"messages": [{"role": "user", "content": "ship"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", OURS, ids=lambda line: " ".join(line.split()[1:6]))
def test_the_commands_run(here, line, capsys):
    words = shlex.split(line)[1:]
    args = build_parser(words[0]).parse_args(words)
    if words[0] == "export" and args.target not in DIRECTORIES:
        pytest.skip("llama.cpp knows no such tokenizer as this model's")
    assert main(words) == 0
    said = capsys.readouterr().out
    if words[0] == "export":
        assert args.out.is_dir()
        # what the page types next is what the verb prints
        printed = said.split("next: ")[1].strip()
        assert printed.partition("(")[2] in TEXT and TARGETS[args.target].version in said
    elif "--html" in words:
        assert Path(words[-1]).is_file()


def test_transformers_block_runs(here, capsys):
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(compile(block, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()
