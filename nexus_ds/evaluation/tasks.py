"""Downstream tasks (paper section 6): lm-eval on a checkpoint as stock transformers runs it.

lm-eval is no requirement of this program: `pip install 'lm-eval[hf]'` adds it. Nothing is
downloaded unless the user sets HF_HUB_OFFLINE=0; tasks of a folder of one's own (lm-eval's YAML)
read local files and win over lm-eval's of that name.

Not covered: the paper's own harness, prompts and metrics, which it does not print; QuAC, LBPP and
HumanEval-Pack, which lm-eval does not have, and SQuAD with shots. Tasks' YAML may name Python
functions, which are run: use folders you trust.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, TypedDict, TypeGuard

import torch

from nexus_ds.checkpoint.config_json import count, read_config
from nexus_ds.checkpoint.loading import device
from nexus_ds.checkpoint.needs import BATCH, Need, Way
from nexus_ds.checkpoint.pieces import in_pieces, need_of, open_way, planned_way, warn_of_time
from nexus_ds.checkpoint.room import is_out_of_memory
from nexus_ds.data.offline import stay_offline
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import ConfigError
from nexus_ds.progress import Progress

PAPER = {
    "knowledge": ("openbookqa", "nq_open", "triviaqa", "squad_completion"),
    "science": ("arc_easy", "arc_challenge", "sciq"),
    "reasoning": ("commonsense_qa", "social_iqa", "piqa", "winogrande", "hellaswag"),
    "mmlu": ("mmlu",),
    "code": ("mbpp", "humaneval"),
}
SHOTS = {"mmlu": 5}  # of lm-eval's tasks; all else as the task says
LONGEST = 2048  # tokens of a request that memory is planned for; hardly any is longer
SAMPLED = 100  # requests whose tokens are counted, at most, for a forecast
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
METRICS = ("acc_norm", "acc", "exact_match", "contains", "f1", "pass@1", "pass_at_1")
"""Shares of 1 that count as a task's score; the first that a task reports."""
CONSENT = "HF_ALLOW_CODE_EVAL"
UNSAFE = f"it runs code that the model wrote; allow that in a sandbox with {CONSENT}=1"


class TaskScore(TypedDict):
    """The score of one task, in per cent."""

    group: str
    metric: str
    score: float
    stderr: float | None
    shots: int
    examples: int


@dataclass
class TaskScores:
    """Scores of one checkpoint in per cent."""

    groups: dict[str, float] = field(default_factory=dict)
    """Mean over the group's tasks that were run."""
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    """Why other tasks were not run."""

    @property
    def mean(self) -> float:
        """Mean over groups, each counting the same, as the paper's averages."""
        return sum(self.groups.values()) / len(self.groups)


def task_groups(text: str) -> dict[str, tuple[str, ...]]:
    """Return groups of tasks: the paper's for `paper`, else each of the names A,B as its own group.

    Raises:
        ConfigError: no name, or one that is given twice.
    """
    if text.strip() == "paper":
        return dict(PAPER)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"--tasks {text!r}: expected paper, or names of tasks, each once: A,B")
    return {name: (name,) for name in names}


