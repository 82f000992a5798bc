"""The verb `evaluate`: any checkpoints' perplexity by domain, measures over held-out documents,
routing, tasks, figures and a page.

Not covered: text whose domain is not known (`discover` finds some).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus_ds.checkpoint.needs import BATCH, WINDOWS
from nexus_ds.command_lines import next_words
from nexus_ds.config import named_once
from nexus_ds.console import print_text
from nexus_ds.data.corpora import Source, open_source, token_files, windows
from nexus_ds.data.encoding import load_tokenizer
from nexus_ds.data.held_out import HeldOut, held_out
from nexus_ds.data.opening import opening
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import new_directory, refuse_existing
from nexus_ds.progress import Progress
from nexus_ds.report import verdict as before_after
from nexus_ds.report.evaluation import (
    PAGE,
    SUMMARY,
    answers,
    perplexity_table,
    routing_table,
    write_evaluation,
)
from nexus_ds.report.measure_tables import TITLES, measure_table, measures_named
from nexus_ds.report.page import text_table
from nexus_ds.report.summary import (
    Measured,
    MeasureEntry,
    ModelTasks,
    Setup,
    Summary,
    compared,
    summarise,
)
from nexus_ds.report.task_tables import task_table

if TYPE_CHECKING:
    from nexus_ds.evaluation.measures import Questions

# checkpoint.inspection, evaluation/ and generation/ import torch: functions below import them, so
# that `evaluate --help` waits for nothing.
DOCUMENTS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        type=Path,
        metavar="DIR",
        help="dense or Nexus checkpoint; give it several times to compare",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with <domain>/validation.jsonl[.gz|.zst], hub:NAME, or demo",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="new directory of the results",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="name of each --checkpoint in the results, in order",
    )
    parser.add_argument(
        "--domains",
        default="",
        metavar="A,B",
        help="domains to score (default: all of the data's)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=WINDOWS,
        metavar="N",
        help="windows of text per domain (default: %(default)s)",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=0,
        metavar="TOKENS",
        help="tokens a window; 0: as the models were trained, else 128",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=BATCH,
        metavar="N",
        help="windows a forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "stored"),
        help="auto: fp32 on a CPU, the stored dtype on a GPU",
    )
    _add_document_options(parser)
    _add_task_options(parser)
    _add_other_options(parser)


def _add_document_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measures",
        default="",
        metavar="A,B",
        help="of held-out documents, or all: bits (per byte; any tokenizers compare), cloze (one "
        "of ten frequent words), generation (distance of generated text from real text)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=DOCUMENTS,
        metavar="N",
        help="documents per domain that --measures reads (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of what --measures draws: documents, passages, tokens (default: %(default)s)",
    )


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        default="",
        metavar="A,B",
        help="downstream tasks by name, or paper: the paper's groups, as far as they can be run; "
        "needs lm-eval, and its data on this machine",
    )
    parser.add_argument(
        "--task-path",
        type=Path,
        metavar="DIR",
        help="folder with tasks of lm-eval as YAML; they win over lm-eval's own of the same name, "
        "and the Python functions that they name are run",
    )
    parser.add_argument(
        "--task-limit",
        type=int,
        default=0,
        metavar="N",
        help="examples of each task; 0: all",
    )


def _add_other_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--before",
        default="",
        metavar="NAME",
        help="model that the last --checkpoint is compared with, by name "
        "(default: the last two mixtures are compared)",
    )
    before_after.add_limit(parser, "the page")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where token files are kept (default: nowhere)",
    )
    parser.add_argument(
        "--on-bad-row",
        default="error",
        choices=("error", "skip"),
        help="what a damaged line does",
    )
    _add_reading_options(parser)
    parser.add_argument("--json", action="store_true", help="print summary.json instead of tables")


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Declare how text is read: as the training read it."""
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="documents don't begin with the BOS of the model's tokenizer "
        "(trained with data.bos=false)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="rows may be chats: rendered by the tokenizer's template, and their answers alone "
        "scored (trained with data.chat=true)",
    )


def model_names(checkpoints: Sequence[Path], given: Sequence[str]) -> list[str]:
    """Return one name a checkpoint: those given, else the directories' names.

    Raises:
        ConfigError: not one --name a checkpoint, an empty name, or two models of one name.
    """
    # in order and all or none: a name that slips by one would label every number wrongly
    if given and len(given) != len(checkpoints):
        raise ConfigError(
            f"found {len(given)} --name for {len(checkpoints)} --checkpoint; "
            "give one --name for each, or none"
        )
    names = list(given) or [path.resolve().name for path in checkpoints]
    if not all(name.strip() for name in names):
        raise ConfigError("found an empty --name; expected a name for each --checkpoint")
    # the results are a table by name: one of two would be lost
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(
            f"several checkpoints are called {', '.join(doubled)}; give each its own --name"
        )
    return names


