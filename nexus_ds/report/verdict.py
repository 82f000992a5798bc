"""Before and after: what a change of a mixture did to each domain's text, as a table with a verdict for each.

The numbers are perplexities of two models on the same windows (`nexus_ds.model.trial`). The noise of such a pair is far
below that of either number, since both models read the same words.
Not covered: noise measured for the very pair (score more windows), tasks other than predicting text.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_ds.errors import ConfigError
from nexus_ds.report.page import Cell, Table, text_table

SAME = 0.01  # largest change of perplexity, in either direction, that is called the same
EXIT_WORSE = 3  # 1 is a mistake, 2 argparse's
WINDOWS = 48
ALL = "all"


def add_limit(parser: argparse.ArgumentParser, written: str) -> None:
    """Declare --fail-if-worse; `written` says what is there all the same."""
    parser.add_argument(
        "--fail-if-worse",
        metavar="X%",
        dest="limit",
        help=f"exit with {EXIT_WORSE} if the perplexity of a domain rises by more than this, e.g. 3%%; {written} is "
        "written all the same",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `remove` and `extend` share."""
    parser.add_argument(
        "--scored", metavar="A,B", default="", help="domains of the table (default: those of all experts, old and new)"
    )
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, metavar="N", help="windows of validation text per domain (%(default)s)"
    )
    add_limit(parser, "the checkpoint")


def parse_limit(text: str | None) -> float | None:
    """Return the share that --fail-if-worse allows: 0.03 for 3%; ConfigError for anything else than a percentage."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        raise ConfigError(f"--fail-if-worse {text!r}: expected a percentage such as 3%")
    return float(match[1]) / 100


def percent(change: float) -> str:
    """Return a change as people read it: 0.08 is +8.0 %."""
    return f"{100 * change:+.1f} %".replace("-0.0 %", "+0.0 %")


@dataclass(frozen=True)
class Change:
    """Perplexity of one domain's text before and after."""

    before: float
    after: float
    same: float
    """Largest change that is called the same."""

    @property
    def change(self) -> float:
        """Relative change of perplexity; above 0 is worse."""
        return self.after / self.before - 1.0

    @property
    def verdict(self) -> str:
        """Better, same or worse."""
        if abs(self.change) <= self.same:
            return "same"
        return "worse" if self.change > 0 else "better"


@dataclass(frozen=True)
class Verdict:
    """What a change did to every domain that was scored; `all` is e to the mean loss, each domain counting the same."""

    domains: dict[str, Change]
    all: Change
    limit: float | None

    @property
    def failed(self) -> list[str]:
        """Domains that are worse by more than the limit."""
        if self.limit is None:
            return []
        return [domain for domain, change in self.domains.items() if change.change > self.limit]

    def table(self, before: str = "before", after: str = "after") -> Table:
        """Return the table; `before` and `after` name the models."""
        rows: list[list[Cell]] = [
            [name, c.before, c.after, percent(c.change), c.verdict]
            for name, c in {**self.domains, ALL: self.all}.items()
        ]
        return Table(header=["perplexity of", before, after, "change", "verdict"], rows=rows)

    def text(self) -> str:
        """Return the table as lines for people."""
        return text_table(self.table())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        entries = {
            name: {"before": c.before, "after": c.after, "change": c.change, "verdict": c.verdict}
            for name, c in {**self.domains, ALL: self.all}.items()
        }
        mean = entries.pop(ALL)
        return {"domains": entries, "all": mean, "limit": self.limit, "failed": self.failed}

    def exit_code(self, verb: str, out: Path) -> int:
        """Return 0, or EXIT_WORSE with a line on stderr that names the domains which got too much worse."""
        if not self.failed or self.limit is None:
            return 0
        found = ", ".join(f"{domain} ({percent(self.domains[domain].change)})" for domain in self.failed)
        print(
            f"nexus-ds {verb}: worse than --fail-if-worse {100 * self.limit:g}% allows: {found}; {out} is written all the same",
            file=sys.stderr,
        )
        return EXIT_WORSE


def judge(before: Mapping[str, float], after: Mapping[str, float], limit: float | None = None) -> Verdict:
    """Compare losses (nats per token) by domain of two models on the same text.

    Args:
        before, after: for each domain the loss.
        limit: relative rise of a domain's perplexity that is still accepted; None: any.
    """
    same = SAME if limit is None else min(SAME, limit)
    changes = {d: Change(math.exp(before[d]), math.exp(after[d]), same) for d in before}
    means = [math.exp(sum(losses[d] for d in before) / len(before)) for losses in (before, after)]
    return Verdict(changes, Change(means[0], means[1], same), limit)