def require_harness() -> None:
    """Raise ConfigError unless lm-eval and what it needs for transformers models are installed."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tasks need lm-eval, found no {' and no '.join(missing)}; add it with: "
            f"{sys.executable} -m pip install 'lm-eval[hf]'"
        )


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def score_of(result: Mapping[str, object]) -> tuple[str, float, float | None] | None:
    """Return (metric, score, standard error) in per cent of lm-eval's result for one task.

    None without a known metric; the standard error is None where lm-eval gives none.
    """
    for metric in METRICS:
        for key, value in result.items():
            # "acc,none": the metric and the filter of the answers
            name, _, answers = key.partition(",")
            # NaN is no score, nor any that the summary could be read with again
            if name != metric or not _is_finite(value):
                continue
            error = result.get(f"{name}_stderr,{answers}")
            return metric, 100.0 * value, 100.0 * error if _is_finite(error) else None
    return None


def run_tasks(
    checkpoint: Path,
    groups: Mapping[str, Sequence[str]],
    task_path: Path | None = None,
    *,
    limit: int = 0,
    batch: int = BATCH,
    precision: str = "auto",
    strict: bool = True,
    label: str = "",
) -> TaskScores:
    """Run tasks on a checkpoint; where memory runs out, those that are left in smaller pieces.

    Args:
        checkpoint: dense or Nexus.
        groups: names of lm-eval's tasks (or of its groups of tasks) by group.
        task_path: folder with further tasks as YAML.
        limit: examples of each task; 0: all.
        batch: sequences a forward pass.
        precision: of the weights, as in `perplexity.score`.
        strict: whether a task that can't be run is an error; if not, it is left out and named in
            `not_run`.
        label: what the progress line calls the model; default its directory's name.

    Raises:
        ConfigError: lm-eval is missing, no such folder, a task that can't be run, or none that can.
        CheckpointError: a checkpoint that can't be loaded.
        InsufficientMemoryError: one request through one layer is too much.
    """
    require_harness()
    if task_path is not None and not task_path.is_dir():
        raise ConfigError(
            f"--task-path {task_path}: no such folder; expected one with tasks of lm-eval as YAML"
        )
    stay_offline()
    names = [(group, task) for group, tasks in groups.items() for task in tasks]
    # Before the model: an unreadable folder of tasks shows at once.
    manager = _manager(task_path, frozenset(task for _, task in names))
    title = f"tasks {label or checkpoint.name}"
    place = device()
    need = need_of(checkpoint, precision, place).with_cache().with_all_logits()
    where = str(checkpoint / "config.json")
    positions = count(read_config(checkpoint), "max_position_embeddings", where) or LONGEST
    chosen = planned_way(need, [place], batch, min(positions, LONGEST), title)
    scores = TaskScores()

    def work(way: Way) -> None:
        opened = _open_model(checkpoint, precision, _Forecast(title, need, place, way))
        _run_all(_Harness(opened, manager, limit), names, scores, strict, title)

    with _quiet():
        in_pieces(title, chosen, work)
    if not scores.tasks:
        reasons = [f"{task}: {why}" for task, why in scores.not_run.items()]
        raise ConfigError("none of the tasks could be run:\n" + "\n".join(reasons))
    for group in groups:
        found = [task["score"] for task in scores.tasks.values() if task["group"] == group]
        if found:
            scores.groups[group] = sum(found) / len(found)
    return scores


def _run_all(
    harness: _Harness,
    names: Sequence[tuple[str, str]],
    scores: TaskScores,
    strict: bool,
    title: str,
) -> None:
    """Add the scores of all tasks that are not in `scores` yet; those of groups are still missing.

    What was done before memory ran out stays done.
    """
    left = [
        (group, task)
        for group, task in names
        if task not in scores.tasks and task not in scores.not_run
    ]
    with Progress(title, len(left), "task") as progress:
        for group, task in left:
            try:
                scores.tasks[task] = harness.run(group, task)
            except ConfigError as error:
                if strict:
                    raise
                scores.not_run[task] = str(error).removeprefix(f"task {task}: ")
            progress.advance()


# lm-eval's model ---------------------------------------------------------------------------------


class _Request(Protocol):
    """What lm-eval asks a model."""

    args: tuple[object, ...]
    """Text, and what should follow: text, or a dict with what to generate."""


Answer = Callable[[Sequence[_Request]], object]


@dataclass
class _Forecast:
    """Says before a task's requests are answered how long that will take, where it is long."""

    title: str
    need: Need
    place: torch.device
    way: Way
    # `_evaluate` leaves lm-eval none.
    stderr: TextIO = field(default_factory=lambda: sys.stderr)

    def before(self, answer: Answer, tokens: Callable[[str], int], added: int) -> Answer:
        """Return `answer` with a forecast before.

        Args:
            answer: what answers requests.
            tokens: the number of them in a text.
            added: tokens that are generated for a request that does not say how many.
        """

        def run(requests: Sequence[_Request]) -> object:
            self._say(requests, tokens, added)
            return answer(requests)

        return run

    def _say(self, requests: Sequence[_Request], tokens: Callable[[str], int], added: int) -> None:
        # Reading every text twice would be a wait of its own.
        sample = requests[:: len(requests) // SAMPLED + 1]
        total = passes = 0
        for request in sample:
            texts = [part for part in request.args if isinstance(part, str)]
            settings = [part for part in request.args if isinstance(part, dict)]
            more = sum(int(part.get("max_gen_toks", added)) for part in settings)
            total += tokens("".join(texts)) + more
            passes += max(1, more)
        share = len(requests) / max(1, len(sample))
        reads = round(share * passes / self.way.rows) if self.way.streamed else 0
        with contextlib.redirect_stderr(self.stderr):
            warn_of_time(self.title, self.need, round(share * total), self.place, reads)


def _open_model(checkpoint: Path, precision: str, forecast: _Forecast) -> object:
    """Return lm-eval's model of a checkpoint."""
    # lm-eval is optional, see `require_harness`.
    from lm_eval.models.huggingface import HFLM

    way = forecast.way
    model = open_way(checkpoint, precision, forecast.place, way)
    tokenizer = open_tokenizer(checkpoint)
    # the model and not its path: lm-eval would load it by its own rules, without our checks
    opened = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=way.rows)
    for kind in REQUESTS:
        answer = getattr(opened, kind)
        told = forecast.before(
            answer, lambda text: len(tokenizer(text).input_ids), opened.max_gen_toks
        )
        setattr(opened, kind, told)
    return opened


