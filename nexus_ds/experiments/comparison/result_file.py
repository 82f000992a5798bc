"""results.json as dataclasses: what `nexus-ds compare` measured, written and read here alone.

`contenders` (the methods) and `extensions` have a row each, with losses (nats per token) by seed
and domain, routing shares, and compute: training operations and tokens of all jobs that the model
needed, the seed model's own left out.

Jobs fail, and results may be joined by hand. So what is missing or null reads as not measured, a
number that is not finite too, and keys that are not known are ignored.

Not covered: collecting the numbers (results.py), showing them (report*.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nexus_ds.report.paired import number
from nexus_ds.report.summary import Json, MeasureEntry, ModelEntry

Shares = Mapping[str, Mapping[str, float]]
"""Share of a domain's tokens at each expert: [domain][expert]."""


def _numbers(values: Json | None) -> dict[str, float]:
    """Return the finite numbers among `values`."""
    found = {}
    for name, value in (values or {}).items():
        found[name] = number(value)
    return present(found)


def present(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that are there."""
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one validation found; of a dense model the loss alone."""

    loss: Mapping[str, float]
    """Nats per token, by domain."""
    own_share: float | None = None
    """Share of the domains' tokens at the domain's own expert, mean over layers and domains."""
    routing: Shares | None = None


@dataclass(frozen=True, kw_only=True)
class Validation(Scores):
    """A validation of a training."""

    gate: float | None = None
    """Mean probability of the router's first choice."""

    @classmethod
    def from_json(cls, value: Json) -> Validation:
        """Return what `to_json` gave."""
        return cls(
            loss=_numbers(value.get("loss")),
            own_share=number(value.get("own_share")),
            routing=value.get("routing"),
            gate=number(value.get("gate")),
        )

    def to_json(self) -> dict[str, object]:
        """Return the four keys in the file."""
        return {
            "loss": self.loss,
            "own_share": self.own_share,
            "routing": self.routing,
            "gate": self.gate,
        }


@dataclass(frozen=True, kw_only=True)
class SeedScores(Validation):
    """What is known of one method with one seed: its last validation, and more."""

    untrained: Validation | None = None
    """The first validation, before training; None where nothing was trained."""
    tasks: Mapping[str, float] | None = None
    """Score in per cent by group of downstream tasks."""

    @classmethod
    def from_json(cls, value: Json) -> SeedScores:
        """Return what `to_json` gave."""
        untrained = value.get("untrained")
        return cls(
            **vars(Validation.from_json(value)),
            untrained=Validation.from_json(untrained) if untrained else None,
            tasks=_numbers(value.get("tasks")) or None,
        )

    def to_json(self) -> dict[str, object]:
        """Return the keys of one seed in the file; what was not trained has a loss and no more."""
        # What was only scored has neither routing nor gate, and nulls would say "not measured".
        found: dict[str, object] = {"loss": self.loss}
        if self.untrained is not None:
            found = super().to_json() | {"untrained": self.untrained.to_json()}
        if self.tasks is not None:
            found["tasks"] = self.tasks
        return found


@dataclass(frozen=True, kw_only=True)
class BudgetScores(Scores):
    """An extension after one budget of finetuning."""

    share: float | None
    """Share of the new domains' tokens at the new experts."""
    leak: float | None
    """Share of the old domains' tokens there."""

    @classmethod
    def from_json(cls, value: Json) -> BudgetScores:
        """Return what `to_json` gave."""
        return cls(
            loss=_numbers(value.get("loss")),
            own_share=number(value.get("own_share")),
            routing=value.get("routing"),
            share=number(value.get("share")),
            leak=number(value.get("leak")),
        )

    def to_json(self) -> dict[str, object]:
        """Return the keys of one budget in the file."""
        return {
            "loss": self.loss,
            "routing": self.routing,
            "share": self.share,
            "leak": self.leak,
            "own_share": self.own_share,
        }


def mean_loss(loss: Mapping[str, float], domains: Sequence[str]) -> float | None:
    """Return the mean over domains, each counting the same; None if one is missing, or for none."""
    found = [loss[domain] for domain in domains if domain in loss]
    # The mean of the others would be one over easier or harder text.
    complete = found and len(found) == len(domains)
    return statistics.fmean(found) if complete else None


def mean_losses(seeds: Mapping[str, Scores], domains: Sequence[str]) -> dict[str, float]:
    """Return the mean loss over `domains` by seed, of the seeds that have one."""
    return present({seed: mean_loss(scores.loss, domains) for seed, scores in seeds.items()})


def own_shares(seeds: Mapping[str, Scores]) -> dict[str, float]:
    """Return the share at the own expert by seed, of the seeds that have one."""
    return present({seed: scores.own_share for seed, scores in seeds.items()})


@dataclass(frozen=True)
class Compute:
    """What a model cost; None where it is not known."""

    training_flops: float | None = None
    training_tokens: float | None = None
    seconds: float | None = None
    """Of its own training."""
    total: float | None = None
    """Parameters."""
    active: float | None = None
    """Parameters that one token visits."""

    @classmethod
    def from_json(cls, value: Json) -> Compute:
        """Return what `to_json` gave."""
        sizes = value.get("parameters") or {}
        return cls(
            number(value.get("training_flops")),
            number(value.get("training_tokens")),
            number(value.get("seconds")),
            number(sizes.get("total")),
            number(sizes.get("active")),
        )

    def to_json(self) -> dict[str, object]:
        """Return the keys in the file."""
        return {
            "training_flops": self.training_flops,
            "training_tokens": self.training_tokens,
            "seconds": self.seconds,
            "parameters": {"total": self.total, "active": self.active},
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """What methods and extensions have in common."""

    name: str
    label: str
    variant: str
    """The changed setting; "" for the recipe as it stands."""
    about: str
    compute: Compute

    @property
    def title(self) -> str:
        """The name that people read, with the changed setting if there is one."""
        return f"{self.label} [{self.variant}]" if self.variant else self.label


def _row(value: Json) -> dict[str, str]:
    """Return the texts that every row has."""
    # The one text that a row can't do without: the others are for people.
    name = value["name"]
    return {
        "name": name,
        "label": value.get("label") or name,
        "variant": value.get("variant") or "",
        "about": value.get("about") or "",
    }


@dataclass(frozen=True, kw_only=True)
class MethodRow(Row):
    """One method (a contender, in the recipe and in the file) under one variant."""

    group: str
    seeds: Mapping[str, SeedScores]

    @property
    def unchanged(self) -> tuple[str, ...]:
        """What it has in common with its row under the recipe as it stands."""
        return (self.name,)

    def losses(self, domains: Sequence[str]) -> dict[str, float]:
        """Return the mean loss over `domains` by seed, of the seeds that have one."""
        return mean_losses(self.seeds, domains)

    def own_shares(self) -> dict[str, float]:
        """Return the share at the own expert by seed, of the seeds that have one."""
        return own_shares(self.seeds)

    def gates(self) -> dict[str, float]:
        """Return the mean probability of the first choice by seed, of the seeds that have one."""
        return present({seed: scores.gate for seed, scores in self.seeds.items()})

    @classmethod
    def from_json(cls, value: Json) -> MethodRow:
        """Return what `to_json` gave."""
        seeds = value.get("seeds") or {}
        return cls(
            **_row(value),
            group=value.get("group") or "",
            compute=Compute.from_json(value.get("compute") or {}),
            seeds={seed: SeedScores.from_json(scores or {}) for seed, scores in seeds.items()},
        )

    def to_json(self) -> dict[str, object]:
        """Return the row in the file."""
        return {
            "name": self.name,
            "label": self.label,
            "variant": self.variant,
            "about": self.about,
            "group": self.group,
            "compute": self.compute.to_json(),
            "seeds": {seed: scores.to_json() for seed, scores in self.seeds.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where several additions follow one another: the end of one of them."""

    added: str
    """'github', or 'github+legal' for two at once."""
    loss: Mapping[str, float]
    """Nats per token, by domain."""

    @classmethod
    def from_json(cls, value: Json) -> Turn:
        """Return what `to_json` gave."""
        return cls(added=value.get("added") or "", loss=_numbers(value.get("loss")))

    def to_json(self) -> dict[str, object]:
        """Return the keys of one addition in the file."""
        return {"added": self.added, "loss": self.loss}


@dataclass(frozen=True, kw_only=True)
class ExtensionRow(Row):
    """One way of adding one expert (or several), under one variant."""

    added: str
    """'github', 'github+legal' (together), 'github, then legal'."""
    starts_from: str
    """The method that is extended."""
    seeds: Mapping[str, Mapping[str, BudgetScores]]
    """By seed and finetune tokens; '0' is before any."""
    turns: Mapping[str, Sequence[Turn]] = field(default_factory=dict)
    """By seed, of several additions in turn; their budgets are those of the last one."""

    @property
    def unchanged(self) -> tuple[str, ...]:
        """What it has in common with its row under the recipe as it stands."""
        return (self.name, self.added)

    @property
    def budgets(self) -> list[str]:
        """Finetune tokens in order; '0' (before any) first."""
        return budgets_of([self])

    def after(self, budget: str) -> dict[str, BudgetScores]:
        """Return what was measured after a budget, by seed."""
        return {seed: found[budget] for seed, found in self.seeds.items() if budget in found}

    def losses(self, domains: Sequence[str], budget: str) -> dict[str, float]:
        """Return the mean loss over `domains` by seed, of the seeds that have one."""
        return mean_losses(self.after(budget), domains)

    def own_shares(self, budget: str) -> dict[str, float]:
        """Return the share at the own expert by seed, of the seeds that have one."""
        return own_shares(self.after(budget))

    def shares(self, budget: str) -> dict[str, float]:
        """Return the new domains' share at the new experts by seed, of the seeds that have one."""
        return present({seed: scores.share for seed, scores in self.after(budget).items()})

    def leaks(self, budget: str) -> dict[str, float]:
        """Return the old domains' share at the new experts by seed, of the seeds that have one."""
        return present({seed: scores.leak for seed, scores in self.after(budget).items()})

    @classmethod
    def from_json(cls, value: Json) -> ExtensionRow:
        """Return what `to_json` gave."""
        seeds = value.get("seeds") or {}
        return cls(
            **_row(value),
            added=value.get("added") or "",
            starts_from=value.get("starts_from") or "",
            compute=Compute.from_json(value.get("compute") or {}),
            seeds={seed: _budgets(scores or {}) for seed, scores in seeds.items()},
            turns={seed: _turns(scores or {}) for seed, scores in seeds.items()},
        )

    def to_json(self) -> dict[str, object]:
        """Return the row in the file."""
        seeds: dict[str, dict[str, object]] = {}
        for seed, found in self.seeds.items():
            budgets = {budget: scores.to_json() for budget, scores in found.items()}
            seeds[seed] = {"budgets": budgets}
            turns = [turn.to_json() for turn in self.turns.get(seed, [])]
            if turns:
                seeds[seed]["turns"] = turns
        return {
            "name": self.name,
            "label": self.label,
            "variant": self.variant,
            "about": self.about,
            "added": self.added,
            "starts_from": self.starts_from,
            "compute": self.compute.to_json(),
            "seeds": seeds,
        }


def _turns(scores: Json) -> list[Turn]:
    return [Turn.from_json(turn or {}) for turn in scores.get("turns") or []]


def _budgets(scores: Json) -> dict[str, BudgetScores]:
    budgets = scores.get("budgets") or {}
    return {budget: BudgetScores.from_json(found or {}) for budget, found in budgets.items()}


def budgets_of(rows: Sequence[ExtensionRow]) -> list[str]:
    """Return the finetune budgets of extensions in order, '0' (before any) first."""
    found: set[str] = set()
    for row in rows:
        for scores in row.seeds.values():
            found |= set(scores)
    # As numbers: as text "100000" would come before "25000".
    return sorted(found, key=float)


@dataclass(frozen=True)
class Text:
    """The data, and the windows of validation text that every model was scored on."""

    path: str | None = None
    windows: int | None = None
    """A domain."""
    length: int | None = None
    """Tokens a window."""

    @classmethod
    def from_json(cls, value: Json) -> Text:
        """Return the dataclass of the file's `data`."""
        return cls(
            path=value.get("path"),
            windows=value.get("windows"),
            length=value.get("length"),
        )


@dataclass(frozen=True)
class Domains:
    """Domains by role."""

    old: list[str]
    """Of the upcycled experts."""
    pretraining: list[str]
    """Trained on, without an expert."""
    new: list[str]
    """Of the experts that are added."""
    scored: list[str]

    @classmethod
    def from_json(cls, value: Json) -> Domains:
        """Return the dataclass of the file's `domains`."""
        # Without the others there is a comparison all the same, without these two none.
        return cls(
            old=list(value["old"]),
            pretraining=value.get("pretraining") or [],
            new=value.get("new") or [],
            scored=value["scored"],
        )


@dataclass(frozen=True)
class CurvePoint:
    """A validation of the seed model within its own training."""

    tokens: int
    """That it had read."""
    loss: dict[str, float]
    """By domain, nats per token."""

    @classmethod
    def from_json(cls, value: Json) -> CurvePoint:
        """Return one point of the file's `seed_curve`."""
        return cls(value["tokens"], _numbers(value.get("loss")))


@dataclass(frozen=True)
class NotRun:
    """What the recipe names and nothing was measured of."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole comparison."""

    recipe: str
    overrides: list[str]
    seeds: list[int]
    seconds: float | None
    machine: str | None
    data: Text
    domains: Domains
    methods: list[MethodRow]
    """`contenders` in the file."""
    extensions: list[ExtensionRow]
    evaluations: dict[str, ModelEntry]
    """Routing and cosines layer by layer, of the first seed, by the model's name."""
    variants: dict[str, list[str]]
    """Overrides by variant."""
    not_run: list[NotRun] = field(default_factory=list)
    contender_settings: dict[str, list[str]] = field(default_factory=dict)
    """Overrides of one contender alone, in the recipe as it stands."""
    measures: dict[str, MeasureEntry] = field(default_factory=dict)
    """Over held-out documents, the mean of all seeds, by contender's label."""
    seed_tokens: dict[str, int] = field(default_factory=dict)
    """That the seed model was trained on, by variant ('': the recipe as it stands); unknown of a
    model that was given."""
    seed_curve: list[CurvePoint] = field(default_factory=list)
    """Of the first seed's model, in the recipe as it stands; empty of a model that was given."""

    @classmethod
    def from_json(cls, value: Json) -> Results:
        """Return what `to_json` gave; KeyError without a recipe, seeds or domains."""
        evaluations = {}
        for name, entry in (value.get("evaluations") or {}).items():
            evaluations[name] = ModelEntry.from_json(entry)
        measures = value.get("measures") or {}
        variants = {}
        for name, found in (value.get("variants") or {}).items():
            variants[name] = (found or {}).get("overrides") or []
        return cls(
            recipe=value["recipe"],
            overrides=value.get("overrides") or [],
            seeds=value["seeds"],
            seconds=number(value.get("seconds")),
            machine=value.get("machine"),
            data=Text.from_json(value.get("data") or {}),
            domains=Domains.from_json(value["domains"]),
            methods=[MethodRow.from_json(row) for row in value.get("contenders") or []],
            extensions=[ExtensionRow.from_json(row) for row in value.get("extensions") or []],
            evaluations=evaluations,
            variants=variants,
            not_run=[NotRun(row["name"], row["why"]) for row in value.get("not_run") or []],
            contender_settings=value.get("contender_settings") or {},
            measures={name: MeasureEntry.from_json(entry) for name, entry in measures.items()},
            seed_tokens=value.get("seed_tokens") or {},
            seed_curve=[CurvePoint.from_json(point) for point in value.get("seed_curve") or []],
        )

    def to_json(self) -> dict[str, object]:
        """Return results.json's content."""
        return {
            "recipe": self.recipe,
            "overrides": self.overrides,
            "seeds": self.seeds,
            "seconds": self.seconds,
            "machine": self.machine,
            "data": vars(self.data),
            "domains": vars(self.domains),
            # Named as in the recipe's `compare` section.
            "contenders": [row.to_json() for row in self.methods],
            "extensions": [row.to_json() for row in self.extensions],
            "evaluations": {name: entry.to_json() for name, entry in self.evaluations.items()},
            "variants": {name: {"overrides": words} for name, words in self.variants.items()},
            "not_run": [vars(row) for row in self.not_run],
            "contender_settings": self.contender_settings,
            "measures": {name: entry.to_json() for name, entry in self.measures.items()},
            "seed_tokens": self.seed_tokens,
            "seed_curve": [vars(point) for point in self.seed_curve],
        }
