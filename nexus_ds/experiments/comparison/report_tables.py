"""Tables of a comparison: contenders, domains, extensions, changed settings; one row a contender.

Results are the dictionary that `nexus-ds compare` writes as results.json: `contenders` and
`extensions` with what was measured for each seed, `domains` by role (old, pretraining, new,
scored). What is missing shows as a dash.

Not covered: judging the numbers (findings.py), drawing them (comparison.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nexus_ds.experiments.comparison.seed_figures import short_count
from nexus_ds.report.page import Cell, Spread, Table
from nexus_ds.report.paired import budgets_of, losses, measured, number, paired, seeds_of, spread

Entry = Mapping[str, Any]
REFERENCES = ("nexus", "nexus_context", "nexus_paper")
EXTENSION_REFERENCES = ("nexus_refit", "nexus_append", "nexus_contrastive", "nexus_zero_shot")


def label(entry: Entry) -> str:
    """Return the name that people read, with the changed setting if there is one."""
    name = str(entry.get("label") or entry["name"])
    return f"{name} [{entry['variant']}]" if entry.get("variant") else name


def methods_of(results: Entry, variant: str | None = "") -> list[Entry]:
    """Return the contenders of one variant that at least one seed measured (None: of all
    variants)."""
    found = [
        e
        for e in results.get("contenders") or []
        if variant is None or (e.get("variant") or "") == variant
    ]
    return [entry for entry in found if losses(entry, old_domains(results))]


def extensions_of(
    results: Entry, added: str | None = None, variant: str | None = ""
) -> list[Entry]:
    """Return the extensions of one variant (None: all) and one addition (None: all) that were
    measured."""
    found = [
        e
        for e in results.get("extensions") or []
        if variant is None or (e.get("variant") or "") == variant
    ]
    return [e for e in found if budgets_of([e]) and added in (None, str(e.get("added", "")))]


def additions(results: Entry) -> list[str]:
    """Return what was added, each once: 'github', 'github+legal' (together), 'github, then
    legal'."""
    return list(dict.fromkeys(str(e.get("added", "")) for e in extensions_of(results)))


def old_domains(results: Entry) -> list[str]:
    """Return the domains of the upcycled experts."""
    return list(results["domains"]["old"])


def new_domains(results: Entry, added: str) -> list[str]:
    """Return the domains of an addition: one, several together ('a+b') or one after another ('a,
    then b')."""
    known = set(results["domains"]["scored"])
    return (
        [added]
        if added in known
        else [name for part in added.split(", then ") for name in part.split("+")]
    )


def reference(entries: Sequence[Entry], names: Sequence[str] = REFERENCES) -> Entry | None:
    """Return the entry that the others are compared with: the first of `names` that is there."""
    found = {entry["name"]: entry for entry in reversed(entries)}
    return next((found[name] for name in names if name in found), None)


def unit_of(values: Iterable[float | None], largest: str) -> tuple[float, str]:
    """Return a power of 1000 and its letter that bring the largest value below 1000 (`largest`: the
    last letter)."""
    top = max((value for value in values if value), default=0.0)
    letters = "kMGTPEZ"[: "kMGTPEZ".index(largest) + 1]
    power = 0
    while top >= 1000 and power < len(letters):
        top, power = top / 1000, power + 1
    return 1000.0**power, letters[power - 1] if power else ""


def compute_of(entry: Entry, *path: str) -> float | None:
    """Return a number of the entry's compute: `training_flops`, or `parameters`, `active`."""
    value: Any = entry.get("compute") or {}
    for part in path:
        value = (value or {}).get(part)
    return number(value)


def flops_ratio(entry: Entry, other: Entry) -> float | None:
    """Return the training FLOPs of an entry as a multiple of another's."""
    mine, base = compute_of(entry, "training_flops"), compute_of(other, "training_flops")
    return mine / base if mine is not None and base else None


