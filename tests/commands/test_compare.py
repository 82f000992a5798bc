"""The verb `compare` as a user runs it: what it makes, says and leaves alone, and its mistakes."""

import csv
import importlib.util
import json
import re
import shlex

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nexus_ds.__main__ import main
from nexus_ds.command_lines import DS_JSON, TRAIN
from nexus_ds.commands import compare
from nexus_ds.config import load_config
from nexus_ds.errors import DataError

RECIPE = """
base: compare-tiny
data: {max_bytes: 200000, cache: ""}
pipeline: {vocabulary: 512, embedding_documents: 3}
model: {hidden_size: 32, heads: 2, layers: 2, ffn_size: 48}
compare:
  seeds: [0]
  contenders: [seed, union, average, btm, linear, nexus]
  extensions: [linear_reset, nexus_refit]
  budgets: [1024, 2048]
training: {eval_windows: 4, log_every: 2}
router: {fit_steps: 10, fit_windows: 4}
stages:
  seed: {training: {tokens: 4096}}
  branch: {training: {tokens: 2048}}
  moe: {training: {tokens: 2048}}
"""


def run(capsys, *words):
    code = main(["compare", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


def plain_loss(out, name, domain):
    """Return what plain transformers makes of a contender's checkpoint on the windows that its
    training validates on."""
    (model_dir,) = [
        path
        for path in (out / "seed0").iterdir()
        if re.fullmatch(rf"{name}-[0-9a-f]{{8}}", path.name)
    ]
    (tokens,) = (out / "tokens").glob(f"{domain}-validation-*.bin")
    ids = np.fromfile(tokens, dtype=np.uint16).astype(np.int64)
    blocks = (len(ids) - 1) // 128
    windows = torch.from_numpy(np.stack([ids[128 * (i * blocks // 4) :][:129] for i in range(4)]))
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, local_files_only=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_whole_comparison_and_its_repetition(tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    words = (
        "--config",
        recipe,
        "--out",
        out,
        "--json",
        "--domains",
        "python,algebra",
        "--new-domain",
        "cpp",
        "--data",
        "demo",
    )
    code, text, err = run(capsys, *words)
    assert code == 0, err
    found = json.loads(text)
    assert json.loads((out / "results.json").read_text()) == found
    rows = {row["name"]: row for row in found["contenders"]}
    assert list(rows) == ["seed", "union", "average", "btm", "linear", "nexus"]
    assert all(
        set(row["seeds"]["0"]["loss"]) == {"python", "algebra", "cpp"} for row in rows.values()
    )
    for name in ("seed", "union", "average", "linear", "nexus"):
        for domain, loss in rows[name]["seeds"]["0"]["loss"].items():
            assert loss == pytest.approx(plain_loss(out, name, domain), abs=2e-4), (name, domain)
    for name in ("linear", "nexus"):
        before = rows[name]["seeds"]["0"]["untrained"]["loss"]
        assert sum(rows[name]["seeds"]["0"]["loss"].values()) < sum(before.values())
    assert (
        rows["btm"]["compute"]["parameters"]["active"]
        == 2 * rows["seed"]["compute"]["parameters"]["active"]
    )
    assert rows["seed"]["compute"]["training_flops"] == 0
    flops = {name: rows[name]["compute"]["training_flops"] for name in rows}
    assert flops["average"] == flops["btm"] < flops["linear"] == flops["nexus"]
    step = 8 * 128 * flops["union"] / rows["union"]["compute"]["training_tokens"]
    assert abs(flops["union"] - flops["nexus"]) <= 0.501 * step  # whole steps: to the nearest
    for row in found["extensions"]:
        assert list(row["seeds"]["0"]["budgets"]) == ["0", "1024", "2048"]
        assert all(
            0 <= b["leak"] <= 1 and 0 <= b["share"] <= 1
            for b in row["seeds"]["0"]["budgets"].values()
        )
    # Untrained and before any finetune: only the router differs, so what is not routed to is the
    # same model.
    assert (
        rows["nexus"]["seeds"]["0"]["untrained"]["loss"]
        != rows["linear"]["seeds"]["0"]["untrained"]["loss"]
    )
    page = (out / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "BTM" in page
    tables = list(out.rglob("*.csv"))
    assert tables and all(len(list(csv.reader(path.open()))) > 1 for path in tables)

    made = {path: path.stat().st_mtime_ns for path in out.rglob("model*.safetensors")}
    code, text, err = run(
        capsys, *words[:-2], "--data", "demo", "compare.contenders=[seed,nexus,linear,average]"
    )
    again = json.loads(text)
    assert code == 0 and [row["name"] for row in again["contenders"]] == [
        "seed",
        "average",
        "linear",
        "nexus",
    ]
    assert again["contenders"][-1]["seeds"] == rows["nexus"]["seeds"]
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("model*.safetensors")}


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff", b"[]", b'{"seconds": "x"}', b'{"seconds": NaN}']
)
def test_a_damaged_earlier_result_is_told_before_anything_is_trained(
    tmp_path, capsys, monkeypatch, content
):
    # a failing test trains nothing either
    monkeypatch.setattr(compare, "Pool", None)
    (tmp_path / "results.json").write_bytes(content)
    words = ["--domains", "python,algebra", "--new-domain", "cpp", "--data", "demo"]
    code, _, said = run(capsys, "--out", tmp_path, *words)
    assert code == 1 and f"{tmp_path / 'results.json'}: " in said and "Traceback" not in said
    assert said.endswith(
        "; expected what compare writes; remove it, and the same command makes it again; "
        "how long the first run took is lost\n"
    )
    assert not (tmp_path / "logs").exists()


def test_the_time_of_the_run_that_made_everything_is_kept(tmp_path):
    assert compare._earlier_seconds(tmp_path) == 0.0
    for seconds, kept in ((12.5, 12.5), (None, 0.0), (3, 3)):
        (tmp_path / "results.json").write_text(json.dumps({"seconds": seconds}))
        assert compare._earlier_seconds(tmp_path) == kept


@pytest.mark.parametrize(
    "content",
    [b"{", b"{}", b'{"models": {}}', b'{"models": {"m": {"checkpoint": {}}}}'],
)
def test_a_damaged_evaluation_says_how_it_is_made_again(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        compare._entry(tmp_path, "m")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'summary.json'}: ") and said.endswith(
        f"; expected what evaluate writes; remove {tmp_path}, and the same command makes it again"
    )


def test_a_dry_run_prints_commands_and_trains_nothing(tmp_path, capsys):
    code, text, err = run(
        capsys,
        "--out",
        tmp_path / "out",
        "--dry-run",
        "--seeds",
        "0",
        "compare.contenders=[nexus]",
        "compare.extensions=[nexus_append]",
    )
    assert code == 0, err
    lines = text.splitlines()
    assert sum(line.startswith(f"deepspeed {TRAIN} --deepspeed {DS_JSON}") for line in lines) == 8
    assert any(line.startswith("nexus-ds upcycle --seed") for line in lines) and lines[
        -1
    ].startswith("# 1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"configs"}
    options = [
        dict(zip(words := shlex.split(line), words[1:], strict=False)) for line in lines[:-1]
    ]
    trained = {
        config.name: config
        for o in options
        if "--deepspeed" in o
        for config in [load_config(o["--config"])]
    }
    seed, branch, nexus = (trained[f"seed 0 {name}"] for name in ("seed", "branch-python", "nexus"))
    assert (seed.stage, seed.model.path, seed.training.tokens) == ("seed", "", 1_000_000)
    assert (branch.stage, branch.model.path, branch.data.domains) == (
        "branch",
        seed.output,
        ["python"],
    )
    (upcycle,) = [
        o
        for line, o in zip(lines[:-1], options, strict=True)
        if line.startswith("nexus-ds upcycle")
    ]
    assert (
        upcycle["--seed"] == seed.output
        and load_config(upcycle["--config"]).router.warm_start == "label_fit"
    )
    assert (nexus.stage, nexus.model.path) == ("moe", upcycle["--out"])
    assert nexus.data.domains == ["python", "docs", "algebra", "tables"]
    added = trained["seed 0 nexus_append-cpp"]
    (extend,) = [
        o for line, o in zip(lines[:-1], options, strict=True) if line.startswith("nexus-ds extend")
    ]
    assert extend["--checkpoint"] == nexus.output and (added.model.path, added.stage) == (
        extend["--out"],
        "extend",
    )
    assert added.training.steps == 100  # 102,400 tokens, the last budget


def test_a_given_seed_model_is_not_trained(tmp_path, capsys, dense_dir):
    words = ("--out", tmp_path / "out", "--seed-model", dense_dir, "--dry-run")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert f"nexus-ds upcycle --seed {dense_dir}" in out
    assert "branch-python" in out and "seed0-seed" not in out and " tokenizer " not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--jobs", "-1"), "--jobs: expected a number of at least 0, found -1"),
        (("--domains", "a,b", "--new-domain", "c", "--data", "DATA"), "no domain"),
        (("compare.contenders=[nexsu]",), "compare.contenders: unknown name 'nexsu'"),
        (("--config", "no-such"), "no recipe at no-such"),
        (("--seed-model", "no-such", "--dry-run"), "no-such: found no config.json; expected a"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, text_folder, words, message):
    words = [str(text_folder) if word == "DATA" else word for word in words]
    code, _, err = run(capsys, "--out", tmp_path / "out", *words)
    assert code == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_the_harness_are_refused_before_anything_is_trained(tmp_path, capsys):
    code, _, err = run(capsys, "--out", tmp_path / "out", "compare.tasks=paper")
    assert code == 1 and "tasks need lm-eval, found no lm_eval" in err
    assert not (tmp_path / "out").exists()


def test_tasks_are_asked_of_every_checkpoint(tmp_path, capsys):
    code, text, _ = run(
        capsys,
        "--out",
        tmp_path / "out",
        "--dry-run",
        "--seeds",
        "0",
        "compare.tasks=arc_easy",
        "compare.task_path=mine",
        "compare.contenders=[seed,btm,nexus]",
        "compare.extensions=[nexus_append]",
    )
    asked = [line for line in text.splitlines() if "--tasks arc_easy --task-path mine" in line]
    assert code == 0 and len(asked) == 2  # an ensemble is no checkpoint
    assert all(" --checkpoint " in line for line in asked)


def test_measures_are_asked_of_every_checkpoint_of_the_recipe_as_it_stands(tmp_path, capsys):
    words = (
        "--out",
        tmp_path / "out",
        "--dry-run",
        "--seeds",
        "0",
        "compare.measures=bits",
        "compare.contenders=[seed,branches,btm,nexus]",
        "compare.extensions=[none]",
        "compare.variants={low: [router.load_balance=0.5]}",
    )
    code, text, _ = run(capsys, *words)
    asked = [line for line in text.splitlines() if "--measures bits" in line]
    # neither an ensemble, nor what knows one domain, nor a variant
    assert code == 0 and len(asked) == 2
    assert [re.findall("--name ([a-z]+)", line) for line in asked] == [["seed"], ["nexus"]]


def test_an_unknown_measure_is_refused_before_anything_is_trained(tmp_path, capsys):
    code, _, err = run(capsys, "--out", tmp_path / "out", "compare.measures=acc")
    assert code == 1 and "compare.measures='acc': found acc, expected all, or some of" in err
    assert not (tmp_path / "out").exists()
