"""docs/finetuning.md as it stands there: its programs train a tiny mixture, its commands bring it
back."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from branches import embed, stock
from conftest import make_nexus, save_branch
from launch import clean_environment
from safetensors.torch import load_file
from transformers4 import python

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.records import read_manifest
from nexus_ds.upcycling.verification import verify

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
# those of chats are run by tests/runtime/test_chat_training.py
CHATS, COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
TRAINERS = ("trainer", "trl", "peft")
TEMPLATE = (
    "{% for m in messages %}{{ 'tree ' if m.role == 'user' else 'leaf ' }}{{ m.content }}"
    "{% if m.role != 'user' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}leaf {% endif %}"
)
PARTS = {  # of the page's table, in its words, what of the adapter's and of all training moves
    "trainer": ("mlp.gate", "mlp.experts", "mlp.shared_expert", "self_attn", "norm"),
    "trl": ("mlp.gate", "mlp.experts", "mlp.shared_expert", "self_attn", "norm"),
    "peft": ("mlp.experts", "self_attn"),
}


def test_the_page_has_a_program_for_each_trainer_and_names_what_there_is(nexus_dir):
    assert len(PROGRAMS) == len(TRAINERS)
    for program in PROGRAMS:
        ast.parse(program)
    names = [name for name, _ in stock(nexus_dir).named_parameters()]
    table = re.findall(r"^\| .*? \| (`.*?) \|", PAGE, re.M)
    parts = [part for row in table for part in re.findall(r"`(.*?)`", row)]
    assert len(parts) == 6
    for part in parts:
        tied = part == "lm_head"
        assert tied or any(part in name for name in names), part


def folder(root, text_folder):
    """Write what the page's programs and commands read."""
    nexus = make_nexus(root / "moe" / "trained")
    (nexus / "chat_template.jinja").write_text(TEMPLATE)
    text = json.dumps({"text": "root branch bark moss. fern soil rain."})
    (root / "text.jsonl").write_text(f"{text}\n" * 16)
    turns = [
        ("user", "root branch"),
        ("assistant", "moss fern"),
        ("user", "sum"),
        ("assistant", "proof lemma"),
    ]
    chat = {"messages": [{"role": role, "content": said} for role, said in turns]}
    (root / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 16)
    (root / "models").mkdir()
    save_branch(nexus, root / "models" / "medicine")
    shutil.copytree(text_folder, root / "data")
    shutil.copytree(text_folder / "gamma", root / "data" / "medicine")
    embed(root / "domains.safetensors", ["medicine"], root / "data")
    return nexus


def program():
    """Return the page's programs as one, for a machine without a GPU; each keeps what it saved."""
    parts = []
    for name, text in zip(TRAINERS, PROGRAMS, strict=True):
        on_cpu = text.replace("learning_rate=", "use_cpu=True, bf16=False, learning_rate=")
        assert on_cpu != text
        parts.append(f"{on_cpu}\nimport shutil\nshutil.move('runs/tuned', 'saved {name}')\n")
    return "\n".join(parts)


@pytest.mark.slow
def test_what_trainer_trl_and_peft_have_trained_is_extended_again(
    tmp_path, text_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    nexus = folder(tmp_path, text_folder)
    Path("program.py").write_text(program())
    done = subprocess.run(
        [python("finetuning"), "program.py"],
        env=clean_environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    before = load_file(nexus / "model.safetensors")
    tokens = torch.arange(40).remainder(29).view(2, 20)
    for name in TRAINERS:
        for made in ("runs/tuned", "moe/tuned", "moe/wider"):
            shutil.rmtree(made, ignore_errors=True)
        shutil.move(f"saved {name}", "runs/tuned")
        for command in COMMANDS.splitlines():
            assert main([*shlex.split(command)[1:]]) == 0, (name, command)
        trained = load_file("runs/tuned/model.safetensors")
        for part in PARTS[name]:
            moved = [n for n in trained if part in n and not torch.equal(trained[n], before[n])]
            assert moved, (name, part)
        with torch.no_grad():
            a, b = (stock(at)(input_ids=tokens).logits for at in ("runs/tuned", "moe/tuned"))
        assert torch.equal(a, b)
        found = read_manifest(Path("moe/wider"))
        assert [step.verb for step in found.lineage] == ["upcycle", "adopt", "extend"]
        assert [expert.name for expert in found.experts][3:] == ["medicine"]
        for made in ("moe/tuned", "moe/wider"):
            assert not verify(Path(made)).problems, (name, made)
