"""Tables of a comparison: methods, domains, extensions, changed settings; one row a method.

What is missing shows as a dash.

Not covered: judging the numbers (report_findings.py), drawing them (report_figures.py).
"""

from __future__ import annotations

import math
import statistics
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

# The package's own before the paper's: what is asked first is whether its defaults hold.
REFERENCES = ("nexus", "nexus_context", "nexus_paper")
EXTENSION_REFERENCES = (
    "nexus_refit",
    "nexus_append",
    "nexus_contrastive",
    "nexus_zero_shot",
)
DENSE = "union"
"""The dense model with the whole budget, which a mixture has to beat."""
UNCHANGED = "as the recipe stands"
LETTERS = "kMGTPEZ"
"""Of powers of 1000."""

AnyRow = TypeVar("AnyRow", MethodRow, ExtensionRow)


# Which rows ---------------------------------------------------------------------------------------


def methods_of(results: Results, variant: str | None = "") -> list[MethodRow]:
    """Return the methods of one variant that at least one seed measured (None: of all variants)."""
    old = results.domains.old
    found = []
    for row in results.methods:
        chosen = variant is None or row.variant == variant
        if chosen and row.losses(old):
            found.append(row)
    return found


def extensions_of(
    results: Results, added: str | None = None, variant: str | None = ""
) -> list[ExtensionRow]:
    """Return the extensions that were measured, of one addition and one variant (None: of all)."""
    found = []
    for row in results.extensions:
        chosen = variant is None or row.variant == variant
        same_addition = added is None or row.added == added
        # Without a budget its finetune left no validation: there is nothing to show.
        if chosen and same_addition and row.budgets:
            found.append(row)
    return found


def additions(results: Results) -> list[str]:
    """Return what was added, each once (`ExtensionRow.added`)."""
    return list(dict.fromkeys(row.added for row in extensions_of(results)))


def new_domains(results: Results, added: str) -> list[str]:
    """Return the domains of an addition, several together ('a+b') or in turn ('a, then b')."""
    # A domain's own name may have a plus in it.
    if added in results.domains.scored:
        return [added]
    names = []
    for turn in added.split(", then "):
        names += turn.split("+")
    return names


def reference(rows: Sequence[AnyRow], names: Sequence[str]) -> AnyRow | None:
    """Return the row that the others are compared with: the first of `names` that is there."""
    # Backwards, so that of several rows of one name the first stays.
    found = {row.name: row for row in reversed(rows)}
    there = [found[name] for name in names if name in found]
    return there[0] if there else None


def method_reference(rows: Sequence[MethodRow]) -> MethodRow | None:
    """Return the method that the others are compared with."""
    return reference(rows, REFERENCES)


def extension_reference(rows: Sequence[ExtensionRow]) -> ExtensionRow | None:
    """Return the extension that the others are compared with."""
    return reference(rows, EXTENSION_REFERENCES)


def counterpart(rows: Sequence[AnyRow], changed: AnyRow) -> AnyRow | None:
    """Return the same method or extension with the recipe as it stands."""
    for row in rows:
        if not row.variant and row.unchanged == changed.unchanged:
            return row
    return None


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
    mine = row.compute.training_flops
    others = base.compute.training_flops
    # The seed model was not trained here: it costs 0, and nothing is a multiple of that.
    if mine is None or not others:
        return None
    return mine / others


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _compute_columns(
    rows: Sequence[AnyRow], base: AnyRow | None
) -> tuple[list[str], list[list[Cell]]]:
    """Return the heads and, for each row, the cells of what it cost."""
    costs = [row.compute for row in rows]
    flops, flops_letter = unit_of([cost.training_flops for cost in costs], "Z")
    tokens, tokens_letter = unit_of([cost.training_tokens for cost in costs], "G")
    # One unit for both columns of sizes, so that active parameters are seen as a part of all.
    sizes, sizes_letter = unit_of([cost.total for cost in costs], "G")
    ratio_head = "×" if base is None else f"× {base.label}'s"
    heads = [
        f"training {flops_letter}FLOP",
        ratio_head,
        f"{tokens_letter} tokens",
        f"{sizes_letter} active",
        f"{sizes_letter} total",
        "seconds",
    ]
    cells: list[list[Cell]] = []
    for row, cost in zip(rows, costs, strict=True):
        line: list[Cell] = [_scaled(cost.training_flops, flops)]
        line.append(None if base is None else flops_ratio(row, base))
        line.append(_scaled(cost.training_tokens, tokens))
        line.append(_scaled(cost.active, sizes))
        line.append(_scaled(cost.total, sizes))
        line.append(_scaled(cost.seconds, 1.0))
        cells.append(line)
    # Below 1000 a unit has no letter, and its space is left over.
    return [head.strip() for head in heads], cells


def difference(values: Mapping[str, float], base: Mapping[str, float]) -> list[Cell]:
    """Return the cells of a paired difference: its spread, and in how many seeds it is below 0."""
    found = paired(values, base)
    if found is None:
        return [None, None]
    return [found.spread, found.agreement]


