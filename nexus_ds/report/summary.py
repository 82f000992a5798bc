"""What an evaluation found, as dataclasses: summary.json is made, written and read here alone.

summary.json: `perplexity[model][domain]`, `loss[model][domain]` in nats per token,
`routing[domain][expert]` (share of tokens, mean over layers) and `tokens_per_second` of
`routed_model`, the last mixture given (of the last model if all are dense);
`window_loss[model][domain]`, a loss a window, and of chats `window_labels[model][domain]`, the
answer tokens of each, by which it counts; `change` between the last two mixtures, or from a
model that was named to the last, with standard errors; `models[model]` with all of it layer by
layer; `tasks[model]`, where downstream tasks were run; `measures[measure]`, where held-out
documents were read: `models[model][domain]` and, where there is one, `reference[domain]`, with
`values` and `weights` by document.

Reading ignores keys that it does not know: the demo adds some of its own.

Shapes: L layers, D domains of text, E routed experts, W windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from nexus_ds.errors import ConfigError
from nexus_ds.report.paired import mean_loss, number, standard_error
from nexus_ds.report.verdict import Verdict, judge
from nexus_ds.typed_json import typed

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import DataclassInstance

    from nexus_ds.evaluation.documents import ByDocument
    from nexus_ds.evaluation.perplexity import Cosines, Routing, Scores

Record = TypeVar("Record", bound="DataclassInstance")
Json = Mapping[str, Any]
"""A JSON object out of a file; its shape is what the dataclass that reads it says."""


def from_keys(kind: type[Record], value: Json) -> Record:
    """Return the dataclass `kind` from the keys that are named like its fields.

    Raises:
        KeyError: one is missing.
        TypeError: one is of another type.
    """
    names = [each.name for each in dataclasses.fields(kind)]
    return typed(kind(**{name: value[name] for name in names}), kind)


def _check_names(what: str, found: Mapping[str, object], expected: Sequence[str]) -> None:
    """Raise ValueError for numbers by name that are not those of these names, in order."""
    if list(found) != list(expected):
        raise ValueError(f"{what}: found {', '.join(found)}, expected {', '.join(expected)}")


def _check_shape(what: str, value: Sequence[Any] | None, *sizes: int) -> None:
    """Raise ValueError for lists in lists that are not of these sizes."""
    if value is None:
        return
    if len(value) != sizes[0]:
        raise ValueError(f"{what}: found {len(value)} entries, expected {sizes[0]}")
    for part in value if len(sizes) > 1 else ():
        _check_shape(what, part, *sizes[1:])


@dataclass(frozen=True)
class Setup:
    """What was scored: the data and its domains, windows a domain, tokens a window."""

    data: str
    domains: list[str]
    windows: int
    length: int


@dataclass(frozen=True, kw_only=True)
class RoutingEntry:
    """Where one mixture sends each domain's tokens (`nexus_ds.evaluation.perplexity.Routing`)."""

    experts: list[str]
    expert_domains: list[str]
    layers: list[int]
    mean_share: dict[str, dict[str, float]]
    """By domain and expert, mean over layers; `routing` in the file."""
    own_share: dict[str, float]
    leak: dict[str, float | None]
    """By expert; None where no other domain's text was scored."""
    share_by_layer: list[list[list[float]]]
    """[L, D, E]; sums to 1 over E."""
    gate_by_layer: list[list[float]]
    """[L, D] mean probability of the first choice."""

    @classmethod
    def of(cls, routing: Routing) -> RoutingEntry:
        """Return what was measured."""
        return cls(
            experts=routing.experts,
            expert_domains=routing.expert_domains,
            layers=routing.layers,
            mean_share=routing.mean_share(),
            own_share=routing.own_share(),
            leak={expert: number(routing.leak(expert)) for expert in routing.experts},
            share_by_layer=routing.share.tolist(),
            gate_by_layer=routing.gate.tolist(),
        )

    @classmethod
    def from_json(cls, value: Json) -> RoutingEntry:
        """Return what `to_json` gave; errors as `from_keys`, ValueError for other shapes."""
        found = from_keys(cls, {**value, "mean_share": value["routing"]})
        domains = len(found.mean_share)
        for domain, shares in found.mean_share.items():
            _check_names(f"routing.{domain}", shares, found.experts)
        _check_shape("expert_domains", found.expert_domains, len(found.experts))
        _check_shape(
            "share_by_layer", found.share_by_layer, len(found.layers), domains, len(found.experts)
        )
        _check_shape("gate_by_layer", found.gate_by_layer, len(found.layers), domains)
        return found

    def to_json(self) -> dict[str, object]:
        """Return the entry's keys in the file."""
        # The file's key is older than the field's name.
        renamed = {"mean_share": "routing"}
        return {renamed.get(key, key): value for key, value in vars(self).items()}


