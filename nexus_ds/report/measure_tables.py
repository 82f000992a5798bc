"""Measures over held-out documents as a table, a section of a page and a CSV.

`nexus_ds.evaluation.documents` and `.distance` measure them; `report.summary.MeasureEntry` is what
is read here.

Not covered: figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from nexus_ds.errors import ConfigError
from nexus_ds.report.page import Cell, Section, Spread, Table
from nexus_ds.report.paired import Difference, mean_difference, over_windows
from nexus_ds.report.summary import MeasureEntry, OverDocuments

TITLES = {
    "bits": "bits per byte (lower is better)",
    "cloze": "cloze (share of right words, higher is better)",
    "generation": "distance of generated text (bits, lower is better)",
}
REFERENCES = {
    "bits": "",
    "cloze": "chance",
    "generation": "real text",
}
READING = {
    "bits": "What a byte of a held-out document costs: the nats of all its tokens over ln 2 and "
    "over its bytes in UTF-8. It does not depend on the tokenizer, and so models of different "
    "vocabularies compare.",
    "cloze": "How often the model prefers the word that a held-out passage ends with to nine other "
    "words of like frequency, all among the 500 most frequent of the domain with at least four "
    "letters. Chance is one in ten.",
    "generation": "The Jensen-Shannon divergence between the words of generated continuations of "
    "held-out prompts and of the real ones. The real text that follows these, which is as long, "
    "has the distance in the last row: less can hardly be reached.",
}
ERRORS = (
    "± is one standard error over stretches of documents. A row with a minus compares two models "
    "document by document, and what makes a document hard for both cancels."
)
MEASURE_HEAD = ("measure", "model", "domain", "mean", "standard_error", "documents", "items")


def measures_named(text: str, key: str) -> list[str]:
    """Return the measures that a list with commas names, in their own order.

    Args:
        text: names, or all.
        key: the option or setting that they come from, for the message.

    Raises:
        ConfigError: an unknown name.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if asked == ["all"]:
        return list(TITLES)
    unknown = [name for name in asked if name not in TITLES]
    if unknown:
        raise ConfigError(
            f"{key}{text!r}: found {', '.join(unknown)}, expected all, or some of "
            f"{', '.join(TITLES)}"
        )
    return [name for name in TITLES if name in asked]


def _mean(by_domain: Mapping[str, OverDocuments]) -> Spread:
    """Return the mean over domains, each counting the same, and its standard error."""
    means = [part.mean for part in by_domain.values()]
    errors = [part.error for part in by_domain.values()]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    return Spread(fmean(means), error)


def _row(name: str, by_domain: Mapping[str, OverDocuments]) -> list[Cell]:
    cells = [Spread(part.mean, part.error) for part in by_domain.values()]
    return [name, *cells, _mean(by_domain)]


def _spread(difference: Difference) -> Spread:
    error = None if math.isnan(difference.error) else difference.error
    return Spread(difference.mean, error, signed=True)


def _difference_row(entry: MeasureEntry, first: str, name: str) -> list[Cell]:
    """Return the second model minus the first, document by document."""
    parts = []
    for domain, part in entry.models[name].items():
        before = entry.models[first][domain]
        parts.append(over_windows(before.values, part.values, part.weights))
    cells = [_spread(part) for part in parts]
    return [f"{name} − {first}", *cells, _spread(mean_difference(parts))]


def measure_table(measure: str, entry: MeasureEntry) -> Table:
    """Return a measure by model (rows) and domain (columns), what it is to be held against, and
    each model minus the first, ± one standard error."""
    first, *others = entry.models
    rows = [_row(name, by_domain) for name, by_domain in entry.models.items()]
    if entry.reference:
        rows.append(_row(REFERENCES[measure], entry.reference))
    rows += [_difference_row(entry, first, name) for name in others]
    return Table(header=["model", *entry.models[first], "mean"], rows=rows)


def measure_sections(measures: Mapping[str, MeasureEntry]) -> list[Section]:
    """Return a section for each measure."""
    sections = []
    for measure, entry in measures.items():
        title = TITLES[measure]
        section = Section(
            title=title[0].upper() + title[1:],
            text=f"{READING[measure]}\n\n{ERRORS}",
            table=measure_table(measure, entry),
        )
        sections.append(section)
    return sections


def measure_rows(measures: Mapping[str, MeasureEntry]) -> list[list[object]]:
    """Return the rows of a CSV below MEASURE_HEAD."""
    rows: list[list[object]] = []
    for measure, entry in measures.items():
        every = dict(entry.models)
        if entry.reference:
            every[REFERENCES[measure]] = entry.reference
        for name, by_domain in every.items():
            for domain, part in by_domain.items():
                count = len(part.values)
                items = sum(part.weights)
                rows.append([measure, name, domain, part.mean, part.error, count, items])
    return rows