def _head_of_difference(base: AnyRow | None) -> str:
    return f"minus {base.label if base else 'the reference'}"


def perplexity(losses: Mapping[str, float]) -> Spread | None:
    """Return perplexity over seeds, with as many decimals as its size deserves."""
    found = {}
    for seed, loss in losses.items():
        # below the largest float
        found[seed] = math.exp(min(700.0, loss))
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
    old = results.domains.old
    rows = methods_of(results)
    base = method_reference(rows)
    compute_heads, compute = _compute_columns(rows, base)
    lines: list[list[Cell]] = []
    for row, costs in zip(rows, compute, strict=True):
        losses = row.losses(old)
        # To itself it has no difference: the cells stay empty.
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
    header = [
        "contender",
        "loss, old domains",
        _head_of_difference(base),
        "seeds lower",
        "own share",
        "gate",
        *compute_heads,
    ]
    # Of shares, gates and costs neither the lowest nor the highest is the best.
    return Table(
        header=header,
        rows=lines,
        best="min",
        only=["loss, old domains"],
    )


def start_table(results: Results) -> Table | None:
    """Return what each mixture is worth before it is trained, and after.

    None if nothing was scored before.
    """
    old = results.domains.old
    lines: list[list[Cell]] = []
    for row in methods_of(results):
        after = row.seeds
        before = {seed: scores.untrained for seed, scores in after.items() if scores.untrained}
        # What was never trained, a mean of models say, has no before.
        if not mean_losses(before, old):
            continue
        line: list[Cell] = [row.title]
        for side in (before, after):
            losses = mean_losses(side, old)
            shares = own_shares(side)
            line += [spread(losses), spread(shares, 2)]
        lines.append(line)
    if not lines:
        return None
    header = ["contender", "loss before", "own share before", "loss after", "own share after"]
    return Table(
        header=header,
        rows=lines,
        best="min",
        only=["loss before", "loss after"],
    )


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
        line: list[Cell] = [row.title]
        for domain in heads:
            losses = row.losses([domain])
            line.append(perplexity(losses))
        lines.append(line)
    return Table(
        header=["contender", *heads.values()],
        rows=lines,
        best="min",
    )


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
        line: list[Cell] = [row.title]
        line += [spread(column, 1) for column in columns]
        line.append(spread(_means_of(columns), 1))
        lines.append(line)
    return Table(
        header=["contender", *groups, "mean of the groups"],
        rows=lines,
        best="max",
    )


def _means_of(columns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over columns by seed."""
    means = {}
    for seed in columns[0]:
        # A mean over some of the groups would be one over easier or harder tasks.
        if all(seed in column for column in columns):
            scores = [column[seed] for column in columns]
            means[seed] = sum(scores) / len(scores)
    return means


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
        # A dense model sends its tokens nowhere.
        if not any(shares):
            continue
        line: list[Cell] = [row.title]
        line += [spread(found, 2) for found in shares]
        line.append(spread(row.own_shares(), 2))
        lines.append(line)
    if not lines:
        return None
    return Table(
        header=["contender", *old, "mean"],
        rows=lines,
        best="max",
    )


def _own_shares_of(seeds: Mapping[str, SeedScores], domain: str) -> dict[str, float]:
    """Return the share of one domain's tokens at its own expert by seed."""
    found: dict[str, float | None] = {}
    for seed, scores in seeds.items():
        routing = scores.routing or {}
        # An expert is called as its domain.
        found[seed] = routing.get(domain, {}).get(domain)
    return present(found)


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
    # Operations and tokens, once: the table of the old domains stands beside that of the new ones.
    shown_costs = (0, 2) if new else ()
    lines: list[list[Cell]] = []
    for row, costs in zip(rows, compute, strict=True):
        start = starting_losses(results, row, domains)
        line: list[Cell] = [row.title, spread(start)]
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
        _head_of_difference(base),
        "seeds lower",
        *[compute_heads[column] for column in shown_costs],
    ]
    return Table(
        header=header,
        rows=lines,
        best="min",
        only=heads,
    )


def share_table(results: Results, added: str) -> Table:
    """Return where tokens go, by budget.

    Share is that of the new domains' tokens at the new experts, leak that of the old domains'
    tokens there, own share that of the old domains' tokens at their own.
    """
    rows = extensions_of(results, added)
    budgets = budgets_of(rows)
    # The three stand side by side: what a new expert gets is worth little if the others lose it.
    columns = [("share", ExtensionRow.shares, budget) for budget in budgets]
    columns += [("leak", ExtensionRow.leaks, budget) for budget in budgets]
    # Of one budget, both ends are the same.
    ends = dict.fromkeys((budgets[0], budgets[-1]))
    columns += [("own share", ExtensionRow.own_shares, budget) for budget in ends]
    heads = [f"{name} at {short_count(float(budget))}" for name, _, budget in columns]
    lines: list[list[Cell]] = []
    for row in rows:
        shares = [spread(shares_of(row, budget), 2) for _, shares_of, budget in columns]
        lines.append([row.title, *shares])
    return Table(header=["extension", *heads], rows=lines)


