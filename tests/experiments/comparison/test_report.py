"""The page and the files of a comparison: all there, honest about gaps, the same numbers as the
results."""

import csv
import html.parser
import re

import pytest
from made_up_results import OLD, assert_row, read, results, rows_of

from nexus_ds.experiments.comparison.report import (
    comparison_sections,
    terminal_tables,
    write_comparison,
)
from nexus_ds.experiments.comparison.report_opening import opening_sections
from nexus_ds.experiments.comparison.report_tables import quality_table
from nexus_ds.report.page import Spread


class Reader(html.parser.HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.links = [], "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_self_contained(written):
    reader = Reader()
    reader.feed((written / "report.html").read_text(encoding="utf-8"))
    assert reader.open == [] and "script" not in reader.tags
    assert all(link.startswith(("data:image/png;base64,", "#s")) for link in reader.links)
    for part in (
        "Comparison compare-tiny",
        "Upcycling: Nexus reaches",
        "Adding github: where tokens go",
        "Not run",
        "nexus-ds compare --config compare-tiny --out DIR",
        "router.load_balance=0.0005",
        "2 CPU cores",
    ):
        assert part in reader.text


def test_cosines_are_drawn_of_projections_alone(found, tmp_path):
    found |= {"extensions": [], "evaluations": {"linear": found["evaluations"]["nexus"]}}
    titles = [section.title for section in comparison_sections(read(found), tmp_path)]
    assert "Routing of Linear router" in titles and not any(
        "projection" in title for title in titles
    )


def test_all_losses_of_all_seeds_are_in_one_file(written, found):
    rows = rows_of(written / "tables" / "losses.csv")
    (row,) = [
        r
        for r in rows
        if (r["contender"], r["variant"], r["seed"], r["domain"]) == ("nexus", "", "1", "arxiv")
    ]
    entry = next(e for e in found["contenders"] if e["name"] == "nexus")
    assert float(row["loss_nats"]) == entry["seeds"]["1"]["loss"]["arxiv"]
    assert {r["finetune_tokens"] for r in rows if r["added"]} == {"0", "25000", "50000", "100000"}


def test_tables_as_csv_keep_mean_and_deviation_apart(written):
    rows = rows_of(written / "tables" / "contenders.csv")
    (row,) = [r for r in rows if r["contender"] == "Nexus"]
    assert float(row["loss, old domains"]) == pytest.approx(4.63, abs=0.05)
    assert 0 < float(row["loss, old domains (deviation)"]) < 0.1 and row["minus Nexus"] == ""


def test_every_section_is_explained_in_two_sentences(found, tmp_path):
    found["evaluations"] = {}
    for section in comparison_sections(read(found), tmp_path):
        assert len([part for part in re.split(r"(?<=\.) ", section.text) if part.strip()]) == 2, (
            section.title
        )


def test_the_command_repeats_the_overrides(found, tmp_path):
    found |= {
        "overrides": ["training.lr=1e-3", "pipeline.domains=[a, b]"],
        "extensions": [],
        "evaluations": {},
    }
    command = comparison_sections(read(found), tmp_path)[-1].table.rows[0]
    assert command == [
        "repeat it",
        "nexus-ds compare --config compare-tiny --out DIR training.lr=1e-3 "
        "'pipeline.domains=[a, b]'",
    ]


def test_what_failed_is_listed_and_left_out(found, tmp_path):
    btm = next(e for e in found["contenders"] if e["name"] == "btm")
    btm["seeds"] = {"0": None, "1": {"loss": None}}
    ridge = next(e for e in found["extensions"] if e["name"] == "ridge")
    ridge["seeds"]["1"] = {}
    found["evaluations"] = {}
    write_comparison(read(found), tmp_path)
    rows = {row["what"]: row["why"] for row in rows_of(tmp_path / "tables" / "not-run.csv")}
    assert rows["Output ensemble (BTM)"] == "not measured with seed 0, 1, 2"
    assert rows["Ridge (DUME), adding github"] == "not measured with seed 1"
    assert "Output ensemble (BTM)" not in [row[0] for row in quality_table(read(found)).rows]


@pytest.mark.parametrize("change", ["one seed, no nexus", "no extensions, no compute", "nothing"])
def test_sparse_results_still_make_a_page(change, tmp_path):
    found = results(seeds=[0] if "one seed" in change else [0, 1], evaluations=False) | {
        "recipe": "my/mine.yaml"
    }
    if "no nexus" in change:
        found["contenders"] = [e for e in found["contenders"] if not e["name"].startswith("nexus")]
    if "no compute" in change:
        found["extensions"] = []
        for entry in found["contenders"]:
            entry["compute"] = None
    if change == "nothing":
        found |= {
            "contenders": None,
            "extensions": [],
            "variants": {},
            "not_run": None,
            "evaluations": None,
        }
        found |= {"machine": None, "seconds": None, "data": None}
    write_comparison(read(found), tmp_path)
    assert "<h1>Comparison mine</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (terminal_tables(read(found)) == "") == (change == "nothing")


def test_terminal_tables_fit_and_say_the_same(found):
    text = terminal_tables(read(found))
    assert max(len(line) for line in text.splitlines()) < 150
    table = quality_table(read(found))
    for row in table.rows:
        assert isinstance(row[1], Spread) and str(row[1]) in text


def test_every_column_of_what_describes_the_comparison(found, tmp_path):
    found |= {"evaluations": {}, "overrides": ["a=1"]}
    sections = {
        section.title: section.table for section in comparison_sections(read(found), tmp_path)
    }
    assert_row(
        sections["Not run"],
        ["nexus_context"],
        {
            "what": "nexus_context",
            "why": "the recipe leaves it out: it needs a router that reads context",
        },
    )
    about = sections["What the contenders are"]
    assert_row(
        about,
        ["BTX"],
        {"name": "BTX", "kind": "contender", "what it is": "What BTX is, in one sentence."},
    )
    assert_row(
        about,
        ["Ridge (DUME)", "extension"],
        {"name": "Ridge (DUME)", "kind": "extension", "what it is": "What Ridge (DUME) does."},
    )
    settings = sections["Settings, and how to repeat this"]
    assert settings.header == ["setting", "value"]
    assert dict(settings.rows) == {
        "repeat it": "nexus-ds compare --config compare-tiny --out DIR a=1",
        "seeds": "0, 1, 2",
        "machine": "2 CPU cores, 8 GB",
        "time": "25.0 minutes",
        "text": "data",
        "validation": "48 windows of 128 tokens a domain",
        "domains, old": ", ".join(OLD),
        "domains, pretraining": "c4",
        "domains, new": "github",
        "domains, scored": ", ".join([*OLD, "c4", "github"]),
        "setting low_balance": "router.load_balance=0.0005",
        "setting equal_data": "data.mixture=uniform",
    }


def test_every_table_as_csv_has_the_cells_of_the_page(written, found, tmp_path):
    """Each table's CSV: the same heads, a column `(deviation)` after each mean, and the numbers in
    full."""
    names = []
    opening = opening_sections(read(found), "", tmp_path)
    for section in [*opening, *comparison_sections(read(found), tmp_path)]:
        if section.table is None:
            continue
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", section.title.lower()).strip("-")
        names.append(f"{name}.csv")
        with (written / "tables" / names[-1]).open(newline="", encoding="utf-8") as stream:
            header, *lines = list(csv.reader(stream))
        wide = [
            any(isinstance(row[c], Spread) for row in section.table.rows)
            for c in range(len(section.table.header))
        ]
        heads = [
            (h, f"{h} (deviation)") if w else (h,)
            for h, w in zip(section.table.header, wide, strict=True)
        ]
        assert header == [head for pair in heads for head in pair], name
        for line, row in zip(lines, section.table.rows, strict=True):
            cells = []
            for cell, double in zip(row, wide, strict=True):
                parts = (
                    [cell.mean, cell.deviation]
                    if isinstance(cell, Spread)
                    else [cell, None][: 1 + double]
                )
                cells += ["" if part is None else str(part) for part in parts]
            assert line == cells, name
    assert {path.name for path in (written / "tables").iterdir()} == {*names, "losses.csv"}


def test_every_column_of_losses_csv(written, found):
    rows = rows_of(written / "tables" / "losses.csv")
    assert list(rows[0]) == [
        "contender",
        "variant",
        "added",
        "finetune_tokens",
        "seed",
        "domain",
        "loss_nats",
    ]
    read = {tuple(row.values())[:-1]: float(row["loss_nats"]) for row in rows}
    expected = {
        (e["name"], e["variant"], "", "", seed, domain): loss
        for e in found["contenders"]
        for seed, value in e["seeds"].items()
        for domain, loss in value["loss"].items()
    }
    expected |= {
        (e["name"], e["variant"], "github", budget, seed, domain): loss
        for e in found["extensions"]
        for seed, value in e["seeds"].items()
        for budget, measured in value["budgets"].items()
        for domain, loss in measured["loss"].items()
    }
    assert len(rows) == len(read) and read == expected
