"""The two commands of the README, in a folder that holds what a fresh clone holds.

The literal `deepspeed nexus_ds/train.py --deepspeed ds_configs/z3.json` makes the seed, the
branches and the upcycled model by itself and trains it; `nexus-ds demo` then goes on from there:
extension, finetune, evaluation, page.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import clean_environment
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
NEXUS_DS = Path(sys.executable).parent / "nexus-ds"
OLD, NEW = ["python", "docs", "algebra", "tables"], "cpp"
WAIT = 3600  # seconds of each command: minutes on two quiet cores
# whichever test comes first waits for both
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * WAIT)]
STOCK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("import os", return_tensors="pt")["input_ids"]
assert "nexus_ds" not in sys.modules and "deepspeed" not in sys.modules
new = model.generate(ids, max_new_tokens=3).shape[1] - ids.shape[1]
print(model.config.model_type, model.config.num_experts, new)
"""


def run(command, folder, seconds):
    environment = {k: v for k, v in clean_environment().items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in ("nexus_ds", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="module")
def literal(clone):
    """What the literal command says, and the folders that it makes."""
    said = run([DEEPSPEED, "nexus_ds/train.py", "--deepspeed", "ds_configs/z3.json"], clone, WAIT)
    made = {
        str(path.relative_to(clone / "runs/demo")) for path in (clone / "runs/demo").glob("**/*")
    }
    return said, made


@pytest.fixture(scope="module")
def demo(clone, literal):
    return run([NEXUS_DS, "demo"], clone, WAIT)


@pytest.fixture(scope="module")
def summary(clone, demo):
    return json.loads((clone / "runs/demo/report/summary.json").read_text())


def test_the_literal_command_makes_and_trains_everything(literal):
    said, made = literal
    assert "== upcycle done" in said
    assert "ZeRO stage 3" in said
    assert "wrote runs/demo/nexus (reloaded in plain transformers: logits differ by" in said
    assert {"tokenizer", "seed", "branches", "domains.safetensors", "upcycled", "nexus"} <= made
    models = {
        name for name in made if name.startswith("branches/") and name.endswith("/config.json")
    }
    assert models == {f"branches/{domain}/config.json" for domain in OLD}


def test_the_demo_goes_on_from_there_and_ends_with_table_report_and_next_command(clone, demo):
    assert "== seed\n" not in demo, "what was there was made again"
    assert "== extended done" in demo
    for words in (
        "perplexity by domain",
        "report:      runs/demo/report/report.html",
        "next:        nexus-ds generate",
    ):
        assert words in demo
    page = (clone / "runs/demo/report/report.html").read_text()
    assert "data:image/png;base64" in page
    assert "http://" not in page and 'src="/' not in page


def test_the_summary_keeps_its_contract(summary):
    models = ["seed", *(f"branch {d}" for d in [*OLD, NEW]), "plain average", "Nexus"]
    models += ["Nexus extended, before finetune", "Nexus extended"]
    assert list(summary["perplexity"]) == models
    assert all(set(row) == {*OLD, NEW} for row in summary["perplexity"].values())
    assert set(summary["routing"]) == {*OLD, NEW}
    assert all(
        sum(row.values()) == pytest.approx(1, abs=1e-6) for row in summary["routing"].values()
    )
    assert summary["tokens_per_second"] > 0
    budgets = list(summary["extension"]["nexus"])
    assert budgets[0] == "0" and len(budgets) >= 3
    assert all(set(row) == {*OLD, NEW} for row in summary["extension"]["nexus"].values())


def test_the_demo_shows_what_the_readme_says(summary):
    table = summary["perplexity"]
    for domain in OLD:
        assert table[f"branch {domain}"][domain] < table["seed"][domain]
    # README: 18% and 35%
    for other, least, most in (("seed", 0.10, 0.30), ("plain average", 0.25, 0.45)):
        gain = -math.expm1(
            sum(math.log(table["Nexus"][d] / table[other][d]) for d in OLD) / len(OLD)
        )
        assert least < gain < most, f"Nexus has {gain:.0%} lower perplexity than the {other}"
    own = [summary["models"]["Nexus"]["own_share"][domain] for domain in OLD]
    assert sum(own) / len(own) > 0.5  # chance: 0.25
    assert table["Nexus extended"][NEW] <= 0.5 * table["Nexus"][NEW]
    ratios = [table["Nexus extended"][d] / table["Nexus"][d] for d in OLD]
    assert sum(ratios) / len(ratios) <= 1.08


def test_the_plain_average_is_the_mean_of_the_seed_and_its_branches(clone, demo):
    """A baseline that is worse than it should be makes everything beside it look better."""
    run = clone / "runs/demo"
    models = [
        load_file(run / name / "model.safetensors")
        for name in ("seed", *(f"branches/{d}" for d in OLD))
    ]
    found = load_file(run / "average" / "model.safetensors")
    assert found.keys() == models[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, torch.stack([model[name].double() for model in models]).mean(0).to(tensor.dtype)
        )


def test_the_page_compares_what_the_headline_compares(clone, summary):
    change = summary["change"]
    assert (change["before"], change["after"]) == ("Nexus", "Nexus extended")
    assert change["domains"][NEW]["verdict"] == "better" and change["windows"] == 48
    assert all(change["domains"][d]["nats_error"] > 0 for d in [*OLD, NEW])
    assert (
        "<h2>From Nexus to Nexus extended</h2>"
        in (clone / "runs/demo/report/report.html").read_text()
    )


def test_the_extended_model_loads_in_stock_transformers(clone, demo):
    path = clone / "runs/demo/extended"
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(path)], capture_output=True, text=True, cwd="/"
    )
    assert done.stdout.split() == ["qwen2_moe", "5", "3"], done.stderr
