"""An evaluation's summary as figures with CSV and sections of a page.

Everything is drawn and written from the summary alone (`nexus_ds.report.summary`), so that another
page (the demo's) can be made from a summary.json and its folder of figures.

Not covered: figures of more models or experts than fit on a page (they are drawn, but small).

Shapes: L layers, D domains of text, E routed experts.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from nexus_ds.outputs import write_json, write_text
from nexus_ds.report import figures
from nexus_ds.report.measure_tables import MEASURE_HEAD, measure_rows, measure_sections
from nexus_ds.report.page import Cell, Section, Table, write_page
from nexus_ds.report.paired import number, standard_error
from nexus_ds.report.summary import CosineEntry, ModelEntry, RoutingEntry, Summary
from nexus_ds.report.task_tables import task_sections
from nexus_ds.report.verdict import ALL, Verdict

SUMMARY = "summary.json"
PAGE = "report.html"
FIGURES = "figures"

# Two sentences each: what is drawn, and what a good and a bad model look like.
READING = {
    "perplexity": "Perplexity is e to the mean loss per token on validation text: lower is better, "
    "and a model of perplexity 20 is as unsure as if it had to choose among 20 equally likely "
    "tokens. Bold marks the best model of a column; the last column is e to the mean of the "
    "domains' losses, each domain counting the same.",
    "change": "The change of perplexity (and of the loss in nats per token) between two models on "
    "the very same windows, for instance before and after an expert was added, ± one standard "
    "error of the paired difference; it is called the same within 1 % or within the 95 % interval, "
    "whichever is wider. A domain that was added should fall a great deal, and the others should "
    "hardly rise.",
    "routing": "Each row is one domain's validation text, each column a routed expert, and each "
    "number the share of that text's tokens which the router sends there; framed cells are the "
    "experts trained on that very domain. A specialised model is dark in the frames, while equal "
    "shades mean that the router does not tell the domains apart; a mean gate close to 1 would "
    "mean a saturated router that can't learn any more.",
    "cosine": "Left, how alike the domain embeddings are to one another (1: same direction, 0: "
    "unrelated); right, the router rows that the learned projection P makes of them in the last "
    "layer. The paper finds that the order of the pairs is kept while unlike domains are pushed "
    "apart.",
    "centred": "A softmax does not see what all rows have in common, so only the differences from "
    "the mean decide where a token goes. Negative cosines (blue) are what a router that separates "
    "domains shows, and n perfectly separate experts would all stand at -1/(n-1).",
    "checkpoints": "Parameters counts every weight once, active per token leaves out the routed "
    "experts that a token does not visit. Tokens/s is the speed of this very scoring, forward "
    "passes only, on the machine that made this.",
    "lineage": "The steps that made this checkpoint, oldest first, as its sidecar nexus.json "
    "records them. Each step lists the settings that it was run with.",
}


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write the numbers behind a figure."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def file_names(models: Sequence[str]) -> dict[str, str]:
    """Return for each model a part of a file name that is harmless and its own."""
    taken: dict[str, str] = {}
    for model in models:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
        # Without regard to case: on some file systems a.png and A.png are one file.
        used = {name.lower() for name in taken.values()}
        name = plain
        count = 1
        while name.lower() in used:
            count += 1
            name = f"{plain}-{count}"
        taken[model] = name
    return taken


# Figures ------------------------------------------------------------------------------------------


def _draw_routing(routing: RoutingEntry, name: str, out: Path) -> None:
    share_LDE = np.array(routing.share_by_layer)
    domains = list(routing.mean_share)
    figures.routing_heatmap(
        share_LDE,
        domains,
        routing.experts,
        out,
        layers=routing.layers,
        own=routing.expert_domains,
        title=f"{name}: where tokens go",
    )
    rows: list[tuple[object, ...]] = []
    for (i, d, e), value in np.ndenumerate(share_LDE):
        rows.append((routing.layers[i], domains[d], routing.experts[e], value))
    for domain, shares in routing.mean_share.items():
        for expert, share in shares.items():
            rows.append(("mean", domain, expert, share))
    write_csv(out.with_suffix(".csv"), ("layer", "domain", "expert", "share"), rows)


def _draw_cosines(
    before_EE: np.ndarray,
    after_EE: np.ndarray,
    names: Sequence[str],
    out: Path,
    titles: tuple[str, str],
    title: str,
) -> None:
    """Draw one pair of tables, the numbers as CSV beside it."""
    figures.cosine_pair(before_EE, after_EE, names, out, titles=titles, title=title)
    rows = []
    for (i, j), before in np.ndenumerate(before_EE):
        rows.append((names[i], names[j], before, after_EE[i, j]))
    write_csv(out.with_suffix(".csv"), ("expert", "other", "before", "after"), rows)


def _draw_cosine(cosine: CosineEntry, name: str, out: Path) -> None:
    """Draw cosines before and after the projection, as they are and with the mean removed."""
    _draw_cosines(
        np.array(cosine.embeddings),
        np.array(cosine.rows)[-1],
        cosine.names,
        out,
        titles=("domain embeddings (before P)", "router rows of the last layer (after P)"),
        title=f"{name}: cosine between experts",
    )
    _draw_cosines(
        np.array(cosine.inputs),
        np.array(cosine.centred_rows).mean(axis=0),
        cosine.names,
        out.with_name(f"{out.stem}-centred.png"),
        titles=("centred embeddings (what P reads)", "centred router rows (mean over layers)"),
        title=f"{name}: cosine, mean removed",
    )


def _write_change(verdict: Verdict | None, out: Path) -> None:
    """Write what happened between the two models that are compared; nothing without two."""
    if verdict is None:
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
    rows = []
    for domain, change in {**verdict.domains, ALL: verdict.all}.items():
        found = change.as_dict()
        rows.append([domain, *(found[key] for key in columns)])
    write_csv(out, ("domain", *columns.values()), rows)


def _write_perplexity(summary: Summary, out: Path) -> None:
    """Write loss and perplexity, with the standard error where losses by window were kept."""
    rows = []
    for model, values in summary.perplexity.items():
        for domain, perplexity in values.items():
            error = None
            if summary.window_loss is not None:
                labels_W = summary.labels(model).get(domain)
                error = number(standard_error(summary.window_loss[model][domain], labels_W))
            rows.append((model, domain, summary.loss[model][domain], perplexity, error))
    header = ("model", "domain", "loss_nats", "perplexity", "standard_error_nats")
    write_csv(out, header, rows)


def draw(summary: Summary, folder: Path) -> None:
    """Draw all figures of a summary into `folder`: PNG, with the numbers as CSV beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    figures.perplexity_bars(summary.perplexity, folder / "perplexity.png")
    _write_perplexity(summary, folder / "perplexity.csv")
    _write_change(summary.verdict, folder / "change.csv")
    if summary.measures:
        write_csv(folder / "measures.csv", MEASURE_HEAD, measure_rows(summary.measures))
    draw_models(summary.models, folder)


