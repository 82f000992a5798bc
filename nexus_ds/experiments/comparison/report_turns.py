"""Experts that are added one after another: what every domain's text costs after each of them.

Not covered: additions of one step; their tables have the budgets of that step (report_tables).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nexus_ds.experiments.comparison.report_tables import (
    extensions_of,
    perplexity,
    starting_losses,
)
from nexus_ds.experiments.comparison.result_file import ExtensionRow, Results, present
from nexus_ds.report.page import Cell, Table
from nexus_ds.report.paired import spread
from nexus_ds.report.verdict import relative

Losses = Mapping[str, float]
"""Nats per token, by seed."""


def _names(row: ExtensionRow) -> list[str]:
    """Return what was added, in order; empty where nothing followed anything."""
    longest = max(row.turns.values(), key=len, default=[])
    return [turn.added for turn in longest]


def _after(row: ExtensionRow, turn: int, domain: str) -> dict[str, float]:
    """Return a domain's loss by seed after the addition of this number."""
    found: dict[str, float | None] = {}
    for seed, turns in row.turns.items():
        # a file that was joined by hand may lack some
        if turn < len(turns):
            found[seed] = turns[turn].loss.get(domain)
    return present(found)


def _turn_of(names: Sequence[str], domain: str) -> int | None:
    """Return the number of the addition that brought a domain's expert; None for an old domain."""
    for number, name in enumerate(names):
        if domain in (name, *name.split("+")):
            return number
    return None


def forgotten(before: Losses, after: Losses) -> dict[str, float]:
    """Return by how many per cent perplexity has grown, by seed, of the seeds in both."""
    found = {}
    for seed, loss in after.items():
        if seed in before:
            found[seed] = 100 * relative(loss - before[seed])
    return found


def _lines(results: Results, row: ExtensionRow) -> list[list[Cell]]:
    """Return a line for each domain: perplexity before and after each addition, and forgetting."""
    names = _names(row)
    last = len(names) - 1
    lines: list[list[Cell]] = []
    for domain in results.domains.scored:
        start = starting_losses(results, row, [domain])
        line: list[Cell] = [row.title, domain, perplexity(start)]
        line += [perplexity(_after(row, turn, domain)) for turn in range(len(names))]
        own = _turn_of(names, domain)
        # of a new domain it begins with its own expert
        mark = start if own is None else _after(row, own, domain)
        lost = forgotten(mark, _after(row, last, domain))
        # the last one had no time to be forgotten
        line.append(None if own == last else spread(lost, 1, signed=True))
        lines.append(line)
    return lines


def turn_table(results: Results, added: str) -> Table | None:
    """Return what is forgotten where experts are added in turn, under every changed setting.

    Args:
        results: with extensions by `added`.
        added: one addition (`ExtensionRow.added`).

    Returns:
        A line a domain and extension: perplexity before, after each addition, and by how many per
        cent it has grown in the end, for a new domain since its own addition. None where nothing
        was added in turn.
    """
    rows = [row for row in extensions_of(results, added, variant=None) if _names(row)]
    if not rows:
        return None
    heads = [f"after {name}" for name in _names(rows[0])]
    header = ["extension", "domain", "mixture before", *heads, "forgotten, %"]
    lines: list[list[Cell]] = []
    for row in rows:
        lines += _lines(results, row)
    return Table(header=header, rows=lines)