def _as_list(array: np.ndarray | None) -> list[list[float]] | None:
    return None if array is None else array.tolist()


@dataclass(frozen=True)
class CosineEntry:
    """Cosines between experts (`nexus_ds.evaluation.perplexity.Cosines`)."""

    names: list[str]
    embeddings: list[list[float]] | None
    """[E, E]; None without a sidecar that has the domain embeddings."""
    inputs: list[list[float]] | None
    """[E, E] of what the projection P reads."""
    rows: list[list[list[float]]]
    """[L, E, E] of the router's expert embeddings."""
    centred_rows: list[list[list[float]]]
    """[L, E, E] of the expert embeddings less their mean."""

    @classmethod
    def of(cls, cosines: Cosines) -> CosineEntry:
        """Return what was measured."""
        return cls(
            names=cosines.names,
            embeddings=_as_list(cosines.embeddings),
            inputs=_as_list(cosines.inputs),
            rows=cosines.rows.tolist(),
            centred_rows=cosines.centred_rows.tolist(),
        )

    @classmethod
    def from_json(cls, value: Json) -> CosineEntry:
        """Return what was written; errors as `from_keys`, ValueError for other shapes."""
        found = from_keys(cls, value)
        experts = len(found.names)
        _check_shape("embeddings", found.embeddings, experts, experts)
        _check_shape("inputs", found.inputs, experts, experts)
        for rows in (found.rows, found.centred_rows):
            _check_shape("rows", rows, len(rows), experts, experts)
        return found


class Models(TypedDict):
    """The models of summary.json, each as `ModelEntry` reads it."""

    models: dict[str, dict[str, object]]