def _compute_columns(
    entries: Sequence[Entry], base: Entry | None
) -> tuple[list[str], dict[int, list[Cell]]]:
    """Return the heads and, by the entry's position, the cells of what each one costs."""
    flops, flops_unit = unit_of([compute_of(e, "training_flops") for e in entries], "Z")
    tokens, tokens_unit = unit_of([compute_of(e, "training_tokens") for e in entries], "G")
    sizes, sizes_unit = unit_of([compute_of(e, "parameters", "total") for e in entries], "G")
    head = [
        f"training {flops_unit}FLOP",
        f"× {base.get('label')}'s" if base else "×",
        f"{tokens_unit or ''} tokens",
        f"{sizes_unit or ''} active",
        f"{sizes_unit or ''} total",
        "seconds",
    ]

    def scaled(value: float | None, by: float) -> float | None:
        return None if value is None else value / by

    cells: dict[int, list[Cell]] = {}
    for position, entry in enumerate(entries):
        cells[position] = [
            scaled(compute_of(entry, "training_flops"), flops),
            flops_ratio(entry, base) if base else None,
            scaled(compute_of(entry, "training_tokens"), tokens),
            scaled(compute_of(entry, "parameters", "active"), sizes),
            scaled(compute_of(entry, "parameters", "total"), sizes),
            scaled(compute_of(entry, "seconds"), 1.0),
        ]
    return [part.strip() for part in head], cells


def quality_table(results: Entry) -> Table:
    """Return loss on the old domains, paired difference to Nexus, and cost of every contender."""
    entries, domains = methods_of(results), old_domains(results)
    base = reference(entries)
    compute_head, compute = _compute_columns(entries, base)
    name = base.get("label") if base else "the reference"
    header = [
        "contender",
        "loss, old domains",
        f"minus {name}",
        "seeds lower",
        "own share",
        "gate",
        *compute_head,
    ]
    rows: list[list[Cell]] = []
    for position, entry in enumerate(entries):
        own, gate = spread(measured(entry, "own_share"), 2), spread(measured(entry, "gate"), 2)
        rows.append(
            [
                label(entry),
                spread(losses(entry, domains)),
                *difference(
                    losses(entry, domains),
                    losses(base, domains) if base and base is not entry else {},
                ),
                own,
                gate,
                *compute[position],
            ]
        )
    return Table(header=header, rows=rows, best="min", only=["loss, old domains"])


def difference(values: Mapping[str, float], base: Mapping[str, float]) -> list[Cell]:
    """Return the cells of a paired difference: its spread, and in how many seeds it is below 0."""
    found = paired(values, base)
    return [found.spread, found.agreement] if found else [None, None]


def start_table(results: Entry) -> Table | None:
    """Return what each mixture is worth before it is trained, and after; None if nothing was scored
    before."""
    domains = old_domains(results)
    rows: list[list[Cell]] = []
    for entry in methods_of(results):
        before = {
            "seeds": {seed: value.get("untrained") for seed, value in seeds_of(entry).items()}
        }
        if losses(before, domains):
            parts = [
                cell
                for side in (before, entry)
                for cell in (spread(losses(side, domains)), spread(measured(side, "own_share"), 2))
            ]
            rows.append([label(entry), *parts])
    header = ["contender", "loss before", "own share before", "loss after", "own share after"]
    return (
        Table(header=header, rows=rows, best="min", only=["loss before", "loss after"])
        if rows
        else None
    )


def _perplexity(values: Mapping[str, float]) -> Spread | None:
    found = {seed: math.exp(min(700.0, value)) for seed, value in values.items()}
    mean = max(found.values(), default=0.0)
    return spread(found, 0 if mean >= 1000 else 1 if mean >= 10 else 2)


