"""Collects what came out of a comparison from its trainings' logs and its models.

Not covered: the file's shape (result_file.py), drawing (report.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.experiments.comparison.case_jobs import CaseJobs
from nexus_ds.experiments.comparison.job_graph import Comparison, Made, moe_domains
from nexus_ds.experiments.comparison.methods import EXTENSIONS, METHODS, Extension, Method
from nexus_ds.experiments.comparison.recipe_reader import Case, training_tokens
from nexus_ds.experiments.comparison.result_file import (
    BudgetScores,
    Compute,
    CurvePoint,
    Domains,
    ExtensionRow,
    MethodRow,
    NotRun,
    Results,
    SeedScores,
    Shares,
    Text,
    Turn,
    Validation,
)
from nexus_ds.pipeline import SEED
from nexus_ds.report.evaluation import SUMMARY
from nexus_ds.report.summary import MeasureEntry, ModelEntry, mean_over_seeds
from nexus_ds.runtime.schedule import tokens_per_step
from nexus_ds.settings import Config
from nexus_ds.typed_json import parsed, read_typed, refusing, typed

WRITTEN = "what evaluate writes"
ROUNDED = 6  # decimals: results.json of two equal runs is the same file


class _Router(TypedDict):
    """What is read of a router's numbers; the other ones may be NaN."""

    gate: NotRequired[float]


class Record(TypedDict):
    """What is read of a line of a training's metrics.jsonl, by its kind."""

    kind: str
    step: int
    time: float
    loss: NotRequired[dict[str, float] | float]
    """By domain of a validation, in nats per token; the mean of training steps."""
    own_share: NotRequired[float | None]
    routing: NotRequired[dict[str, dict[str, float]] | None]
    router: NotRequired[_Router | None]


class _Losses(TypedDict):
    """What is read of the file of a score."""

    loss: dict[str, float]


class _Groups(TypedDict):
    groups: dict[str, float]


class _Tasks(TypedDict):
    """What is read of an evaluation with downstream tasks."""

    tasks: dict[str, _Groups]


class _Measures(TypedDict):
    """What is read of an evaluation with measures."""

    measures: dict[str, dict[str, object]]


def made_again(path: Path) -> str:
    """Return what to do about a damaged file of what a job made."""
    return f"remove {path}, and the same command makes it again"


def _log(model: Path) -> Path:
    return Path(f"{model}.training") / "metrics.jsonl"


def _reading(model: Path, line: int = 0) -> AbstractContextManager[None]:
    """Refuse what a training's log should not hold, with the file and what to do."""
    mend = f"remove {model} and {model}.training, and the same command trains it again"
    where = f"{_log(model)}:{line}" if line else str(_log(model))
    if line:
        mend = f"take the line out where a later one has its step, else {mend}"
    return refusing(where, "what train writes", mend)


def records(model: Path) -> list[Record]:
    """Return the records of a training's metrics.jsonl.

    Of a step that was repeated after a stop the last one counts.

    Raises:
        DataError: a line that is no such record.
    """
    latest: dict[tuple[str, int], Record] = {}
    for number, line in enumerate(_log(model).read_bytes().split(b"\n"), start=1):
        if line:
            with _reading(model, number):
                record = typed(parsed(line), Record)
            latest[record["kind"], record["step"]] = record
    return list(latest.values())


def _rounded(loss: Mapping[str, float]) -> dict[str, float]:
    return {domain: round(nats, ROUNDED) for domain, nats in loss.items()}


def _losses(record: Record) -> dict[str, float]:
    """Return the losses of a validation by domain."""
    return _rounded(typed(record["loss"], dict[str, float], "loss"))


def _validation(record: Record, gate: float | None = None) -> Validation:
    return Validation(
        loss=_losses(record),
        own_share=record.get("own_share"),
        routing=record.get("routing") or None,
        gate=gate,
    )


