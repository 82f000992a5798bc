"""What an evaluation found, as summary.json, figures with CSV, and sections of a page.

`summarise` puts measurements into one JSON dictionary; everything drawn or written afterwards reads
nothing else, so that another page (the demo's) can be made from a summary.json and its folder of
figures.

summary.json: `perplexity[model][domain]`, `loss[model][domain]` in nats per token,
`routing[domain][expert]` (share of tokens, mean over layers) and `tokens_per_second` of
`routed_model`, the last mixture given (of the last model if all are dense);
`window_loss[model][domain]`, a loss a window; `change` between the last two mixtures, or from a
model that was named to the last, with standard errors; `models[model]` with all of it layer by
layer.
Not covered: figures of more models or experts than fit on a page (they are drawn, but small).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus_ds.errors import ConfigError
from nexus_ds.outputs import write_json, write_text
from nexus_ds.report import figures
from nexus_ds.report.page import Cell, Section, Table, write_page
from nexus_ds.report.paired import number, standard_error
from nexus_ds.report.task_tables import task_sections
from nexus_ds.report.verdict import ALL, Verdict, judge

if TYPE_CHECKING:
    from nexus_ds.evaluation.perplexity import Cosines, Routing, Scores

SUMMARY, PAGE, FIGURES = "summary.json", "report.html", "figures"

# Two sentences each: what is drawn, and what a good and a bad model look like.
READING = {
    "perplexity": "Perplexity is e to the mean loss per token on validation text: lower is better, and a model of "
    "perplexity 20 is as unsure as if it had to choose among 20 equally likely tokens. Bold marks the best model of a "
    "column; the last column is e to the mean of the domains' losses, each domain counting the same.",
    "change": "The change of perplexity (and of the loss in nats per token) between two models on the very same windows, for "
    "instance before and after an expert was added, ± one standard error of the paired difference; it is called the same "
    "within 1 % or within the 95 % interval, whichever is wider. A domain that was added should fall a great deal, and the "
    "others should hardly rise.",
    "routing": "Each row is one domain's validation text, each column a routed expert, and each number the share of "
    "that text's tokens which the router sends there; framed cells are the experts trained on that very domain. A "
    "specialised model is dark in the frames, while equal shades mean that the router does not tell the domains apart; "
    "a mean gate close to 1 would mean a saturated router that can't learn any more.",
    "cosine": "Left, how alike the domain embeddings are to one another (1: same direction, 0: unrelated); right, the "
    "router rows that the learned projection P makes of them in the last layer. The paper finds that the order of the "
    "pairs is kept while unlike domains are pushed apart.",
    "centred": "A softmax does not see what all rows have in common, so only the differences from the mean decide "
    "where a token goes. Negative cosines (blue) are what a router that separates domains shows, and n perfectly "
    "separate experts would all stand at -1/(n-1).",
    "checkpoints": "Parameters counts every weight once, active per token leaves out the routed experts that a token "
    "does not visit. Tokens/s is the speed of this very scoring, forward passes only, on the machine that made this.",
    "lineage": "The steps that made this checkpoint, oldest first, as its sidecar nexus.json records them. Each step "
    "lists the settings that it was run with.",
}


@dataclass
class Measured:
    """One model's part of an evaluation: facts as `nexus_ds.checkpoint.inspection.describe` gives
    them, scores, cosines."""

    facts: dict[str, Any]
    scores: Scores
    cosines: Cosines | None


def _routing_entry(routing: Routing) -> dict[str, Any]:
    return {
        "experts": routing.experts,
        "expert_domains": routing.expert_domains,
        "layers": routing.layers,
        "routing": routing.mean_share(),
        "own_share": routing.own_share(),
        "leak": {expert: number(routing.leak(expert)) for expert in routing.experts},
        "share_by_layer": routing.share.tolist(),
        "gate_by_layer": routing.gate.tolist(),
    }


def _cosine_entry(cosines: Cosines) -> dict[str, Any]:
    arrays = {
        name: getattr(cosines, name) for name in ("embeddings", "inputs", "rows", "centred_rows")
    }
    return {
        "names": cosines.names,
        **{k: None if v is None else v.tolist() for k, v in arrays.items()},
    }


def _warnings(name: str, routing: Routing) -> list[str]:
    found = routing.saturated()
    if not found:
        return []
    layer, domain, gate = max(found, key=lambda place: place[2])
    return [
        f"{name}: the router is saturated in {len(found)} of {routing.gate.size} places (layer, domain), mean gate up "
        f"to {gate:.2f} in layer {layer} on {domain}; above 0.95 it hardly learns: lower router.lr_scale or init_norm"
    ]


def compared(facts: Mapping[str, Mapping[str, Any]], before: str = "") -> tuple[str, str] | None:
    """Return which two models a summary compares: `before` and the last, else the last two
    mixtures.

    None if there are none, or where the tokenizers differ: such models read different windows.
    `facts` are by the model's name, as `nexus_ds.checkpoint.inspection.describe` gives them.

    Raises:
        ConfigError: a `before` that is no model, or the last one.
    """
    if before and before not in list(facts)[:-1]:
        raise ConfigError(
            f"--before {before}: expected a model given before the last one, which it is compared with; found: "
            f"{', '.join(facts)}"
        )
    pair = (
        [before, list(facts)[-1]]
        if before
        else [name for name, fact in facts.items() if fact["routed_experts"]][-2:]
    )
    if len(pair) < 2 or facts[pair[0]].get("tokenizer") != facts[pair[1]].get("tokenizer"):
        return None
    return pair[0], pair[1]


def _change(
    measured: Mapping[str, Measured], before: str, limit: float | None
) -> dict[str, Any] | None:
    """Return the ratio of perplexities of two models and what may be said about it; None without
    two to compare."""
    pair = compared({name: part.facts for name, part in measured.items()}, before)
    if pair is None:
        return None
    first, last = (measured[name].scores for name in pair)
    ratio = {domain: last.perplexity[domain] / value for domain, value in first.perplexity.items()}
    verdict = judge(first.window_loss, last.window_loss, limit)
    return {"before": pair[0], "after": pair[1], "ratio": ratio, **verdict.as_dict()}


def summarise(
    measured: Mapping[str, Measured],
    setup: Mapping[str, Any],
    before: str = "",
    limit: float | None = None,
) -> dict[str, Any]:
    """Return the summary (see the module's docstring).

    Args:
        measured: by the model's name.
        setup: data, domains, windows, length; put at the top.
        before: model that the last one is compared with; "": the last two mixtures are compared.
        limit: rise of a domain's perplexity that is accepted (`report.verdict`).
    """
    models: dict[str, Any] = {}
    warnings: list[str] = []
    for name, part in measured.items():
        models[name] = {
            "checkpoint": part.facts,
            "tokens_per_second": part.scores.tokens_per_second,
        }
        if part.scores.routing is not None:
            models[name] |= _routing_entry(part.scores.routing)
            warnings += _warnings(name, part.scores.routing)
        if part.cosines is not None:
            models[name]["cosine"] = _cosine_entry(part.cosines)
    perplexity = {name: part.scores.perplexity for name, part in measured.items()}
    mixtures = [name for name, part in measured.items() if part.scores.routing is not None]
    return {
        **setup,
        "perplexity": perplexity,
        "loss": {name: part.scores.loss for name, part in measured.items()},
        "window_loss": {
            name: {domain: loss_W.tolist() for domain, loss_W in part.scores.window_loss.items()}
            for name, part in measured.items()
        },
        "routed_model": mixtures[-1] if mixtures else None,
        "routing": models[mixtures[-1]]["routing"] if mixtures else {},
        "tokens_per_second": models[(mixtures or list(models))[-1]]["tokens_per_second"],
        "change": _change(measured, before, limit),
        "warnings": warnings,
        "models": models,
    }


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write the numbers behind a figure."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def file_names(models: Sequence[str]) -> dict[str, str]:
    """Return for each model a part of a file name that is harmless and its own."""
    taken: dict[str, str] = {}
    for model in models:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
        number, name = 1, plain
        while name.lower() in (other.lower() for other in taken.values()):
            number += 1
            name = f"{plain}-{number}"
        taken[model] = name
    return taken


def _draw_routing(entry: dict[str, Any], domains: Sequence[str], name: str, out: Path) -> None:
    share_LDE = np.array(entry["share_by_layer"])
    figures.routing_heatmap(
        share_LDE,
        domains,
        entry["experts"],
        out,
        layers=entry["layers"],
        own=entry["expert_domains"],
        title=f"{name}: where tokens go",
    )
    rows = [
        (entry["layers"][i], domains[d], entry["experts"][e], value)
        for (i, d, e), value in np.ndenumerate(share_LDE)
    ]
    mean = [
        ("mean", domain, expert, v)
        for domain, shares in entry["routing"].items()
        for expert, v in shares.items()
    ]
    write_csv(out.with_suffix(".csv"), ("layer", "domain", "expert", "share"), rows + mean)


def _draw_cosine(cosine: dict[str, Any], name: str, out: Path) -> None:
    before, after = np.array(cosine["inputs"]), np.array(cosine["centred_rows"]).mean(axis=0)
    raw, last = np.array(cosine["embeddings"]), np.array(cosine["rows"])[-1]
    titles = ("domain embeddings (before P)", "router rows of the last layer (after P)")
    figures.cosine_pair(
        raw, last, cosine["names"], out, titles=titles, title=f"{name}: cosine between experts"
    )
    titles = ("centred embeddings (what P reads)", "centred router rows (mean over layers)")
    centred = out.with_name(f"{out.stem}-centred.png")
    figures.cosine_pair(
        before,
        after,
        cosine["names"],
        centred,
        titles=titles,
        title=f"{name}: cosine, mean removed",
    )
    for path, left, right in ((out, raw, last), (centred, before, after)):
        rows = [
            (cosine["names"][i], cosine["names"][j], value, right[i, j])
            for (i, j), value in np.ndenumerate(left)
        ]
        write_csv(path.with_suffix(".csv"), ("expert", "other", "before", "after"), rows)


def _write_change(change: Mapping[str, Any] | None, out: Path) -> None:
    """Write what happened between the two models that are compared, with standard errors; nothing
    without two."""
    if change is None:
        return
    columns = {
        "before": "perplexity_before",
        "after": "perplexity_after",
        "change": "change",
        "change_error": "change_standard_error",
        "nats": "difference_nats",
        "nats_error": "standard_error_nats",
        "verdict": "verdict",
    }
    rows = [
        [domain, *(entry[key] for key in columns)]
        for domain, entry in {**change["domains"], ALL: change["all"]}.items()
    ]
    write_csv(out, ("domain", *columns.values()), rows)


def draw(summary: dict[str, Any], folder: Path) -> None:
    """Draw all figures of a summary into `folder`, each as PNG with the numbers as CSV beside
    it."""
    folder.mkdir(parents=True, exist_ok=True)
    perplexity = summary["perplexity"]
    figures.perplexity_bars(perplexity, folder / "perplexity.png")
    rows = [
        (
            model,
            domain,
            summary["loss"][model][domain],
            value,
            number(standard_error(summary["window_loss"][model][domain])),
        )
        for model, values in perplexity.items()
        for domain, value in values.items()
    ]
    header = ("model", "domain", "loss_nats", "perplexity", "standard_error_nats")
    write_csv(folder / "perplexity.csv", header, rows)
    _write_change(summary["change"], folder / "change.csv")
    draw_models(summary["models"], folder)


def draw_models(models: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Draw the routing and the cosines of every mixture among `models` (a summary's entries) into
    `folder`."""
    for name, file in file_names(list(models)).items():
        entry = models[name]
        if "share_by_layer" in entry:
            _draw_routing(entry, list(entry["routing"]), name, folder / f"routing-{file}.png")
        if _has_cosines(entry):
            _draw_cosine(entry["cosine"], name, folder / f"cosine-{file}.png")


def _has_cosines(entry: dict[str, Any]) -> bool:
    return entry.get("cosine") is not None and entry["cosine"]["embeddings"] is not None


def perplexity_table(summary: dict[str, Any]) -> Table:
    """Return perplexity by model (rows) and domain (columns) with the mean of the domains (of their
    losses)."""
    domains = list(
        dict.fromkeys(domain for values in summary["perplexity"].values() for domain in values)
    )
    rows: list[list[Cell]] = []
    for model, values in summary["perplexity"].items():
        losses = list(summary["loss"][model].values())
        rows.append(
            [
                model,
                *[values.get(domain) for domain in domains],
                math.exp(min(700.0, float(np.mean(losses)))),
            ]
        )
    return Table(
        header=["model", *domains, "all"], rows=rows, best="min" if len(rows) > 1 else None
    )


def routing_table(entry: dict[str, Any]) -> Table:
    """Return the share of each domain's tokens at each expert, the own expert's share, and the mean
    gate."""
    gate_D = np.array(entry["gate_by_layer"]).mean(axis=0)
    rows: list[list[Cell]] = [
        [domain, *shares.values(), entry["own_share"].get(domain), float(gate_D[d])]
        for d, (domain, shares) in enumerate(entry["routing"].items())
    ]
    return Table(header=["text of", *entry["experts"], "own expert", "mean gate"], rows=rows)


def _perplexity_section(summary: dict[str, Any], folder: Path) -> Section:
    return Section(
        title="Perplexity by domain",
        text=READING["perplexity"],
        figure=folder / "perplexity.png",
        table=perplexity_table(summary),
    )


def change_verdict(summary: dict[str, Any]) -> Verdict | None:
    """Return what happened between the two models that are compared, None if there are not two."""
    # none in a summary that an older version wrote
    change, loss = summary["change"], summary.get("window_loss")
    return (
        judge(loss[change["before"]], loss[change["after"]], change["limit"])
        if change and loss
        else None
    )


def _change_section(summary: dict[str, Any]) -> list[Section]:
    verdict = change_verdict(summary)
    if verdict is None:
        return []
    before, after = summary["change"]["before"], summary["change"]["after"]
    text = "\n\n".join([READING["change"], *(f"Not decided: {note}." for note in verdict.notes())])
    return [
        Section(title=f"From {before} to {after}", text=text, table=verdict.table(before, after))
    ]


def model_sections(name: str, file: str, entry: dict[str, Any], folder: Path) -> list[Section]:
    """Return the sections about one model whose figures `draw_models` has put into `folder` under
    `file`."""
    sections: list[Section] = []
    if "share_by_layer" in entry:
        sections.append(
            Section(
                title=f"Routing of {name}",
                text=READING["routing"],
                figure=folder / f"routing-{file}.png",
                table=routing_table(entry),
            )
        )
    if _has_cosines(entry):
        sections += [
            Section(
                title=f"Domains before and after the projection: {name}",
                text=READING["cosine"],
                figure=folder / f"cosine-{file}.png",
            ),
            Section(
                title=f"The same with the mean removed: {name}",
                text=READING["centred"],
                figure=folder / f"cosine-{file}-centred.png",
            ),
        ]
    return sections


def _checkpoint_section(summary: dict[str, Any]) -> Section:
    header = [
        "model",
        "kind",
        "family",
        "dtype",
        "experts",
        "top-k",
        "parameters",
        "active per token",
        "tokens/s",
    ]
    rows: list[list[Cell]] = []
    for name, entry in summary["models"].items():
        facts = entry["checkpoint"]
        rows.append(
            [
                name,
                *(facts[key] for key in ("kind", "family", "dtype")),
                facts["routed_experts"] or None,
                facts.get("top_k"),
                *facts["parameters"].values(),
                int(entry["tokens_per_second"]),
            ]
        )
    return Section(
        title="Checkpoints",
        text=READING["checkpoints"],
        table=Table(header=header, rows=rows),
    )


def _lineage_sections(summary: dict[str, Any]) -> list[Section]:
    sections = []
    for name, entry in summary["models"].items():
        facts = entry["checkpoint"]
        if facts.get("lineage"):
            rows: list[list[Cell]] = [
                [str(number + 1), str(step.get("verb", "")), _details(step)]
                for number, step in enumerate(facts["lineage"])
            ]
            sections.append(
                Section(
                    title=f"How {name} came about",
                    text=READING["lineage"],
                    table=Table(header=["step", "verb", "settings"], rows=rows),
                )
            )
    return sections


def _plain(value: Any) -> str:
    """Return a recorded setting as people read it: 'kind nexus, depth 2', 'a, b', 0.4529."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _details(step: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{key}: {_plain(value)}"
        for key, value in step.items()
        if key != "verb" and value is not None
    )


def evaluation_sections(summary: dict[str, Any], folder: Path) -> list[Section]:
    """Return the sections of a page about a summary whose figures `draw` has put into `folder`."""
    sections = [
        _perplexity_section(summary, folder),
        *_change_section(summary),
        *task_sections(summary),
    ]
    for name, file in file_names(list(summary["models"])).items():
        sections += model_sections(name, file, summary["models"][name], folder)
    return [*sections, _checkpoint_section(summary), *_lineage_sections(summary)]


def intro(summary: dict[str, Any]) -> str:
    """Return the opening paragraphs of the page: what was scored on what, and the warnings."""
    count = len(summary["models"])
    text = (
        f"{count} model{'s' if count > 1 else ''} scored on {summary['windows']} windows of {summary['length']} tokens of "
        f"validation text in each of {len(summary['domains'])} domains: {', '.join(summary['domains'])}."
    )
    return "\n\n".join([text, *(f"Warning: {warning}." for warning in summary["warnings"])])


def write_evaluation(summary: dict[str, Any], out: Path) -> None:
    """Write summary.json, figures/ and report.html into the directory `out`."""
    write_json(out / SUMMARY, summary)
    draw(summary, out / FIGURES)
    title = f"Evaluation of {', '.join(summary['models'])}"
    write_page(out / PAGE, title, intro(summary), evaluation_sections(summary, out / FIGURES))
