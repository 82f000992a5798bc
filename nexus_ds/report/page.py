"""One self-contained HTML page: sections of text, figures (inline PNG) and tables.

It is readable in light and dark. Everything that is put in is escaped; the page loads nothing from
anywhere and runs no script.

Not covered: links between pages, any other image format than PNG, markup inside texts.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from nexus_ds.console import in_line
from nexus_ds.errors import DataError
from nexus_ds.outputs import new_file, write_text

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# The page itself proves that it needs no network: a browser refuses anything but inline style and
# images.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark;
  --text: #1b1f24; --paper: #ffffff; --soft: #f3f5f8; --line: #d4dae1; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ee; --paper: #14171b; --soft: #1f242b; --line: #39424e; --accent: #7db7f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem;
  background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { max-width: 48rem; margin: .5rem 0; } h1 + p { font-size: 1.1rem; }
nav { margin: 1rem 0; } nav a { color: var(--accent); margin-right: 1rem; white-space: nowrap; }
figure { margin: 1rem 0; padding: .75rem; background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th { background: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
td:not(.text) { white-space: nowrap; } td:first-child { min-width: 8.5rem; }
td strong { color: var(--accent); }
footer { margin-top: 3rem; font-size: .85rem; opacity: .75; }
"""


@dataclass(frozen=True)
class Spread:
    """A mean and how far it may be off, shown as 4.613 ± 0.027."""

    mean: float
    deviation: float | None = None
    """Over seeds, or a standard error; None where nothing is known of it, as of one seed."""
    digits: int = 3
    signed: bool = False

    def __float__(self) -> float:
        return float(self.mean)

    def __str__(self) -> str:
        sign = "+" if self.signed else ""
        shown = f"{self.mean:{sign},.{self.digits}f}"
        if self.deviation is None:
            return shown
        # As many decimals as the mean, so that both can be read against one another.
        return f"{shown} ± {self.deviation:,.{self.digits}f}"


Cell = str | int | float | Spread | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its first column names the rows.

    `best` sets the smallest ("min") or largest ("max") number of every column (or row, see `along`)
    in bold, ties together; None sets nothing in bold; `only` names the columns that are compared
    (empty: all). Numbers keep three significant digits or two decimals; None shows as a dash.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    best: Literal["min", "max"] | None = None
    along: Literal["column", "row"] = "column"
    only: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs (separated by blank lines), and at most one figure and one table."""

    title: str
    text: str = ""
    figure: Path | None = None
    table: Table | None = field(default=None)


def format_cell(value: Cell) -> str:
    """Return a cell as people read it: 12,345 for counts, 1,235, 123.5 or 17.35 for numbers.

    Nothing, and what is not a number, is a dash. A cell has one line.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | str | Spread):
        return in_line(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _is_number(value: Cell) -> bool:
    # Python counts True as a number.
    if isinstance(value, bool) or not isinstance(value, int | float | Spread):
        return False
    return not math.isnan(float(value))


def best_cells(table: Table) -> set[tuple[int, int]]:
    """Return the (row, column) places of `table.rows` that are bold; the first column never is."""
    if table.best is None:
        return set()
    columns = []
    for c, name in enumerate(table.header):
        compared = not table.only or name in table.only
        if c > 0 and compared:
            columns.append(c)
    rows = range(len(table.rows))
    lines: Iterable[list[tuple[int, int]]]
    if table.along == "column":
        lines = [[(r, c) for r in rows] for c in columns]
    else:
        lines = [[(r, c) for c in columns] for r in rows]
    found: set[tuple[int, int]] = set()
    for line in lines:
        found |= _best_of(table, line)
    return found


def _best_of(table: Table, line: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return the best places of one column or row."""
    cells = {(r, c): table.rows[r][c] for r, c in line}
    numbers = {place: value for place, value in cells.items() if _is_number(value)}
    # One number alone has nothing to be better than.
    if len(numbers) < 2:
        return set()
    choose = min if table.best == "min" else max
    top = choose(float(value) for value in numbers.values() if value is not None)
    # What is shown decides about ties: two equal numbers of which one is bold would puzzle the
    # reader.
    best = set()
    for place, value in numbers.items():
        if format_cell(value) == format_cell(_as(value, top)):
            best.add(place)
    return best


def _as(like: Cell, number: float) -> Cell:
    if isinstance(like, Spread):
        return replace(like, mean=number)  # the same deviation: the means alone decide
    return int(number) if isinstance(like, int) else number


def text_table(table: Table) -> str:
    """Return the table as aligned plain text for a terminal, numbers to the right."""
    grid = [[format_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(len(line[c]) for line in grid) for c in range(len(table.header))]
    lines = []
    for first, *others in grid:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _check(table: Table) -> None:
    for number, row in enumerate(table.rows, start=1):
        if len(row) != len(table.header):
            raise DataError(
                f"row {number} of the table has {len(row)} cells, expected {len(table.header)} "
                f"as in its header ({', '.join(table.header)})"
            )


def _kind(*cells: Cell) -> str:
    """Return the attribute that puts text to the left; numbers stand at the right."""
    return ' class="text"' if any(isinstance(cell, str) for cell in cells) else ""


def _table(table: Table) -> str:
    _check(table)
    bold = best_cells(table)
    heads = []
    for c, name in enumerate(table.header):
        column = [row[c] for row in table.rows]
        heads.append(f"<th{_kind(*column)}>{html.escape(name)}</th>")
    body = []
    for r, row in enumerate(table.rows):
        cells = []
        for c, value in enumerate(row):
            shown = html.escape(format_cell(value))
            if (r, c) in bold:
                shown = f"<strong>{shown}</strong>"
            cells.append(f"<td{_kind(value)}>{shown}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(path: Path, title: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the figure of section {title!r} can't be read ({error}); "
            "draw it before the page"
        ) from error
    if not data.startswith(PNG_MAGIC):
        raise DataError(
            f"{path}: the figure of section {title!r} is not a PNG file; save it as PNG"
        )
    # In the page itself: it is sent around as one file.
    source = base64.b64encode(data).decode("ascii")
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{source}"></figure>'


def _paragraphs(text: str) -> str:
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    return "".join(f"<p>{html.escape(part)}</p>" for part in parts if part)


def _section(number: int, section: Section) -> str:
    parts = [
        f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>',
        _paragraphs(section.text),
    ]
    if section.figure is not None:
        parts.append(_figure(section.figure, section.title))
    if section.table is not None:
        parts.append(_table(section.table))
    return "\n".join([*parts, "</section>"])


def write_page(
    out: Path,
    title: str,
    intro: str,
    sections: Sequence[Section],
) -> None:
    """Write one HTML file that needs nothing else; an existing `out` is replaced in one step.

    Raises:
        DataError: a figure that is missing or no PNG, or a table row whose length differs from the
            header's.
    """
    # By number: titles repeat and may hold any character.
    links = [f'<a href="#s{n}">{html.escape(s.title)}</a> ' for n, s in enumerate(sections)]
    body = [
        _paragraphs(intro),
        f"<nav>{''.join(links)}</nav>",
        *[_section(number, section) for number, section in enumerate(sections)],
    ]
    with new_file(Path(out), overwrite=True) as temporary:
        write_text(temporary, document(title, body))


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """Return a page that needs nothing else, of a title and lines of HTML, with `style` beside the
    pages' own."""
    heading = html.escape(title)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title>",
        f"<style>{STYLE}{style}</style>",
        "</head>",
        "<body>",
        f"<h1>{heading}</h1>",
        *body,
        "<footer>Written by nexus_ds.</footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"
