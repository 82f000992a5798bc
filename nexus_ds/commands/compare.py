"""The verb `compare`: Nexus and its alternatives on the same data, tokens and seeds, with what each
costs; one page.

What is shared by several contenders (a seed's branches, a start) is made once; an interrupted
comparison goes on where it stopped, and one that gets further contenders, seeds or variants makes
only those.
Not covered: trainings over several devices; `--dry-run` prints the commands, which can be submitted
one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.command_lines import evaluate_words
from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.launch import devices
from nexus_ds.outputs import held, write_json
from nexus_ds.pipeline import MOE, check_domains
from nexus_ds.progress import duration

if TYPE_CHECKING:
    from nexus_ds.experiments.comparison.job_graph import Comparison, Made
    from nexus_ds.experiments.comparison.jobs import Pool
    from nexus_ds.experiments.comparison.result_file import Results
    from nexus_ds.settings import Config

RESULTS = "results.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default="compare-tiny",
        help="recipe file or name (compare-tiny)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory of the comparison"
    )
    parser.add_argument("--data", metavar="DIR", help="folder of domains (default: the recipe's)")
    parser.add_argument("--domains", metavar="A,B", help="domains of the upcycled experts")
    parser.add_argument(
        "--new-domain", metavar="E[,F]", help="domains of the experts that are added later"
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
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the recipe"
    )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return the options as overrides of the recipe, the user's own last."""
    pairs = {
        "data.path": args.data,
        "pipeline.domains": args.domains and f"[{args.domains}]",
        "pipeline.new_domains": args.new_domain and f"[{args.new_domain}]",
        "compare.seeds": args.seeds and f"[{args.seeds}]",
    }
    return [f"{key}={value}" for key, value in pairs.items() if value] + list(args.overrides)


def _evaluations(comparison: Comparison, out: Path) -> dict[str, Path]:
    """Add the evaluations that figures layer by layer need, under the first seed; return their
    outputs by name."""
    from nexus_ds.experiments.comparison.report import SHOWN

    rows: dict[str, Made] = {}
    for (variant, row), (_, seeds) in comparison.contenders.items():
        rows |= {} if variant else {row: next(iter(seeds.values()))}
    for (variant, name, _), (_, seeds) in comparison.extensions.items():
        rows |= {} if variant else {f"extended: {name}": next(iter(seeds.values()))}
    shown = {name: made.model for name, made in rows.items() if name in SHOWN}
    return {
        name: _evaluate(comparison, out, name, model, "report")
        for name, model in shown.items()
        if model
    }


def _evaluate(
    comparison: Comparison, out: Path, name: str, model: Path, what: str, *more: str
) -> Path:
    """Add an evaluation of a model; return its directory."""
    from nexus_ds.experiments.comparison.job_graph import scored_domains
    from nexus_ds.experiments.comparison.jobs import Job
    from nexus_ds.experiments.comparison.recipe_reader import Case

    builder = comparison.builder
    config = builder.reader.config(MOE, Case(0))
    report = model.with_name(f"{model.name}-{what}")
    words = evaluate_words(config, {name: model}, scored_domains(config), builder.cache)
    needs = (model,) if model in builder.jobs else ()
    words += [*more, "--out", str(report)]
    return builder.add(Job(f"{what} of {name}", report, tuple(words), needs))


def _tasks(comparison: Comparison, config: Config, out: Path) -> None:
    """Add the downstream tasks of every contender that is one checkpoint."""
    if not config.compare.tasks:
        return
    path = ("--task-path", config.compare.task_path) if config.compare.task_path else ()
    for (_, row), (_, seeds) in comparison.contenders.items():
        for made in seeds.values():
            if made.model is not None:
                made.tasks = _evaluate(
                    comparison,
                    out,
                    row,
                    made.model,
                    "tasks",
                    "--tasks",
                    config.compare.tasks,
                    *path,
                )


def _show_plan(comparison: Comparison) -> None:
    jobs = comparison.builder.jobs.values()
    print("\n".join(job.command() for job in jobs))
    flops, tokens = sum(job.flops for job in jobs), sum(job.tokens for job in jobs)
    print(f"# {len(jobs)} jobs, {tokens:,} training tokens, {flops:.2e} floating-point operations")


def _report(
    comparison: Comparison,
    config: Config,
    pool: Pool,
    wanted: dict[str, Path],
    out: Path,
    seconds: float,
) -> Results:
    from nexus_ds.experiments.comparison.report import write_comparison
    from nexus_ds.experiments.comparison.results import collect
    from nexus_ds.report.summary import ModelEntry

    entries = {}
    for name, report in wanted.items():
        if report.exists():
            summary = json.loads((report / "summary.json").read_text(encoding="utf-8"))
            entries[name] = ModelEntry.from_json(summary["models"][name])
    earlier = (
        json.loads((out / RESULTS).read_text(encoding="utf-8"))["seconds"]
        if (out / RESULTS).exists()
        else 0.0
    )
    results = collect(comparison, config, pool.failed, entries, max(seconds, earlier))
    write_json(out / RESULTS, results.to_json())
    write_comparison(results, out)
    return results


def run(args: argparse.Namespace) -> int:
    """Make what is missing, then the tables and the page."""
    from nexus_ds.data.corpora import open_source, require_domains
    from nexus_ds.evaluation.tasks import require_harness, task_groups
    from nexus_ds.experiments.comparison.build import build
    from nexus_ds.experiments.comparison.job_graph import scored_domains
    from nexus_ds.experiments.comparison.jobs import Pool
    from nexus_ds.experiments.comparison.recipe_reader import Case

    if args.jobs < 0:
        raise ConfigError(f"--jobs: expected a number of at least 0, found {args.jobs}")
    started = time.monotonic()
    comparison = build(args.config, overrides_of(args), args.out)
    config = comparison.builder.reader.config(MOE, Case(0))
    check_domains(config)
    wanted = _evaluations(comparison, args.out)
    _tasks(comparison, config, args.out)
    if args.dry_run:
        comparison.builder.write_configs()
        _show_plan(comparison)
        return 0
    require_domains(open_source(config.data.path), scored_domains(config))
    if config.compare.tasks:  # before the days of training, not after
        require_harness()
        task_groups(config.compare.tasks)
    gpus = devices()
    with held(args.out):
        comparison.builder.write_configs()
        pool = Pool(
            comparison.builder.jobs,
            args.out / "logs",
            args.jobs or gpus or len(os.sched_getaffinity(0)),
            gpus,
        )
        pool.run()
        results = _report(comparison, config, pool, wanted, args.out, time.monotonic() - started)
    if args.json:
        print(json.dumps(results.to_json(), ensure_ascii=False))
    else:
        from nexus_ds.experiments.comparison.report import terminal_tables, verdict

        print(terminal_tables(results) + "\n\n" + "\n".join(verdict(results)))
        print(
            f"\nreport: {args.out / 'report.html'}, {args.out / RESULTS}; {duration(results.seconds or 0.0)}"
        )
    if pool.failed:
        first, why = next(iter(pool.failed.items()))
        raise NexusError(
            f"{len(pool.failed)} jobs failed, first {comparison.builder.jobs[first].name}: {why}; the rest is in "
            f"{args.out}, logs in {args.out / 'logs'}; the same command again makes what is missing"
        )
    return 0