def _of_kind(found: Sequence[Record], kind: str) -> list[Record]:
    of_kind = [record for record in found if record["kind"] == kind]
    return sorted(of_kind, key=lambda record: record["step"])


def _validations(found: Sequence[Record]) -> list[Record]:
    """Return a training's validations in order; ValueError without any."""
    scored = _of_kind(found, "validation")
    if not scored:
        raise ValueError("found no validation")
    return scored


def trained(model: Path) -> SeedScores:
    """Return what a training found out about its model, before (`untrained`) and after.

    Raises:
        DataError: a log that is not what `train` writes.
    """
    found = records(model)
    with _reading(model):
        scored = _validations(found)
        logged = _of_kind(found, "train")
        # A dense training has no router, and logs an empty one.
        router = logged[-1]["router"] if logged else None
        # The gate is logged in training alone: that of the last steps is nearest to the end.
        gate = router["gate"] if router else None
        first = _validation(scored[0])
        last = _validation(scored[-1], gate)
    return SeedScores(**vars(last), untrained=first)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _budget(record: Record, new: Sequence[str], old: Sequence[str]) -> BudgetScores:
    """Return one validation of an extension: `new` are its experts, `old` the domains before."""
    routing: Shares = record["routing"] or {}
    old_texts = {domain: routing[domain] for domain in old if domain in routing}
    new_texts = {domain: routing[domain] for domain in new if domain in routing}
    kept = [shares[domain] for domain, shares in old_texts.items()]
    found = [shares[domain] for domain, shares in new_texts.items()]
    leaked = []
    for shares in old_texts.values():
        leaked.append(sum(shares[expert] for expert in new))
    return BudgetScores(
        loss=_losses(record),
        routing=routing,
        share=_mean(found),
        leak=_mean(leaked),
        own_share=_mean(kept),
    )


def budgets(made: Made, old: list[str]) -> dict[str, BudgetScores]:
    """Return an extension's losses and shares after each budget, in finetune tokens.

    Raises:
        DataError: a log that is not what `train` writes.
    """
    assert made.model is not None
    found = {}
    for record in _of_kind(records(made.model), "validation"):
        # Budgets are whole steps, and steps between them are validated as well.
        tokens = made.steps.get(record["step"])
        if tokens is not None:
            with _reading(made.model):
                found[str(tokens)] = _budget(record, made.experts, old)
    return found


def turns(made: Made) -> list[Turn]:
    """Return the losses at the end of each of several additions, in order.

    Of a single one there are none: its budgets say it all.
    """
    found: list[Turn] = []
    if len(made.turns) < 2:
        return found
    for added, model in made.turns.items():
        logged = records(model)
        with _reading(model):
            last = _validations(logged)[-1]
            found.append(Turn(added=added, loss=_losses(last)))
    return found


def _seconds(model: Path | None) -> float | None:
    """Return how long a model's own training took; None of what was not trained."""
    if model is None or not Path(f"{model}.training").is_dir():
        return None
    times = [record["time"] for record in records(model)]
    with _reading(model):
        return max(times) - min(times)


def compute(comparison: Comparison, made: Made) -> Compute:
    """Return what a model cost: of its trainings, and of its parameters."""
    jobs = comparison.builder.jobs
    # A branch may be a member twice, but was trained once; a checkpoint that was given has no job.
    members = dict.fromkeys(made.members)
    needed = [jobs[path] for path in members if path in jobs]
    # Every method starts from the seed model, so its own training makes no difference.
    costs = [job for job in needed if not job.output.name.startswith("seed-")]
    # An ensemble is all its members, and each reads every token.
    models = [made.model] if made.model else list(made.members)
    counts = [describe(path)["parameters"] for path in models]
    return Compute(
        training_flops=sum(job.flops for job in costs),
        training_tokens=sum(job.tokens for job in costs),
        seconds=_seconds(made.model),
        total=sum(count["total"] for count in counts),
        active=sum(count["active"] for count in counts),
    )


