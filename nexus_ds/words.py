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


class Once(argparse.Action):
    """Stores an option's value; refuses an option that is given twice, of which argparse would take
    the last one without a word."""

    filled: argparse.Namespace | None = None
    """The one in which it has stored last: each command line has one of its own."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Store the value, or end with exit code 2."""
        # what stands without an option is told by its place
        if option_string and self.filled is namespace:
            before = getattr(namespace, self.dest)
            parser.error(
                f"{option_string} is given twice, as {_told(before)} and as {_told(values)}; "
                "expected once: leave one out"
            )
        self.filled = namespace
        setattr(namespace, self.dest, values)


def _told(values: object) -> str:
    return " ".join(map(str, values)) if isinstance(values, list) else str(values)


class Parser(argparse.ArgumentParser):
    """One that refuses options with a value that are given twice, unless they append, and tells
    `parse_words` whose usage is to be shown. Its verbs have such parsers, too."""

    def __init__(self, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description)
        for kind in (None, "store"):
            self.register("action", kind, Once)
        self.set_defaults(own_parser=self)


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line whose overrides may stand before, between and after its options."""
    args, left = parser.parse_known_args(words)
    own: argparse.ArgumentParser = vars(args).pop("own_parser", parser)
    # argparse takes optional words at one place alone and hands the others back; those with a `=`
    # are overrides too, if the verb has any.
    for word in left:
        if not hasattr(args, "overrides"):
            own.error(f"unknown argument {word}; {own.prog} has no such option or word")
        if word.startswith("-") or "=" not in word:
            own.error(f"unknown argument {word}; settings are given as section.key=value")
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
