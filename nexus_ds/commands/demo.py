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
import time
from pathlib import Path
from typing import NotRequired, TypedDict

from nexus_ds.children import tied
from nexus_ds.command_lines import DS_JSON, evaluate_words, next_words, program
from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.data.corpora import open_source, require_domains
from nexus_ds.data.opening import opening
from nexus_ds.errors import ConfigError, DataError, NexusError
from nexus_ds.launch import devices
from nexus_ds.local_runner import run_steps
from nexus_ds.outputs import held, write_json
from nexus_ds.pipeline import (
    FINETUNE,
    Places,
    Step,
    check_domains,
    check_made,
    places,
    resolve,
    steps,
)
from nexus_ds.progress import duration, say
from nexus_ds.report.evaluation import (
    FIGURES,
    PAGE,
    SUMMARY,
    evaluation_sections,
    intro,
    perplexity_table,
    write_csv,
)
from nexus_ds.report.figures import line_plot
from nexus_ds.report.page import Cell, Section, Table, text_table, write_page
from nexus_ds.report.summary import Json, Summary
from nexus_ds.settings import Config
from nexus_ds.typed_json import parsed, read_typed, refusing, typed

SEED_MODEL = "seed"
AVERAGE = "plain average"
NEXUS = "Nexus"
APPENDED = "Nexus extended, before finetune"
EXTENDED = "Nexus extended"

Curve = dict[str, dict[str, float]]
"""Perplexity by finetune tokens (text, as JSON has its keys) and domain."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    _add_data_options(parser)
    parser.add_argument("--out", metavar="DIR", help="directory of the run (default: the recipe's)")
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default="demo",
        help="recipe file or name (default: demo)",
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
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings laid over the recipe",
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """Declare what the demo is made of."""
    parser.add_argument(
        "--data", metavar="DIR", help="folder of domains (default: text that lies on this machine)"
    )
    parser.add_argument("--domains", metavar="A,B", help="domains of the upcycled experts")
    parser.add_argument(
        "--new-domain", metavar="E", help="domain of the expert that is added later"
    )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return the options as overrides of the recipe, the user's own last."""
    # the recipe's domains are those of the demo's own text
    if args.data and not (args.domains and args.new_domain):
        raise ConfigError("--data needs --domains A,B,.. and --new-domain E: folders of the data")
    pairs = {
        "data.path": args.data,
        "pipeline.domains": args.domains and f"[{args.domains}]",
        "pipeline.new_domains": args.new_domain and f"[{args.new_domain}]",
        "pipeline.run": args.out,
    }
    given = [f"{key}={value}" for key, value in pairs.items() if value]
    return [*given, *args.overrides]


def evaluated(config: Config) -> dict[str, Path]:
    """Return the models of the table, by name, in order."""
    where = places(config)
    pipe = config.pipeline
    models = {SEED_MODEL: where.seed}
    for domain in [*pipe.domains, *pipe.new_domains]:
        models[f"branch {domain}"] = where.branch(domain)
    models[AVERAGE] = where.average
    models[NEXUS] = where.nexus
    if pipe.new_domains:
        models[APPENDED] = where.extension
        models[EXTENDED] = where.extended
    return models