# Changed settings ---------------------------------------------------------------------------------

VARIANT_HEAD = [
    "setting",
    "contender",
    "loss, old domains",
    "minus the recipe",
    "seeds lower",
    "own share",
    "gate",
]
EXTENSION_VARIANT_HEAD = [
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


def variant_table(results: Results) -> Table | None:
    """Return what each changed setting does to each method (paper Figure 7).

    None without variants.
    """
    old = results.domains.old
    changed = list(varied(results))
    rows = [row for row in methods_of(results, variant=None) if row.name in changed]
    lines: list[list[Cell]] = []
    # All rows of one method together, its unchanged one among them.
    for row in sorted(rows, key=lambda row: changed.index(row.name)):
        same = counterpart(results.methods, row) if row.variant else None
        losses = row.losses(old)
        unchanged = same.losses(old) if same else {}
        lines.append(
            [
                row.variant or UNCHANGED,
                row.label,
                spread(losses),
                *difference(losses, unchanged),
                spread(row.own_shares(), 2),
                spread(row.gates(), 2),
            ]
        )
    return Table(header=VARIANT_HEAD, rows=lines) if lines else None


def _best_rows(rows: Iterable[MethodRow], old: Sequence[str]) -> dict[str, MethodRow]:
    """Return every method's row with the lowest mean loss, by name, in the order of `rows`."""
    best: dict[str, MethodRow] = {}
    lowest: dict[str, float] = {}
    for row in rows:
        mean = statistics.fmean(row.losses(old).values())
        if mean < lowest.get(row.name, math.inf):
            lowest[row.name] = mean
            best[row.name] = row
    return best


def result_table(results: Results) -> Table | None:
    """Return every method at the setting that is best for it, against dense training at its best.

    Of the seed as it stands, where variants have others. So a learning rate, say, is tuned alike
    for all. Without branches, each of which serves one domain; None without methods.
    """
    old = results.domains.old
    rows = methods_of(results, variant=None)
    kept = [row for row in rows if same_seed(results, row.variant)]
    best = [row for name, row in _best_rows(kept, old).items() if name[:7] != "branch "]
    best.sort(key=lambda row: -statistics.fmean(row.losses(old).values()))
    dense = reference(best, (DENSE,))
    sizes, letter = unit_of([row.compute.total for row in best], "G")
    lines: list[list[Cell]] = []
    for row in best:
        losses = row.losses(old)
        compared_with = dense.losses(old) if dense and dense is not row else {}
        setting = row.variant or UNCHANGED
        line: list[Cell] = [row.label, setting, spread(losses), *difference(losses, compared_with)]
        line += [_scaled(row.compute.active, sizes), _scaled(row.compute.total, sizes)]
        lines.append(line)
    header = [
        "contender",
        "its best setting",
        "loss, old domains",
        _head_of_difference(dense),
        "seeds lower",
        f"{letter} active",
        f"{letter} total",
    ]
    return Table(header=header, rows=lines) if lines else None


def same_seed(results: Results, variant: str) -> bool:
    """Return whether a variant's seed model has read as much as the recipe's own."""
    tokens = results.seed_tokens
    return tokens.get(variant) == tokens.get("")


def regimes(results: Results) -> dict[float, list[MethodRow]]:
    """Return every method at its best, by the tokens a parameter that the seed model has read.

    Fewest first; settings that leave the seed alone count as one. Empty if all have read the same:
    then there is nothing to set side by side.
    """
    rows = methods_of(results, variant=None)
    seed = reference(rows, ("seed",))
    if seed is None or not seed.compute.total:
        return {}
    by_tokens: dict[int, list[MethodRow]] = {}
    for row in rows:
        tokens = results.seed_tokens.get(row.variant)
        if tokens:
            by_tokens.setdefault(tokens, []).append(row)
    if len(by_tokens) < 2:
        return {}
    found = {}
    for tokens, same in sorted(by_tokens.items()):
        best = _best_rows(same, results.domains.old)
        found[tokens / seed.compute.total] = list(best.values())
    return found


def regime_table(results: Results) -> Table | None:
    """Return each method's loss minus dense training's, by how long the seed model was trained."""
    old = results.domains.old
    lines: list[list[Cell]] = []
    for tokens, rows in regimes(results).items():
        dense = reference(rows, (DENSE,))
        for row in rows:
            losses = row.losses(old)
            compared_with = dense.losses(old) if dense and dense is not row else {}
            setting = row.variant or UNCHANGED
            found = difference(losses, compared_with)
            lines.append([round(tokens, 1), row.label, setting, spread(losses), *found])
    header = [
        "tokens a parameter",
        "contender",
        "its best setting",
        "loss, old domains",
        "minus dense",
        "seeds lower",
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
            unchanged = same.losses(domains, last) if same else {}
            line.append(spread(losses))
            line += difference(losses, unchanged)
        line.append(spread(row.shares(first), 2))
        line.append(spread(row.leaks(first), 2))
        lines.append(line)
    return Table(header=EXTENSION_VARIANT_HEAD, rows=lines) if lines else None