def _domain_heads(results: Entry) -> dict[str, str]:
    roles = {**dict.fromkeys(results["domains"].get("pretraining") or [], " (pretraining)")}
    roles |= dict.fromkeys(results["domains"].get("new") or [], " (new)")
    roles |= dict.fromkeys(old_domains(results), "")
    return {domain: f"{domain}{roles.get(domain, '')}" for domain in results["domains"]["scored"]}


def domain_table(results: Entry) -> Table:
    """Return perplexity by domain (paper Tables 2 and 3, perplexity in place of tasks)."""
    heads = _domain_heads(results)
    rows: list[list[Cell]] = [
        [label(entry), *[_perplexity(losses(entry, [domain])) for domain in heads]]
        for entry in methods_of(results)
    ]
    return Table(header=["contender", *heads.values()], rows=rows, best="min")


def task_table(results: Entry) -> Table | None:
    """Return scores by group of tasks (paper Tables 2 and 3) and their mean; None if no tasks were
    run."""
    entries = methods_of(results)
    groups = list(
        dict.fromkeys(
            g
            for entry in entries
            for seed in seeds_of(entry).values()
            for g in (seed.get("tasks") or {})
        )
    )
    if not groups:
        return None
    rows: list[list[Cell]] = []
    for entry in entries:
        scores = {seed: value.get("tasks") or {} for seed, value in seeds_of(entry).items()}
        columns = [
            {s: v for s, found in scores.items() if (v := number(found.get(group))) is not None}
            for group in groups
        ]
        whole = [seed for seed in scores if all(seed in column for column in columns)]
        mean = {seed: sum(column[seed] for column in columns) / len(columns) for seed in whole}
        rows.append([label(entry), *[spread(column, 1) for column in columns], spread(mean, 1)])
    return Table(header=["contender", *groups, "mean of the groups"], rows=rows, best="max")


def own_table(results: Entry) -> Table | None:
    """Return the share of each old domain's tokens at its own expert (paper Figure 9); None without
    routers."""
    domains = old_domains(results)
    rows: list[list[Cell]] = []
    for entry in methods_of(results, variant=None):
        shares = [
            {
                seed: share
                for seed, value in seeds_of(entry).items()
                if (share := number(((value.get("routing") or {}).get(domain) or {}).get(domain)))
                is not None
            }
            for domain in domains
        ]
        if any(shares):
            rows.append(
                [
                    label(entry),
                    *[spread(found, 2) for found in shares],
                    spread(measured(entry, "own_share"), 2),
                ]
            )
    return Table(header=["contender", *domains, "mean"], rows=rows, best="max") if rows else None


def _budget_heads(budgets: Sequence[str]) -> list[str]:
    return [
        f"after {short_count(float(budget))}" if float(budget) else "before finetune"
        for budget in budgets
    ]


def starting_losses(results: Entry, entry: Entry, domains: Sequence[str]) -> dict[str, float]:
    """Return the losses by seed of the mixture that an extension started from; empty if it was not
    measured."""
    name, variant = entry.get("starts_from"), entry.get("variant") or ""
    for wanted in dict.fromkeys((variant, "")):
        for candidate in results.get("contenders") or []:
            if candidate["name"] == name and (candidate.get("variant") or "") == wanted:
                return losses(candidate, domains)
    return {}


def extension_table(results: Entry, added: str, new: bool) -> Table:
    """Return the loss on the added (`new`) or the old domains before and after each budget (paper
    Figure 4)."""
    entries = extensions_of(results, added)
    domains, budgets = (
        new_domains(results, added) if new else old_domains(results),
        budgets_of(entries),
    )
    base, heads = reference(entries, EXTENSION_REFERENCES), _budget_heads(budgets)
    compute_head, compute = _compute_columns(entries, base)
    name = base.get("label") if base else "the reference"
    middle = [f"minus {name}", "seeds lower"]
    rows: list[list[Cell]] = []
    for position, entry in enumerate(entries):
        last = losses(entry, domains, budgets[-1])
        row: list[Cell] = [label(entry), spread(starting_losses(results, entry, domains))]
        row += [spread(losses(entry, domains, budget)) for budget in budgets]
        row += difference(
            last, losses(base, domains, budgets[-1]) if base and base is not entry else {}
        )
        rows.append(row + (compute[position][0:3:2] if new else []))
    header = ["extension", "mixture before", *heads, *middle, *(compute_head[0:3:2] if new else [])]
    return Table(header=header, rows=rows, best="min", only=heads)


