"""Tasks on a page: table of groups, each task with its error, and what was not run."""

from nexus_ds.report.page import text_table
from nexus_ds.report.tasks import task_sections, task_table


def entry(groups, tasks, not_run=None):
    return {"mean": sum(groups.values()) / len(groups), "groups": groups, "tasks": tasks, "not_run": not_run or {}}


def task(group, score, stderr=1.5, shots=0):
    return {"group": group, "metric": "acc", "score": score, "stderr": stderr, "shots": shots, "examples": 1200}


TASKS = {
    "seed": entry({"science": 30.0}, {"sciq": task("science", 30.0)}, {"mmlu": "no data"}),
    "Nexus": entry(
        {"science": 34.0, "mmlu": 26.0}, {"sciq": task("science", 34.0, None), "mmlu": task("mmlu", 26.0, 2, 5)}
    ),
}


def test_groups_and_their_mean():
    table = task_table(TASKS)
    assert table.header == ["model", "science", "mmlu", "mean"] and table.best == "max"
    assert table.rows == [["seed", 30.0, None, 30.0], ["Nexus", 34.0, 26.0, 30.0]]
    assert "–" in text_table(table)


def test_sections_name_each_task_and_what_was_not_run():
    groups, each, left_out = task_sections({"tasks": TASKS})
    assert groups.title == "Tasks" and groups.table.rows[1][0] == "Nexus"
    assert each.table.rows == [
        ["sciq", "30.0 ± 1.5", "34.0", "acc, 0 shots, 1,200 examples"],
        ["mmlu", None, "26.0 ± 2.0", "acc, 5 shots, 1,200 examples"],
    ]
    assert left_out.table.rows == [["mmlu", "no data"]]
    assert len(task_sections({"tasks": {"Nexus": TASKS["Nexus"]}})) == 2
    assert task_sections({}) == [] and task_sections({"tasks": {}}) == []
