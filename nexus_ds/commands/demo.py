"""The verb `demo`: the whole pipeline through the other verbs, then one table and one page.

Every stage is a command of its own, run as a user would type it; a stage whose output exists is not
run again, so an interrupted demo goes on where it stopped. All numbers stand in the recipe.
Not covered: clusters (slurm/), fair comparison with other ways to use the same compute.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nexus_ds.command_lines import DS_JSON, evaluate_words, program
from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.launch import devices
from nexus_ds.local_runner import run_steps
from nexus_ds.outputs import held, write_json
from nexus_ds.pipeline import (
    FINETUNE,
    Places,
    check_domains,
    check_made,
    next_words,
    places,
    resolve,
    steps,
)
from nexus_ds.progress import duration
from nexus_ds.settings import Config

APPENDED = "Nexus extended, before finetune"
EXTENDED = "Nexus extended"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--data", metavar="DIR", help="folder of domains (default: text that lies on this machine)"
    )
    parser.add_argument("--domains", metavar="A,B", help="domains of the upcycled experts")
    parser.add_argument(
        "--new-domain", metavar="E", help="domain of the expert that is added later"
    )
    parser.add_argument("--out", metavar="DIR", help="directory of the run (default: the recipe's)")
    parser.add_argument(
        "--config", metavar="RECIPE", default="demo", help="recipe file or name (default: demo)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=0,
        help="ranks of the mixture's stages (default: devices, or 2)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print summary.json instead of the table"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the recipe"
    )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return the options as overrides of the recipe, the user's own last."""
    if args.data and not (args.domains and args.new_domain):
        raise ConfigError("--data needs --domains A,B,.. and --new-domain E: folders of the data")
    pairs = {
        "data.path": args.data,
        "pipeline.domains": args.domains and f"[{args.domains}]",
        "pipeline.new_domains": args.new_domain and f"[{args.new_domain}]",
        "pipeline.run": args.out,
    }
    return [f"{key}={value}" for key, value in pairs.items() if value] + list(args.overrides)


def evaluated(config: Config) -> dict[str, Path]:
    """Return the models of the table, by name, in order."""
    where, pipe = places(config), config.pipeline
    branches = {
        f"branch {domain}": where.branch(domain) for domain in [*pipe.domains, *pipe.new_domains]
    }
    models = {"seed": where.seed, **branches, "plain average": where.average, "Nexus": where.nexus}
    return models | (
        {APPENDED: where.extension, EXTENDED: where.extended} if pipe.new_domains else {}
    )


def evaluate(config: Config) -> None:
    """Score all models of the run with the verb `evaluate`."""
    where = places(config)
    domains = [*config.pipeline.domains, *config.pipeline.new_domains]
    words = evaluate_words(config, evaluated(config), domains, where.tokens)
    if config.pipeline.new_domains:
        words += ["--before", "Nexus"]
    command = program([*words, "--out", str(where.report)])
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise NexusError(f"evaluate failed (exit {done.returncode}); its message stands above")


def extension_curve(where: Places, config: Config) -> dict[str, dict[str, float]]:
    """Return perplexity by finetune budget (tokens) and domain, from the validations of the
    finetune itself."""
    log = Path(f"{where.extended}.training") / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    tokens = config.training.batch_size * config.data.sequence_length
    return {str(r["step"] * tokens): r["perplexity"] for r in records if r["kind"] == "validation"}


def _mean_log(perplexity: dict[str, float], domains: list[str]) -> float:
    return sum(math.log(perplexity[domain]) for domain in domains) / len(domains)


def findings(summary: dict[str, Any], config: Config) -> list[str]:
    """Return what the numbers of this run say, one sentence each; nothing is claimed beyond
    them."""
    table, old, new = summary["perplexity"], config.pipeline.domains, config.pipeline.new_domains
    found = []
    for other in ("seed", "plain average"):
        difference = _mean_log(table["Nexus"], old) - _mean_log(table[other], old)
        word = "lower" if difference < 0 else "HIGHER"
        found.append(
            f"On the upcycled domains Nexus has {abs(math.expm1(difference)):.0%} {word} perplexity than the {other} "
            f"(which had no training on the mixture)."
        )
    own = summary["models"]["Nexus"]["own_share"]
    share = sum(own[d] for d in old) / len(old)
    found.append(
        f"{share:.0%} of a domain's tokens go to its own expert (chance: {1 / len(old):.0%})."
    )
    if new:
        gain = math.exp(_mean_log(table[EXTENDED], new) - _mean_log(table["Nexus"], new))
        cost = math.expm1(_mean_log(table[EXTENDED], old) - _mean_log(table["Nexus"], old))
        found.append(
            f"With the expert for {', '.join(new)} its perplexity is {gain:.2f} of what it was; the older domains "
            f"{'rose' if cost > 0 else 'fell'} by {abs(cost):.1%} on average."
        )
    return found


