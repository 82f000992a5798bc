"""Tables of a comparison: methods, domains, extensions, changed settings; one row a method.

What is missing shows as a dash.

Not covered: judging the numbers (report_findings.py), drawing them (report_figures.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from nexus_ds.experiments.comparison.result_file import (
    ExtensionRow,
    MethodRow,
    Results,
    SeedScores,
    budgets_of,
    mean_losses,
    own_shares,
    present,
)
from nexus_ds.experiments.comparison.seed_figures import short_count
from nexus_ds.report.page import Cell, Spread, Table
from nexus_ds.report.paired import paired, spread

REFERENCES = ("nexus", "nexus_context", "nexus_paper")
EXTENSION_REFERENCES = ("nexus_refit", "nexus_append", "nexus_contrastive", "nexus_zero_shot")
LETTERS = "kMGTPEZ"
"""Of powers of 1000."""

AnyRow = TypeVar("AnyRow", MethodRow, ExtensionRow)


# Which rows ---------------------------------------------------------------------------------------


def methods_of(results: Results, variant: str | None = "") -> list[MethodRow]:
    """Return the methods of one variant that at least one seed measured (None: of all variants)."""
    rows = [row for row in results.methods if variant is None or row.variant == variant]
    return [row for row in rows if row.losses(results.domains.old)]


def extensions_of(
    results: Results, added: str | None = None, variant: str | None = ""
) -> list[ExtensionRow]:
    """Return the extensions that were measured, of one addition and one variant (None: of all)."""
    rows = [row for row in results.extensions if variant is None or row.variant == variant]
    return [row for row in rows if row.budgets and (added is None or row.added == added)]


def additions(results: Results) -> list[str]:
    """Return what was added, each once (`ExtensionRow.added`)."""
    return list(dict.fromkeys(row.added for row in extensions_of(results)))


def new_domains(results: Results, added: str) -> list[str]:
    """Return the domains of an addition, several together ('a+b') or in turn ('a, then b')."""
    # A domain's own name may have a plus in it.
    if added in results.domains.scored:
        return [added]
    turns = added.split(", then ")
    return [name for turn in turns for name in turn.split("+")]


def reference(rows: Sequence[AnyRow], names: Sequence[str]) -> AnyRow | None:
    """Return the row that the others are compared with: the first of `names` that is there."""
    # Backwards, so that of several rows of one name the first stays.
    found = {row.name: row for row in reversed(rows)}
    return next((found[name] for name in names if name in found), None)


def method_reference(rows: Sequence[MethodRow]) -> MethodRow | None:
    """Return the method that the others are compared with."""
    return reference(rows, REFERENCES)


def extension_reference(rows: Sequence[ExtensionRow]) -> ExtensionRow | None:
    """Return the extension that the others are compared with."""
    return reference(rows, EXTENSION_REFERENCES)


def counterpart(rows: Sequence[AnyRow], changed: AnyRow) -> AnyRow | None:
    """Return the same method or extension with the recipe as it stands."""
    same = (row for row in rows if not row.variant and row.unchanged == changed.unchanged)
    return next(same, None)


def variants_of(results: Results) -> list[str]:
    """Return the names of the changed settings that were measured, in the recipe's order."""
    measured = [row.variant for row in methods_of(results, variant=None)]
    measured += [row.variant for row in extensions_of(results, variant=None)]
    ordered = dict.fromkeys([*results.variants, *measured])
    return [name for name in ordered if name and name in measured]


def varied(results: Results) -> dict[str, str]:
    """Return the methods (name: label) that some variant changes."""
    rows = methods_of(results, variant=None)
    return {row.name: row.label for row in rows if row.variant}


# Cells --------------------------------------------------------------------------------------------


def unit_of(values: Iterable[float | None], largest: str) -> tuple[float, str]:
    """Return a power of 1000 and its letter that bring the largest value below 1000.

    `largest` is the last letter that may be used.
    """
    letters = LETTERS[: LETTERS.index(largest) + 1]
    top = max((value for value in values if value), default=0.0)
    power = 0
    while top >= 1000 and power < len(letters):
        top /= 1000
        power += 1
    return 1000.0**power, letters[power - 1] if power else ""


