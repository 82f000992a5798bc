"""What `nexus-ds compare` measured, as a page, figures with CSV, tables as CSV, and text for the
terminal.

Everything is made from results.json alone (result_file.py says what stands in it), so that a page
can be made again, or from results that were joined. What was not measured is left out or shown as a
dash, never guessed.

Not covered: figures of more than about 14 methods or 30 settings (they are drawn, but crowded).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nexus_ds.experiments.comparison.report_figures import (
    draw_compute,
    draw_differences,
    draw_extension,
    draw_share,
    draw_variants,
)
from nexus_ds.experiments.comparison.report_opening import QUESTION, opening_sections
from nexus_ds.experiments.comparison.report_seed import seed_sections
from nexus_ds.experiments.comparison.report_tables import (
    additions,
    domain_table,
    extension_table,
    extension_variant_table,
    methods_of,
    own_table,
    quality_table,
    regime_table,
    regimes,
    share_table,
    start_table,
    task_table,
    variant_table,
)
from nexus_ds.experiments.comparison.report_turns import turn_table
from nexus_ds.experiments.comparison.result_file import Results
from nexus_ds.report.evaluation import draw_models, file_names, model_sections, write_csv
from nexus_ds.report.measure_tables import measure_sections
from nexus_ds.report.page import Cell, Section, Spread, Table, text_table, write_page
from nexus_ds.report.summary import ModelEntry

PAGE = "report.html"
FIGURES = "figures"
TABLES = "tables"
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
    "quality": "Mean loss over the old domains' validation text in nats per token (lower is "
    "better, ± standard deviation over seeds), the difference to the reference seed by seed, and "
    "beside it what each contender cost from the seed model on, branches included. In the figure "
    "every dot is a seed and every bar a mean: right of the grey band the contender is worse than "
    "the reference, inside it the difference is too small to be called.",
    "domains": "Perplexity (e to the loss per token) of each domain's validation text; bold is the "
    "best of a column (paper, Tables 2 and 3, with perplexity in place of tasks). A dense branch "
    "should win its own domain and lose the others, and a good mixture comes close to each branch "
    "at once.",
    "starts": "Loss and own-domain share on the old domains right after the models were put "
    "together, and after training. A warm start of the router shows in the first two columns, and "
    "what is left of its lead in the last two.",
    "tasks": "Mean score by group of tasks, higher is better (paper, Tables 2 and 3). Differences "
    "below a few points are within the noise of small test sets, so read them with the "
    "perplexities.",
    "compute": "Loss on the old domains against the training compute spent after the seed model, "
    "branches included. The lower left is good: a contender right of another and no lower got "
    "nothing for its additional compute.",
    "new": "Loss on the added domain before any finetuning and after each budget; the mixture "
    "before has no expert for it (paper, Figure 4). The first columns show what the way of adding "
    "is worth at once, the last whether finetuning makes up for it.",
    "old": "Loss on the older domains over the same finetuning; the dotted line in the figure "
    "above is the reference extension's own starting point. A good extension stays at that level "
    "while the new domain falls.",
    "share": "Share is the part of the new domain's tokens that the router sends to the new "
    "expert, leak the part of the old domains' tokens that goes there too (paper, Figure 6). A "
    "good router has a high share and a low leak; both high together mean that it sends "
    "everything there.",
    "turns": "Perplexity of every domain's validation text after each addition. What is forgotten "
    "is by how many per cent it has grown in the end: of an old domain since the mixture before, "
    "of a new one since its own addition.",
    "own": "Share of each domain's tokens that go to the expert trained on that domain, mean over "
    "layers (paper, Figures 5 and 9). With n experts, 1/n is what a router without any knowledge "
    "reaches.",
    "regimes": "Loss minus that of the dense model with the same budget, by how many tokens a "
    "parameter the seed model had read before. Below 0 a mixture is better than training the dense "
    "model on; a seed that still falls steeply favours whatever trains longest.",
    "variants": "The same contenders with one setting changed, on the same seeds (paper, Figure 7, "
    "has load balancing and equal data). The difference is that to the same contender in the "
    "recipe as it stands, so below 0 the change helps.",
    "extension_variants": "The same extensions with one setting changed, after the last budget. "
    "Differences are those to the same extension in the recipe as it stands, so below 0 the "
    "change helps.",
    "missing": "What the recipe names and nothing was measured of, with the reason. A comparison "
    "says nothing about these.",
    "about": "What each contender is. Contenders see the same text, in the same order for one "
    "seed, and are scored on the same validation windows.",
    "settings": "Where and how this was made. The command repeats it; a finished part is not run "
    "again.",
}


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "x"


# Sections -----------------------------------------------------------------------------------------


def _not_run(results: Results) -> Table | None:
    """Return what is missing: what was not run, failed, or lacks some seeds."""
    lines: list[list[Cell]] = [[item.name, item.why] for item in results.not_run]
    # One line each: why it failed says more than that its seeds are missing.
    told = {item.name for item in results.not_run}

    def add(
        name: str,
        title: str,
        added: str,
        measured: set[str],
    ) -> None:
        lost = [seed for seed in map(str, results.seeds) if seed not in measured]
        if lost and name not in told and title not in told:
            what = f"{title}, adding {added}" if added else title
            lines.append([what, f"not measured with seed {', '.join(lost)}"])

    for method in results.methods:
        measured = {seed for seed, scores in method.seeds.items() if scores.loss}
        add(method.name, method.title, "", measured)
    for extension in results.extensions:
        measured = {seed for seed, budgets in extension.seeds.items() if budgets}
        add(extension.name, extension.title, extension.added, measured)
    return Table(header=["what", "why"], rows=lines) if lines else None


def _about(results: Results) -> Table:
    lines = [(row.label, "contender", row.about) for row in results.methods]
    lines += [(row.label, "extension", row.about) for row in results.extensions]
    # Variants and several added domains repeat a line.
    once = [list(line) for line in dict.fromkeys(lines)]
    return Table(header=["name", "kind", "what it is"], rows=once)


def _command(results: Results) -> str:
    words = ["nexus-ds", "compare", "--config", results.recipe, "--out", "DIR"]
    return shlex.join([*words, *results.overrides])


def _settings(results: Results) -> Table:
    data = results.data
    domains = results.domains
    minutes = None if results.seconds is None else results.seconds / 60
    windows = "?" if data.windows is None else data.windows
    length = "?" if data.length is None else data.length
    lines: list[list[Cell]] = [
        ["repeat it", _command(results)],
        ["seeds", ", ".join(str(seed) for seed in results.seeds)],
        ["machine", results.machine or "unknown"],
        ["time", "unknown" if minutes is None else f"{minutes:.1f} minutes"],
        ["text", data.path or "unknown"],
        ["validation", f"{windows} windows of {length} tokens a domain"],
    ]
    for role, names in vars(domains).items():
        if names:
            lines.append([f"domains, {role}", ", ".join(names)])
    for name, overrides in results.contender_settings.items():
        lines.append([f"{name} alone", " ".join(overrides)])
    for name, overrides in results.variants.items():
        lines.append([f"setting {name}", " ".join(overrides)])
    return Table(header=["setting", "value"], rows=lines)


def _upcycling_sections(results: Results, folder: Path) -> list[Section]:
    many = regimes(results)
    sections = [
        Section(
            title="Contenders",
            text=READING["quality"],
            table=quality_table(results),
            # the page's first figure, where there are no regimes
            figure=draw_differences(results, folder / "differences.png") if many else None,
        ),
        Section(
            title="Perplexity by domain",
            text=READING["domains"],
            table=domain_table(results),
        ),
    ]
    starts = start_table(results)
    if starts is not None:
        sections.append(
            Section(
                title="Before training, and after",
                text=READING["starts"],
                table=starts,
            )
        )
    tasks = task_table(results)
    if tasks is not None:
        sections.append(
            Section(
                title="Tasks",
                text=READING["tasks"],
                table=tasks,
            )
        )
    sections += measure_sections(results.measures)
    figure = draw_compute(results, folder / "compute.png")
    if figure is not None:
        sections.append(
            Section(
                title="Quality against compute",
                text=READING["compute"],
                figure=figure,
            )
        )
    return sections


def _extension_sections(results: Results, added: str, folder: Path) -> list[Section]:
    file = _file(added)
    sections = [
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
    turns = turn_table(results, added)
    if turns is not None:
        title = f"Adding {added}: what is forgotten"
        sections.append(Section(title=title, text=READING["turns"], table=turns))
    return sections


def _routing_sections(results: Results, folder: Path) -> list[Section]:
    """Return own shares, and routing by layer and cosines of the first seed's mixtures (paper
    Figures 5, 6 and 8)."""
    sections = []
    own = own_table(results)
    if own is not None:
        sections.append(
            Section(
                title="Own-domain share",
                text=READING["own"],
                table=own,
            )
        )
    models = _shown_models(results)
    draw_models(models, folder)
    for name, file in file_names(list(models)).items():
        sections += model_sections(name, file, models[name], folder)
    return sections


def _shown_models(results: Results) -> dict[str, ModelEntry]:
    """Return the evaluations whose figures are drawn, by the label of the method or extension."""
    labels = {}
    # A variant's row has the same name, and would take the label.
    for extension in results.extensions:
        if not extension.variant:
            labels[f"extended: {extension.name}"] = extension.title
    for method in results.methods:
        if not method.variant:
            labels[method.name] = method.title
    models = {}
    for name in SHOWN:
        if name not in results.evaluations:
            continue
        entry = results.evaluations[name]
        # Free expert embeddings have no projection, so cosines before and after it are drawn of
        # Nexus alone.
        if "nexus" not in name:
            entry = replace(entry, cosine=None)
        models[labels.get(name, name)] = entry
    return models


def _regime_sections(results: Results, folder: Path) -> list[Section]:
    table = regime_table(results)
    if table is None:
        return []
    # its figure is the page's first one
    return [Section(title="A longer trained seed", text=READING["regimes"], table=table)]


def _variant_sections(results: Results, folder: Path) -> list[Section]:
    sections = []
    methods = variant_table(results)
    if methods is not None:
        sections.append(
            Section(
                title="Changed settings",
                text=READING["variants"],
                table=methods,
                figure=draw_variants(results, folder / "settings.png"),
            )
        )
    extensions = extension_variant_table(results)
    if extensions is not None:
        sections.append(
            Section(
                title="Changed settings, extension",
                text=READING["extension_variants"],
                table=extensions,
            )
        )
    return sections


def _end_sections(results: Results) -> list[Section]:
    sections = []
    missing = _not_run(results)
    if missing is not None:
        sections.append(
            Section(
                title="Not run",
                text=READING["missing"],
                table=missing,
            )
        )
    return [
        *sections,
        Section(
            title="What the contenders are",
            text=READING["about"],
            table=_about(results),
        ),
        Section(
            title="Settings, and how to repeat this",
            text=READING["settings"],
            table=_settings(results),
        ),
    ]


def comparison_sections(results: Results, folder: Path) -> list[Section]:
    """Draw all figures into `folder` and return the sections of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = _upcycling_sections(results, folder) if methods_of(results) else []
    for added in additions(results):
        sections += _extension_sections(results, added, folder)
    return [
        *sections,
        *_routing_sections(results, folder),
        *seed_sections(results, folder),
        *_regime_sections(results, folder),
        *_variant_sections(results, folder),
        *_end_sections(results),
    ]


