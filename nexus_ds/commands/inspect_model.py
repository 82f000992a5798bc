"""The verb `inspect`: what checkpoints are, how they differ and are related, what they can become.

In a second or two and without torch, from headers and a sample of bytes (`checkpoint.relation` and
`checkpoint.expert_rows` state the bounds).
A module named inspect would shadow Python's own.
Not covered: every byte of the weights (`verify`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.console import in_line, print_text
from nexus_ds.report.page import Cell, Table, text_table
from nexus_ds.upcycling.assessment import assess, related

# Shown below the other facts, on lines of their own.
APART = ("experts", "lineage", "domains", "relation", "outlook")
# Of the router, by layer and expert: a line a layer.
BY_LAYER = ("row_norms", "row_cosines")
# Not in the table of what differs: they have tables of their own.
TABLES = (*BY_LAYER, "domains", "relation", "outlook")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="dense or Nexus checkpoint; of several the first is the seed or the mixture to extend",
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
        # one level of texts has no room for tables
        if key in TABLES:
            continue
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
    short = {key: value for key, value in facts.items() if key not in APART}
    lines = flat(short)
    width = max(map(len, lines))
    text = [f"{name.ljust(width)}  {in_line(value)}" for name, value in lines.items()]
    # from 0: messages and tensor names count experts so
    for index, expert in enumerate(facts.get("experts", [])):
        text.append(in_line(f"expert {index}: {_expert_text(expert)}"))
    for number, step in enumerate(facts.get("lineage", []), 1):
        text.append(in_line(f"step {number}: {_step_text(step)}"))
    text += _router_text(facts)
    return "\n".join(text)


def _router_text(facts: dict[str, Any]) -> list[str]:
    """Return how alike domains are, and how long and alike the router's rows of each layer."""
    text = []
    domains = facts.get("domains") or {}
    if domains:
        rows = [[name, *cosines] for name, cosines in domains["cosines"].items()]
        text += ["", text_table(Table(header=["cosine of", *domains["names"]], rows=rows))]
    router = facts.get("router") or {}
    if BY_LAYER[0] in router:
        names = [expert["name"] for expert in facts["experts"]]
        rows = []
        for layer, norms in enumerate(router[BY_LAYER[0]]):
            rows.append([str(layer), *norms, router[BY_LAYER[1]][layer]])
        header = ["norm of row, layer", *names, "mean cosine"]
        text += ["", text_table(Table(header=header, rows=rows))]
    return text


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


def relation_text(all_info: Sequence[dict[str, Any]]) -> list[str]:
    """Return how each further model is related to the first: in words, by module, by layer."""
    others = [facts for facts in all_info if "relation" in facts]
    text = [f"{facts['directory']}: {facts['relation']['says']}" for facts in others]
    names = [facts["directory"] for facts in others]
    header = [f"{name} {what}" for name in names for what in ("cosine", "distance")]
    for title, key in (("module", "modules"), ("layer", "layers")):
        rows: list[list[Cell]] = []
        # in the order of the files: a set has none
        for name in dict.fromkeys(chain.from_iterable(one["relation"][key] for one in others)):
            cells: list[Cell] = [name]
            for facts in others:
                found = facts["relation"][key].get(name, {})
                # of a layer its attention: it is averaged, and tells of a common start
                found = found.get("self_attn", {}) if key == "layers" else found
                cells += [found.get("cosine"), found.get("distance")]
            rows.append(cells)
        if rows:
            text += ["", text_table(Table(header=[title, *header], rows=rows))]
    return text


def outlook_text(outlook: dict[str, Any]) -> list[str]:
    """Return whether models can be put together, and what stands against it."""
    possible = "yes" if outlook["possible"] else "no"
    text = [f"can be put together (as {outlook['as']}): {possible}"]
    for number, problem in enumerate(outlook["problems"], start=1):
        text.append(f"{number}. {problem}")
    return [*text, *(f"note: {one}" for one in outlook["notes"])]


def _facts(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the facts of each checkpoint; of others than the first also how they are related."""
    first, *others = [describe(directory) for directory in directories]
    for facts, directory in zip(others, directories[1:], strict=True):
        facts["relation"] = related(directories[0], directory)
    outlook = assess(directories)
    if outlook:
        first["outlook"] = outlook.as_dict()
    return [first, *others]


def run(args: argparse.Namespace) -> int:
    """Print the facts of one directory, or a table of differences of several."""
    facts = _facts(args.directories)
    alone = len(facts) == 1
    if args.json:
        answer = facts[0] if alone else facts
        print_text(json.dumps(answer, indent=2, ensure_ascii=False))
    elif alone:
        print_text(describe_text(facts[0]))
    else:
        rows, equal = differences(facts)
        header = ["differs", *map(str, args.directories)]
        print_text(text_table(Table(header=header, rows=rows)))
        print_text(f"equal: {', '.join(equal)}\n")
        print_text("\n".join(relation_text(facts)))
    if not args.json and "outlook" in facts[0]:
        print_text("\n" + "\n".join(outlook_text(facts[0]["outlook"])))
    return 0