@dataclass(frozen=True)
class ModelEntry:
    """One model of an evaluation."""

    info: Json
    """Model info as `nexus_ds.checkpoint.inspection.describe` gives it; `checkpoint` in the
    file."""
    tokens_per_second: float
    routing: RoutingEntry | None = None
    cosine: CosineEntry | None = None

    @classmethod
    def from_json(cls, value: Json) -> ModelEntry:
        """Return what `to_json` gave."""
        # A router's keys lie flat among the entry's own: any of them tells that there is one.
        routing = RoutingEntry.from_json(value) if "share_by_layer" in value else None
        found = value.get("cosine")
        cosine = None if found is None else CosineEntry.from_json(found)
        info = typed(value["checkpoint"], dict[str, object], "checkpoint")
        speed = typed(value["tokens_per_second"], float, "tokens_per_second")
        return cls(info, speed, routing, cosine)

    def to_json(self) -> dict[str, object]:
        """Return the entry; without a router there are no keys of one."""
        entry: dict[str, object] = {
            "checkpoint": self.info,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.routing is not None:
            entry |= self.routing.to_json()
        if self.cosine is not None:
            entry["cosine"] = vars(self.cosine)
        return entry

    @property
    def has_embeddings(self) -> bool:
        """Whether there are cosines from before the projection too, so that both can be drawn."""
        return self.cosine is not None and self.cosine.embeddings is not None


@dataclass(frozen=True)
class BeforeAfter:
    """Two models of an evaluation on the same windows."""

    before: str
    after: str
    ratio: dict[str, float]
    """Perplexity after / before, by domain."""
    verdict: Verdict | None
    """None in a summary of an older version, which kept no loss by window."""

    def to_json(self) -> dict[str, object]:
        """Return the file's `change`."""
        judged = {} if self.verdict is None else self.verdict.as_dict()
        return {"before": self.before, "after": self.after, "ratio": self.ratio, **judged}


@dataclass(frozen=True)
class TaskEntry:
    """One downstream task of one model: score and standard error in per cent."""

    group: str
    metric: str
    score: float
    stderr: float | None
    shots: int
    examples: int


@dataclass(frozen=True)
class ModelTasks:
    """Downstream tasks of one model: the groups' means and the mean of these, in per cent."""

    mean: float
    groups: dict[str, float]
    tasks: dict[str, TaskEntry]
    not_run: dict[str, str]
    """The reason, by task."""

    @classmethod
    def from_json(cls, value: Json) -> ModelTasks:
        """Return what `to_json` gave."""
        tasks = {name: from_keys(TaskEntry, task) for name, task in value["tasks"].items()}
        return from_keys(cls, {**value, "tasks": tasks})

    def to_json(self) -> dict[str, object]:
        """Return the file's entry of one model."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class OverDocuments:
    """A measure of one model or reference on a domain: a weighted mean over documents."""

    values: list[float]
    weights: list[float]
    """By document, in the order of the text: bytes, or items asked."""

    @classmethod
    def of(cls, found: ByDocument) -> OverDocuments:
        """Return what was measured."""
        return cls(found.values.tolist(), found.weights.tolist())

    @property
    def mean(self) -> float:
        """The measure."""
        return mean_loss(self.values, self.weights)

    @property
    def error(self) -> float | None:
        """Its standard error; None of one document."""
        return number(standard_error(self.values, self.weights))

    def to_json(self) -> dict[str, object]:
        """Return the file's entry."""
        return {"mean": self.mean, "standard_error": self.error, **vars(self)}


@dataclass(frozen=True)
class MeasureEntry:
    """One measure over held-out documents, by model and domain."""

    models: dict[str, dict[str, OverDocuments]]
    reference: dict[str, OverDocuments] = field(default_factory=dict)
    """By domain, what no model made: chance, or real text; empty where there is none."""

    @classmethod
    def of(
        cls, models: Mapping[str, Mapping[str, ByDocument]], reference: Mapping[str, ByDocument]
    ) -> MeasureEntry:
        """Return what was measured."""
        entries = {name: _of_documents(found) for name, found in models.items()}
        return cls(entries, _of_documents(reference))

    @classmethod
    def from_json(cls, value: Json) -> MeasureEntry:
        """Return what `to_json` gave."""
        models = {name: _read_documents(entry) for name, entry in value["models"].items()}
        return cls(models, _read_documents(value["reference"]))

    def to_json(self) -> dict[str, object]:
        """Return the file's entry."""
        models = {name: _listed_documents(entry) for name, entry in self.models.items()}
        return {"models": models, "reference": _listed_documents(self.reference)}


def mean_over_seeds(entries: Sequence[MeasureEntry]) -> MeasureEntry:
    """Return the mean, document by document, of what several models of one name were measured at.

    Args:
        entries: one a seed, of the same documents.
    """
    names = list(dict.fromkeys(name for entry in entries for name in entry.models))
    models = {}
    for name in names:
        seeds = [entry.models[name] for entry in entries if name in entry.models]
        models[name] = {domain: _mean_of([seed[domain] for seed in seeds]) for domain in seeds[0]}
    return MeasureEntry(models, entries[0].reference)


def _mean_of(seeds: Sequence[OverDocuments]) -> OverDocuments:
    values = [
        sum(column) / len(column) for column in zip(*(seed.values for seed in seeds), strict=True)
    ]
    return OverDocuments(values, seeds[0].weights)


def _of_documents(found: Mapping[str, ByDocument]) -> dict[str, OverDocuments]:
    return {domain: OverDocuments.of(part) for domain, part in found.items()}


def _read_documents(value: Json) -> dict[str, OverDocuments]:
    found = {domain: from_keys(OverDocuments, entry) for domain, entry in value.items()}
    for domain, entry in found.items():
        _check_shape(f"weights of {domain}", entry.weights, len(entry.values))
        if not sum(entry.weights) > 0:
            raise ValueError(f"{domain}: found no document that counts")
    return found


def _listed_documents(entries: Mapping[str, OverDocuments]) -> dict[str, object]:
    return {domain: entry.to_json() for domain, entry in entries.items()}


class _Parameters(TypedDict):
    total: int
    active: int


class _Info(TypedDict):
    """What the page shows of a model, among what `describe` says."""

    kind: str
    family: str
    dtype: str
    routed_experts: int | None
    top_k: NotRequired[int | None]
    parameters: _Parameters
    lineage: NotRequired[list[dict[str, object]] | None]


class _Model(TypedDict):
    checkpoint: _Info


class _ChangeFile(TypedDict):
    before: str
    after: str
    ratio: dict[str, float]
    limit: NotRequired[float | None]
    """Missing in a summary of an older version, which kept no loss by window."""


class _File(TypedDict):
    """Types of summary.json, but for what the entries check themselves."""

    perplexity: dict[str, dict[str, float]]
    loss: dict[str, dict[str, float]]
    window_loss: NotRequired[dict[str, dict[str, list[float]]] | None]
    window_labels: NotRequired[dict[str, dict[str, list[int]]] | None]
    routed_model: str | None
    change: _ChangeFile | None
    warnings: list[str]
    models: dict[str, _Model]
    tasks: NotRequired[dict[str, object] | None]
    measures: NotRequired[dict[str, object] | None]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """An evaluation (see the module's docstring)."""

    setup: Setup
    perplexity: dict[str, dict[str, float]]
    loss: dict[str, dict[str, float]]
    window_loss: dict[str, dict[str, list[float]]] | None
    """None in a summary of an older version."""
    routed_model: str | None
    change: BeforeAfter | None
    warnings: list[str]
    models: dict[str, ModelEntry]
    tasks: dict[str, ModelTasks] = field(default_factory=dict)
    window_labels: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Answer tokens a window, of domains with chats; empty where there are none."""
    measures: dict[str, MeasureEntry] = field(default_factory=dict)
    """Of held-out documents; empty where none were read."""

    def labels(self, model: str) -> dict[str, list[int]]:
        """Return the answer tokens a window of each domain with chats."""
        return self.window_labels.get(model, {})

    @property
    def routing(self) -> dict[str, dict[str, float]]:
        """Share by domain and expert of the routed model; empty without one."""
        if self.routed_model is None:
            return {}
        routing = self.models[self.routed_model].routing
        return {} if routing is None else routing.mean_share

    @property
    def tokens_per_second(self) -> float:
        """Speed of the routed model, of the last model without one."""
        last = list(self.models)[-1]
        name = self.routed_model or last
        return self.models[name].tokens_per_second

    @property
    def verdict(self) -> Verdict | None:
        """What happened between the two models that are compared, None if there are not two."""
        return None if self.change is None else self.change.verdict

    @classmethod
    def from_json(cls, value: Json) -> Summary:
        """Return what `to_json` gave; errors as `from_keys`, ValueError for other shapes."""
        typed(value, _File)
        routed = value["routed_model"]
        if routed is not None and routed not in value["models"]:
            raise ValueError(f"routed_model: found {routed}, expected one of models")
        window_loss = value.get("window_loss")
        window_labels = value.get("window_labels") or {}
        change = value["change"]
        tasks = value.get("tasks") or {}
        measures = value.get("measures") or {}
        return cls(
            setup=from_keys(Setup, value),
            perplexity=value["perplexity"],
            loss=value["loss"],
            window_loss=window_loss,
            routed_model=value["routed_model"],
            change=_read_change(change, window_loss, window_labels) if change else None,
            warnings=value["warnings"],
            models={name: ModelEntry.from_json(entry) for name, entry in value["models"].items()},
            tasks={name: ModelTasks.from_json(entry) for name, entry in tasks.items()},
            window_labels=window_labels,
            measures={name: MeasureEntry.from_json(entry) for name, entry in measures.items()},
        )

    def to_json(self) -> dict[str, object]:
        """Return summary.json's content."""
        summary: dict[str, object] = {
            **vars(self.setup),
            "perplexity": self.perplexity,
            "loss": self.loss,
            "window_loss": self.window_loss,
            "routed_model": self.routed_model,
            "routing": self.routing,
            "tokens_per_second": self.tokens_per_second,
            "change": None if self.change is None else self.change.to_json(),
            "warnings": self.warnings,
            "models": {name: entry.to_json() for name, entry in self.models.items()},
        }
        # Most evaluations read no chats and run no tasks, and then there is no key.
        if self.window_labels:
            summary["window_labels"] = self.window_labels
        if self.tasks:
            summary["tasks"] = {name: entry.to_json() for name, entry in self.tasks.items()}
        if self.measures:
            measures = {name: entry.to_json() for name, entry in self.measures.items()}
            summary["measures"] = measures
        return summary


def _read_change(
    change: Json,
    window_loss: Mapping[str, Mapping[str, list[float]]] | None,
    window_labels: Mapping[str, Mapping[str, list[int]]],
) -> BeforeAfter:
    before = change["before"]
    after = change["after"]
    verdict = None
    # The losses by window are in the file in full, so the verdict follows from them; what the file
    # says of it is for other readers.
    if window_loss:
        labels = window_labels.get(after, {})
        verdict = judge(window_loss[before], window_loss[after], change["limit"], labels)
    return BeforeAfter(before, after, change["ratio"], verdict)


@dataclass(frozen=True)
class Measured:
    """One model's part of an evaluation: model info as
    `nexus_ds.checkpoint.inspection.describe` gives it, scores, cosines."""

    info: Json
    scores: Scores
    cosines: Cosines | None

    def entry(self) -> ModelEntry:
        """Return the model's entry of a summary."""
        routing = self.scores.routing
        return ModelEntry(
            self.info,
            self.scores.tokens_per_second,
            None if routing is None else RoutingEntry.of(routing),
            None if self.cosines is None else CosineEntry.of(self.cosines),
        )


def compared(infos: Mapping[str, Json], before: str = "") -> tuple[str, str] | None:
    """Return which two models are compared: `before` and the last, else the last two mixtures.

    None if there are none, or where the tokenizers differ: such models read different windows.

    Args:
        infos: model info by the model's name (`nexus_ds.checkpoint.inspection.describe`).
        before: a model's name, or "".

    Raises:
        ConfigError: a `before` that is no model, or the last one.
    """
    if before and before not in list(infos)[:-1]:
        raise ConfigError(
            f"--before {before}: expected a model given before the last one, "
            f"which it is compared with; found: {', '.join(infos)}"
        )
    if before:
        pair = [before, list(infos)[-1]]
    else:
        mixtures = [name for name, info in infos.items() if info["routed_experts"]]
        pair = mixtures[-2:]
    if len(pair) < 2:
        return None
    first, last = pair
    if infos[first].get("tokenizer") != infos[last].get("tokenizer"):
        return None
    return first, last


def _change(
    measured: Mapping[str, Measured], before: str, limit: float | None
) -> BeforeAfter | None:
    """Return what happened between two models; None without two to compare."""
    pair = compared({name: part.info for name, part in measured.items()}, before)
    if pair is None:
        return None
    first, last = (measured[name].scores for name in pair)
    ratio = {}
    for domain, perplexity in first.perplexity.items():
        ratio[domain] = last.perplexity[domain] / perplexity
    verdict = judge(first.window_loss, last.window_loss, limit, last.window_labels)
    return BeforeAfter(*pair, ratio, verdict)


def _saturation(name: str, routing: Routing) -> list[str]:
    """Return a warning about a model whose router hardly learns any more."""
    found = routing.saturated()
    if not found:
        return []
    # One line a model: the worst place stands for all of them.
    layer, domain, gate = max(found, key=lambda place: place[2])
    return [
        f"{name}: the router is saturated in {len(found)} of {routing.gate.size} places "
        f"(layer, domain), mean gate up to {gate:.2f} in layer {layer} on {domain}; "
        "above 0.95 it hardly learns: lower router.lr_scale or init_norm"
    ]


def summarise(
    measured: Mapping[str, Measured],
    setup: Setup,
    before: str = "",
    limit: float | None = None,
) -> Summary:
    """Return the summary of what was measured.

    Args:
        measured: by the model's name, in the order of the tables.
        setup: what was scored.
        before: model that the last one is compared with; "": the last two mixtures are compared.
        limit: rise of a domain's perplexity that is accepted (`report.verdict`).

    Raises:
        ConfigError: as `compared`.
    """
    scores = {name: part.scores for name, part in measured.items()}
    mixtures: list[str] = []
    warnings: list[str] = []
    for name, part in scores.items():
        if part.routing is not None:
            mixtures.append(name)
            warnings += _saturation(name, part.routing)
    return Summary(
        setup=setup,
        perplexity={name: part.perplexity for name, part in scores.items()},
        loss={name: part.loss for name, part in scores.items()},
        window_loss={name: _listed(part) for name, part in scores.items()},
        routed_model=mixtures[-1] if mixtures else None,
        change=_change(measured, before, limit),
        warnings=warnings,
        models={name: part.entry() for name, part in measured.items()},
        window_labels=_chats(scores),
    )


def _chats(scores: Mapping[str, Scores]) -> dict[str, dict[str, list[int]]]:
    """Return the answer tokens a window, by model and domain; of models that read no chats none."""
    found = {}
    for name, part in scores.items():
        if part.window_labels:
            labels = {domain: labels_W.tolist() for domain, labels_W in part.window_labels.items()}
            found[name] = labels
    return found


def _listed(scores: Scores) -> dict[str, list[float]]:
    return {domain: loss_W.tolist() for domain, loss_W in scores.window_loss.items()}
