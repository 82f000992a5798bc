"""Downstream tasks: groups, metrics, and what is said without lm-eval; with it, one real task on a
tiny model."""

import importlib.util
import json
import shutil
import sys
import types
from typing import NamedTuple

import pytest
import torch

from nexus_ds.checkpoint import pieces
from nexus_ds.checkpoint.needs import LOGITS_AT_ONCE, Way
from nexus_ds.checkpoint.pieces import open_way
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.evaluation import tasks
from nexus_ds.evaluation.tasks import (
    PAPER,
    TaskScores,
    require_harness,
    run_tasks,
    score_of,
    task_groups,
)

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")


def test_groups():
    assert list(task_groups("paper")) == ["knowledge", "science", "reasoning", "mmlu", "code"]
    assert task_groups(" a, b ,") == {"a": ("a",), "b": ("b",)}
    names = [task for tasks in PAPER.values() for task in tasks]
    assert len(set(names)) == len(names)
    for text in ("", " , ", "a,a"):
        with pytest.raises(ConfigError, match="expected paper, or names of tasks, each once: A,B"):
            task_groups(text)


def test_the_mean_counts_groups_the_same():
    assert TaskScores(groups={"science": 50.0, "mmlu": 26.0}).mean == 38.0


def test_a_task_has_one_score_in_per_cent():
    result = {
        "alias": "arc",
        "acc,none": 0.25,
        "acc_stderr,none": 0.02,
        "acc_norm,none": 0.5,
        "acc_norm_stderr,none": 0.03,
    }
    assert score_of(result) == ("acc_norm", 50.0, 3.0)
    assert score_of(
        {"exact_match,remove_whitespace": 0.125, "exact_match_stderr,remove_whitespace": "N/A"}
    ) == (
        "exact_match",
        12.5,
        None,
    )
    of_nothing = {"acc,none": float("nan"), "f1,none": 0.5, "f1_stderr,none": float("nan")}
    assert score_of(of_nothing) == ("f1", 50.0, None)
    assert score_of({"alias": "wikitext", "word_perplexity,none": 21.0}) is None


@pytest.mark.skipif(HARNESS, reason="lm-eval is installed")
def test_without_lm_eval_it_says_how_to_get_it(dense_dir):
    with pytest.raises(
        ConfigError,
        match=r"tasks need lm-eval, found no lm_eval.*; add it with: .* -m pip install 'lm-eval",
    ):
        run_tasks(dense_dir, {"a": ("a",)})
    with pytest.raises(ConfigError):
        require_harness()


@pytest.fixture
def task_folder(tmp_path):
    """Two tasks over local files: `wet` (which of three words follows) and `broken` (its file is
    not there)."""
    rows = [
        {"query": "ship sail", "choices": ["wind", "moss", "lemma"], "gold": i % 3}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (
        "task: {name}\n"
        "dataset_path: json\n"
        "dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{{{query}}}}'\n"
        "doc_to_choice: choices\n"
        "doc_to_target: gold\n"
        "metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n"
    )
    (tmp_path / "wet.yaml").write_text(text.format(name="wet", file=tmp_path / "rows.jsonl"))
    (tmp_path / "sea.yaml").write_text(
        "tag: sea\n" + text.format(name="tagged", file=tmp_path / "rows.jsonl")
    )
    (tmp_path / "broken.yaml").write_text(text.format(name="broken", file=tmp_path / "gone.jsonl"))
    return tmp_path


@needs_harness
def test_a_real_task_on_dense_and_mixture(dense_dir, nexus_dir, task_folder):
    for directory in (dense_dir, nexus_dir):
        scores = run_tasks(directory, {"sea": ("wet",)}, task_folder)
        # each word is right four times of twelve
        assert scores.groups == {"sea": pytest.approx(100 / 3)}
        assert scores.tasks["wet"] | {"stderr": 0} == {
            "group": "sea",
            "metric": "acc",
            "score": pytest.approx(100 / 3),
            "stderr": 0,
            "shots": 0,
            "examples": 12,
        }
    assert (
        run_tasks(dense_dir, {"sea": ("wet",)}, task_folder, limit=6).tasks["wet"]["examples"] == 6
    )


class Requests(NamedTuple):
    """As lm-eval asks: what follows, or what to generate."""

    args: tuple


class MadeUpModel:
    """Where lm-eval's model would be: a pass over the words of the first request."""

    max_gen_toks = 7

    def __init__(self, pretrained, tokenizer, batch_size):
        self.pretrained, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def loglikelihood(self, requests):
        ids_1T = self.tokenizer("".join(requests[0].args), return_tensors="pt").input_ids
        self.pretrained(ids_1T.expand(self.batch_size, -1))

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        return [""] * len(requests)


@pytest.fixture
def made_up(monkeypatch):
    """lm-eval with the tasks `wet` and `dry`, which find nothing out; the answer tells how often
    each was begun."""
    begun = {"wet": 0, "dry": 0}

    class Manager:
        all_tasks = ("wet", "dry")

        def __init__(self, **options):
            pass

    def simple_evaluate(model, tasks, limit, **options):
        begun[tasks[0]] += 1
        model.loglikelihood([Requests(("ship sail", " wind"))] * 300)
        model.generate_until([Requests(("ship", {"until": ["x"]}))] * 10)
        model.generate_until([Requests(("ship", {"max_gen_toks": 3}))] * 10)
        result = {"acc,none": 0.5}
        return {
            "results": {tasks[0]: result},
            "n-samples": {tasks[0]: {"effective": 3}},
            "n-shot": {tasks[0]: 0},
        }

    found = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": MadeUpModel},
    }
    for name, members in found.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tasks, "require_harness", lambda: None)
    tasks._manager.cache_clear()
    yield begun
    tasks._manager.cache_clear()