def _scores(made: Made) -> SeedScores:
    tasks = _task_scores(made)
    if made.scores is not None:
        told = read_typed(made.scores, _Losses, "losses by domain", made_again(made.scores))
        return SeedScores(loss=_rounded(told["loss"]), tasks=tasks)
    assert made.model is not None
    return replace(trained(made.model), tasks=tasks)


def _task_scores(made: Made) -> dict[str, float] | None:
    """Return scores by group of tasks in per cent; None where lm-eval failed or was not asked."""
    if made.tasks is None or not made.tasks.exists():
        return None
    path, mend = made.tasks / SUMMARY, made_again(made.tasks)
    summary = read_typed(path, _Tasks, WRITTEN, mend)
    with refusing(path, WRITTEN, mend):
        # An evaluation of this one model, under whatever name.
        (entry,) = summary["tasks"].values()
    return entry["groups"]


def _measured(comparison: Comparison, seed: int) -> dict[str, MeasureEntry]:
    """Return one seed's measures of all methods that have them, by the method's label."""
    found: dict[str, MeasureEntry] = {}
    for method, seeds in comparison.contenders.values():
        report = seeds[seed].measures if seed in seeds else None
        if report is None or not report.exists():
            continue
        summary = read_typed(report / SUMMARY, _Measures, WRITTEN, made_again(report))
        for measure, value in summary["measures"].items():
            with refusing(report / SUMMARY, WRITTEN, made_again(report)):
                entry = MeasureEntry.from_json(value)
                # an evaluation of this one model
                (by_domain,) = entry.models.values()
            models = found[measure].models if measure in found else {}
            found[measure] = MeasureEntry({**models, method.label: by_domain}, entry.reference)
    return found


def _measures(comparison: Comparison, config: Config) -> dict[str, MeasureEntry]:
    """Return the measures over held-out documents, the mean of all seeds."""
    by_seed = [_measured(comparison, seed) for seed in config.compare.seeds]
    names = list(dict.fromkeys(name for found in by_seed for name in found))
    return {
        name: mean_over_seeds([found[name] for found in by_seed if name in found]) for name in names
    }


def _is_made(made: Made) -> bool:
    paths = [made.start, made.model, made.scores]
    return all(path.exists() for path in paths if path is not None)


def _made(seeds: Mapping[int, Made]) -> dict[int, Made]:
    return {seed: made for seed, made in seeds.items() if _is_made(made)}


def _method_row(
    comparison: Comparison,
    key: tuple[str, str],
    method: Method,
    seeds: Mapping[int, Made],
) -> MethodRow | None:
    """Return a method's row, None if no seed was made; `key` is variant and name of the row."""
    done = _made(seeds)
    if not done:
        return None
    variant, row = key
    return MethodRow(
        name=row,
        # The branches are one method and a row a domain, which names itself.
        label=method.label if row == method.name else row,
        variant=variant,
        about=method.about,
        group=method.group,
        # Seeds cost the same: the first that was made stands for all.
        compute=compute(comparison, next(iter(done.values()))),
        seeds={str(seed): _scores(made) for seed, made in done.items()},
    )


def _extension_row(
    comparison: Comparison,
    key: tuple[str, str, str],
    extension: Extension,
    seeds: Mapping[int, Made],
    old: list[str],
) -> ExtensionRow | None:
    """Return an extension's row, None if no seed was made; `key` is variant, name and addition."""
    done = _made(seeds)
    if not done:
        return None
    variant, name, added = key
    return ExtensionRow(
        name=name,
        label=extension.label,
        variant=variant,
        about=extension.about,
        added=added,
        starts_from=extension.starts_from,
        # Seeds cost the same: the first that was made stands for all.
        compute=compute(comparison, next(iter(done.values()))),
        seeds={str(seed): budgets(made, old) for seed, made in done.items()},
        turns={str(seed): turns(made) for seed, made in done.items()},
    )


