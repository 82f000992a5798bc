"""What came out of a comparison, as one JSON value (results.json) that the page and the tables
read.

`contenders` and `extensions` have a row each, with losses (nats per token) by seed and domain,
routing shares, and compute: training operations and tokens of all jobs that the model needed, the
seed model's own left out.
Not covered: drawing (`report.comparison`).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.experiments.comparison.job_graph import Comparison, Made, moe_domains
from nexus_ds.experiments.comparison.methods import Extension, Method
from nexus_ds.settings import Config

ROUNDED = 6  # decimals: results.json of two equal runs is the same file


def records(model: Path) -> list[dict[str, Any]]:
    """Return the records of a training's metrics.jsonl; of a step that was repeated after a stop
    the last one."""
    text = (Path(f"{model}.training") / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return list({(record["kind"], record["step"]): record for record in found}.values())


def _validation(record: dict[str, Any], gate: float | None = None) -> dict[str, Any]:
    return {
        "loss": {domain: round(loss, ROUNDED) for domain, loss in record["loss"].items()},
        "own_share": record.get("own_share"),
        "routing": record.get("routing") or None,
        "gate": gate,
    }


def trained(model: Path) -> dict[str, Any]:
    """Return what a training found out about its model, before (`untrained`) and after."""
    found = records(model)
    scored = sorted((r for r in found if r["kind"] == "validation"), key=lambda r: r["step"])
    logged = sorted((r for r in found if r["kind"] == "train"), key=lambda r: r["step"])
    gate = logged[-1]["router"].get("gate") if logged and logged[-1]["router"] else None
    return _validation(scored[-1], gate) | {"untrained": _validation(scored[0])}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def budgets(made: Made, old: list[str]) -> dict[str, Any]:
    """Return an extension's losses and shares after each budget, in finetune tokens."""
    assert made.model is not None
    found = {}
    for record in records(made.model):
        if record["kind"] != "validation" or record["step"] not in made.steps:
            continue
        routing = record["routing"]
        kept = [routing[d][d] for d in old if d in routing]
        leaks = [sum(routing[d][new] for new in made.experts) for d in old if d in routing]
        shares = [routing[new][new] for new in made.experts if new in routing]
        values = {
            "loss": {d: round(x, ROUNDED) for d, x in record["loss"].items()},
            "routing": routing,
        }
        values |= {"share": _mean(shares), "leak": _mean(leaks), "own_share": _mean(kept)}
        found[str(made.steps[record["step"]])] = values
    return found


def _seconds(model: Path) -> float:
    times = [record["time"] for record in records(model)]
    return max(times) - min(times)


def compute(comparison: Comparison, made: Made) -> dict[str, Any]:
    """Return what a model cost: operations and tokens of its trainings, seconds of its own, and its
    parameters."""
    jobs = [
        comparison.builder.jobs[path]
        for path in dict.fromkeys(made.members)
        if path in comparison.builder.jobs
    ]
    costs = [job for job in jobs if not job.output.name.startswith("seed-")]
    found: dict[str, Any] = {
        "training_flops": sum(job.flops for job in costs),
        "training_tokens": sum(job.tokens for job in costs),
        "seconds": _seconds(made.model)
        if made.model and Path(f"{made.model}.training").is_dir()
        else None,
    }
    models = [made.model] if made.model else list(made.members)
    counts = [describe(path)["parameters"] for path in models]
    found["parameters"] = {key: sum(count[key] for count in counts) for key in ("total", "active")}
    return found


def _scores(made: Made) -> dict[str, Any]:
    if made.scores is not None:
        loss = json.loads(made.scores.read_text(encoding="utf-8"))["loss"]
        return {
            "loss": {domain: round(value, ROUNDED) for domain, value in loss.items()}
        } | _task_scores(made)
    assert made.model is not None
    return trained(made.model) | _task_scores(made)


def _task_scores(made: Made) -> dict[str, Any]:
    """Return scores by group of tasks in per cent, nothing where none were asked for or lm-eval
    failed."""
    if made.tasks is None or not made.tasks.exists():
        return {}
    summary = json.loads((made.tasks / "summary.json").read_text(encoding="utf-8"))
    return {"tasks": next(iter(summary["tasks"].values()))["groups"]}


def _missing(made: Made) -> bool:
    paths = [path for path in (made.start, made.model, made.scores) if path is not None]
    return not all(path.exists() for path in paths)


def _method_row(
    comparison: Comparison, key: tuple[str, str], contender: Method, seeds: dict[int, Made]
) -> dict[str, Any] | None:
    done = {seed: made for seed, made in seeds.items() if not _missing(made)}
    if not done:
        return None
    variant, row = key
    label = contender.label if row == contender.name else row
    return {
        "name": row,
        "label": label,
        "variant": variant,
        "about": contender.about,
        "group": contender.group,
        "compute": compute(comparison, next(iter(done.values()))),
        "seeds": {str(seed): _scores(made) for seed, made in done.items()},
    }


def _extension_row(
    comparison: Comparison,
    key: tuple[str, str, str],
    extension: Extension,
    seeds: dict[int, Made],
    old: list[str],
) -> dict[str, Any] | None:
    done = {seed: made for seed, made in seeds.items() if not _missing(made)}
    if not done:
        return None
    variant, name, added = key
    return {
        "name": name,
        "label": extension.label,
        "variant": variant,
        "about": extension.about,
        "added": added,
        "starts_from": extension.starts_from,
        "compute": compute(comparison, next(iter(done.values()))),
        "seeds": {str(seed): {"budgets": budgets(made, old)} for seed, made in done.items()},
    }


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}"


def _not_run(comparison: Comparison, failed: dict[Path, str]) -> list[dict[str, str]]:
    from nexus_ds.experiments.comparison.methods import EXTENSIONS, METHODS

    found = [
        {"name": comparison.builder.jobs[path].name, "why": why} for path, why in failed.items()
    ]
    run = {contender.name for contender, _ in comparison.contenders.values()}
    run_extensions = {extension.name for extension, _ in comparison.extensions.values()}
    found += [{"name": c.label, "why": "not asked for"} for c in METHODS if c.name not in run]
    found += [
        {"name": f"extension: {e.label}", "why": "not asked for"}
        for e in EXTENSIONS
        if e.name not in run_extensions
    ]
    return found


def collect(
    comparison: Comparison,
    config: Config,
    failed: dict[Path, str],
    evaluations: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the results of everything that was made; what is missing has its reason in
    `not_run`."""
    pipe = config.pipeline
    old, new = pipe.domains, pipe.new_domains
    trained_on = moe_domains(config)
    contenders = [_method_row(comparison, key, *row) for key, row in comparison.contenders.items()]
    extensions = [
        _extension_row(comparison, key, *row, old) for key, row in comparison.extensions.items()
    ]
    return {
        "recipe": comparison.builder.recipe,
        "overrides": list(comparison.builder.overrides),
        "seeds": config.compare.seeds,
        "seconds": round(seconds, 1),
        "machine": _machine(),
        "data": {
            "path": config.data.path,
            "windows": config.training.eval_windows,
            "length": config.data.sequence_length,
        },
        "domains": {
            "old": old,
            "pretraining": [d for d in trained_on if d not in old],
            "new": new,
            "scored": list(dict.fromkeys([*trained_on, *new])),
        },
        "contenders": [row for row in contenders if row],
        "extensions": [row for row in extensions if row],
        "evaluations": evaluations,
        "variants": {name: {"overrides": words} for name, words in config.compare.variants.items()},
        "not_run": _not_run(comparison, failed),
    }
