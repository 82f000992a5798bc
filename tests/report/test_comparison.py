"""The page, figures and tables of a comparison: all there, honest about gaps, the same numbers as the results."""

import copy
import csv
import html.parser
import json
import re

import pytest
from made_up_results import OLD, results

from nexus_ds.report.comparison import comparison_sections, terminal_tables, write_comparison
from nexus_ds.report.comparison_tables import (
    domain_table,
    extension_table,
    own_table,
    quality_table,
    share_table,
    start_table,
    task_table,
    unit_of,
    variant_table,
)
from nexus_ds.report.page import Spread, best_cells


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


@pytest.fixture(scope="module")
def whole():
    return results()


@pytest.fixture
def found(whole):
    return copy.deepcopy(whole)


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(json.loads(json.dumps(whole)), folder)
    return folder


def cells(table, row, column):
    (line,) = [line for line in table.rows if line[0] == row]
    return line[table.header.index(column)]


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_page_is_whole_and_self_contained(written):
    reader = Reader()
    reader.feed((written / "report.html").read_text(encoding="utf-8"))
    assert reader.open == [] and "script" not in reader.tags
    assert all(link.startswith(("data:image/png;base64,", "#s")) for link in reader.links)
    for part in ("Comparison compare-tiny", "Upcycling: Nexus reaches", "Adding github: where tokens go", "Not run",
                 "nexus-ds compare --config compare-tiny --out DIR", "router.load_balance=0.0005", "2 CPU cores"):  # fmt: skip
        assert part in reader.text


def test_every_figure_has_its_numbers_beside_it(written):
    figures = {path.stem for path in (written / "figures").glob("*.png")}
    assert figures == {path.stem for path in (written / "figures").glob("*.csv")}
    assert figures >= {"differences", "compute", "extension-github", "share-github", "settings", "routing-Nexus",
                       "routing-Nexus-refit", "cosine-Nexus", "cosine-Nexus-centred"}  # fmt: skip


def test_cosines_are_drawn_of_projections_alone(found, tmp_path):
    found |= {"extensions": [], "evaluations": {"linear": found["evaluations"]["nexus"]}}
    titles = [section.title for section in comparison_sections(found, tmp_path)]
    assert "Routing of Linear router" in titles and not any("projection" in title for title in titles)


def test_csv_of_a_figure_holds_what_was_measured(written, found):
    rows = rows_of(written / "figures" / "extension-github.csv")
    (row,) = [r for r in rows if r["extension"] == "Linear, reset" and r["finetune_tokens"] == "50000.0"
              and r["panel"].startswith("new")]  # fmt: skip
    entry = next(e for e in found["extensions"] if e["name"] == "linear_reset")
    expected = [seed["budgets"]["50000"]["loss"]["github"] for seed in entry["seeds"].values()]
    assert float(row["mean"]) == pytest.approx(sum(expected) / 3) and float(row["deviation"]) > 0


def test_all_losses_of_all_seeds_are_in_one_file(written, found):
    rows = rows_of(written / "tables" / "losses.csv")
    (row,) = [r for r in rows if (r["contender"], r["variant"], r["seed"], r["domain"]) == ("nexus", "", "1", "arxiv")]
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
    for section in comparison_sections(found, tmp_path):
        assert len([part for part in re.split(r"(?<=\.) ", section.text) if part.strip()]) == 2, section.title


def test_quality_table_is_paired_and_costs_stand_beside(found):
    table = quality_table(found)
    found_cell = cells(table, "Linear router", "minus Nexus")
    nexus, linear = (next(e for e in found["contenders"] if e["name"] == n) for n in ("nexus", "linear"))
    differences = [
        sum(linear["seeds"][s]["loss"][d] - nexus["seeds"][s]["loss"][d] for d in OLD) / 4 for s in ("0", "1", "2")
    ]
    assert found_cell.mean == pytest.approx(sum(differences) / 3) and found_cell.signed
    assert cells(table, "Linear router", "seeds lower") == "0 of 3"
    assert cells(table, "Output ensemble (BTM)", "training TFLOP") == pytest.approx(5.1)
    assert cells(table, "Output ensemble (BTM)", "× Nexus's") == pytest.approx(0.85)
    assert cells(table, "Nexus", "M active") == pytest.approx(0.752)
    assert [table.rows[r][0] for r, c in best_cells(table)] == ["Output ensemble (BTM)"]


def test_start_and_end_of_the_training_stand_side_by_side(found):
    table = start_table(found)
    assert cells(table, "Nexus", "loss before").mean == pytest.approx(cells(table, "Nexus", "loss after").mean + 0.9)
    assert cells(table, "Nexus", "own share before").mean == pytest.approx(0.51)
    assert "Plain average" not in [row[0] for row in table.rows]


def test_domains_show_perplexity_and_their_role(found):
    table = domain_table(found)
    assert table.header[1:] == [*OLD, "c4 (pretraining)", "github (new)"]
    assert cells(table, "Nexus", "arxiv").mean == pytest.approx(84, abs=4)


