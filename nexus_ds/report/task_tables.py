"""Scores of downstream tasks as tables and sections of a page.

`nexus_ds.evaluation.tasks` measures them; `report.summary.ModelTasks` is what is read here.

Not covered: figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nexus_ds.report.page import Cell, Section, Spread, Table
from nexus_ds.report.summary import ModelTasks, TaskEntry

READING = (
    "Scores of downstream tasks in per cent ± one standard error, by group; higher is better, bold "
    "marks the best model of a column, and the last column is the mean of the groups. Tasks of "
    "four choices start at 25, of two at 50: small models often stay there."
)
READING_EACH = (
    "Score and standard error of each task, in per cent, and how it was run. Two models differ "
    "where their scores are several standard errors apart."
)
READING_LEFT_OUT = (
    "The paper's tasks that are not in the means above, with the reason. Compare means only with "
    "those over the same tasks."
)


def task_table(tasks: Mapping[str, ModelTasks]) -> Table:
    """Return scores by model (rows) and group (columns) and their mean, ± one standard error."""
    found: dict[str, None] = {}
    for entry in tasks.values():
        found |= dict.fromkeys(entry.groups)
    groups = list(found)
    rows: list[list[Cell]] = []
    for model, entry in tasks.items():
        errors = {group: _group_error(entry, group) for group in entry.groups}
        row: list[Cell] = [model]
        for group in groups:
            score = entry.groups.get(group)
            row.append(None if score is None else Spread(score, errors[group], 1))
        # Of the groups, as the mean is: a group of many tasks counts no more than another.
        error = _error_of_mean(list(errors.values()))
        row.append(Spread(entry.mean, error, 1))
        rows.append(row)
    return Table(
        header=["model", *groups, "mean"],
        rows=rows,
        best="max",
    )


def _group_error(entry: ModelTasks, group: str) -> float | None:
    of_group = [task for task in entry.tasks.values() if task.group == group]
    return _error_of_mean([task.stderr for task in of_group])


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of n independent scores: sqrt(e_1² + … + e_n²) / n.

    None if the error of one is not known: a mean with a part that may be off by any amount has no
    error either.
    """
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.hypot(*known) / len(known)


def task_sections(tasks: Mapping[str, ModelTasks]) -> list[Section]:
    """Return the sections about tasks by model: by group, then each task; none without tasks."""
    if not tasks:
        return []
    sections = [
        Section(
            title="Tasks",
            text=READING,
            table=task_table(tasks),
        ),
        Section(
            title="Each task",
            text=READING_EACH,
            table=_each_task(tasks),
        ),
    ]
    left_out: dict[str, str] = {}
    for entry in tasks.values():
        left_out |= entry.not_run
    if left_out:
        table = Table(header=["task", "why"], rows=[[task, why] for task, why in left_out.items()])
        sections.append(
            Section(
                title="Tasks that were not run",
                text=READING_LEFT_OUT,
                table=table,
            )
        )
    return sections


def _each_task(tasks: Mapping[str, ModelTasks]) -> Table:
    # How a task was run is the same for all models of one evaluation: the first that has it tells.
    first: dict[str, TaskEntry] = {}
    for entry in tasks.values():
        for name, task in entry.tasks.items():
            first.setdefault(name, task)
    rows: list[list[Cell]] = []
    for name, task in first.items():
        scores = [_score(entry.tasks.get(name)) for entry in tasks.values()]
        rows.append([name, *scores, _how(task)])
    return Table(header=["task", *tasks, "how"], rows=rows)


def _score(task: TaskEntry | None) -> str | None:
    if task is None:
        return None
    error = "" if task.stderr is None else f" ± {task.stderr:.1f}"
    return f"{task.score:.1f}{error}"


def _how(task: TaskEntry) -> str:
    return f"{task.metric}, {task.shots} shots, {task.examples:,} examples"