def _machine() -> str:
    # Imported here: torch takes seconds, and `compare --help` would pay for it.
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}"


def _not_run(comparison: Comparison, failed: Mapping[Path, str]) -> list[NotRun]:
    jobs = comparison.builder.jobs
    found = [NotRun(jobs[path].name, why) for path, why in failed.items()]
    # A table from which a method is missing must not look as if there were no such method.
    methods = {method.name for method, _ in comparison.contenders.values()}
    for method in METHODS:
        if method.name not in methods:
            found.append(NotRun(method.label, "not asked for"))
    extensions = {extension.name for extension, _ in comparison.extensions.values()}
    for extension in EXTENSIONS:
        if extension.name not in extensions:
            found.append(NotRun(f"extension: {extension.label}", "not asked for"))
    return found


def _domains(config: Config) -> Domains:
    """Return the recipe's domains by role."""
    old = config.pipeline.domains
    new = config.pipeline.new_domains
    mixture = moe_domains(config)
    return Domains(
        old=old,
        pretraining=[domain for domain in mixture if domain not in old],
        new=new,
        scored=list(dict.fromkeys([*mixture, *new])),
    )


def _seed_tokens(comparison: Comparison, config: Config) -> dict[str, int]:
    """Return the tokens of the seed model's training by variant, where one is trained."""
    variants = {"": [], **config.compare.variants}
    found = {}
    for variant, settings in variants.items():
        case = Case(config.compare.seeds[0], tuple(settings))
        seed = comparison.builder.reader.config(SEED, case)
        # what a given model has read is not known
        if not seed.model.path:
            found[variant] = training_tokens(seed)
    return found


def _seed_curve(comparison: Comparison, config: Config) -> list[CurvePoint]:
    """Return the validations of the seed model's training, without that of its random start."""
    case = Case(config.compare.seeds[0])
    seed = comparison.builder.reader.config(SEED, case)
    # of a given model's training nothing is known
    if seed.model.path:
        return []
    model = CaseJobs(comparison.builder, case).seed_model()
    if not _log(model).exists():
        return []
    size = tokens_per_step(seed.training, seed.data)
    found = records(model)
    with _reading(model):
        scored = [record for record in _of_kind(found, "validation") if record["step"]]
        return [CurvePoint(record["step"] * size, _losses(record)) for record in scored]


def collect(
    comparison: Comparison,
    config: Config,
    failed: Mapping[Path, str],
    evaluations: dict[str, ModelEntry],
    seconds: float,
) -> Results:
    """Return the results of everything that was made; what is missing has its reason in `not_run`.

    Args:
        comparison: the job graph.
        config: the recipe of the mixture's stage.
        failed: the reason, by the output of the job.
        evaluations: entries of summary.json by the model's name, for figures layer by layer.
        seconds: how long the comparison took.
    """
    domains = _domains(config)
    methods = [_method_row(comparison, key, *row) for key, row in comparison.contenders.items()]
    extensions = []
    for key, row in comparison.extensions.items():
        extensions.append(_extension_row(comparison, key, *row, domains.old))
    text = Text(
        config.data.path,
        config.training.eval_windows,
        config.data.sequence_length,
    )
    return Results(
        recipe=comparison.builder.recipe,
        overrides=list(comparison.builder.overrides),
        seeds=config.compare.seeds,
        seconds=round(seconds, 1),
        machine=_machine(),
        data=text,
        domains=domains,
        methods=[row for row in methods if row is not None],
        extensions=[row for row in extensions if row is not None],
        evaluations=evaluations,
        variants=config.compare.variants,
        contender_settings=config.compare.contender_settings,
        measures=_measures(comparison, config),
        not_run=_not_run(comparison, failed),
        seed_tokens=_seed_tokens(comparison, config),
        seed_curve=_seed_curve(comparison, config),
    )
