"""The verb evaluate: summary, figures, CSV and page of one run; names, tokenizers, and what it
refuses."""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import add_token
from held_out_text import write_model, write_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ds.commands import evaluate
from nexus_ds.console import CONTROL
from nexus_ds.errors import ConfigError, DataError, OutputExistsError
from nexus_ds.report.evaluation import file_names
from nexus_ds.report.page import PNG_MAGIC
from nexus_ds.report.summary import Summary


def arguments(checkpoints, data, out, *more):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = [word for path in checkpoints for word in ("--checkpoint", str(path))]
    return parser.parse_args(
        [*words, "--data", str(data), "--out", str(out), "--windows", "6", "--length", "16", *more]
    )


@pytest.fixture(scope="module")
def evaluated(dense_dir, nexus_dir, text_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    grown = root / "grown"
    shutil.copytree(nexus_dir, grown)
    args = arguments(
        [dense_dir, nexus_dir, grown], text_folder, root / "out", "--cache", str(root / "cache")
    )
    assert evaluate.run(args) == 0
    return root / "out"


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_summary_has_the_contract(evaluated):
    summary = summary_of(evaluated)
    domains = ["alpha", "beta", "gamma"]
    assert list(summary["perplexity"]) == ["dense", "nexus", "grown"]
    assert all(list(values) == domains for values in summary["perplexity"].values())
    assert list(summary["routing"]) == domains
    for shares in summary["routing"].values():
        assert list(shares) == domains and sum(shares.values()) == pytest.approx(1)
    assert isinstance(summary["tokens_per_second"], float) and summary["routed_model"] == "grown"
    assert (summary["windows"], summary["length"], summary["domains"]) == (6, 16, domains)


def test_models_of_one_tokenizer_read_the_same_text(evaluated):
    summary = summary_of(evaluated)
    assert summary["perplexity"]["nexus"] == summary["perplexity"]["grown"]
    assert summary["change"]["ratio"] == pytest.approx(
        dict.fromkeys(["alpha", "beta", "gamma"], 1.0)
    )
    assert summary["perplexity"]["nexus"] != summary["perplexity"]["dense"]


def beta_windows(text_folder, directory):
    """Return what the evaluation should read of beta, from the text itself: 6 of the blocks of 16
    tokens and a label."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    lines = (text_folder / "beta" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [
        i
        for line in lines
        for i in [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    blocks = (len(ids) - 1) // 16
    starts = [16 * (n * blocks // 6) for n in range(6)]
    return torch.tensor([ids[start : start + 17] for start in starts])


def test_summary_is_what_plain_transformers_finds_in_the_validation_text(
    evaluated, nexus_dir, text_folder
):
    model = AutoModelForCausalLM.from_pretrained(
        nexus_dir, local_files_only=True, dtype=torch.float32
    ).eval()
    summary, tokens_WT = summary_of(evaluated), beta_windows(text_folder, nexus_dir)
    with torch.no_grad():
        losses = [
            float(model(input_ids=window[None], labels=window[None]).loss) for window in tokens_WT
        ]
        logits = model(input_ids=tokens_WT[:, :-1], output_router_logits=True).router_logits
    assert summary["window_loss"]["nexus"]["beta"] == pytest.approx(losses, abs=1e-5)
    assert summary["loss"]["nexus"]["beta"] == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert summary["perplexity"]["nexus"]["beta"] == pytest.approx(
        math.exp(sum(losses) / 6), rel=1e-5
    )
    shares = [torch.bincount(layer.argmax(-1), minlength=3) / len(layer) for layer in logits]
    expected = dict(zip(["alpha", "beta", "gamma"], (sum(shares) / 2).tolist(), strict=True))
    # of the copy, which computes the same
    assert summary["routing"]["beta"] == pytest.approx(expected)
    assert summary["models"]["nexus"]["routing"]["beta"] == pytest.approx(expected)


def test_figures_and_their_numbers(evaluated):
    figures = evaluated / "figures"
    names = {path.name for path in figures.iterdir()}
    kinds = ("routing-nexus", "cosine-nexus", "cosine-nexus-centred")
    kinds += tuple(kind.replace("nexus", "grown") for kind in kinds)
    assert names == {
        f"{kind}.{end}" for kind in ("perplexity", *kinds) for end in ("png", "csv")
    } | {"change.csv"}
    assert all(path.read_bytes().startswith(PNG_MAGIC) for path in figures.glob("*.png"))
    with (figures / "routing-nexus.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == (2 + 1) * 3 * 3  # layers and mean, domains, experts
    mean = {(r["domain"], r["expert"]): float(r["share"]) for r in rows if r["layer"] == "mean"}
    assert mean["beta", "gamma"] == pytest.approx(
        summary_of(evaluated)["models"]["nexus"]["routing"]["beta"]["gamma"]
    )


def test_page_shows_everything(evaluated):
    page = (evaluated / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 2 * 3
    for text in (
        "Perplexity by domain",
        "Routing of nexus",
        "From nexus to grown",
        "Checkpoints",
        "How grown came about",
    ):
        assert f"<h2>{text}" in page
    assert "Domains before and after the projection: nexus" in page


def test_output_names_next_command(dense_dir, text_folder, tmp_path, capsys):
    assert (
        evaluate.run(
            arguments([dense_dir], text_folder, tmp_path / "out", "--domains", "beta,alpha")
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "report.html" in said and "next: nexus-ds generate --checkpoint" in said
    assert said.splitlines()[1].split() == ["model", "beta", "alpha", "all"]
    summary = summary_of(tmp_path / "out")
    assert (
        summary["routing"] == {} and summary["routed_model"] is None and summary["change"] is None
    )


def test_names_of_a_strangers_model_reach_no_terminal_as_they_are(
    nexus_dir, text_folder, tmp_path, capsys
):
    strange, text = tmp_path / "strange", tmp_path / "text"
    shutil.copytree(nexus_dir, strange)
    shutil.copytree(text_folder, text)
    (text / "beta").rename(text / "be\x1b[2Jta")
    sidecar = strange / "nexus.json"
    sidecar.write_text(sidecar.read_text().replace('"gamma"', '"gam\\u001b[2Jma\\ud800"'))
    assert evaluate.run(arguments([strange], text, tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert "be\\u001b[2Jta" in said.out and "gam\\u001b[2Jma\\ud800" in said.out
    assert not CONTROL.search(said.out + said.err)


def test_json_is_the_summary_alone(dense_dir, text_folder, tmp_path, capsys):
    evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", "--json", "--name", "small"))
    assert json.loads(capsys.readouterr().out) == summary_of(tmp_path / "out")


def test_mixture_without_sidecar_has_no_cosines_of_embeddings(plain_moe_dir, text_folder, tmp_path):
    evaluate.run(arguments([plain_moe_dir], text_folder, tmp_path / "out"))
    assert not list((tmp_path / "out" / "figures").glob("cosine*"))
    assert list(summary_of(tmp_path / "out")["routing"]["alpha"]) == [
        f"expert_{i}" for i in range(4)
    ]


def test_a_tokenizer_too_large_is_refused(nexus_dir, text_folder, tmp_path):
    add_token(shutil.copytree(nexus_dir, tmp_path / "large"))
    with pytest.raises(
        DataError,
        match=r"found token ids from \d+ to 31, .*large knows 0 to 30; tokenise the text with",
    ):
        evaluate.run(arguments([tmp_path / "large"], text_folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_different_tokenizers_are_warned_about(dense_dir, text_folder, tmp_path):
    other_tokenizer(dense_dir, tmp_path / "other")
    evaluate.run(arguments([dense_dir, tmp_path / "other"], text_folder, tmp_path / "out"))
    summary = summary_of(tmp_path / "out")
    assert "2 different tokenizers" in summary["warnings"][0]
    assert summary["perplexity"]["dense"]["beta"] != summary["perplexity"]["other"]["beta"]


def test_output_that_exists_is_refused_before_work(dense_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExistsError, match="out exists already; give another --out"):
        evaluate.run(arguments([dense_dir], "/nowhere", tmp_path / "out"))


def test_nothing_is_left_after_a_failure(dense_dir, text_folder, tmp_path):
    with pytest.raises(DataError, match="delta"):
        evaluate.run(
            arguments([dense_dir], text_folder, tmp_path / "out", "--domains", "alpha,delta")
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--before", "other"],
            "--before other: expected a model given before the last one, which it is compared with",
        ),
        (["--windows", "0"], "--windows: expected a number of at least 1, found 0"),
        (["--length", "-1"], "--length: expected a number of at least 0, found -1"),
        (["--task-limit", "-1"], "--task-limit: expected a number of at least 0, found -1"),
        (["--fail-if-worse", "3"], "--fail-if-worse '3': expected a percentage such as 3%"),
        (
            ["--fail-if-worse", "3%"],
            "--fail-if-worse compares two mixtures; "
            "give --checkpoint of one before and of one after, or name any model",
        ),
        (["--batch", "0"], "--batch: expected a number of at least 1, found 0"),
        (
            ["--name", "a", "--name", "b"],
            "found 2 --name for 1 --checkpoint; give one --name for each, or none",
        ),
        (["--name", " "], "found an empty --name"),
        (
            ["--domains", "alpha,alpha"],
            "--domains names a domain twice: alpha, alpha; name each once",
        ),
    ],
)
def test_options_that_make_no_sense(dense_dir, text_folder, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", *more))


@pytest.fixture(scope="module")
def worse_dir(nexus_dir, tmp_path_factory):
    """The mixture with a final norm that makes it far too sure: worse on every window of every
    domain."""
    out = tmp_path_factory.mktemp("worse") / "worse"
    shutil.copytree(nexus_dir, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] *= 20
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def interval(summary, before, after, domain):
    """Return the 95% interval of the relative change over 6 windows: Student's t of 5 degrees of
    freedom is 2.5706."""
    loss = summary["window_loss"]
    difference_W = np.array(loss[after][domain]) - np.array(loss[before][domain])
    noise = 2.5706 * difference_W.std(ddof=1) / math.sqrt(6)
    return np.expm1([difference_W.mean() - noise, difference_W.mean() + noise])


@pytest.fixture(scope="module")
def judged(nexus_dir, worse_dir, text_folder, tmp_path_factory):
    """What `evaluate` prints of two mixtures, its exit code and its output."""
    out = tmp_path_factory.mktemp("judged") / "out"
    words, told, errors = ("--fail-if-worse", "3%"), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(errors):
        code = evaluate.run(arguments([nexus_dir, worse_dir], text_folder, out, *words))
    return code, told.getvalue(), errors.getvalue(), out


def test_two_mixtures_are_judged(judged):
    code, told, errors, out = judged
    assert (
        code == 3 and "nexus-ds evaluate: worse than --fail-if-worse 3% allows: alpha (+" in errors
    )
    summary = summary_of(out)
    change = summary["change"]
    assert (
        change["failed"] == ["alpha", "beta", "gamma"]
        and change["limit"] == 0.03
        and change["windows"] == 6
    )
    for domain, entry in change["domains"].items():
        assert entry["interval"] == pytest.approx(
            interval(summary, "nexus", "worse", domain), rel=1e-4
        )
        assert entry["interval"][0] > 0.03 and entry["verdict"] == "worse"
        perplexity = {name: summary["perplexity"][name][domain] for name in ("nexus", "worse")}
        assert (entry["before"], entry["after"]) == pytest.approx(
            (perplexity["nexus"], perplexity["worse"])
        )
    lines = told.splitlines()
    start = lines.index("from nexus to worse, ± one standard error")
    assert lines[start + 1].split() == [
        "perplexity",
        "of",
        "before",
        "after",
        "change",
        "in",
        "nats",
        "verdict",
    ]
    assert [line.split()[0] for line in lines[start + 2 : start + 6]] == [
        "alpha",
        "beta",
        "gamma",
        "all",
    ]
    assert all(" ± " in line and line.endswith("worse") for line in lines[start + 2 : start + 6])


def test_a_limit_that_the_windows_do_not_decide_passes_and_is_said(
    judged, nexus_dir, worse_dir, text_folder, tmp_path, capsys
):
    low, high = interval(summary_of(judged[-1]), "nexus", "worse", "beta")
    # above the change itself: some windows would fail it, others not
    limit = f"{100 * (0.2 * low + 0.8 * high):.2f}%"
    words = ("--domains", "beta", "--fail-if-worse", limit)
    assert (
        evaluate.run(arguments([nexus_dir, worse_dir], text_folder, tmp_path / "out", *words)) == 0
    )
    said = capsys.readouterr().err
    assert f"nexus-ds evaluate: 6 windows do not decide --fail-if-worse {limit} for beta (+" in said
    assert "so that passes; about" in said and summary_of(tmp_path / "out")["change"][
        "undecided"
    ] == ["beta"]
    assert "Not decided: 6 windows do not decide" in (tmp_path / "out" / "report.html").read_text()


def test_any_model_can_be_the_one_before(dense_dir, nexus_dir, worse_dir, text_folder, tmp_path):
    words = ("--before", "nexus", "--fail-if-worse", "3%", "--domains", "beta")
    models = [nexus_dir, worse_dir, dense_dir]
    code = evaluate.run(arguments(models, text_folder, tmp_path / "out", *words))
    summary = summary_of(tmp_path / "out")
    assert (summary["change"]["before"], summary["change"]["after"]) == ("nexus", "dense")
    assert code == (
        3
        if any(interval(summary, "nexus", "dense", d)[0] > 0.03 for d in summary["domains"])
        else 0
    )
    assert "<h2>From nexus to dense" in (tmp_path / "out" / "report.html").read_text()


def other_tokenizer(source, out):
    """Copy a model and exchange two words of its vocabulary."""
    shutil.copytree(source, out)
    value = json.loads((out / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["axiom"], vocabulary["bark"] = vocabulary["bark"], vocabulary["axiom"]
    (out / "tokenizer.json").write_text(json.dumps(value))
    return out


def test_a_limit_needs_models_that_read_the_same_windows(nexus_dir, text_folder, tmp_path):
    models = [nexus_dir, other_tokenizer(nexus_dir, tmp_path / "other")]
    with pytest.raises(
        ConfigError, match="but these have different tokenizers and so different windows"
    ):
        evaluate.run(arguments(models, text_folder, tmp_path / "out", "--fail-if-worse", "3%"))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_lm_eval(dense_dir, text_folder, tmp_path):
    with pytest.raises(ConfigError, match="tasks need lm-eval, found no lm_eval"):
        evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", "--tasks", "paper"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_stand_in_summary_and_page(dense_dir, nexus_dir, text_folder, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text(
        '{"query": "ship", "choices": ["sail", "moss"], "gold": 0}\n' * 4
    )
    (tmp_path / "tasks" / "wet.yaml").write_text(
        "task: wet\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/tasks/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\n"
        "doc_to_choice: choices\n"
        "doc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    more = ["--tasks", "wet", "--task-path", str(tmp_path / "tasks")]
    assert (
        evaluate.run(arguments([dense_dir, nexus_dir], text_folder, tmp_path / "out", *more)) == 0
    )
    tasks = summary_of(tmp_path / "out")["tasks"]
    assert list(tasks) == ["dense", "nexus"] and tasks["dense"]["groups"]["wet"] in (0.0, 100.0)
    assert tasks["dense"]["mean"] == tasks["dense"]["groups"]["wet"]
    assert "tasks (per cent ± one standard error, higher is better)" in capsys.readouterr().out
    assert "<h2>Tasks</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_two_models_of_one_name(dense_dir, text_folder, tmp_path):
    with pytest.raises(
        ConfigError, match="several checkpoints are called dense; give each its own --name"
    ):
        evaluate.run(arguments([dense_dir, dense_dir], text_folder, tmp_path / "out"))


def test_file_names_are_harmless_and_distinct():
    assert file_names(["a/b", "a b", "..", "A-B"]) == {
        "a/b": "a-b",
        "a b": "a-b-2",
        "..": "model",
        "A-B": "A-B-3",
    }


# Measures of held-out documents -------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = tmp_path_factory.mktemp("measured")
    text = write_text(root / "text")
    models = [write_model(root / name, seed) for seed, name in enumerate(("one", "two"))]
    words = ("--measures", "all", "--documents", "3", "--length", "64", "--seed", "4")
    assert evaluate.run(arguments(models, text, root / "out", *words)) == 0
    return root


def test_measures_are_in_all_that_is_written(measured, capsys):
    summary = summary_of(measured / "out")
    assert list(summary["measures"]) == ["bits", "cloze", "generation"]
    for measure, entry in summary["measures"].items():
        assert list(entry["models"]) == ["one", "two"]
        assert list(entry["reference"]) == ([] if measure == "bits" else ["alpha", "beta"])
        for by_domain in entry["models"].values():
            assert all(len(part["values"]) == 3 for part in by_domain.values())
    assert Summary.from_json(summary).to_json() == summary
    with (measured / "out" / "figures" / "measures.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 * 2 + 2 * 2
    one = summary["measures"]["cloze"]["models"]["one"]["beta"]
    (row,) = [row for row in rows if (row["measure"], row["model"]) == ("cloze", "one")][1:]
    assert float(row["mean"]) == one["mean"] and float(row["items"]) == sum(one["weights"])
    page = (measured / "out" / "report.html").read_text()
    for title in ("Bits per byte", "Cloze", "Distance of generated text"):
        assert f"<h2>{title} (" in page
    assert "two − one" in page


def test_measures_repeat_under_a_seed_whatever_stands_beside_them(measured, capsys):
    words = ("--measures", "generation, bits", "--documents", "3", "--length", "64", "--domains")
    models = [measured / "two"]
    found = []
    for number, seed in enumerate(("4", "5")):
        out = measured / f"again{number}"
        args = arguments(models, measured / "text", out, *words, "beta", "--seed", seed)
        assert evaluate.run(args) == 0
        found.append(summary_of(out)["measures"])
    shown = capsys.readouterr()
    assert "bits per byte (lower is better), ± one standard error\nmodel " in shown.out
    assert "real text" in shown.out and "chance" not in shown.out
    assert "continue prompts with two: " in shown.err
    whole = summary_of(measured / "out")["measures"]
    assert list(found[0]) == ["bits", "generation"]
    for measure, entry in found[0].items():
        both = entry["models"]["two"]["beta"], whole[measure]["models"]["two"]["beta"]
        values = [part["values"] for part in both]
        if measure == "bits":
            assert values[0] == pytest.approx(values[1], rel=1e-6)
        # prompts of other domains come before, and take other seeds
        assert entry["reference"].get("beta") == whole[measure]["reference"].get("beta")
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--measures", "bits,acc"],
            "--measures 'bits,acc': found acc, expected all, or some of bits, cloze, generation",
        ),
        (
            ["--measures", "bits", "--documents", "1"],
            "--documents: expected a number of at least 2",
        ),
        (["--seed", "-1"], "--seed: expected a number of at least 0"),
    ],
)
def test_measures_that_are_refused(measured, tmp_path, words, said):
    args = arguments([measured / "one"], measured / "text", tmp_path / "out", *words)
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluate.run(args)


def test_too_little_text_is_said_before_a_model_is_scored(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)
    args = arguments([measured / "one"], measured / "text", tmp_path / "out", "--measures", "bits")
    with pytest.raises(DataError, match="found 6 validation documents"):
        evaluate.run(args)
    assert not (tmp_path / "out").exists()
