"""The verb `compare`: Nexus and its alternatives on the same data, tokens and seeds; one page.

What is shared by several methods (a seed's branches, a start) is made once; an interrupted
comparison goes on where it stopped, and one that gets further methods, seeds or variants makes
only those.
Not covered: trainings over several devices; `--dry-run` prints the commands, which can be submitted
one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from nexus_ds.command_lines import evaluate_words
from nexus_ds.console import print_text
from nexus_ds.data.corpora import open_source, require_domains
from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.experiments.comparison.jobs import Job, Pool
from nexus_ds.experiments.comparison.report import SHOWN, terminal_tables, write_comparison
from nexus_ds.experiments.comparison.report_findings import verdict
from nexus_ds.launch import devices
from nexus_ds.outputs import held, write_json
from nexus_ds.pipeline import MOE, check_domains
from nexus_ds.progress import duration
from nexus_ds.report.evaluation import SUMMARY
from nexus_ds.typed_json import read_typed, refusing

if TYPE_CHECKING:
    from nexus_ds.experiments.comparison.job_graph import Comparison, Made
    from nexus_ds.experiments.comparison.jobs import Pool
    from nexus_ds.experiments.comparison.result_file import Results
    from nexus_ds.report.summary import ModelEntry
    from nexus_ds.settings import Config

# What builds the jobs and collects their results imports torch: functions below import it, so that
# `compare --help` waits for nothing.

RESULTS = "results.json"
MEASURED = ("--documents", "20", "--batch", "32")
"""Of what `compare.measures` asks: how many documents a domain, and how many windows at once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default="compare-tiny",
        help="recipe file or name (compare-tiny)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory of the comparison",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of domains (default: the recipe's)")
    parser.add_argument("--domains", metavar="A,B", help="domains of the upcycled experts")
    parser.add_argument(
        "--new-domain", metavar="E[,F]", help="domains of the experts that are added later"
    )
    parser.add_argument(
        "--seed-model",
        metavar="DIR",
        help="a dense checkpoint to start from: no seed is trained (the same as model.path=DIR)",
    )
    parser.add_argument("--seeds", metavar="0,1,2", help="seeds (default: the recipe's)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        help="jobs at once (default: one a device, or one a CPU core)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and what they cost, run nothing"
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead of tables")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings laid over the recipe",
    )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return the options as overrides of the recipe, the user's own last."""
    pairs = {
        "data.path": args.data,
        "pipeline.domains": args.domains and f"[{args.domains}]",
        "pipeline.new_domains": args.new_domain and f"[{args.new_domain}]",
        "model.path": args.seed_model and json.dumps(args.seed_model),
        "compare.seeds": args.seeds and f"[{args.seeds}]",
    }
    given = [f"{key}={value}" for key, value in pairs.items() if value]
    return [*given, *args.overrides]


def _evaluations(comparison: Comparison, out: Path) -> dict[str, Path]:
    """Add the evaluations that figures layer by layer need; return their outputs by name."""
    rows: dict[str, dict[int, Made]] = {}
    for (variant, row), (_, seeds) in comparison.contenders.items():
        if not variant:
            rows[row] = seeds
    for (variant, name, _), (_, seeds) in comparison.extensions.items():
        if not variant:
            rows[f"extended: {name}"] = seeds
    found = {}
    for name, seeds in rows.items():
        # One seed's layers are enough for a figure.
        model = next(iter(seeds.values())).model
        if name in SHOWN and model:
            found[name] = _evaluate(comparison, out, name, model, "report")
    return found


def _evaluate(
    comparison: Comparison, out: Path, name: str, model: Path, what: str, *more: str
) -> Path:
    """Add an evaluation of a model; return its directory."""
    from nexus_ds.experiments.comparison.job_graph import scored_domains
    from nexus_ds.experiments.comparison.recipe_reader import Case

    builder = comparison.builder
    config = builder.reader.config(MOE, Case(0))
    report = model.with_name(f"{model.name}-{what}")
    words = evaluate_words(config, {name: model}, scored_domains(config), builder.cache)
    needs = (model,) if model in builder.jobs else ()
    words += [*more, "--out", str(report)]
    return builder.add(Job(f"{what} of {name}", report, tuple(words), needs))


def _tasks(comparison: Comparison, config: Config, out: Path) -> None:
    """Add the downstream tasks of every method that is one checkpoint."""
    if not config.compare.tasks:
        return
    words = ["--tasks", config.compare.tasks]
    if config.compare.task_path:
        words += ["--task-path", config.compare.task_path]
    for (_, row), (_, seeds) in comparison.contenders.items():
        for made in seeds.values():
            if made.model is not None:
                made.tasks = _evaluate(comparison, out, row, made.model, "tasks", *words)


def _measures(comparison: Comparison, config: Config, out: Path) -> None:
    """Add the measures over documents of every method that is one checkpoint, in the recipe as it
    stands."""
    if not config.compare.measures:
        return
    words = ["--measures", config.compare.measures, *MEASURED]
    for (variant, row), (method, seeds) in comparison.contenders.items():
        for made in seeds.values():
            if not variant and row == method.name and made.model is not None:
                made.measures = _evaluate(comparison, out, row, made.model, "measures", *words)


def _show_plan(comparison: Comparison) -> None:
    jobs = comparison.builder.jobs.values()
    for job in jobs:
        print_text(job.command())
    flops = sum(job.flops for job in jobs)
    tokens = sum(job.tokens for job in jobs)
    print_text(
        f"# {len(jobs)} jobs, {tokens:,} training tokens, {flops:.2e} floating-point operations"
    )


class _Earlier(TypedDict):
    """What is read of an earlier results.json."""

    seconds: NotRequired[float | None]


def _earlier_seconds(out: Path) -> float:
    """Return how long the run took that made everything; 0 of a new one.

    Raises:
        DataError: a results.json that is none.
    """
    path = out / RESULTS
    if not path.exists():
        return 0.0
    mend = "remove it, and the same command makes it again; how long the first run took is lost"
    return read_typed(path, _Earlier, "what compare writes", mend).get("seconds") or 0.0


def _entry(report: Path, name: str) -> ModelEntry:
    """Return a model's entry of an evaluation; DataError where it is not what evaluate writes."""
    from nexus_ds.experiments.comparison.results import WRITTEN, made_again
    from nexus_ds.report.summary import ModelEntry, Models

    summary = read_typed(report / SUMMARY, Models, WRITTEN, made_again(report))
    with refusing(report / SUMMARY, WRITTEN, made_again(report)):
        return ModelEntry.from_json(summary["models"][name])


def _report(
    comparison: Comparison,
    config: Config,
    failed: Mapping[Path, str],
    wanted: dict[str, Path],
    out: Path,
    seconds: float,
) -> Results:
    """Write results.json and the page; return what the file holds."""
    from nexus_ds.experiments.comparison.results import collect

    found = {name: report for name, report in wanted.items() if report.exists()}
    entries = {name: _entry(report, name) for name, report in found.items()}
    results = collect(comparison, config, dict(failed), entries, seconds)
    write_json(out / RESULTS, results.to_json())
    write_comparison(results, out)
    return results


def _show(results: Results, out: Path) -> None:
    print_text(f"{terminal_tables(results)}\n")
    for sentence in verdict(results):
        print_text(sentence)
    took = duration(results.seconds or 0.0)
    print_text(f"\nreport: {out / 'report.html'}, {out / RESULTS}; {took}")


def _check(config: Config) -> None:
    """Refuse what would fail after days: text that isn't there, unknown tasks or measures."""
    from nexus_ds.evaluation.tasks import require_harness, task_groups
    from nexus_ds.experiments.comparison.job_graph import scored_domains
    from nexus_ds.report.measure_tables import measures_named

    require_domains(open_source(config.data.path), scored_domains(config))
    measures_named(config.compare.measures, "compare.measures=")
    if config.compare.tasks:
        require_harness()
        task_groups(config.compare.tasks)


def run(args: argparse.Namespace) -> int:
    """Make what is missing, then the tables and the page."""
    from nexus_ds.experiments.comparison.build import build
    from nexus_ds.experiments.comparison.recipe_reader import Case

    if args.jobs < 0:
        raise ConfigError(f"--jobs: expected a number of at least 0, found {args.jobs}")
    started = time.monotonic()
    comparison = build(args.config, overrides_of(args), args.out)
    builder = comparison.builder
    config = builder.reader.config(MOE, Case(0))
    check_domains(config)
    wanted = _evaluations(comparison, args.out)
    _tasks(comparison, config, args.out)
    _measures(comparison, config, args.out)
    if args.dry_run:
        # the printed commands read them
        builder.write_configs()
        _show_plan(comparison)
        return 0
    _check(config)
    gpus = devices()
    slots = args.jobs or gpus or len(os.sched_getaffinity(0))
    logs = args.out / "logs"
    # two comparisons in one folder would run the same jobs
    with held(args.out):
        # now, not after days
        earlier = _earlier_seconds(args.out)
        builder.write_configs()
        pool = Pool(builder.jobs, logs, slots, gpus)
        pool.run()
        # a repetition only reports; what counts is the run that made everything
        seconds = max(time.monotonic() - started, earlier)
        results = _report(comparison, config, pool.failed, wanted, args.out, seconds)
    if args.json:
        print_text(json.dumps(results.to_json(), ensure_ascii=False))
    else:
        _show(results, args.out)
    if pool.failed:
        raise _failure(pool, builder.jobs, args.out, logs)
    return 0


def _failure(pool: Pool, jobs: Mapping[Path, Job], out: Path, logs: Path) -> NexusError:
    """Return what is told of failed jobs; by now the page shows what the others found."""
    first, why = next(iter(pool.failed.items()))
    return NexusError(
        f"{len(pool.failed)} jobs failed, first {jobs[first].name}: {why}; "
        f"the rest is in {out}, logs in {logs}; the same command again makes what is missing"
    )