@functools.cache
def _manager(task_path: Path | None, names: frozenset[str]) -> Any:
    """Return lm-eval's index of tasks; its own are many seconds to read: only where asked for."""
    from lm_eval.tasks import TaskManager

    if task_path is not None:
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
        if names <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=str(task_path) if task_path else None)


@dataclass
class _Harness:
    """lm-eval with one model."""

    model: Any
    manager: Any
    limit: int

    def run(self, group: str, task: str) -> TaskScore:
        """Return the score of one task; ConfigError if it can't be run."""
        # before any of it is loaded
        if task in PAPER["code"] and os.environ.get(CONSENT) != "1":
            raise ConfigError(f"task {task}: {UNSAFE}")
        if task not in self.manager.all_tasks:
            raise ConfigError(
                f"task {task}: lm-eval has none of this name; "
                "give its YAML's folder with --task-path"
            )
        found = self._evaluate(task)
        result = found["results"].get(task, {})
        score = score_of(result)
        if score is None:
            parts = ", ".join(found["results"])
            said = ", ".join(map(str, result)) or f"nothing itself; it stands for {parts}"
            raise ConfigError(f"task {task}: reports {said}; expected one of {', '.join(METRICS)}")
        metric, value, error = score
        # a task that stands for several has an entry for each of them
        samples = [count["effective"] for count in found["n-samples"].values()]
        return {
            "group": group,
            "metric": metric,
            "score": value,
            "stderr": error,
            "shots": max(found["n-shot"].values()),
            "examples": sum(samples),
        }

    def _evaluate(self, task: str) -> dict[str, Any]:
        """Return what lm-eval finds; ConfigError for whatever goes wrong in it."""
        # lm-eval is optional, see `require_harness`.
        from lm_eval import simple_evaluate

        try:
            # four bars a task; what goes wrong is raised
            with contextlib.redirect_stderr(io.StringIO()):
                return simple_evaluate(
                    model=self.model,
                    tasks=[task],
                    num_fewshot=SHOTS.get(task),
                    limit=self.limit or None,
                    task_manager=self.manager,
                    bootstrap_iters=100,
                    log_samples=False,
                    confirm_run_unsafe_code=os.environ.get(CONSENT) == "1",
                )
        # of lm-eval, of `datasets`, of a task's own code: they have no type in common
        except Exception as error:
            # not the task's fault: smaller pieces help
            if is_out_of_memory(error):
                raise
            raise ConfigError(f"task {task}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why a task failed, and what helps, as one line."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if "unsafe" in said:
        return f"{UNSAFE} ({said})"
    return (
        f"{said}; if its data is not on this machine: "
        "HF_HUB_OFFLINE=0 downloads it, --task-path reads files"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave lm-eval's log and its bars to errors."""
    import datasets

    root = logging.getLogger("lm_eval")
    level = root.level
    root.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        root.setLevel(level)
        datasets.enable_progress_bars()