def _check_numbers(args: argparse.Namespace) -> None:
    bounds = {"windows": 1, "length": 0, "batch": 1, "task-limit": 0, "documents": 2, "seed": 0}
    for option, least in bounds.items():
        found = getattr(args, option.replace("-", "_"))
        if found < least:
            raise ConfigError(f"--{option}: expected a number of at least {least}, found {found}")


def _domains(text: str, source: Source) -> list[str]:
    return named_once("--domains", text) or source.domains()


def _windows(
    args: argparse.Namespace,
    source: Source,
    domains: list[str],
    tokenizer: Path,
    length: int,
    cache: Path,
) -> dict[str, np.ndarray]:
    """Return validation windows [W, length + 1] of each domain in a checkpoint's own tokens; of
    chats marked, as `score` reads them."""
    files = token_files(
        source,
        domains,
        "validation",
        tokenizer,
        cache,
        on_bad_row=args.on_bad_row,
        bos=not args.no_bos,
        chat=args.chat,
    )
    return {
        domain: windows(files[domain], args.windows, length, marked=args.chat) for domain in domains
    }


def _reader_of(checkpoint: Path, chat: bool) -> str:
    """Return a hash that two models share which read the very same windows.

    Raises:
        CheckpointError: of chats, a tokenizer without a template.
    """
    from nexus_ds.checkpoint.tokenizer import tokenizer_fingerprint

    found = tokenizer_fingerprint(checkpoint)
    # Each model reads chats as its own template renders them, which are other words in another.
    form = load_tokenizer(checkpoint, chat=True).chat if chat else None
    return f"{found} {form.fingerprint}" if form else found


def _check_compared(facts: dict[str, dict[str, Any]], before: str, limit: float | None) -> None:
    """Refuse a limit that nothing can be held against, before a second of work."""

    if compared(facts, before) is not None or limit is None:
        return
    # said first: with one tokenizer the other message would send people in a circle
    if len({fact["tokenizer"] for fact in facts.values()}) > 1:
        raise ConfigError(
            "--fail-if-worse compares two models window by window, but these have different "
            "tokenizers and so different windows; give --checkpoint of two models of one "
            "tokenizer, with --chat also of one chat template"
        )
    raise ConfigError(
        "--fail-if-worse compares two mixtures; give --checkpoint of one before and of one after, "
        "or name any model with --before"
    )


def measure(
    args: argparse.Namespace,
    names: list[str],
    cache: Path,
    limit: float | None = None,
) -> Summary:
    """Score every checkpoint and return the summary."""
    from nexus_ds.checkpoint.inspection import describe
    from nexus_ds.evaluation.perplexity import cosines, score, window_length

    # ids decide which windows a model reads, and what they mean only transformers can tell
    facts = [
        describe(path) | {"tokenizer": _reader_of(path, args.chat)} for path in args.checkpoint
    ]
    _check_compared(dict(zip(names, facts, strict=True)), args.before, limit)
    length = window_length(args.length, facts)
    source = open_source(args.data)
    domains = _domains(args.domains, source)
    # by tokenizer: models of one tokenizer read the very same windows
    texts: dict[str, dict[str, np.ndarray]] = {}
    measured: dict[str, Measured] = {}
    for name, path, fact in zip(names, args.checkpoint, facts, strict=True):
        tokenizer = fact["tokenizer"]
        if tokenizer not in texts:
            texts[tokenizer] = _windows(args, source, domains, path, length, cache)
        scores = score(path, texts[tokenizer], args.batch, args.precision, label=name)
        similar = cosines(path) if scores.routing is not None else None
        measured[name] = Measured(fact, scores, similar)
    setup = Setup(args.data, domains, args.windows, length)
    summary = summarise(measured, setup, args.before, limit)
    if len(texts) > 1:
        what = "tokenizers or chat templates" if args.chat else "tokenizers"
        summary.warnings.append(
            f"the models have {len(texts)} different {what}: perplexity per token can't be "
            "compared between them"
        )
    return summary


def measure_tasks(args: argparse.Namespace, names: list[str]) -> dict[str, ModelTasks]:
    """Return each checkpoint's groups, mean and tasks in per cent, and what was not run and why."""
    from nexus_ds.evaluation.tasks import run_tasks, task_groups

    groups = task_groups(args.tasks)
    # of the paper's groups what can't be run is left out; what was asked for by name has to run
    strict = args.tasks.strip() != "paper"
    found = {}
    for name, path in zip(names, args.checkpoint, strict=True):
        scores = run_tasks(
            path,
            groups,
            args.task_path,
            limit=args.task_limit,
            batch=args.batch,
            precision=args.precision,
            strict=strict,
            label=name,
        )
        measured = {"mean": scores.mean, **dataclasses.asdict(scores)}
        found[name] = ModelTasks.from_json(measured)
    return found


