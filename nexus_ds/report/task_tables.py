"""Scores of downstream tasks as a table and a section of a page; the numbers come from
`nexus_ds.evaluation.tasks`.

Not covered: figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nexus_ds.report.page import Cell, Section, Spread, Table

READING = (
    "Scores of downstream tasks in per cent ± one standard error, by group; higher is better, bold marks the best model of a "
    "column, and the last column is the mean of the groups. Tasks of four choices start at 25, of two at 50: small models "
    "often stay there."
)
READING_EACH = (
    "Score and standard error of each task, in per cent, and how it was run. Two models differ where their scores are "
    "several standard errors apart."
)
READING_LEFT_OUT = "The paper's tasks that are not in the means above, with the reason. Compare means only with those over the same tasks."


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return scores[model][group] and their mean, ± one standard error; `tasks` is that of a
    summary.json."""
    groups = list(dict.fromkeys(group for entry in tasks.values() for group in entry["groups"]))
    rows: list[list[Cell]] = []
    for model, entry in tasks.items():
        errors = {group: _group_error(entry, group) for group in entry["groups"]}
        scores = [Spread(entry["groups"][g], errors[g], 1) if g in errors else None for g in groups]
        rows.append(
            [model, *scores, Spread(entry["mean"], _error_of_mean(list(errors.values())), 1)]
        )
    return Table(header=["model", *groups, "mean"], rows=rows, best="max")


def _group_error(entry: Mapping[str, Any], group: str) -> float | None:
    return _error_of_mean(
        [task["stderr"] for task in entry["tasks"].values() if task["group"] == group]
    )


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of independent scores; None if that of one is not
    known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def task_sections(summary: Mapping[str, Any]) -> list[Section]:
    """Return the sections about a summary's tasks: by group, then each task; none without tasks."""
    tasks = summary.get("tasks")
    if not tasks:
        return []
    names = list(dict.fromkeys(task for entry in tasks.values() for task in entry["tasks"]))
    rows: list[list[Cell]] = [
        [task, *(_score(entry["tasks"].get(task)) for entry in tasks.values()), _how(task, tasks)]
        for task in names
    ]
    sections = [
        Section(title="Tasks", text=READING, table=task_table(tasks)),
        Section(
            title="Each task",
            text=READING_EACH,
            table=Table(header=["task", *tasks, "how"], rows=rows),
        ),
    ]
    left_out: dict[str, str] = {
        task: why for entry in tasks.values() for task, why in entry["not_run"].items()
    }
    if left_out:
        table = Table(header=["task", "why"], rows=[[task, why] for task, why in left_out.items()])
        sections.append(
            Section(title="Tasks that were not run", text=READING_LEFT_OUT, table=table)
        )
    return sections


def _score(task: Mapping[str, Any] | None) -> str | None:
    if task is None:
        return None
    return f"{task['score']:.1f}" + ("" if task["stderr"] is None else f" ± {task['stderr']:.1f}")


def _how(name: str, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    task = next(entry["tasks"][name] for entry in tasks.values() if name in entry["tasks"])
    return f"{task['metric']}, {task['shots']} shots, {task['examples']:,} examples"