def share_table(results: Entry, added: str) -> Table:
    """Return share (new domain's tokens at its expert), leak (old tokens there) and own share, by
    budget."""
    entries = extensions_of(results, added)
    budgets = budgets_of(entries)
    columns = [(key, budget) for key in ("share", "leak") for budget in budgets]
    columns += [("own_share", budget) for budget in dict.fromkeys((budgets[0], budgets[-1]))]
    header = [
        "extension",
        *[f"{key.replace('_', ' ')} at {short_count(float(budget))}" for key, budget in columns],
    ]
    rows: list[list[Cell]] = [
        [label(entry), *[spread(measured(entry, key, budget), 2) for key, budget in columns]]
        for entry in entries
    ]
    return Table(header=header, rows=rows)


def counterpart(results: Entry, entry: Entry) -> Entry | None:
    """Return the same contender or extension with the recipe as it stands."""
    kind = "extensions" if "added" in entry else "contenders"
    same = [
        e for e in results.get(kind) or [] if e["name"] == entry["name"] and not e.get("variant")
    ]
    return next((e for e in same if e.get("added") == entry.get("added")), None)


def variants_of(results: Entry) -> list[str]:
    """Return the names of the changed settings that were measured, in the recipe's order."""
    found = [
        e.get("variant") for e in [*methods_of(results, None), *extensions_of(results, None, None)]
    ]
    order = dict.fromkeys([*(results.get("variants") or {}), *found])
    return [name for name in order if name and name in found]


def variant_table(results: Entry) -> Table | None:
    """Return what each changed setting does to each contender (paper Figure 7); None without
    variants."""
    domains = old_domains(results)
    entries = sorted(
        (e for e in methods_of(results, None) if e["name"] in varied(results)),
        key=lambda e: list(varied(results)).index(e["name"]),
    )
    rows: list[list[Cell]] = []
    for entry in entries:
        same = counterpart(results, entry) if entry.get("variant") else None
        rows.append(
            [
                str(entry.get("variant") or "as the recipe stands"),
                str(entry.get("label") or entry["name"]),
                spread(losses(entry, domains)),
                *difference(losses(entry, domains), losses(same, domains) if same else {}),
                spread(measured(entry, "own_share"), 2),
                spread(measured(entry, "gate"), 2),
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
    return Table(header=header, rows=rows) if rows else None


def varied(results: Entry) -> dict[str, str]:
    """Return the contenders (name: label) that some variant changes."""
    return {
        e["name"]: str(e.get("label") or e["name"])
        for e in methods_of(results, None)
        if e.get("variant")
    }


def extension_variant_table(results: Entry) -> Table | None:
    """Return what each changed setting does to each extension; None if no variant has one."""
    rows: list[list[Cell]] = []
    for entry in (e for e in extensions_of(results, None, None) if e.get("variant")):
        same, budgets = counterpart(results, entry), budgets_of([entry])
        row: list[Cell] = [
            str(entry["variant"]),
            str(entry.get("label") or entry["name"]),
            str(entry.get("added")),
        ]
        for domains in (new_domains(results, str(entry["added"])), old_domains(results)):
            last = losses(entry, domains, budgets[-1])
            row += [
                spread(last),
                *difference(last, losses(same, domains, budgets[-1]) if same else {}),
            ]
        row += [spread(measured(entry, key, budgets[0]), 2) for key in ("share", "leak")]
        rows.append(row)
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
    return Table(header=header, rows=rows) if rows else None
