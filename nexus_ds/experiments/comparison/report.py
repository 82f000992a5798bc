"""What `nexus-ds compare` measured, as a page, figures with CSV, tables as CSV, and text for the
terminal.

Everything is made from results.json alone (comparison_tables.py says what stands in it), so that a
page can be made again, or from results that were joined. What was not measured is left out or shown
as a dash, never guessed.

Not covered: figures of more than about 14 contenders or 30 settings (they are drawn, but crowded).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nexus_ds.experiments.comparison.report_figures import (
    draw_compute,
    draw_differences,
    draw_extension,
    draw_share,
    draw_variants,
)
from nexus_ds.experiments.comparison.report_findings import verdict
from nexus_ds.experiments.comparison.report_tables import (
    additions,
    domain_table,
    extension_table,
    extension_variant_table,
    label,
    methods_of,
    old_domains,
    own_table,
    quality_table,
    share_table,
    start_table,
    task_table,
    variant_table,
)
from nexus_ds.report.evaluation import draw_models, file_names, model_sections, write_csv
from nexus_ds.report.page import Section, Spread, Table, text_table, write_page
from nexus_ds.report.paired import budgets_of, number, seeds_of
from nexus_ds.report.summary import ModelEntry

__all__ = ["terminal_tables", "verdict", "write_comparison"]

Entry = Mapping[str, Any]
PAGE, FIGURES, TABLES = "report.html", "figures", "tables"
SHOWN = (
    "nexus",
    "linear",
    "nexus_context",
    "extended: nexus_refit",
    "extended: linear_reset",
    "extended: nexus_zero_shot",
)
"""Whose routing is drawn layer by layer, of those that were evaluated; the tables have all."""

# Two sentences each: what is shown, and how to read it.
READING = {
    "quality": "Mean loss over the old domains' validation text in nats per token (lower is better, ± standard deviation "
    "over seeds), the difference to the reference seed by seed, and beside it what each contender cost from the seed "
    "model on, branches included. In the figure every dot is a seed and every bar a mean: right of the grey band the "
    "contender is worse than the reference, inside it the difference is too small to be called.",
    "domains": "Perplexity (e to the loss per token) of each domain's validation text; bold is the best of a column "
    "(paper, Tables 2 and 3, with perplexity in place of tasks). A dense branch should win its own domain and lose the "
    "others, and a good mixture comes close to each branch at once.",
    "starts": "Loss and own-domain share on the old domains right after the models were put together, and after training. "
    "A warm start of the router shows in the first two columns, and what is left of its lead in the last two.",
    "tasks": "Mean score by group of tasks, higher is better (paper, Tables 2 and 3). Differences below a few points are "
    "within the noise of small test sets, so read them with the perplexities.",
    "compute": "Loss on the old domains against the training compute spent after the seed model, branches included. The "
    "lower left is good: a contender right of another and no lower got nothing for its additional compute.",
    "new": "Loss on the added domain before any finetuning and after each budget; the mixture before has no expert for "
    "it (paper, Figure 4). The first columns show what the way of adding is worth at once, the last whether finetuning "
    "makes up for it.",
    "old": "Loss on the older domains over the same finetuning; the dotted line in the figure above is the reference "
    "extension's own starting point. A good extension stays at that level while the new domain falls.",
    "share": "Share is the part of the new domain's tokens that the router sends to the new expert, leak the part of the "
    "old domains' tokens that goes there too (paper, Figure 6). A good router has a high share and a low leak; both high "
    "together mean that it sends everything there.",
    "own": "Share of each domain's tokens that go to the expert trained on that domain, mean over layers (paper, Figures "
    "5 and 9). With n experts, 1/n is what a router without any knowledge reaches.",
    "variants": "The same contenders with one setting changed, on the same seeds (paper, Figure 7, has load balancing and "
    "equal data). The difference is that to the same contender in the recipe as it stands, so below 0 the change helps.",
    "extension_variants": "The same extensions with one setting changed, after the last budget. Differences are those to "
    "the same extension in the recipe as it stands, so below 0 the change helps.",
    "missing": "What the recipe names and nothing was measured of, with the reason. A comparison says nothing about these.",
    "about": "What each contender is. Contenders see the same text, in the same order for one seed, and are scored on the "
    "same validation windows.",
    "settings": "Where and how this was made. The command repeats it; a finished part is not run again.",
}


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "x"


def _not_run(results: Entry) -> Table | None:
    """Return what is missing: what was not run, failed, or lacks some seeds."""
    rows: list[list[Any]] = [
        [str(item["name"]), str(item["why"])] for item in results.get("not_run") or []
    ]
    named = {row[0] for row in rows}
    wanted = [str(seed) for seed in results["seeds"]]
    for kind, values in (("contenders", "loss"), ("extensions", "budgets")):
        for entry in results.get(kind) or []:
            found = seeds_of(entry)
            lost = [seed for seed in wanted if not found.get(seed, {}).get(values)]
            if lost and not named & {entry["name"], label(entry)}:
                added = f", adding {entry['added']}" if entry.get("added") else ""
                rows.append([label(entry) + added, f"not measured with seed {', '.join(lost)}"])
    return Table(header=["what", "why"], rows=rows) if rows else None


def _about(results: Entry) -> Table:
    rows: list[list[Any]] = []
    for kind, what in (("contenders", "contender"), ("extensions", "extension")):
        for entry in results.get(kind) or []:
            row = [str(entry.get("label") or entry["name"]), what, str(entry.get("about") or "")]
            if row not in rows:  # variants and several added domains repeat it
                rows.append(row)
    return Table(header=["name", "kind", "what it is"], rows=rows)


def _command(results: Entry) -> str:
    return shlex.join(
        [
            "nexus-ds",
            "compare",
            "--config",
            str(results["recipe"]),
            "--out",
            "DIR",
            *map(str, results.get("overrides") or []),
        ]
    )


def _settings(results: Entry) -> Table:
    data = results.get("data") or {}
    seconds = number(results.get("seconds"))
    rows: list[list[Any]] = [
        ["repeat it", _command(results)],
        ["seeds", ", ".join(str(seed) for seed in results["seeds"])],
        ["machine", str(results.get("machine") or "unknown")],
        ["time", "unknown" if seconds is None else f"{seconds / 60:.1f} minutes"],
        ["text", str(data.get("path") or "unknown")],
        [
            "validation",
            f"{data.get('windows', '?')} windows of {data.get('length', '?')} tokens a domain",
        ],
        *[
            [f"domains, {role}", ", ".join(names)]
            for role, names in results["domains"].items()
            if names
        ],
    ]
    for name, variant in (results.get("variants") or {}).items():
        rows.append([f"setting {name}", " ".join((variant or {}).get("overrides") or [])])
    return Table(header=["setting", "value"], rows=rows)


def _upcycling_sections(results: Entry, folder: Path) -> list[Section]:
    sections = [
        Section(
            title="Contenders",
            text=READING["quality"],
            table=quality_table(results),
            figure=draw_differences(results, folder / "differences.png"),
        ),
        Section(title="Perplexity by domain", text=READING["domains"], table=domain_table(results)),
    ]
    starts = start_table(results)
    if starts is not None:
        sections.append(
            Section(title="Before training, and after", text=READING["starts"], table=starts)
        )
    tasks = task_table(results)
    if tasks is not None:
        sections.append(Section(title="Tasks", text=READING["tasks"], table=tasks))
    figure = draw_compute(results, folder / "compute.png")
    if figure is not None:
        sections.append(
            Section(title="Quality against compute", text=READING["compute"], figure=figure)
        )
    return sections


def _extension_sections(results: Entry, added: str, folder: Path) -> list[Section]:
    file = _file(added)
    return [
        Section(
            title=f"Adding {added}: the new domain",
            text=READING["new"],
            figure=draw_extension(results, added, folder / f"extension-{file}.png"),
            table=extension_table(results, added, new=True),
        ),
        Section(
            title=f"Adding {added}: the old domains",
            text=READING["old"],
            table=extension_table(results, added, new=False),
        ),
        Section(
            title=f"Adding {added}: where tokens go",
            text=READING["share"],
            figure=draw_share(results, added, folder / f"share-{file}.png"),
            table=share_table(results, added),
        ),
    ]


def _routing_sections(results: Entry, folder: Path) -> list[Section]:
    """Return own shares, and routing by layer and cosines of the first seed's mixtures (paper
    Figures 5, 6 and 8)."""
    sections = []
    own = own_table(results)
    if own is not None:
        sections.append(Section(title="Own-domain share", text=READING["own"], table=own))
    labels = {
        f"extended: {e['name']}": label(e)
        for e in results.get("extensions") or []
        if not e.get("variant")
    }
    labels |= {e["name"]: label(e) for e in results.get("contenders") or [] if not e.get("variant")}
    found = results.get("evaluations") or {}
    models = {}
    for name in SHOWN:
        if name in found:
            entry = ModelEntry.from_json(found[name])
            # Free rows have no projection, so cosines before and after it are drawn of Nexus alone.
            models[labels.get(name, name)] = (
                entry if "nexus" in name else replace(entry, cosine=None)
            )
    draw_models(models, folder)
    for name, file in file_names(list(models)).items():
        sections += model_sections(name, file, models[name], folder)
    return sections


def _variant_sections(results: Entry, folder: Path) -> list[Section]:
    sections = []
    table, more = variant_table(results), extension_variant_table(results)
    if table is not None:
        figure = draw_variants(results, folder / "settings.png")
        sections.append(
            Section(title="Changed settings", text=READING["variants"], table=table, figure=figure)
        )
    if more is not None:
        sections.append(
            Section(
                title="Changed settings, extension", text=READING["extension_variants"], table=more
            )
        )
    return sections


def _end_sections(results: Entry) -> list[Section]:
    missing = _not_run(results)
    sections = [Section(title="Not run", text=READING["missing"], table=missing)] if missing else []
    return [
        *sections,
        Section(title="What the contenders are", text=READING["about"], table=_about(results)),
        Section(
            title="Settings, and how to repeat this",
            text=READING["settings"],
            table=_settings(results),
        ),
    ]


def comparison_sections(results: Entry, folder: Path) -> list[Section]:
    """Draw all figures into `folder` and return the sections of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = _upcycling_sections(results, folder) if methods_of(results) else []
    for added in additions(results):
        sections += _extension_sections(results, added, folder)
    return [
        *sections,
        *_routing_sections(results, folder),
        *_variant_sections(results, folder),
        *_end_sections(results),
    ]


