"""Before and after: what a change of a mixture did to each domain's text, as a table with a verdict
for each.

The numbers are perplexities of two models on the same windows (`nexus_ds.evaluation.before_after`).
Both models read the same words, so what counts is the difference window by window; its standard
error stands beside it (`report.paired` has the assumptions).

A domain is the same within SAME or within the interval of the difference, whichever is wider. A
limit fails where all of the interval lies above it, so that a model which keeps to the limit is not
failed by an unlucky choice of windows; where the limit lies inside the interval, the windows do not
decide: that passes, and is said with the number of windows that would.

The interval is that of one domain: of many that have not changed, one in forty is called worse by
chance.

Not covered: tasks other than predicting text, another seed's training.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from types import MappingProxyType
from typing import TYPE_CHECKING

from nexus_ds.checkpoint.needs import WINDOWS
from nexus_ds.errors import ConfigError
from nexus_ds.progress import say
from nexus_ds.report.page import Cell, Spread, Table, text_table
from nexus_ds.report.paired import (
    CONFIDENCE,
    Difference,
    mean_difference,
    mean_loss,
    number,
    over_windows,
    quantile,
)

if TYPE_CHECKING:
    from nexus_ds.report.paired import Values

SAME = 0.01  # change of perplexity, in either direction, that is called the same however sure it is
EXIT_WORSE = 3  # 1 is a mistake, 2 argparse's
FURTHEST = 100  # times as many windows: what needs more is too near to the limit to be told
# chance with which the advised number of windows decides, if the change is as it was estimated
POWER = 0.8
ALL = "all"
NO_CHATS: Mapping[str, Values] = MappingProxyType({})


def add_limit(parser: argparse.ArgumentParser, written: str) -> None:
    """Declare --fail-if-worse; `written` says what is there all the same."""
    parser.add_argument(
        "--fail-if-worse",
        metavar="X%",
        dest="limit",
        help=f"exit with {EXIT_WORSE} if the perplexity of a domain rises by more than this, "
        f"e.g. 3%%, and by more than chance: all of the {100 * CONFIDENCE:.0f}%% interval of the "
        "rise, window by window, lies above it; what the windows do not decide passes, with a line "
        f"that says how many would; {written} is written all the same",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `remove` and `extend` share."""
    parser.add_argument(
        "--scored",
        metavar="A,B",
        default="",
        help="domains of the table (default: those of all experts, old and new)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=WINDOWS,
        metavar="N",
        help="windows of validation text per domain (%(default)s)",
    )
    add_limit(parser, "the checkpoint")


