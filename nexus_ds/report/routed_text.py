"""Text whose tokens have the colours of their experts: on a terminal, in marks, and as a page.

Not covered: more than the first expert of a token, routes in parallel columns.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_ds.console import visible
from nexus_ds.generation.continuation import Said
from nexus_ds.generation.routes import first_choice
from nexus_ds.outputs import new_file, write_text
from nexus_ds.report.figures import COLOURS
from nexus_ds.report.page import (
    Cell,
    Table,
    document,
    format_cell,
    text_table,
)

TERMINAL = (25, 214, 36, 175, 74, 166, 242)
"""COLOURS among the 256 of terminals."""
ON_DARK = (0, 5, 6)
"""Those of them on which white can be read; on the others black."""
UNDERLINES = ("", "4;", "1;4;")
BORDERS = ("none", "2px solid", "2px dashed")
"""Second marks, once the colours are used up."""
RESET = "\x1b[0m"

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; line-height: 1.9;
  font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .93rem; }
.tokens span { padding: .12em 0; border-radius: 2px; }
.tokens .given { font-style: italic; }
td .swatch { display: inline-block; padding: 0 .5em; border-radius: 2px; }
details { margin: .75rem 0; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Legend:
    """What the colours mean."""

    experts: Sequence[str]
    """Names, by number."""
    domains: Sequence[str]
    """Of the text that they were trained on; '' where no sidecar says so."""
    layers: Sequence[int]
    """That have a router."""
    layer: int | None = None
    """Whose decisions are shown; None: the expert that most layers chose."""

    @property
    def title(self) -> str:
        """Return what is shown, as a phrase."""
        if self.layer is not None:
            return f"each token's first expert in layer {self.layer}"
        return f"the expert that most of {len(self.layers)} layers chose first for each token"

    def choice(self, said: Said) -> tuple[int, float]:
        """Return the expert that a token is shown with, and its weight."""
        assert said.decision is not None, "routes were asked for"
        place = None if self.layer is None else self.layers.index(self.layer)
        return first_choice(said.decision, place)


def legend_table(
    legend: Legend,
    said: Sequence[Said],
) -> Table:
    """Return what became of some tokens, expert by expert."""
    found: list[list[float]] = [[] for _ in legend.experts]
    for token in said:
        expert, weight = legend.choice(token)
        found[expert].append(weight)
    total = max(1, len(said))
    rows: list[list[Cell]] = []
    for name, domain, weights in zip(legend.experts, legend.domains, found, strict=True):
        share = f"{len(weights) / total:.0%}"
        mean = sum(weights) / len(weights) if weights else None
        rows.append([name, domain, len(weights), share, mean])
    header = ["expert", "domain", "tokens", "share", "mean weight"]
    return Table(header=header, rows=rows)


# On a terminal, and where there is none ----------------------------------------------------------


def _painted(
    text: str,
    expert: int,
) -> str:
    """Return text in an expert's colour; line ends have none, or some terminals fill the line."""
    place = expert % len(TERMINAL)
    # colours first, then a line below, then bold letters with it
    mark = UNDERLINES[expert // len(TERMINAL) % len(UNDERLINES)]
    letters = 231 if place in ON_DARK else 16
    begin = f"\x1b[{mark}48;5;{TERMINAL[place]};38;5;{letters}m"
    lines = [f"{begin}{line}{RESET}" if line else "" for line in text.split("\n")]
    return "\n".join(lines)


class Coloured:
    """Tokens for a terminal, each in the colour of its expert."""

    def __init__(self, legend: Legend) -> None:
        self.legend = legend

    def add(self, said: Said) -> str:
        """Return what is printed for a token."""
        expert, _ = self.legend.choice(said)
        return _painted(said.text, expert)

    def end(self) -> str:
        """Return what is printed after the last token."""
        return ""


class Marked:
    """Tokens for a file: behind each stretch of one expert its name and mean weight, [law 0.83]."""

    def __init__(self, legend: Legend) -> None:
        self.legend = legend
        self.expert: int | None = None
        self.weights: list[float] = []

    def add(self, said: Said) -> str:
        """Return what is printed for a token, and before it for a stretch that has ended."""
        expert, weight = self.legend.choice(said)
        # behind, not before: where a stretch ends is known when it has ended
        ended = "" if expert == self.expert else self.end()
        self.expert = expert
        self.weights.append(weight)
        return ended + said.text

    def end(self) -> str:
        """Return the mark of the last stretch."""
        if self.expert is None:
            return ""
        mean = sum(self.weights) / len(self.weights)
        self.weights = []
        return f"[{visible(self.legend.experts[self.expert])} {mean:.2f}]"


def legend_text(
    legend: Legend,
    said: Sequence[Said],
    colours: bool,
) -> str:
    """Return the legend below a text, its rows in colours if asked for."""
    table = legend_table(legend, said)
    heading, *rows = visible(text_table(table)).splitlines()
    if colours:
        rows = [_painted(row, expert) for expert, row in enumerate(rows)]
    return "\n".join([legend.title, heading, *rows])


# As a page ---------------------------------------------------------------------------------------


def _colours(legend: Legend) -> str:
    """Return the style of each expert."""
    # fixed letters on fixed colours: readable in light and dark
    rules = []
    for expert in range(len(legend.experts)):
        place = expert % len(TERMINAL)
        border = BORDERS[expert // len(TERMINAL) % len(BORDERS)]
        letters = "#ffffff" if place in ON_DARK else "#000000"
        rules.append(
            f".e{expert} {{ background: {COLOURS[place]}; color: {letters}; "
            f"border-bottom: {border} currentColor; }}"
        )
    return "\n".join(rules) + "\n"


def _hint(
    legend: Legend,
    said: Said,
) -> str:
    """Return every layer's decision on a token."""
    assert said.decision is not None, "routes were asked for"
    lines = []
    decided = zip(legend.layers, said.decision.experts, said.decision.weights, strict=True)
    for layer, expert, weight in decided:
        lines.append(f"layer {layer}: {legend.experts[expert]} {weight:.2f}")
    return "\n".join(lines)


def _spans(
    legend: Legend,
    said: Sequence[Said],
    hints: bool,
) -> str:
    parts = []
    for token in said:
        # special tokens have no text
        if not token.text:
            continue
        expert, _ = legend.choice(token)
        kind = f"e{expert}" if token.added else f"e{expert} given"
        hint = f' title="{html.escape(_hint(legend, token))}"' if hints else ""
        parts.append(f'<span class="{kind}"{hint}>{html.escape(token.text)}</span>')
    return f'<p class="tokens">{"".join(parts)}</p>'


def _layers(
    legend: Legend,
    said: Sequence[Said],
) -> list[str]:
    """Return the text once more for each layer, folded away."""
    found = []
    for layer in legend.layers:
        # hints would repeat what the first text has
        alone = Legend(legend.experts, legend.domains, legend.layers, layer)
        text = _spans(alone, said, hints=False)
        found.append(f"<details><summary>layer {layer}</summary>{text}</details>")
    return found


def _key(
    legend: Legend,
    said: Sequence[Said],
) -> str:
    """Return the legend as a table whose names have their colours."""
    table = legend_table(legend, said)
    heads = "".join(f"<th>{name}</th>" for name in table.header)
    rows = []
    for expert, (name, *cells) in enumerate(table.rows):
        swatch = f'<td><span class="swatch e{expert}">{html.escape(str(name))}</span></td>'
        shown = [f"<td>{html.escape(format_cell(cell))}</td>" for cell in cells]
        rows.append(f"<tr>{swatch}{''.join(shown)}</tr>")
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def write_routed_page(
    out: Path, title: str, legend: Legend, texts: Sequence[Sequence[Said]]
) -> None:
    """Write texts with their tokens in colours as one page that needs nothing else.

    Args:
        out: HTML file to write.
        title: heading of the page.
        legend: what the colours mean.
        texts: tokens of each text, with their routes.

    Raises:
        OutputExistsError: there is such a file.
    """
    everything = [token for text in texts for token in text]
    body = [
        f"<p>Colours: {html.escape(legend.title)}. The prompt is in italics; a token's hint has "
        "every layer's choice and its weight.</p>",
        _key(legend, everything),
    ]
    for number, text in enumerate(texts, start=1):
        heading = f"Text {number}" if len(texts) > 1 else "Text"
        body += [f"<h2>{heading}</h2>", _spans(legend, text, hints=True)]
        body += _layers(legend, text) if len(legend.layers) > 1 else []
    with new_file(Path(out)) as temporary:
        write_text(temporary, document(title, body, STYLE + _colours(legend)))