def flops_ratio(row: MethodRow | ExtensionRow, base: MethodRow | ExtensionRow) -> float | None:
    """Return the training FLOPs of a row as a multiple of another's."""
    mine, others = row.compute.training_flops, base.compute.training_flops
    return mine / others if mine is not None and others else None


def _compute_columns(
    rows: Sequence[AnyRow], base: AnyRow | None
) -> tuple[list[str], list[list[Cell]]]:
    """Return the heads and, for each row, the cells of what it cost."""
    costs = [row.compute for row in rows]
    flops, flops_unit = unit_of([cost.training_flops for cost in costs], "Z")
    tokens, tokens_unit = unit_of([cost.training_tokens for cost in costs], "G")
    sizes, sizes_unit = unit_of([cost.total for cost in costs], "G")
    heads = [
        f"training {flops_unit}FLOP",
        "×" if base is None else f"× {base.label}'s",
        f"{tokens_unit} tokens",
        f"{sizes_unit} active",
        f"{sizes_unit} total",
        "seconds",
    ]

    def scaled(value: float | None, unit: float) -> float | None:
        return None if value is None else value / unit

    cells: list[list[Cell]] = []
    for row in rows:
        cost = row.compute
        cells.append(
            [
                scaled(cost.training_flops, flops),
                None if base is None else flops_ratio(row, base),
                scaled(cost.training_tokens, tokens),
                scaled(cost.active, sizes),
                scaled(cost.total, sizes),
                scaled(cost.seconds, 1.0),
            ]
        )
    return [head.strip() for head in heads], cells


def difference(values: Mapping[str, float], base: Mapping[str, float]) -> list[Cell]:
    """Return the cells of a paired difference: its spread, and in how many seeds it is below 0."""
    found = paired(values, base)
    return [found.spread, found.agreement] if found else [None, None]


def _perplexity(losses: Mapping[str, float]) -> Spread | None:
    """Return perplexity over seeds, with as many decimals as its size deserves."""
    # below the largest float
    found = {seed: math.exp(min(700.0, loss)) for seed, loss in losses.items()}
    mean = max(found.values(), default=0.0)
    digits = 2
    if mean >= 10:
        digits = 1
    if mean >= 1000:
        digits = 0
    return spread(found, digits)


# Methods ------------------------------------------------------------------------------------------


def quality_table(results: Results) -> Table:
    """Return loss on the old domains, paired difference to Nexus, and cost of every method."""
    rows, old = methods_of(results), results.domains.old
    base = method_reference(rows)
    compute_heads, compute = _compute_columns(rows, base)
    header = [
        "contender",
        "loss, old domains",
        f"minus {base.label if base else 'the reference'}",
        "seeds lower",
        "own share",
        "gate",
        *compute_heads,
    ]
    lines: list[list[Cell]] = []
    for row, costs in zip(rows, compute, strict=True):
        losses = row.losses(old)
        compared_with = base.losses(old) if base and base is not row else {}
        own = spread(row.own_shares(), 2)
        gate = spread(row.gates(), 2)
        lines.append(
            [
                row.title,
                spread(losses),
                *difference(losses, compared_with),
                own,
                gate,
                *costs,
            ]
        )
    return Table(header=header, rows=lines, best="min", only=["loss, old domains"])


def start_table(results: Results) -> Table | None:
    """Return what each mixture is worth before it is trained, and after.

    None if nothing was scored before.
    """
    old = results.domains.old
    lines: list[list[Cell]] = []
    for row in methods_of(results):
        after = row.seeds
        before = {seed: scores.untrained for seed, scores in after.items() if scores.untrained}
        if not mean_losses(before, old):
            continue
        line: list[Cell] = [row.title]
        for side in (before, after):
            line += [spread(mean_losses(side, old)), spread(own_shares(side), 2)]
        lines.append(line)
    if not lines:
        return None
    header = ["contender", "loss before", "own share before", "loss after", "own share after"]
    return Table(header=header, rows=lines, best="min", only=["loss before", "loss after"])