def parse_limit(text: str | None) -> float | None:
    """Return the share that --fail-if-worse allows: 0.03 for 3%.

    Raises:
        ConfigError: anything else than a percentage.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        raise ConfigError(f"--fail-if-worse {text!r}: expected a percentage such as 3%")
    return float(match[1]) / 100


def percent(change: float, error: float = math.nan) -> str:
    """Return a change as people read it: 0.08 is +8.0 %, or +8.0 ± 0.5 % with a standard error."""
    # Rounded to nothing, a change has no direction to warn of; a model that has diverged may have
    # three hundred digits.
    shown = f"{100 * change:{'+.1f' if change < 1e6 else '+.2g'}}".replace("-0.0", "+0.0")
    return f"{shown} %" if math.isnan(error) else f"{shown} ± {100 * error:.1f} %"


def relative(nats: float) -> float:
    """Return the relative change of perplexity that a change of loss is, below the largest float,
    as perplexities are."""
    return math.expm1(min(700.0, nats))


@dataclass(frozen=True)
class Change:
    """One domain's text before and after."""

    before: float
    """Perplexity."""
    after: float
    difference: Difference
    """Of the losses window by window, in nats per token."""
    same: float
    """Largest change that is called the same however sure it is."""

    @property
    def change(self) -> float:
        """Relative change of perplexity; above 0 is worse."""
        # Perplexity is e^loss, so the ratio is e^difference.
        return relative(self.difference.mean)

    @property
    def error(self) -> float:
        """Standard error of `change`; NaN for one window."""
        # The delta method: the derivative of e^x - 1 is e^x.
        return (1.0 + self.change) * self.difference.error

    @property
    def interval(self) -> tuple[float, float]:
        """Where the change lies with CONFIDENCE; all above -1 for one window."""
        # That of the loss, carried over: around the ratio itself it would not be symmetric.
        mean = self.difference.mean
        noise = self.difference.noise
        return relative(mean - noise), relative(mean + noise)

    @property
    def verdict(self) -> str:
        """Better, same, worse, or open: one window alone tells nothing about its noise."""
        if self.difference.freedom == 0:
            return "open"
        too_small = abs(self.change) <= self.same
        in_the_noise = abs(self.difference.mean) <= self.difference.noise
        if too_small or in_the_noise:
            return "same"
        return "worse" if self.change > 0 else "better"

    def exceeds(self, limit: float) -> bool:
        """Whether the change is above `limit` beyond the noise."""
        return self.interval[0] > limit

    def undecided(self, limit: float) -> bool:
        """Whether the noise leaves open on which side of `limit` the change is."""
        return not self.exceeds(limit) and self.interval[1] > limit

    def shown(self) -> str:
        """Return the change with its standard error."""
        return percent(self.change, self.error)

    def as_dict(self) -> dict[str, object]:
        """Return all of it as JSON; null where one window has no error."""
        low, high = self.interval
        return {
            "before": self.before,
            "after": self.after,
            "change": self.change,
            "change_error": number(self.error),
            "interval": [low, high] if math.isfinite(self.difference.noise) else None,
            "nats": self.difference.mean,
            "nats_error": number(self.difference.error),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Verdict:
    """What a change did to every domain that was scored."""

    domains: dict[str, Change]
    all: Change
    """Of the mean of the losses, each domain counting the same."""
    limit: float | None
    windows: int
    """Of the domain that has fewest."""

    @property
    def failed(self) -> list[str]:
        """Domains that are worse by more than the limit, beyond the noise."""
        if self.limit is None:
            return []
        return [name for name, change in self.domains.items() if change.exceeds(self.limit)]

    @property
    def undecided(self) -> list[str]:
        """Domains of which these windows do not tell on which side of the limit they are."""
        if self.limit is None:
            return []
        return [name for name, change in self.domains.items() if change.undecided(self.limit)]

    @property
    def coarse(self) -> list[str]:
        """Domains that are called the same though a larger change could drown in the noise.

        None with a limit: then that is what the windows have to decide.
        """
        if self.limit is not None:
            return []
        found = []
        for name, change in self.domains.items():
            # Noise is in nats, so the bound has to be as well.
            bound = math.log1p(change.same)
            if change.verdict == "same" and change.difference.noise > bound:
                found.append(name)
        return found

    def _listed(self, domains: Sequence[str]) -> str:
        return ", ".join(f"{domain} ({self.domains[domain].shown()})" for domain in domains)

    def _enough(self, gaps: Mapping[str, float], power: float = 0.5) -> str:
        """Return in words how many windows bring each domain's noise below its gap.

        The standard error falls with the root of the windows, so ((t + z) * error / gap)² times as
        many are needed: t is the interval's quantile, z that of the normal distribution at `power`
        (0 at a half), as in any sample size.

        Args:
            gaps: nats per token, by domain.
            power: chance that so many windows decide, if the change is as it was estimated.
        """
        z = NormalDist().inv_cdf(power)
        times = []
        for domain, gap in gaps.items():
            difference = self.domains[domain].difference
            reach = (quantile(difference.freedom) + z) * difference.error
            # A change right at the limit is on neither side of it, with any number of windows.
            times.append((reach / gap) ** 2 if gap else math.inf)
        if max(times) > FURTHEST:
            return f"not even {FURTHEST} times as many windows"
        windows = _rounded(self.windows * max(times))
        return f"about {windows:,} windows a domain (--windows) of that much more text"

    def notes(self) -> list[str]:
        """Return a line on what the windows leave open; none where all is decided."""
        if self.windows < 2:
            return [
                "one window has no standard error, so nothing is called better or worse; "
                f"give --windows {WINDOWS}"
            ]
        if self.coarse:
            gaps = {name: math.log1p(self.domains[name].same) for name in self.coarse}
            return [
                f"the same as far as {self.windows} windows can tell: {self._listed(self.coarse)}; "
                f"{self._enough(gaps)} would show a change of {100 * SAME:g} %"
            ]
        if self.limit is not None and self.undecided:
            limit = math.log1p(self.limit)
            means = {name: self.domains[name].difference.mean for name in self.undecided}
            gaps = {name: abs(mean - limit) for name, mean in means.items()}
            return [
                f"{self.windows} windows do not decide --fail-if-worse {100 * self.limit:g}% for "
                f"{self._listed(self.undecided)}, so that passes; {self._enough(gaps, POWER)} would"
            ]
        return []

    def table(self, before: str = "before", after: str = "after") -> Table:
        """Return the table; `before` and `after` name the models, ± is one standard error."""
        rows: list[list[Cell]] = []
        for name, change in {**self.domains, ALL: self.all}.items():
            line: list[Cell] = [name, change.before, change.after]
            line += [change.shown(), _nats(change.difference), change.verdict]
            rows.append(line)
        return Table(
            header=["perplexity of", before, after, "change", "in nats", "verdict"], rows=rows
        )

    def text(self) -> str:
        """Return the table as lines for people."""
        # With a limit `exit_code` prints the notes, to stderr.
        notes = self.notes() if self.limit is None else []
        return "\n".join([text_table(self.table()), *notes])

    def as_dict(self) -> dict[str, object]:
        """Return all of it as JSON."""
        domains = {name: change.as_dict() for name, change in self.domains.items()}
        return {
            "domains": domains,
            "all": self.all.as_dict(),
            "limit": self.limit,
            "failed": self.failed,
            "undecided": self.undecided,
            "windows": self.windows,
            "notes": self.notes(),
        }

    def exit_code(self, verb: str, out: Path) -> int:
        """Return 0, or EXIT_WORSE with a line on stderr about the domains that got too much worse.

        With a limit, a line on stderr also says what the windows leave open.
        """
        if self.limit is None:
            return 0
        for note in self.notes():
            say(f"nexus-ds {verb}: {note}")
        if not self.failed:
            return 0
        say(
            f"nexus-ds {verb}: worse than --fail-if-worse {100 * self.limit:g}% allows: "
            f"{self._listed(self.failed)}; {out} is written all the same"
        )
        return EXIT_WORSE


def _rounded(count: float) -> int:
    """Return a count rounded up to two significant digits."""
    step = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return math.ceil(count / step) * step


def _nats(difference: Difference) -> Spread:
    return Spread(difference.mean, number(difference.error), signed=True)


def _perplexity(losses: Sequence[float]) -> float:
    """Return e to the mean of the domains' losses, below the largest float."""
    return math.exp(min(700.0, fmean(losses)))


def judge(
    before: Mapping[str, Values],
    after: Mapping[str, Values],
    limit: float | None = None,
    labels: Mapping[str, Values] = NO_CHATS,
) -> Verdict:
    """Compare losses (nats per token) by domain of two models on the same windows of text.

    Args:
        before, after: for each domain the loss of every window, in the same order, at least one; as
            many in each domain.
        limit: relative rise of a domain's perplexity that is still accepted; None: any.
        labels: of domains with chats the answer tokens of every window, by which it counts.
    """
    # Nothing is called the same that a stricter limit would fail.
    same = SAME if limit is None else min(SAME, limit)
    changes = {}
    losses = []
    new_losses = []
    for domain, loss_W in before.items():
        labels_W = labels.get(domain)
        losses.append(mean_loss(loss_W, labels_W))
        new_losses.append(mean_loss(after[domain], labels_W))
        changes[domain] = Change(
            before=_perplexity(losses[-1:]),
            after=_perplexity(new_losses[-1:]),
            difference=over_windows(loss_W, after[domain], labels_W),
            same=same,
        )
    whole = Change(
        before=_perplexity(losses),
        after=_perplexity(new_losses),
        difference=mean_difference([change.difference for change in changes.values()]),
        same=same,
    )
    return Verdict(changes, whole, limit, min(len(loss_W) for loss_W in before.values()))