def evaluate(config: Config) -> None:
    """Score all models of the run with the verb `evaluate`."""
    where = places(config)
    domains = [*config.pipeline.domains, *config.pipeline.new_domains]
    words = evaluate_words(config, evaluated(config), domains, where.tokens)
    if config.pipeline.new_domains:
        words += ["--before", NEXUS]
    command = program([*words, "--out", str(where.report)])
    done = subprocess.run(tied(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise NexusError(f"evaluate failed (exit {done.returncode}); its message stands above")


class _Record(TypedDict):
    """What is read of a line of metrics.jsonl."""

    kind: str
    step: int
    perplexity: NotRequired[dict[str, float]]
    """Of validations."""


def extension_curve(where: Places, config: Config) -> Curve:
    """Return perplexity by finetune budget and domain, from the finetune's own validations.

    Raises:
        DataError: a log that is not what `train` writes.
    """
    log = Path(f"{where.extended}.training") / "metrics.jsonl"
    tokens = config.training.batch_size * config.data.sequence_length
    curve = {}
    for number, line in enumerate(log.read_bytes().split(b"\n"), start=1):
        mend = (
            f"take the line out where a later one has its step, else remove {where.extended} and "
            f"{where.extended}.training, and the same command trains it again"
        )
        with refusing(f"{log}:{number}", "what train writes", mend):
            record = typed(parsed(line), _Record) if line else None
            if record and record["kind"] == "validation":
                curve[str(record["step"] * tokens)] = record["perplexity"]
    if not curve:
        raise DataError(
            f"{log}: found no validation; expected what train writes; remove {where.extended} and "
            f"{where.extended}.training, and the same command trains it again"
        )
    return curve


def _mean_log(perplexity: dict[str, float], domains: list[str]) -> float:
    return sum(math.log(perplexity[domain]) for domain in domains) / len(domains)


def _against(other: str, summary: Summary, domains: list[str]) -> str:
    """Return how Nexus compares with a model that had no training on the mixture."""
    before = _mean_log(summary.perplexity[other], domains)
    after = _mean_log(summary.perplexity[NEXUS], domains)
    # of logarithms: the ratio of geometric means, which no single domain decides
    change = math.expm1(after - before)
    word = "lower" if change < 0 else "HIGHER"
    return (
        f"On the upcycled domains Nexus has {abs(change):.0%} {word} perplexity "
        f"than the {other} (which had no training on the mixture)."
    )


def _own_share(summary: Summary, domains: list[str]) -> str:
    routing = summary.models[NEXUS].routing
    if routing is None:
        raise ValueError(f"models.{NEXUS}: found no routing")
    shares = [routing.own_share[domain] for domain in domains]
    share = sum(shares) / len(domains)
    chance = 1 / len(domains)
    return f"{share:.0%} of a domain's tokens go to its own expert (chance: {chance:.0%})."


def _extension(summary: Summary, old: list[str], new: list[str]) -> str:
    before = summary.perplexity[NEXUS]
    after = summary.perplexity[EXTENDED]
    on_new = _mean_log(after, new) - _mean_log(before, new)
    on_old = _mean_log(after, old) - _mean_log(before, old)
    gain = math.exp(on_new)
    cost = math.expm1(on_old)
    word = "rose" if cost > 0 else "fell"
    return (
        f"With the expert for {', '.join(new)} its perplexity is {gain:.2f} of what it was; the "
        f"older domains {word} by {abs(cost):.1%} on average."
    )


def findings(summary: Summary, config: Config) -> list[str]:
    """Return what the numbers of this run say, a sentence each; nothing is claimed beyond them.

    Raises:
        KeyError: a model or domain that the summary lacks.
        ValueError: Nexus has no routing there.
    """
    old = config.pipeline.domains
    new = config.pipeline.new_domains
    found = [_against(other, summary, old) for other in (SEED_MODEL, AVERAGE)]
    found.append(_own_share(summary, old))
    if new:
        found.append(_extension(summary, old, new))
    return found


def _extension_section(summary: Summary, curve: Curve, figures: Path) -> Section:
    """Draw the finetune's curve and write its numbers; return the section of the page."""
    budgets = [int(tokens) for tokens in curve]
    points = list(curve.values())
    domains = list(points[0])
    lines = {}
    for domain in domains:
        perplexities = [point[domain] for point in points]
        lines[domain] = (budgets, perplexities)
    figure = figures / "extension.png"
    line_plot(
        lines,
        figure,
        title="While the extended model is finetuned",
        xlabel="finetune tokens",
        ylabel="validation perplexity",
        log_y=True,
    )
    cells = [[int(tokens), *row.values()] for tokens, row in curve.items()]
    write_csv(figure.with_suffix(".csv"), ["finetune_tokens", *domains], cells)
    text = (
        "Perplexity of each domain while the extended model is finetuned on new text and replayed "
        "old text; at 0 tokens the expert has only been appended (and the router refitted, unless "
        "the recipe says no). The new domain should fall fast, the others should stay level."
    )
    rows: list[list[Cell]] = []
    for name in (NEXUS, APPENDED, EXTENDED):
        rows.append([name, *summary.perplexity[name].values()])
    table = Table(header=["model", *summary.perplexity[NEXUS]], rows=rows)
    return Section(title="Adding an expert", text=text, figure=figure, table=table)


def report(config: Config, args: argparse.Namespace, seconds: float) -> Json:
    """Complete the evaluation's summary and page with what only the demo knows.

    Returns:
        What summary.json holds: the evaluation's keys, `findings`, `seconds`, `extension`.
    """
    where = places(config)
    path = where.report / SUMMARY
    what = "what evaluate writes"
    mend = f"remove {where.report}, and the same command makes it again"
    content = read_typed(path, dict[str, object], what, mend)
    # what is missing, or of another shape, shows where it is drawn
    with refusing(path, what, mend):
        summary = Summary.from_json(content)
        sections = evaluation_sections(summary, where.report / FIGURES)
        told = findings(summary, config)
        # A repetition only reports; what counts is the run that made everything.
        earlier = typed(content.get("seconds", 0.0), float, "seconds")
        about = intro(summary)
    content |= {"findings": told, "seconds": max(round(seconds, 1), earlier)}
    if config.pipeline.new_domains:
        words = [*overrides_of(args), f"stage={FINETUNE}"]
        finetune = resolve(load_config(args.config, words))
        curve = extension_curve(where, finetune)
        content["extension"] = {"nexus": curve}
        sections.insert(1, _extension_section(summary, curve, where.report / FIGURES))
    write_json(where.report / SUMMARY, content)
    opening = "\n\n".join([*told, about])
    title = "Dense models in, one mixture-of-experts out"
    write_page(where.report / PAGE, title, opening, sections)
    return content


def show(content: Json, config: Config) -> None:
    """Print the table, what it says, and where everything is."""
    where = places(config)
    last = where.extended if config.pipeline.new_domains else where.nexus
    checkpoints = [str(path) for path in (where.seed, where.nexus, last)]
    print_text("\nperplexity by domain (lower is better)")
    print_text(text_table(perplexity_table(Summary.from_json(content))))
    print_text("\n" + "\n".join(content["findings"]))
    print_text(f"\nreport:      {where.report / PAGE}")
    print_text(f"checkpoints: {', '.join(checkpoints)}")
    print_text(f"this run:    {duration(content['seconds'])}, all of it in {where.run}")
    # of the text that the last expert was trained on
    domain = [*config.pipeline.domains, *config.pipeline.new_domains][-1]
    prompt = opening(open_source(config.data.path), domain)
    words = next_words(last, prompt, mixture=True, bos=config.data.bos)
    print_text(f"next:        {words}")


def _ranks(asked: int, batch: int) -> int:
    """Return the ranks of the mixture's stages: as many as there are devices, or 2, if the batch
    (sequences a step) divides over them."""
    most = devices() or 2
    # sequences are dealt out whole
    dividing = [ranks for ranks in range(1, most + 1) if batch % ranks == 0]
    ranks = asked or max(dividing)
    if ranks < 1 or batch % ranks:
        raise ConfigError(
            f"--ranks {ranks}: training.batch_size {batch} does not divide over them; "
            "use a divisor of it"
        )
    return ranks


def _make_missing(config: Config, plan: list[Step]) -> None:
    """Run the stages that are missing, then what is made of all models."""
    where = places(config)
    # outputs appear whole or not at all: what is there is done
    missing = [step for step in plan if not step.output.exists()]
    run_steps(missing, config.pipeline.parallel_branches)
    if not where.average.exists():
        # It imports torch, which `demo --help` does not wait for.
        from nexus_ds.upcycling.average import average_dense

        branches = [where.branch(domain) for domain in config.pipeline.domains]
        average_dense([where.seed, *branches], where.average)
    if not where.report.exists():
        say("== evaluate")
        evaluate(config)


def run(args: argparse.Namespace) -> int:
    """Run what is missing of the pipeline, then evaluate and report."""
    started = time.monotonic()
    overrides = overrides_of(args)
    config = resolve(load_config(args.config, overrides))
    pipe = config.pipeline
    if not pipe.domains:
        raise ConfigError("pipeline.domains is empty; name the domains of the upcycled experts")
    check_domains(config)
    source = open_source(config.data.path)
    require_domains(source, [*pipe.domains, *pipe.new_domains])
    ranks = _ranks(args.ranks, config.training.batch_size)
    plan = steps(config, args.config, overrides, ranks, str(DS_JSON))
    # what is there was made with the same settings, or the page would mix two runs
    check_made(plan, args.config, overrides)
    # two demos in one folder would make the same stages
    with held(places(config).run):
        _make_missing(config, plan)
        content = report(config, args, time.monotonic() - started)
    if args.json:
        print_text(json.dumps(content, ensure_ascii=False))
    else:
        show(content, config)
    return 0
