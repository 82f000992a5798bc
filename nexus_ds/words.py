"""The words that a user types: settings among options, and the known word nearest to a wrong one.

Not covered: what the words of a setting mean (`config`).
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ', did you mean X?' for the known word nearest to `word`, or the list of them all."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {matches[0]}?" if matches else f"; known: {', '.join(known)}"


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line whose overrides may stand before, between and after its options."""
    args, left = parser.parse_known_args(words)
    # argparse takes optional words at one place alone and hands the others back; those with a `=`
    # are overrides too, if the verb has any.
    for word in left:
        if word.startswith("-") or "=" not in word or not hasattr(args, "overrides"):
            parser.error(f"unknown argument {word}; settings are given as section.key=value")
    if left:
        args.overrides = [*args.overrides, *left]
    return args


def add_stage_arguments(
    parser: argparse.ArgumentParser, stages: Sequence[str], stage_help: str
) -> None:
    """Declare what names one stage of a recipe's run: `stage` makes it, `preflight` checks it."""
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default="demo",
        help="recipe file or name (default: demo)",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="JSON",
        default="",
        help="for moe and extended (default: the project's z3)",
    )
    parser.add_argument("name", metavar="STAGE", choices=stages, help=stage_help)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings laid over the recipe",
    )
