"""What a comparison found, in sentences that say no more than its numbers.

A difference is called (better, worse) if at least three seeds have it with one sign and its mean is
at least 0.01 nats; with fewer seeds it is reported as seen (lower, higher), and everything else as
not told apart.

Not covered: advice; the reader sees the cost of each contender beside the finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nexus_ds.experiments.comparison.report_tables import (
    EXTENSION_REFERENCES,
    additions,
    counterpart,
    extensions_of,
    flops_ratio,
    label,
    methods_of,
    new_domains,
    old_domains,
    reference,
    variants_of,
)
from nexus_ds.experiments.comparison.seed_figures import short_count
from nexus_ds.report.page import Spread
from nexus_ds.report.paired import (
    ENOUGH,
    LEAST,
    Paired,
    budgets_of,
    losses,
    measured,
    paired,
    spread,
)

Entry = Mapping[str, Any]
WORDS = {
    "better": "better than",
    "worse": "worse than",
    "lower": "lower (in {seeds}, too few to call it better) than",
    "higher": "higher (in {seeds}, too few to call it worse) than",
    "open": "not told apart from",
}
HEADLINE = ("linear", "linear_fit", "union", "btx")
"""Rivals whose differences are spelt out: the paper's baseline, the same with our warm start, the
dense alternative, BTX."""
SMALL_ZERO_SHOT = "nexus_append", "nexus_zero_shot"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _level(values: Mapping[str, float]) -> str:
    found = spread(values)
    deviation = "mean ± standard deviation over " if len(values) > 1 else "from "
    return f"{found} nats per token ({deviation}{_seeds(len(values))})"


def _amount(found: Paired) -> str:
    """Return the size of a difference without its sign, with its deviation."""
    return str(Spread(abs(found.spread.mean), found.spread.deviation))


def _signed(found: Paired) -> str:
    return (
        f"{found.spread}, lower in {found.agreement} seeds"
        if len(found.by_seed) > 1
        else str(found.spread)
    )


def grouped(differences: Mapping[str, Paired], extra: Mapping[str, str] | None = None) -> str:
    """Return 'better than A (0.90 ± 0.01), B (…); not told apart from C (…)', best news first.

    Args:
        differences: the reference minus each rival, by the rival's label.
        extra: what to add in a rival's parentheses, such as its compute.
    """
    parts = []
    for outcome, words in WORDS.items():
        found = {name: value for name, value in differences.items() if value.outcome == outcome}
        if not found:
            continue
        listed = []
        for name, value in found.items():
            size = _signed(value) if outcome == "open" else f"by {_amount(value)}"
            listed.append(f"{name} ({size}{(extra or {}).get(name, '')})")
        most = max(len(value.by_seed) for value in found.values())
        parts.append(f"{words.format(seeds=_seeds(most))} {', '.join(listed)}")
    return "; ".join(parts)


def _against(
    entries: Sequence[Entry], base: Entry, domains: Sequence[str], budget: str | None = None
) -> dict[str, Paired]:
    """Return `base` minus each other entry, by label."""
    mine = losses(base, domains, budget)
    found = {label(e): paired(mine, losses(e, domains, budget)) for e in entries if e is not base}
    return {name: value for name, value in found.items() if value is not None}


def _cost(entry: Entry, base: Entry) -> str:
    """Return what a rival's training cost relative to `base`, where it differs by more than a
    tenth."""
    ratio = flops_ratio(entry, base)
    if ratio is None or 0.9 <= ratio <= 1.1:
        return ""
    return f"; {ratio:.2g} × the training" if ratio else "; no further training"


def _upcycling(results: Entry) -> list[str]:
    # A branch serves its own domain; its loss over all of them is in the tables and makes no
    # finding.
    entries = [entry for entry in methods_of(results) if not entry["name"].startswith("branch")]
    domains, base = old_domains(results), reference(entries)
    if base is None:
        return ["No Nexus mixture was measured, so nothing is said about upcycling."]
    differences = _against(entries, base, domains)
    name = label(base)
    opening = f"{name} reaches {_level(losses(base, domains))} on the {len(domains)} domains of its experts."
    if not differences:
        return [f"Upcycling: {opening} Nothing was measured to compare it with."]
    costs = {label(entry): _cost(entry, base) for entry in entries}
    first = {label(e) for e in entries if e["name"] in HEADLINE}
    main = grouped({k: v for k, v in differences.items() if k in first}, costs)
    others = grouped({k: v for k, v in differences.items() if k not in first}, costs)
    sentences = [f"Upcycling: {opening} It is {main}." if main else f"Upcycling: {opening}"]
    return [*sentences, f"{name} is {others}."] if others else sentences


def _extension(results: Entry, added: str) -> list[str]:
    entries = extensions_of(results, added)
    base = reference(entries, EXTENSION_REFERENCES)
    if base is None:
        return [f"Adding {added}: no Nexus extension was measured."]
    budget = budgets_of(entries)[-1]
    when = (
        f"after {short_count(float(budget))} tokens of finetuning"
        if float(budget)
        else "without finetuning"
    )
    sentences = []
    for what, domains in (
        ("the new domain", new_domains(results, added)),
        ("the old domains", old_domains(results)),
    ):
        mine = losses(base, domains, budget)
        if not mine:
            continue
        found = grouped(_against(entries, base, domains, budget))
        text = f"Adding {added}, {what} {when}: {label(base)} reaches {_level(mine)}"
        sentences.append(f"{text}; it is {found}." if found else f"{text}.")
    return [*sentences, *_found_at_once(entries, added)]


def _found_at_once(entries: Sequence[Entry], added: str) -> list[str]:
    """Say where the new domain's tokens go when its row is P of the domain embedding and nothing
    else."""
    sentences = []
    for entry in entries:
        share, leak = (
            spread(measured(entry, "share", "0"), 2),
            spread(measured(entry, "leak", "0"), 2),
        )
        if entry["name"] in SMALL_ZERO_SHOT and share is not None:
            tail = f" and {leak} of the old domains' tokens" if leak is not None else ""
            sentences.append(
                f"{label(entry)}, before any finetuning: {share} of {added}'s tokens{tail} go to the new expert."
            )
    return sentences


def _variants(results: Entry) -> list[str]:
    """Say which changed settings move the Nexus mixture's loss."""
    found: dict[str, Paired] = {}
    for variant in variants_of(results):
        entry = reference(methods_of(results, variant))
        same = counterpart(results, entry) if entry is not None else None
        if entry is None or same is None:
            continue
        value = paired(losses(entry, old_domains(results)), losses(same, old_domains(results)))
        if value is not None:
            found[variant] = value
    if not found:
        return []
    told = {name: value for name, value in found.items() if value.outcome != "open"}
    listed = ", ".join(f"{name} ({value.spread}, {value.outcome})" for name, value in told.items())
    rest = len(found) - len(told)
    quiet = (
        f"{rest} of {len(found)} changed settings can't be told apart from the recipe as it stands"
    )
    return [
        f"Settings, Nexus on its old domains: {'; '.join(part for part in (listed, quiet if rest else '') if part)}."
    ]


def _caveat(results: Entry) -> str:
    count = len(results["seeds"])
    if count < ENOUGH:
        return (
            f"From {_seeds(count)}: the differences are those of this run, and nothing is known about how much they "
            f"vary; run at least {ENOUGH} seeds before you call one better."
        )
    return (
        f"Better and worse: one sign in every seed (at least {ENOUGH}) and a mean difference of at least {LEAST} nats; "
        f"equal contenders would share one sign by chance in 1 of {2 ** (count - 1)} comparisons of {count} seeds."
    )


def verdict(results: Entry) -> list[str]:
    """Return the verdict, a paragraph an entry: paired differences with spread and sign agreement
    over the seeds."""
    sentences = _upcycling(results)
    for added in additions(results):
        sentences += _extension(results, added)
    return [*sentences, *_variants(results), _caveat(results)]