def test_extension_tables_have_every_budget_and_the_start(found):
    table = extension_table(found, "github", new=False)
    assert table.header[:6] == [
        "extension", "mixture before", "before finetune", "after 25k", "after 50k", "after 100k"
    ]  # fmt: skip
    assert cells(table, "Nexus, refit", "mixture before").mean == pytest.approx(
        cells(quality_table(found), "Nexus", "loss, old domains").mean
    )
    assert cells(share_table(found, "github"), "Linear, reset", "leak at 100k").mean == pytest.approx(0.25)


@pytest.mark.parametrize("added", ["github+legal", "github, then legal"])
def test_several_domains_added(found, added):
    found["domains"]["scored"].append("legal")
    for entry in found["extensions"]:
        entry["added"] = added
        for seed in entry["seeds"].values():
            for value in seed["budgets"].values():
                value["loss"]["legal"] = value["loss"]["github"] + 2
    table = extension_table(found, added, new=True)
    single = results()
    assert cells(table, "Nexus, refit", "after 100k").mean == pytest.approx(
        cells(extension_table(single, "github", new=True), "Nexus, refit", "after 100k").mean + 1
    )


def test_variants_are_set_against_the_same_contender_unchanged(found):
    table = variant_table(found)
    assert [row[:2] for row in table.rows[:3]] == [
        ["as the recipe stands", "Nexus"], ["low_balance", "Nexus"], ["equal_data", "Nexus"]
    ]  # fmt: skip
    assert table.rows[0][3] is None and table.rows[2][3].mean == pytest.approx(0.02, abs=0.01)
    assert variant_table(results(variants=False)) is None


def test_own_share_by_domain_includes_variants(found):
    names = [row[0] for row in own_table(found).rows]
    assert "Nexus" in names and "Nexus [equal_data]" in names and "Seed" not in names


def test_the_command_repeats_the_overrides(found, tmp_path):
    found |= {"overrides": ["training.lr=1e-3", "pipeline.domains=[a, b]"], "extensions": [], "evaluations": {}}
    command = comparison_sections(found, tmp_path)[-1].table.rows[0]
    assert command == [
        "repeat it", "nexus-ds compare --config compare-tiny --out DIR training.lr=1e-3 'pipeline.domains=[a, b]'"
    ]  # fmt: skip


def test_task_groups_when_they_were_run(found):
    assert task_table(found) is None
    for number, entry in enumerate(found["contenders"]):
        for seed in entry["seeds"].values():
            seed["tasks"] = {"science": 50.0 + number, "code": 10.0}
    table = task_table(found)
    assert table.header == ["contender", "science", "code", "mean of the groups"] and table.best == "max"
    assert cells(table, "Seed", "mean of the groups").mean == 30.0


@pytest.mark.parametrize(
    ("values", "unit"), [([0, 5e12], (1e12, "T")), ([3e21], (1e21, "Z")), ([500.0, None], (1, "")), ([], (1, ""))]
)
def test_unit_of(values, unit):
    assert unit_of(values, "Z") == unit


def test_what_failed_is_listed_and_left_out(found, tmp_path):
    btm = next(e for e in found["contenders"] if e["name"] == "btm")
    btm["seeds"] = {"0": None, "1": {"loss": None}}
    ridge = next(e for e in found["extensions"] if e["name"] == "ridge")
    ridge["seeds"]["1"] = {}
    found["evaluations"] = {}
    write_comparison(found, tmp_path)
    rows = {row["what"]: row["why"] for row in rows_of(tmp_path / "tables" / "not-run.csv")}
    assert rows["Output ensemble (BTM)"] == "not measured with seed 0, 1, 2"
    assert rows["Ridge (DUME), adding github"] == "not measured with seed 1"
    assert "Output ensemble (BTM)" not in [row[0] for row in quality_table(found).rows]


@pytest.mark.parametrize("change", ["one seed, no nexus", "no extensions, no compute", "nothing"])
def test_sparse_results_still_make_a_page(change, tmp_path):
    found = results(seeds=[0] if "one seed" in change else [0, 1], evaluations=False) | {"recipe": "my/mine.yaml"}
    if "no nexus" in change:
        found["contenders"] = [e for e in found["contenders"] if not e["name"].startswith("nexus")]
    if "no compute" in change:
        found["extensions"] = []
        for entry in found["contenders"]:
            entry["compute"] = None
    if change == "nothing":
        found |= {"contenders": None, "extensions": [], "variants": {}, "not_run": None, "evaluations": None}
        found |= {"machine": None, "seconds": None, "data": None}
    write_comparison(found, tmp_path)
    assert "<h1>Comparison mine</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (terminal_tables(found) == "") == (change == "nothing")


def test_terminal_tables_fit_and_say_the_same(found):
    text = terminal_tables(found)
    assert max(len(line) for line in text.splitlines()) < 150
    table = quality_table(found)
    for row in table.rows:
        assert isinstance(row[1], Spread) and str(row[1]) in text