def _domain_heads(results: Results) -> dict[str, str]:
    """Return the heads of the scored domains' columns, with the role of all but the old ones."""
    domains = results.domains
    # A domain of several roles is called by the last of these.
    roles = dict.fromkeys(domains.pretraining, " (pretraining)")
    roles |= dict.fromkeys(domains.new, " (new)")
    roles |= dict.fromkeys(domains.old, "")
    return {domain: domain + roles.get(domain, "") for domain in domains.scored}


def domain_table(results: Results) -> Table:
    """Return perplexity by domain (paper Tables 2 and 3, perplexity in place of tasks)."""
    heads = _domain_heads(results)
    lines: list[list[Cell]] = []
    for row in methods_of(results):
        lines.append([row.title, *[_perplexity(row.losses([domain])) for domain in heads]])
    return Table(header=["contender", *heads.values()], rows=lines, best="min")


def _groups_of(rows: Sequence[MethodRow]) -> list[str]:
    """Return the groups of tasks that some method was run on, each once."""
    groups: dict[str, None] = {}
    for row in rows:
        for scores in row.seeds.values():
            groups |= dict.fromkeys(scores.tasks or {})
    return list(groups)


def task_table(results: Results) -> Table | None:
    """Return scores by group of tasks (paper Tables 2 and 3) and their mean.

    None if no tasks were run.
    """
    rows = methods_of(results)
    groups = _groups_of(rows)
    if not groups:
        return None
    lines: list[list[Cell]] = []
    for row in rows:
        columns = [_group_scores(row.seeds, group) for group in groups]
        # A mean over some of the groups would be one over easier or harder tasks.
        whole = [seed for seed in row.seeds if all(seed in column for column in columns)]
        mean = {seed: sum(column[seed] for column in columns) / len(columns) for seed in whole}
        lines.append([row.title, *[spread(column, 1) for column in columns], spread(mean, 1)])
    return Table(header=["contender", *groups, "mean of the groups"], rows=lines, best="max")


def _group_scores(seeds: Mapping[str, SeedScores], group: str) -> dict[str, float]:
    return present({seed: (scores.tasks or {}).get(group) for seed, scores in seeds.items()})


def own_table(results: Results) -> Table | None:
    """Return the share of each old domain's tokens at its own expert (paper Figure 9).

    None without routers.
    """
    old = results.domains.old
    lines: list[list[Cell]] = []
    for row in methods_of(results, variant=None):
        shares = [_own_shares_of(row.seeds, domain) for domain in old]
        if any(shares):
            mean = spread(row.own_shares(), 2)
            lines.append([row.title, *[spread(found, 2) for found in shares], mean])
    if not lines:
        return None
    return Table(header=["contender", *old, "mean"], rows=lines, best="max")


def _own_shares_of(seeds: Mapping[str, SeedScores], domain: str) -> dict[str, float]:
    """Return the share of one domain's tokens at its own expert by seed."""
    routing = {seed: (scores.routing or {}).get(domain, {}) for seed, scores in seeds.items()}
    return present({seed: shares.get(domain) for seed, shares in routing.items()})


# Extensions ---------------------------------------------------------------------------------------


def _budget_heads(budgets: Sequence[str]) -> list[str]:
    heads = []
    for budget in budgets:
        tokens = float(budget)
        heads.append(f"after {short_count(tokens)}" if tokens else "before finetune")
    return heads


def starting_losses(
    results: Results, row: ExtensionRow, domains: Sequence[str]
) -> dict[str, float]:
    """Return the losses by seed of the mixture that an extension started from.

    Empty if it was not measured.
    """
    # A variant may change the extension alone; then the mixture is the recipe's.
    for variant in (row.variant, ""):
        for method in results.methods:
            if method.name == row.starts_from and method.variant == variant:
                return method.losses(domains)
    return {}


