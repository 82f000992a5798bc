"""The verb `inspect`: what a checkpoint is, or how several differ.

A module named inspect would shadow Python's own.
Not covered: differences between weights; only sizes, experts, router, origin and tokenizer are
compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nexus_ds.console import visible
from nexus_ds.report.page import Table, text_table

# Shown below the other facts, a line for each entry.
LISTS = ("experts", "lineage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="dense or Nexus checkpoint",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the facts as JSON (a list for several directories)",
    )


def flat(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested facts as one level of texts.

    {'parameters': {'total': 5}} becomes {'parameters.total': '5'}.
    """
    result: dict[str, str] = {}
    for key, value in facts.items():
        name = prefix + key
        if isinstance(value, dict):
            result |= flat(value, f"{name}.")
        elif key == "lineage":
            # another program's steps may have no verb
            verbs = [str(step.get("verb", "?")) for step in value]
            result[name] = " > ".join(verbs)
        elif key == "experts":
            experts = [f"{expert['name']} {expert['sha256'][:8]}" for expert in value]
            result[name] = ", ".join(experts)
        # a bool is an int to Python, but has no thousands
        elif type(value) is int:
            result[name] = f"{value:,}"
        elif value is not None:
            result[name] = str(value)
    return result


def describe_text(facts: dict[str, Any]) -> str:
    """Return the facts of one checkpoint as lines of text."""
    short = {key: value for key, value in facts.items() if key not in LISTS}
    lines = flat(short)
    width = max(map(len, lines))
    text = [f"{name.ljust(width)}  {value}" for name, value in lines.items()]
    # from 0: messages and tensor names count experts so
    for index, expert in enumerate(facts.get("experts", [])):
        text.append(f"expert {index}: {_expert_text(expert)}")
    for number, step in enumerate(facts.get("lineage", []), 1):
        text.append(f"step {number}: {_step_text(step)}")
    return "\n".join(text)


def _expert_text(expert: dict[str, str]) -> str:
    domain = expert["domain"]
    # enough to tell files apart, and to search for
    sha256 = expert["sha256"][:12]
    return f"{expert['name']} (domain {domain}) from {expert['source']}, sha256 {sha256}"


def _step_text(step: dict[str, Any]) -> str:
    verb = step.get("verb", "?")
    settings = {key: value for key, value in step.items() if key != "verb"}
    details = json.dumps(settings, ensure_ascii=False)
    return f"{verb} {details}"


def differences(all_info: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Return what differs and the names of what is equal.

    Args:
        all_info: facts of each checkpoint.

    Returns:
        Rows [name, value of the first, of the second, ...], and names.
    """
    flats = [flat(facts) for facts in all_info]
    keys = dict.fromkeys(chain.from_iterable(flats))
    # always differs, and heads the columns
    keys.pop("directory", None)
    rows: list[list[str]] = []
    equal: list[str] = []
    for key in keys:
        # a dense model has no experts to speak of, a mixture has
        values = [facts.get(key, "–") for facts in flats]
        if len(set(values)) == 1:
            equal.append(key)
        else:
            rows.append([key, *values])
    return rows, equal


def run(args: argparse.Namespace) -> int:
    """Print the facts of one directory, or a table of differences of several."""
    # not at the top: it imports torch, for which `inspect --help` doesn't wait
    from nexus_ds.checkpoint.inspection import describe

    facts = [describe(directory) for directory in args.directories]
    alone = len(facts) == 1
    if args.json:
        answer = facts[0] if alone else facts
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    elif alone:
        print(visible(describe_text(facts[0])))
    else:
        rows, equal = differences(facts)
        header = ["differs", *map(str, args.directories)]
        print(visible(text_table(Table(header=header, rows=rows))))
        print(f"equal: {', '.join(equal)}")
    return 0
