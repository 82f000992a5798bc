"""Tasks on a page: table of groups, each task with its error, and what was not run."""

from nexus_ds.report.page import Spread, text_table
from nexus_ds.report.summary import ModelTasks
from nexus_ds.report.task_tables import task_sections, task_table


def entry(groups, tasks, not_run=None):
    return ModelTasks.from_json(
        {
            "mean": sum(groups.values()) / len(groups),
            "groups": groups,
            "tasks": tasks,
            "not_run": not_run or {},
        }
    )


def task(group, score, stderr=1.5, shots=0):
    return {
        "group": group,
        "metric": "acc",
        "score": score,
        "stderr": stderr,
        "shots": shots,
        "examples": 1200,
    }


TASKS = {
    "seed": entry({"science": 30.0}, {"sciq": task("science", 30.0)}, {"mmlu": "no data"}),
    "Nexus": entry(
        {"science": 34.0, "mmlu": 26.0},
        {"sciq": task("science", 34.0, None), "mmlu": task("mmlu", 26.0, 2, 5)},
    ),
}


def test_groups_and_their_mean():
    table = task_table(TASKS)
    assert table.header == ["model", "science", "mmlu", "mean"] and table.best == "max"
    assert table.rows == [
        ["seed", Spread(30.0, 1.5, 1), None, Spread(30.0, 1.5, 1)],
        ["Nexus", Spread(34.0, None, 1), Spread(26.0, 2.0, 1), Spread(30.0, None, 1)],
    ]
    assert [line.split("  ")[-1] for line in text_table(table).splitlines()] == [
        "mean",
        "30.0 ± 1.5",
        "30.0",
    ]
    assert "–" in text_table(table)


def test_errors_of_groups_and_their_mean():
    tasks = {"a": task("x", 10.0, 3.0), "b": task("x", 20.0, 4.0), "c": task("y", 40.0, 6.0)}
    (row,) = task_table({"Nexus": entry({"x": 15.0, "y": 40.0}, tasks)}).rows
    # 5/2; hypot(2.5, 6)/2
    assert row[1:] == [Spread(15.0, 2.5, 1), Spread(40.0, 6.0, 1), Spread(27.5, 3.25, 1)]


def test_sections_name_each_task_and_what_was_not_run():
    groups, each, left_out = task_sections(TASKS)
    assert groups.title == "Tasks" and groups.table.rows[1][0] == "Nexus"
    assert each.table.rows == [
        ["sciq", "30.0 ± 1.5", "34.0", "acc, 0 shots, 1,200 examples"],
        ["mmlu", None, "26.0 ± 2.0", "acc, 5 shots, 1,200 examples"],
    ]
    assert left_out.table.rows == [["mmlu", "no data"]]
    assert len(task_sections({"Nexus": TASKS["Nexus"]})) == 2
    assert task_sections({}) == []