def _write_tables(sections: Sequence[Section], folder: Path) -> None:
    """Write every table as CSV with full numbers; a mean over seeds takes two columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if section.table is None:
            continue
        table = section.table
        wide = [
            any(isinstance(row[c], Spread) for row in table.rows) for c in range(len(table.header))
        ]
        header: list[str] = []
        for name, double in zip(table.header, wide, strict=True):
            header += [name, f"{name} (deviation)"] if double else [name]
        rows = []
        for row in table.rows:
            cells: list[Any] = []
            for cell, double in zip(row, wide, strict=True):
                if isinstance(cell, Spread):
                    cells += [cell.mean, cell.deviation]
                else:
                    cells += [cell, None] if double else [cell]
            rows.append(cells)
        write_csv(folder / f"{_file(section.title.lower())}.csv", header, rows)


def _write_measured(results: Entry, folder: Path) -> None:
    """Write every loss of every seed, so that other statistics can be made from them."""
    rows: list[tuple[Any, ...]] = []
    for entry in results.get("contenders") or []:
        for seed, value in seeds_of(entry).items():
            rows += [
                (entry["name"], entry.get("variant") or "", "", "", seed, domain, loss)
                for domain, loss in (value.get("loss") or {}).items()
            ]
    for entry in results.get("extensions") or []:
        for budget in budgets_of([entry]):
            for seed, value in seeds_of(entry, budget).items():
                rows += [
                    (
                        entry["name"],
                        entry.get("variant") or "",
                        entry.get("added"),
                        budget,
                        seed,
                        domain,
                        loss,
                    )
                    for domain, loss in (value.get("loss") or {}).items()
                ]
    header = ("contender", "variant", "added", "finetune_tokens", "seed", "domain", "loss_nats")
    write_csv(folder / "losses.csv", header, rows)


def _title(recipe: str) -> str:
    """Return the page's title: a recipe of the package by its name, a file by that of the file."""
    name = Path(recipe).name if recipe.endswith(".yaml") else recipe
    return f"Comparison {name.removesuffix('.yaml')}"


