"""The commands of the README, run as they stand on tiny models of a user's own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tokenizer, sentences
from launch import clean_environment

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
TINY = ["model.dtype=fp32", "data.sequence_length=16", "training.tokens=0", "training.steps=4", "training.batch_size=2",
        "training.eval_windows=2", "training.save_every=2", "training.lr=1e-3"]  # fmt: skip
WORDS = {
    "law": "court judge claim appeal clause statute party ruling",
    "code": "loop array index stack branch merge pointer cache",
    "medicine": "heart blood nerve fever dose virus tissue organ",
}


def blocks(section):
    """Return the commands of the first shell block of a section."""
    text = README.split(f"## {section}\n", 1)[1]
    lines = re.search(r"```bash\n(.*?)```", text, re.S).group(1).strip().splitlines()
    assert lines.pop(0) == "source .venv/bin/activate"
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: data/, models/, and what a clone holds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("user")
    for name in ("nexus_ds", "ds_configs"):
        (root / name).symlink_to(REPOSITORY / name)
    for index, domain in enumerate(WORDS):
        (root / "data" / domain).mkdir(parents=True)
        for split, count in (("train", 60), ("validation", 30)):
            texts = sentences(domain, count, index, WORDS)
            lines = "\n".join(json.dumps({"text": text}) for text in texts)
            (root / "data" / domain / f"{split}.jsonl").write_text(lines + "\n", encoding="utf-8")
    for seed, name in enumerate(("seed", *WORDS)):
        vocabulary = save_tokenizer(root / "models" / name, WORDS)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / "models" / name)
    return root


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_for_ones_own_models_run_as_they_stand(folder):
    for command in blocks("Your own models"):
        words = shlex.split(command)
        more = TINY if words[0] == "deepspeed" else []
        done = subprocess.run(
            [str(BIN / words[0]), *words[1:], *more],
            cwd=folder,
            env=clean_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    lineage = json.loads((folder / "moe/extended/nexus.json").read_text())["lineage"]
    assert [step["verb"] for step in lineage] == ["upcycle", "train", "extend", "train"]
    assert lineage[-1]["mixture"] == {"law": 0.25, "code": 0.25, "medicine": 0.5}
    assert (folder / "moe/report/report.html").is_file()


def test_every_verb_of_the_command_line_explains_itself():
    from nexus_ds.__main__ import VERBS

    said = subprocess.run([sys.executable, "-m", "nexus_ds", "--help"], capture_output=True, text=True).stdout
    for verb in VERBS:
        assert verb in said
        done = subprocess.run([sys.executable, "-m", "nexus_ds", verb, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout) > 100


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_a_mistake_is_one_line_and_a_non_zero_exit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nexus_ds", "embed", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "x")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("nexus-ds embed: ") and "Traceback" not in done.stderr