GROUPS = {"sea": ("wet",), "land": ("dry",)}


def test_tasks_go_on_in_smaller_pieces_where_memory_runs_out(
    made_up, nexus_dir, monkeypatch, capsys
):
    """It is no fault of the task, and what was done before stays done."""

    def opened(directory, precision, place, way):
        model = open_way(directory, precision, place, way)

        def fail(module, inputs):
            if made_up["dry"] and len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(fail)
        return model

    monkeypatch.setattr(tasks, "open_way", opened)
    scores = run_tasks(nexus_dir, GROUPS, batch=8, strict=False, label="m")
    assert scores.groups == {"sea": 50.0, "land": 50.0} and not scores.not_run
    assert made_up == {"wet": 1, "dry": 3}
    said = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert said == [
        "tasks m: memory ran out (whole, 8 sequences at once); it goes on whole, "
        "4 sequences at once",
        "tasks m: memory ran out (whole, 4 sequences at once); it goes on whole, "
        "2 sequences at once",
    ]


def test_a_model_of_no_number_of_positions_is_named(made_up, nexus_dir, tmp_path):
    path = shutil.copytree(nexus_dir, tmp_path / "m") / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": "abc"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="max_position_embeddings is 'abc', expected a whole"):
        run_tasks(tmp_path / "m", GROUPS)


def test_tasks_are_planned_with_the_logits_of_all_tokens(made_up, nexus_dir, monkeypatch):
    asked = []

    def planned(need, places, rows, length, label):
        asked.append((need.logits(rows, length), rows * length * need.vocabulary))
        return Way(streamed=False, rows=1)

    monkeypatch.setattr(tasks, "planned_way", planned)
    run_tasks(nexus_dir, GROUPS, batch=20_000)
    # fp32 on a CPU: logits, and logarithms of probabilities
    ((found, logits),) = asked
    assert found == 8 * logits and logits > LOGITS_AT_ONCE


def test_a_task_that_takes_long_says_so_before(made_up, nexus_dir, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "cpu_speed", lambda: 1.0)
    monkeypatch.setattr(tasks, "planned_way", lambda *asked: Way(streamed=True, rows=2))
    asked = []
    stock = pieces.warn_of_time
    monkeypatch.setattr(tasks, "warn_of_time", lambda *args: asked.append(args) or stock(*args))
    run_tasks(nexus_dir, {"sea": ("wet",)}, label="m")
    tokens = len(open_tokenizer(nexus_dir)("ship sail wind").input_ids)
    one = len(open_tokenizer(nexus_dir)("ship").input_ids)
    # tokens, and readings of the checkpoint: one a pass of two sequences, and one a token generated
    assert [(args[2], args[4]) for args in asked] == [
        (300 * tokens, 150),
        (10 * (one + 7), 35),
        (10 * (one + 3), 15),
    ]
    said = capsys.readouterr().err
    assert f"tasks m: no GPU; 0.0B active parameters and {300 * tokens:,} tokens take" in said


@needs_harness
def test_lm_evals_own_requests_are_counted(nexus_dir, task_folder, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "cpu_speed", lambda: 1.0)
    run_tasks(nexus_dir, {"sea": ("wet",)}, task_folder, label="m")
    count = sum(
        len(open_tokenizer(nexus_dir)(f"ship sail {word}").input_ids)
        for word in ("wind", "moss", "lemma")
    )
    assert f"parameters and {12 * count} tokens take about" in capsys.readouterr().err


@needs_harness
def test_tasks_that_can_not_be_run(dense_dir, task_folder):
    groups = {"sea": ("wet", "broken", "no_such_task"), "code": ("humaneval",)}
    scores = run_tasks(dense_dir, groups, task_folder, strict=False)
    assert list(scores.tasks) == ["wet"] and list(scores.groups) == ["sea"]
    assert list(scores.not_run) == ["broken", "no_such_task", "humaneval"]
    assert "HF_HUB_OFFLINE=0 downloads it, --task-path reads files" in scores.not_run["broken"]
    assert scores.not_run["humaneval"].endswith("allow that in a sandbox with HF_ALLOW_CODE_EVAL=1")
    with pytest.raises(
        ConfigError,
        match="task no_such_task: lm-eval has none of this name; give its YAML's folder",
    ):
        run_tasks(dense_dir, {"a": ("no_such_task",)}, task_folder)
    with pytest.raises(
        ConfigError,
        match="task sea: reports nothing itself; it stands for tagged; expected one of acc_n",
    ):
        run_tasks(dense_dir, {"a": ("sea",)}, task_folder)
    with pytest.raises(ConfigError, match="none of the tasks could be run:\nbroken: "):
        run_tasks(dense_dir, {"a": ("broken",)}, task_folder, strict=False)
    with pytest.raises(ConfigError, match=r"--task-path .*nowhere: no such folder"):
        run_tasks(dense_dir, {"a": ("wet",)}, task_folder / "nowhere")


@needs_harness
def test_the_papers_tasks_have_names_that_lm_eval_knows():
    from lm_eval.tasks import TaskManager

    assert {task for tasks in PAPER.values() for task in tasks} <= set(TaskManager().all_tasks)