def draw_models(models: Mapping[str, ModelEntry], folder: Path) -> None:
    """Draw the routing and the cosines of every mixture among `models` into `folder`."""
    for name, file in file_names(list(models)).items():
        entry = models[name]
        if entry.routing is not None:
            _draw_routing(entry.routing, name, folder / f"routing-{file}.png")
        if entry.cosine is not None and entry.has_embeddings:
            _draw_cosine(entry.cosine, name, folder / f"cosine-{file}.png")


# Tables and sections ------------------------------------------------------------------------------


def perplexity_table(summary: Summary) -> Table:
    """Return perplexity by model (rows) and domain (columns), and e to the mean of the losses."""
    found: dict[str, None] = {}
    for values in summary.perplexity.values():
        found |= dict.fromkeys(values)
    domains = list(found)
    rows: list[list[Cell]] = []
    for model, values in summary.perplexity.items():
        mean_loss = fmean(summary.loss[model].values())
        # below the largest float, as each domain's own perplexity
        whole = math.exp(min(700.0, mean_loss))
        rows.append([model, *[values.get(domain) for domain in domains], whole])
    return Table(
        header=["model", *domains, "all"],
        rows=rows,
        best="min" if len(rows) > 1 else None,
    )


def routing_table(routing: RoutingEntry) -> Table:
    """Return where each domain's tokens go, the own expert's share, and the mean gate."""
    gate_D = np.array(routing.gate_by_layer).mean(axis=0)
    rows: list[list[Cell]] = []
    for d, (domain, shares) in enumerate(routing.mean_share.items()):
        # Text of a domain without an expert has no share of its own.
        own = routing.own_share.get(domain)
        rows.append([domain, *shares.values(), own, float(gate_D[d])])
    header = ["text of", *routing.experts, "own expert", "mean gate"]
    return Table(header=header, rows=rows)


def _perplexity_section(summary: Summary, folder: Path) -> Section:
    return Section(
        title="Perplexity by domain",
        text=READING["perplexity"],
        figure=folder / "perplexity.png",
        table=perplexity_table(summary),
    )


