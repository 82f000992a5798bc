"""Downstream tasks: groups, metrics, and what is said without lm-eval; with it, one real task on a
tiny model."""

import importlib.util
import json

import pytest

from nexus_ds.errors import ConfigError
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