def extension_table(results: Results, added: str, new: bool) -> Table:
    """Return the loss before and after each budget (paper Figure 4).

    Args:
        results: with extensions by `added`.
        added: one addition (`ExtensionRow.added`).
        new: the loss on the added domains, with what the extension cost; else on the old ones.
    """
    rows = extensions_of(results, added)
    domains = new_domains(results, added) if new else results.domains.old
    budgets = budgets_of(rows)
    last = budgets[-1]
    base = extension_reference(rows)
    compute_heads, compute = _compute_columns(rows, base)
    shown_costs = (0, 2) if new else ()  # operations and tokens
    lines: list[list[Cell]] = []
    for row, costs in zip(rows, compute, strict=True):
        line: list[Cell] = [row.title, spread(starting_losses(results, row, domains))]
        line += [spread(row.losses(domains, budget)) for budget in budgets]
        compared_with = base.losses(domains, last) if base and base is not row else {}
        line += difference(row.losses(domains, last), compared_with)
        line += [costs[column] for column in shown_costs]
        lines.append(line)
    heads = _budget_heads(budgets)
    header = [
        "extension",
        "mixture before",
        *heads,
        f"minus {base.label if base else 'the reference'}",
        "seeds lower",
        *[compute_heads[column] for column in shown_costs],
    ]
    return Table(header=header, rows=lines, best="min", only=heads)


def share_table(results: Results, added: str) -> Table:
    """Return where tokens go, by budget.

    Share is that of the new domains' tokens at the new experts, leak that of the old domains'
    tokens there, own share that of the old domains' tokens at their own.
    """
    rows = extensions_of(results, added)
    budgets = budgets_of(rows)
    columns = [("share", ExtensionRow.shares, budget) for budget in budgets]
    columns += [("leak", ExtensionRow.leaks, budget) for budget in budgets]
    ends = dict.fromkeys((budgets[0], budgets[-1]))
    columns += [("own share", ExtensionRow.own_shares, budget) for budget in ends]
    heads = [f"{name} at {short_count(float(budget))}" for name, _, budget in columns]
    lines: list[list[Cell]] = []
    for row in rows:
        shares = [spread(shares_of(row, budget), 2) for _, shares_of, budget in columns]
        lines.append([row.title, *shares])
    return Table(header=["extension", *heads], rows=lines)


# Changed settings ---------------------------------------------------------------------------------


def variant_table(results: Results) -> Table | None:
    """Return what each changed setting does to each method (paper Figure 7).

    None without variants.
    """
    old = results.domains.old
    changed = list(varied(results))
    rows = [row for row in methods_of(results, variant=None) if row.name in changed]
    lines: list[list[Cell]] = []
    for row in sorted(rows, key=lambda row: changed.index(row.name)):
        same = counterpart(results.methods, row) if row.variant else None
        losses = row.losses(old)
        lines.append(
            [
                row.variant or "as the recipe stands",
                row.label,
                spread(losses),
                *difference(losses, same.losses(old) if same else {}),
                spread(row.own_shares(), 2),
                spread(row.gates(), 2),
            ]
        )
    header = [
        "setting",
        "contender",
        "loss, old domains",
        "minus the recipe",
        "seeds lower",
        "own share",
        "gate",
    ]
    return Table(header=header, rows=lines) if lines else None


def extension_variant_table(results: Results) -> Table | None:
    """Return what each changed setting does to each extension; None if no variant has one."""
    changed = [row for row in extensions_of(results, variant=None) if row.variant]
    lines: list[list[Cell]] = []
    for row in changed:
        same = counterpart(results.extensions, row)
        first, last = row.budgets[0], row.budgets[-1]
        line: list[Cell] = [row.variant, row.label, row.added]
        for domains in (new_domains(results, row.added), results.domains.old):
            losses = row.losses(domains, last)
            line.append(spread(losses))
            line += difference(losses, same.losses(domains, last) if same else {})
        line += [spread(row.shares(first), 2), spread(row.leaks(first), 2)]
        lines.append(line)
    header = [
        "setting",
        "extension",
        "added",
        "loss, new",
        "minus the recipe",
        "lower",
        "loss, old",
        "minus the recipe",
        "lower",
        "share before finetune",
        "leak before finetune",
    ]
    return Table(header=header, rows=lines) if lines else None