def _change_section(summary: Summary) -> list[Section]:
    change = summary.change
    if change is None or change.verdict is None:
        return []
    left_open = [f"Not decided: {note}." for note in change.verdict.notes()]
    return [
        Section(
            title=f"From {change.before} to {change.after}",
            text="\n\n".join([READING["change"], *left_open]),
            table=change.verdict.table(change.before, change.after),
        )
    ]


def model_sections(
    name: str,
    file: str,
    entry: ModelEntry,
    folder: Path,
) -> list[Section]:
    """Return the sections about one model.

    Its figures are those that `draw_models` has put into `folder` under `file`.
    """
    sections: list[Section] = []
    if entry.routing is not None:
        sections.append(
            Section(
                title=f"Routing of {name}",
                text=READING["routing"],
                figure=folder / f"routing-{file}.png",
                table=routing_table(entry.routing),
            )
        )
    if entry.has_embeddings:
        sections += _cosine_sections(name, file, folder)
    return sections


def _cosine_sections(name: str, file: str, folder: Path) -> list[Section]:
    # Both: a router may look unspecialised only for what all its rows have in common.
    return [
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


CHECKPOINT_HEAD = [
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


def _checkpoint_section(summary: Summary) -> Section:
    rows: list[list[Cell]] = []
    for name, entry in summary.models.items():
        info, parameters = entry.info, entry.info["parameters"]
        rows.append(
            [
                name,
                info["kind"],
                info["family"],
                info["dtype"],
                # A dense model has none, which is a dash and not a count.
                info["routed_experts"] or None,
                info.get("top_k"),
                parameters["total"],
                parameters["active"],
                int(entry.tokens_per_second),
            ]
        )
    return Section(
        title="Checkpoints",
        text=READING["checkpoints"],
        table=Table(header=CHECKPOINT_HEAD, rows=rows),
    )


def _lineage_sections(summary: Summary) -> list[Section]:
    sections = []
    for name, entry in summary.models.items():
        lineage = entry.info.get("lineage") or []
        rows: list[list[Cell]] = [
            [str(number), str(step.get("verb", "")), _details(step)]
            for number, step in enumerate(lineage, start=1)
        ]
        if rows:
            sections.append(
                Section(
                    title=f"How {name} came about",
                    text=READING["lineage"],
                    table=Table(header=["step", "verb", "settings"], rows=rows),
                )
            )
    return sections


def _plain(value: object) -> str:
    """Return a recorded setting as people read it: 'kind nexus, depth 2', 'a, b', 0.4529."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _details(step: Mapping[str, object]) -> str:
    settings = {key: value for key, value in step.items() if key != "verb" and value is not None}
    return "; ".join(f"{key}: {_plain(value)}" for key, value in settings.items())


def evaluation_sections(summary: Summary, folder: Path) -> list[Section]:
    """Return the sections of a page about a summary whose figures `draw` has put into `folder`."""
    sections = [
        _perplexity_section(summary, folder),
        *_change_section(summary),
        *measure_sections(summary.measures),
        *task_sections(summary.tasks),
    ]
    for name, file in file_names(list(summary.models)).items():
        sections += model_sections(name, file, summary.models[name], folder)
    return [*sections, _checkpoint_section(summary), *_lineage_sections(summary)]


def answers(summary: Summary) -> str:
    """Return what was scored of chats, in words; nothing where there were none."""
    last = list(summary.models)[-1]
    counts = {domain: sum(labels) for domain, labels in summary.labels(last).items()}
    if not counts:
        return ""
    listed = ", ".join(f"{count:,} tokens of {domain}" for domain, count in counts.items())
    return f"Of chats the answers alone count: {listed}"


def intro(summary: Summary) -> str:
    """Return the opening paragraphs of the page: what was scored on what, and the warnings."""
    count = len(summary.models)
    setup = summary.setup
    text = (
        f"{count} model{'s' if count > 1 else ''} scored on {setup.windows} windows of "
        f"{setup.length} tokens of validation text in each of {len(setup.domains)} domains: "
        f"{', '.join(setup.domains)}."
    )
    chats = answers(summary)
    if chats:
        text += f" {chats}."
    return "\n\n".join([text, *(f"Warning: {warning}." for warning in summary.warnings)])


def write_evaluation(summary: Summary, out: Path) -> None:
    """Write summary.json, figures/ and report.html into the directory `out`."""
    write_json(out / SUMMARY, summary.to_json())
    draw(summary, out / FIGURES)
    title = f"Evaluation of {', '.join(summary.models)}"
    write_page(out / PAGE, title, intro(summary), evaluation_sections(summary, out / FIGURES))