def report(config: Config, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Complete the evaluation's summary and page with what only the demo knows; return the
    summary."""
    from nexus_ds.report.evaluation import (
        FIGURES,
        PAGE,
        SUMMARY,
        evaluation_sections,
        intro,
        write_csv,
    )
    from nexus_ds.report.figures import line_plot
    from nexus_ds.report.page import Cell, Section, Table, write_page
    from nexus_ds.report.summary import Summary

    where = places(config)
    summary = json.loads((where.report / SUMMARY).read_text(encoding="utf-8"))
    evaluation = Summary.from_json(summary)
    sections = evaluation_sections(evaluation, where.report / FIGURES)
    summary["findings"] = findings(summary, config)
    # a repetition only reports
    summary["seconds"] = max(round(seconds, 1), summary.get("seconds", 0.0))
    if config.pipeline.new_domains:
        finetune = resolve(load_config(args.config, [*overrides_of(args), f"stage={FINETUNE}"]))
        curve = extension_curve(where, finetune)
        summary["extension"] = {"nexus": curve}
        lines = {
            d: ([int(t) for t in curve], [row[d] for row in curve.values()])
            for d in next(iter(curve.values()))
        }
        figure = where.report / FIGURES / "extension.png"
        line_plot(
            lines,
            figure,
            title="While the extended model is finetuned",
            xlabel="finetune tokens",
            ylabel="validation perplexity",
            log_y=True,
        )
        cells = [[int(tokens), *row.values()] for tokens, row in curve.items()]
        write_csv(figure.with_suffix(".csv"), ["finetune_tokens", *lines], cells)
        text = (
            "Perplexity of each domain while the extended model is finetuned on new text and replayed old text; at 0 "
            "tokens the expert has only been appended (and the router refitted, unless the recipe says no). The new domain should fall fast, the others "
            "should stay level."
        )
        rows: list[list[Cell]] = [
            [name, *summary["perplexity"][name].values()] for name in ("Nexus", APPENDED, EXTENDED)
        ]
        table = Table(header=["model", *summary["perplexity"]["Nexus"]], rows=rows)
        sections.insert(1, Section(title="Adding an expert", text=text, figure=figure, table=table))
    write_json(where.report / SUMMARY, summary)
    opening = "\n\n".join([*summary["findings"], intro(evaluation)])
    write_page(
        where.report / PAGE, "Dense models in, one mixture-of-experts out", opening, sections
    )
    return summary


def show(summary: dict[str, Any], config: Config) -> None:
    """Print the table, what it says, and where everything is."""
    from nexus_ds.report.evaluation import perplexity_table
    from nexus_ds.report.page import text_table
    from nexus_ds.report.summary import Summary

    where = places(config)
    last = where.extended if config.pipeline.new_domains else where.nexus
    print("\nperplexity by domain (lower is better)")
    print(text_table(perplexity_table(Summary.from_json(summary))))
    print("\n" + "\n".join(summary["findings"]))
    print(f"\nreport:      {where.report / 'report.html'}")
    print(f"checkpoints: {', '.join(str(path) for path in (where.seed, where.nexus, last))}")
    print(f"this run:    {duration(summary['seconds'])}, all of it in {where.run}")
    print(f"next:        {next_words(last)}")


def run(args: argparse.Namespace) -> int:
    """Run what is missing of the pipeline, then evaluate and report."""
    from nexus_ds.data.corpora import open_source, require_domains
    from nexus_ds.upcycling.average import average_dense

    started = time.monotonic()
    overrides = overrides_of(args)
    config = resolve(load_config(args.config, overrides))
    if not config.pipeline.domains:
        raise ConfigError("pipeline.domains is empty; name the domains of the upcycled experts")
    check_domains(config)
    require_domains(
        open_source(config.data.path), [*config.pipeline.domains, *config.pipeline.new_domains]
    )
    where, batch = places(config), config.training.batch_size
    ranks = args.ranks or max(r for r in range(1, (devices() or 2) + 1) if batch % r == 0)
    if ranks < 1 or batch % ranks:
        raise ConfigError(
            f"--ranks {ranks}: training.batch_size {batch} does not divide over them; use a divisor of it"
        )
    plan = steps(config, args.config, overrides, ranks, str(DS_JSON))
    check_made(plan, args.config, overrides)
    with held(where.run):
        run_steps(
            [step for step in plan if not step.output.exists()], config.pipeline.parallel_branches
        )
        if not where.average.exists():
            average_dense(
                [where.seed, *(where.branch(domain) for domain in config.pipeline.domains)],
                where.average,
            )
        if not where.report.exists():
            print("== evaluate", file=sys.stderr, flush=True)
            evaluate(config)
        summary = report(config, args, time.monotonic() - started)
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        show(summary, config)
    return 0
