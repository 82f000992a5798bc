"""The verb evaluate: summary, figures, CSV and page of one run; names, tokenizers, and what it refuses."""

import argparse
import csv
import importlib.util
import json
import shutil

import pytest
from conftest import make_nexus

from nexus_ds import evaluate
from nexus_ds.errors import ConfigError, DataError, OutputExistsError
from nexus_ds.model.scoring import DEFAULT_LENGTH, score, window_length
from nexus_ds.report.evaluation import file_names
from nexus_ds.report.page import PNG_MAGIC


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
    args = arguments([dense_dir, nexus_dir, grown], text_folder, root / "out", "--cache", str(root / "cache"))
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
    assert summary["change"]["ratio"] == pytest.approx(dict.fromkeys(["alpha", "beta", "gamma"], 1.0))
    assert summary["perplexity"]["nexus"] != summary["perplexity"]["dense"]


def test_summary_equals_the_scoring(evaluated, nexus_dir, text_folder):
    from nexus_ds.data.corpora import open_source, token_files, windows

    cache = evaluated.parent / "cache"
    files = token_files(open_source(str(text_folder)), ["beta"], "validation", nexus_dir, cache)
    scores = score(nexus_dir, {"beta": windows(files["beta"], 6, 16)})
    summary = summary_of(evaluated)
    assert summary["perplexity"]["nexus"]["beta"] == pytest.approx(scores.perplexity["beta"], rel=1e-5)
    assert summary["models"]["nexus"]["routing"]["beta"] == pytest.approx(scores.routing.mean_share()["beta"])


def test_figures_and_their_numbers(evaluated):
    figures = evaluated / "figures"
    names = {path.name for path in figures.iterdir()}
    kinds = ("routing-nexus", "cosine-nexus", "cosine-nexus-centred")
    kinds += tuple(kind.replace("nexus", "grown") for kind in kinds)
    assert names == {f"{kind}.{end}" for kind in ("perplexity", *kinds) for end in ("png", "csv")}
    assert all(path.read_bytes().startswith(PNG_MAGIC) for path in figures.glob("*.png"))
    with (figures / "routing-nexus.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == (2 + 1) * 3 * 3  # layers and mean, domains, experts
    mean = {(r["domain"], r["expert"]): float(r["share"]) for r in rows if r["layer"] == "mean"}
    assert mean["beta", "gamma"] == pytest.approx(summary_of(evaluated)["models"]["nexus"]["routing"]["beta"]["gamma"])


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
    assert evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", "--domains", "beta,alpha")) == 0
    said = capsys.readouterr().out
    assert "report.html" in said and "next: nexus-ds generate --checkpoint" in said
    assert said.splitlines()[1].split() == ["model", "beta", "alpha", "all"]
    summary = summary_of(tmp_path / "out")
    assert summary["routing"] == {} and summary["routed_model"] is None and summary["change"] is None


def test_json_is_the_summary_alone(dense_dir, text_folder, tmp_path, capsys):
    evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", "--json", "--name", "small"))
    assert json.loads(capsys.readouterr().out) == summary_of(tmp_path / "out")


def test_mixture_without_sidecar_has_no_cosines_of_embeddings(plain_moe_dir, text_folder, tmp_path):
    evaluate.run(arguments([plain_moe_dir], text_folder, tmp_path / "out"))
    assert not list((tmp_path / "out" / "figures").glob("cosine*"))
    assert list(summary_of(tmp_path / "out")["routing"]["alpha"]) == [f"expert_{i}" for i in range(4)]


def test_different_tokenizers_are_warned_about(dense_dir, text_folder, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["axiom"], vocabulary["bark"] = vocabulary["bark"], vocabulary["axiom"]
    path.write_text(json.dumps(value))
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
        evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", "--domains", "alpha,delta"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--windows", "0"], "--windows: expected a number of at least 1, found 0"),
        (["--length", "-1"], "--length: expected a number of at least 0, found -1"),
        (["--task-limit", "-1"], "--task-limit: expected a number of at least 0, found -1"),
        (["--fail-if-worse", "3"], "--fail-if-worse '3': expected a percentage such as 3%"),
        (
            ["--fail-if-worse", "3%"],
            "--fail-if-worse compares two mixtures; give --checkpoint of one before and of one",
        ),
        (["--batch", "0"], "--batch: expected a number of at least 1, found 0"),
        (["--name", "a", "--name", "b"], "found 2 --name for 1 --checkpoint; give one --name for each, or none"),
        (["--name", " "], "found an empty --name"),
        (["--domains", "alpha,alpha"], "--domains names a domain twice: alpha, alpha; name each once"),
    ],
)
def test_options_that_make_no_sense(dense_dir, text_folder, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", *more))


def test_two_mixtures_are_judged(nexus_dir, text_folder, tmp_path, capsys):
    make_nexus(tmp_path / "other", seed=1)  # random too, and worse on some domain
    words = ("--fail-if-worse", "0%")
    assert evaluate.run(arguments([nexus_dir, tmp_path / "other"], text_folder, tmp_path / "out", *words)) == 3
    change = summary_of(tmp_path / "out")["change"]["ratio"]
    worse = [domain for domain, ratio in change.items() if ratio > 1]
    said = capsys.readouterr().err
    assert worse and "nexus-ds evaluate: worse than --fail-if-worse 0% allows" in said
    assert [domain for domain in change if f"{domain} (+" in said] == worse


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_lm_eval(dense_dir, text_folder, tmp_path):
    with pytest.raises(ConfigError, match="tasks need lm-eval, found no lm_eval"):
        evaluate.run(arguments([dense_dir], text_folder, tmp_path / "out", "--tasks", "paper"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_stand_in_summary_and_page(dense_dir, nexus_dir, text_folder, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text('{"query": "ship", "choices": ["sail", "moss"], "gold": 0}\n' * 4)
    (tmp_path / "tasks" / "wet.yaml").write_text(
        f"task: wet\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/tasks/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    more = ["--tasks", "wet", "--task-path", str(tmp_path / "tasks")]
    assert evaluate.run(arguments([dense_dir, nexus_dir], text_folder, tmp_path / "out", *more)) == 0
    tasks = summary_of(tmp_path / "out")["tasks"]
    assert list(tasks) == ["dense", "nexus"] and tasks["dense"]["groups"]["wet"] in (0.0, 100.0)
    assert tasks["dense"]["mean"] == tasks["dense"]["groups"]["wet"]
    assert "tasks (per cent, higher is better)" in capsys.readouterr().out
    assert "<h2>Tasks</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_two_models_of_one_name(dense_dir, text_folder, tmp_path):
    with pytest.raises(ConfigError, match="several checkpoints are called dense; give each its own --name"):
        evaluate.run(arguments([dense_dir, dense_dir], text_folder, tmp_path / "out"))


def test_window_length():
    facts = [{"sequence_length": None, "max_positions": 2048}, {"sequence_length": None, "max_positions": 64}]
    assert window_length(0, facts) == 64
    assert window_length(0, facts[:1]) == DEFAULT_LENGTH
    assert window_length(0, [{"sequence_length": 512, "max_positions": 2048}]) == 512
    assert window_length(32, facts) == 32


def test_file_names_are_harmless_and_distinct():
    assert file_names(["a/b", "a b", "..", "A-B"]) == {"a/b": "a-b", "a b": "a-b-2", "..": "model", "A-B": "A-B-3"}