def _held_out(args: argparse.Namespace) -> dict[str, HeldOut]:
    """Return the documents of each domain that --measures reads."""
    source = open_source(args.data)
    domains = _domains(args.domains, source)
    texts = {}
    with Progress("read held-out documents", len(domains), "domain") as progress:
        for domain in domains:
            texts[domain] = held_out(source, domain, args.documents, args.seed, args.on_bad_row)
            progress.advance()
    return texts


def _questions(args: argparse.Namespace, measures: Sequence[str]) -> Questions | None:
    """Return what --measures asks of every model; None without it.

    Raises:
        DataError: too little text.
    """
    from nexus_ds.evaluation.measures import Questions

    return Questions(_held_out(args), measures, args.seed) if measures else None


def measure_documents(
    args: argparse.Namespace,
    names: Sequence[str],
    measures: Sequence[str],
    questions: Questions,
    length: int,
) -> dict[str, MeasureEntry]:
    """Return each measure of all models, in windows of `length` tokens."""
    from nexus_ds.evaluation.documents import Reader
    from nexus_ds.generation.samples import Sampler

    bos = not args.no_bos
    found = {}
    for measure in measures:
        models = {}
        for name, path in zip(names, args.checkpoint, strict=True):
            reader = Reader(path, length, args.batch, args.precision, bos, name)
            sampler = Sampler(path, length, args.seed, args.batch, args.precision, bos, name)
            models[name] = questions.measured(measure, reader, sampler.continued)
        found[measure] = MeasureEntry.of(models, questions.reference(measure))
    return found


def _show(summary: Summary, args: argparse.Namespace) -> None:
    """Print the tables, the warnings, what was written and what to type next."""
    print_text("perplexity (lower is better)")
    print_text(text_table(perplexity_table(summary)))
    change = summary.change
    if change is not None and change.verdict is not None:
        print_text(f"\nfrom {change.before} to {change.after}, ± one standard error")
        print_text(change.verdict.text())
    routed = summary.routed_model
    routing = None if routed is None else summary.models[routed].routing
    # dense models have none
    if routing is not None:
        print_text(
            f"\nrouting of {routed}: share of each domain's tokens at each expert, mean over layers"
        )
        print_text(text_table(routing_table(routing)))
    for measure, entry in summary.measures.items():
        print_text(f"\n{TITLES[measure]}, ± one standard error")
        print_text(text_table(measure_table(measure, entry)))
    if summary.tasks:
        print_text("\ntasks (per cent ± one standard error, higher is better)")
        print_text(text_table(task_table(summary.tasks)))
    if chats := answers(summary):
        print_text(f"\n{chats}")
    print_text(f"\n{summary.tokens_per_second:,.0f} tokens/s")
    for warning in summary.warnings:
        print_text(f"warning: {warning}")
    print_text(f"wrote {args.out / PAGE}, {args.out / SUMMARY}, {args.out / 'figures'}/")
    name, last = list(summary.perplexity.items())[-1]
    # of the text that the model knows best
    prompt = opening(open_source(args.data), min(last, key=last.__getitem__))
    mixture = summary.models[name].routing is not None
    print_text(f"next: {next_words(args.checkpoint[-1], prompt, mixture, not args.no_bos)}")


def run(args: argparse.Namespace) -> int:
    """Score, draw, write; the output directory appears when everything is in it."""
    _check_numbers(args)
    limit = before_after.parse_limit(args.limit)
    names = model_names(args.checkpoint, args.name)
    measures = measures_named(args.measures, "--measures ")
    # before anything is scored, which takes minutes
    refuse_existing(args.out)
    with (
        new_directory(args.out) as folder,
        tempfile.TemporaryDirectory(prefix="nexus-ds-") as scratch,
    ):
        if args.tasks:
            from nexus_ds.evaluation.tasks import require_harness, task_groups

            require_harness()
            task_groups(args.tasks)
        # too little text is said before a model is scored
        questions = _questions(args, measures)
        summary = measure(args, names, args.cache or Path(scratch), limit)
        if questions is not None:
            length = summary.setup.length
            found = measure_documents(args, names, measures, questions, length)
            summary = dataclasses.replace(summary, measures=found)
        if args.tasks:
            summary = dataclasses.replace(summary, tasks=measure_tasks(args, names))
        write_evaluation(summary, folder)
    if args.json:
        print_text(json.dumps(summary.to_json(), ensure_ascii=False))
    else:
        _show(summary, args)
    verdict = summary.verdict
    return verdict.exit_code("evaluate", args.out) if verdict else 0
