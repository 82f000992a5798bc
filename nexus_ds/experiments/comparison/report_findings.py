"""What a comparison found, in sentences that say no more than its numbers.

A difference is called (better, worse) if at least three seeds have it with one sign and its mean is
at least 0.01 nats; with fewer seeds it is reported as seen (lower, higher), and everything else as
not told apart.

Not covered: advice; the reader sees the cost of each method beside the finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nexus_ds.experiments.comparison.report_tables import (
    additions,
    counterpart,
    extension_reference,
    extensions_of,
    flops_ratio,
    method_reference,
    methods_of,
    new_domains,
    same_seed,
    variants_of,
)
from nexus_ds.experiments.comparison.result_file import (
    ExtensionRow,
    MethodRow,
    Results,
    budgets_of,
)
from nexus_ds.experiments.comparison.seed_figures import short_count
from nexus_ds.report.page import Spread
from nexus_ds.report.paired import ENOUGH, LEAST, Paired, paired, spread

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
SMALL_ZERO_SHOT = ("nexus_append", "nexus_zero_shot")
"""Extensions that never read the new text."""


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
    if len(found.by_seed) == 1:
        return str(found.spread)
    return f"{found.spread}, lower in {found.agreement} seeds"


def grouped(differences: Mapping[str, Paired], extra: Mapping[str, str] | None = None) -> str:
    """Return 'better than A (0.90 ± 0.01), B (…); not told apart from C (…)', best news first.

    Args:
        differences: the reference minus each rival, by the rival's label.
        extra: what to add in a rival's parentheses, such as its compute.
    """
    notes = extra or {}
    parts = []
    for outcome, words in WORDS.items():
        found = {name: value for name, value in differences.items() if value.outcome == outcome}
        if not found:
            continue
        listed = []
        for name, value in found.items():
            size = _signed(value) if outcome == "open" else f"by {_amount(value)}"
            listed.append(f"{name} ({size}{notes.get(name, '')})")
        most = max(len(value.by_seed) for value in found.values())
        parts.append(f"{words.format(seeds=_seeds(most))} {', '.join(listed)}")
    return "; ".join(parts)


def _minus_each(
    base: Mapping[str, float], others: Mapping[str, Mapping[str, float]]
) -> dict[str, Paired]:
    """Return losses by seed of `base` minus those of each other, by label."""
    found = {}
    for name, losses in others.items():
        value = paired(base, losses)
        # Without a common seed nothing can be said.
        if value is not None:
            found[name] = value
    return found


def _cost(row: MethodRow, base: MethodRow) -> str:
    """Return what a rival's training cost, where it differs from `base` by more than a tenth."""
    ratio = flops_ratio(row, base)
    if ratio is None or 0.9 <= ratio <= 1.1:
        return ""
    return f"; {ratio:.2g} × the training" if ratio else "; no further training"


def _upcycling(results: Results) -> list[str]:
    # A branch serves its own domain; its loss over all of them is in the tables and makes no
    # finding.
    rows = [row for row in methods_of(results) if not row.name.startswith("branch")]
    old = results.domains.old
    base = method_reference(rows)
    if base is None:
        return ["No Nexus mixture was measured, so nothing is said about upcycling."]
    rivals = [row for row in rows if row is not base]
    differences = _minus_each(base.losses(old), {row.title: row.losses(old) for row in rivals})
    level = _level(base.losses(old))
    opening = f"{base.title} reaches {level} on the {len(old)} domains of its experts."
    if not differences:
        return [f"Upcycling: {opening} Nothing was measured to compare it with."]
    costs = {row.title: _cost(row, base) for row in rivals}
    first = {row.title for row in rivals if row.name in HEADLINE}
    spelt_out = {name: value for name, value in differences.items() if name in first}
    others = {name: value for name, value in differences.items() if name not in first}
    sentences = [f"Upcycling: {opening}"]
    if spelt_out:
        sentences = [f"Upcycling: {opening} It is {grouped(spelt_out, costs)}."]
    if others:
        sentences.append(f"{base.title} is {grouped(others, costs)}.")
    return sentences


def _extension(results: Results, added: str) -> list[str]:
    rows = extensions_of(results, added)
    base = extension_reference(rows)
    if base is None:
        return [f"Adding {added}: no Nexus extension was measured."]
    budget = budgets_of(rows)[-1]
    tokens = float(budget)
    when = f"after {short_count(tokens)} tokens of finetuning" if tokens else "without finetuning"
    texts = {
        "the new domain": new_domains(results, added),
        "the old domains": results.domains.old,
    }
    sentences = []
    for what, domains in texts.items():
        mine = base.losses(domains, budget)
        if not mine:
            continue
        others = {row.title: row.losses(domains, budget) for row in rows if row is not base}
        found = grouped(_minus_each(mine, others))
        text = f"Adding {added}, {what} {when}: {base.title} reaches {_level(mine)}"
        sentences.append(f"{text}; it is {found}." if found else f"{text}.")
    return [*sentences, *_found_at_once(rows, added)]


def _found_at_once(rows: Sequence[ExtensionRow], added: str) -> list[str]:
    """Say where the new domain's tokens go when its expert embedding is P(d) and nothing else."""
    sentences = []
    for row in rows:
        share = spread(row.shares("0"), 2)
        leak = spread(row.leaks("0"), 2)
        if row.name in SMALL_ZERO_SHOT and share is not None:
            tail = f" and {leak} of the old domains' tokens" if leak is not None else ""
            sentences.append(
                f"{row.title}, before any finetuning: {share} of {added}'s tokens{tail} "
                "go to the new expert."
            )
    return sentences


def _variants(results: Results) -> list[str]:
    """Say which changed settings move the Nexus mixture's loss."""
    old = results.domains.old
    found: dict[str, Paired] = {}
    for variant in variants_of(results):
        # a seed that has read less is no setting of the mixture
        if not same_seed(results, variant):
            continue
        row = method_reference(methods_of(results, variant))
        same = None if row is None else counterpart(results.methods, row)
        if row is None or same is None:
            continue
        value = paired(row.losses(old), same.losses(old))
        if value is not None:
            found[variant] = value
    if not found:
        return []
    told = {name: value for name, value in found.items() if value.outcome != "open"}
    parts = []
    if told:
        listed = [f"{name} ({value.spread}, {value.outcome})" for name, value in told.items()]
        parts.append(", ".join(listed))
    if len(told) < len(found):
        parts.append(
            f"{len(found) - len(told)} of {len(found)} changed settings can't be told apart from "
            "the recipe as it stands"
        )
    return [f"Settings, Nexus on its old domains: {'; '.join(parts)}."]


def _caveat(results: Results) -> str:
    count = len(results.seeds)
    if count < ENOUGH:
        return (
            f"From {_seeds(count)}: the differences are those of this run, and nothing is known "
            f"about how much they vary; run at least {ENOUGH} seeds before you call one better."
        )
    # Of n fair coins all show one side in 2 of 2^n throws.
    return (
        f"Better and worse: one sign in every seed (at least {ENOUGH}) and a mean difference of at "
        f"least {LEAST} nats; equal contenders would share one sign by chance in 1 of "
        f"{2 ** (count - 1)} comparisons of {count} seeds."
    )


def verdict(results: Results) -> list[str]:
    """Return the verdict, a paragraph an entry.

    It gives paired differences with their spread and how many seeds agree on the sign.
    """
    sentences = _upcycling(results)
    for added in additions(results):
        sentences += _extension(results, added)
    return [*sentences, *_variants(results), _caveat(results)]