# Files --------------------------------------------------------------------------------------------


def _flat(cell: Cell, wide: bool) -> list[str | int | float | None]:
    """Return a cell's numbers; in a `wide` column (one with means) two, mean and deviation."""
    if isinstance(cell, Spread):
        return [cell.mean, cell.deviation]
    return [cell, None] if wide else [cell]


def _write_table(table: Table, out: Path) -> None:
    """Write a table as CSV with full numbers; a column with a mean over seeds becomes two."""
    columns = range(len(table.header))
    wide = []
    for c in columns:
        wide.append(any(isinstance(row[c], Spread) for row in table.rows))
    header: list[str] = []
    for name, double in zip(table.header, wide, strict=True):
        header += [name, f"{name} (deviation)"] if double else [name]
    lines = []
    for row in table.rows:
        line: list[str | int | float | None] = []
        for cell, double in zip(row, wide, strict=True):
            line += _flat(cell, double)
        lines.append(line)
    write_csv(out, header, lines)


def _write_tables(sections: Sequence[Section], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        if section.table is not None:
            _write_table(section.table, folder / f"{_file(section.title.lower())}.csv")


def _write_measured(results: Results, folder: Path) -> None:
    """Write every loss of every seed, so that other statistics can be made from them."""
    lines: list[tuple[str | float, ...]] = []
    for method in results.methods:
        for seed, scores in method.seeds.items():
            for domain, loss in scores.loss.items():
                lines.append((method.name, method.variant, "", "", seed, domain, loss))
    for row in results.extensions:
        for budget in row.budgets:
            for seed, after in row.after(budget).items():
                for domain, loss in after.loss.items():
                    lines.append((row.name, row.variant, row.added, budget, seed, domain, loss))
    header = ("contender", "variant", "added", "finetune_tokens", "seed", "domain", "loss_nats")
    write_csv(folder / "losses.csv", header, lines)


def _title(recipe: str) -> str:
    """Return the page's title: a recipe of the package by its name, a file by that of the file."""
    name = Path(recipe).name if recipe.endswith(".yaml") else recipe
    return f"Comparison {name.removesuffix('.yaml')}"


def write_comparison(results: Results, folder: Path) -> None:
    """Write report.html (self-contained), figures/ (PNG, CSV) and tables/ (CSV) into `folder`."""
    opening = opening_sections(results, _command(results), folder / FIGURES)
    sections = [*opening, *comparison_sections(results, folder / FIGURES)]
    _write_tables(sections, folder / TABLES)
    _write_measured(results, folder / TABLES)
    write_page(folder / PAGE, _title(results.recipe), QUESTION, sections)


def _narrow(table: Table, without: Sequence[str]) -> Table:
    """Return the table without the columns whose heads begin with one of `without`."""
    kept = [c for c, name in enumerate(table.header) if not name.startswith(tuple(without))]
    header = [table.header[c] for c in kept]
    return Table(header=header, rows=[[row[c] for c in kept] for row in table.rows])


def terminal_tables(results: Results) -> str:
    """Return the main tables as plain text.

    Methods with their cost, and each extension's losses and shares.
    """
    parts = []
    if methods_of(results):
        table = _narrow(quality_table(results), ("gate", "× ", "seconds"))
        parts.append(f"Old domains ({', '.join(results.domains.old)})\n{text_table(table)}")
    for added in additions(results):
        tables = {
            "loss on the new domain": extension_table(results, added, new=True),
            "loss on the old domains": extension_table(results, added, new=False),
            "share of its tokens at the new expert, and leak": share_table(results, added),
        }
        for what, table in tables.items():
            narrow = _narrow(table, ("training", "× ", "own share"))
            parts.append(f"Adding {added}: {what}\n{text_table(narrow)}")
        turns = turn_table(results, added)
        if turns is not None:
            parts.append(f"Adding {added}: perplexity after each\n{text_table(turns)}")
    return "\n\n".join(parts)