def write_comparison(results: dict[str, Any], folder: Path) -> None:
    """Write report.html (self-contained), figures/ (PNG, CSV beside each) and tables/ (CSV) into
    `folder`."""
    folder = Path(folder)
    sections = comparison_sections(results, folder / FIGURES)
    _write_tables(sections, folder / TABLES)
    _write_measured(results, folder / TABLES)
    write_page(folder / PAGE, _title(results["recipe"]), "\n\n".join(verdict(results)), sections)


def _narrow(table: Table, without: Sequence[str]) -> Table:
    """Return the table without the columns whose heads begin with one of `without`."""
    kept = [c for c, name in enumerate(table.header) if not name.startswith(tuple(without))]
    return Table(
        header=[table.header[c] for c in kept], rows=[[row[c] for c in kept] for row in table.rows]
    )


def terminal_tables(results: Entry) -> str:
    """Return the main tables as plain text: contenders with their cost, and each extension's losses
    and shares."""
    parts = []
    if methods_of(results):
        table = _narrow(quality_table(results), ("gate", "× ", "seconds"))
        parts.append(f"Old domains ({', '.join(old_domains(results))})\n{text_table(table)}")
    for added in additions(results):
        parts += [
            f"Adding {added}: {what}\n{text_table(_narrow(table, ('training', '× ', 'own share')))}"
            for what, table in (
                ("loss on the new domain", extension_table(results, added, new=True)),
                ("loss on the old domains", extension_table(results, added, new=False)),
                ("share of its tokens at the new expert, and leak", share_table(results, added)),
            )
        ]
    return "\n\n".join(parts)
