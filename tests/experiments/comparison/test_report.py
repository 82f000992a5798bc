"""The page, figures and tables of a comparison: all there, honest about gaps, the same numbers as
the results."""

import copy
import csv
import html.parser
import json
import math
import re
from statistics import fmean, stdev

import pytest
from made_up_results import OLD, results

from nexus_ds.experiments.comparison.report import (
    comparison_sections,
    terminal_tables,
    write_comparison,
)
from nexus_ds.experiments.comparison.report_tables import (
    domain_table,
    extension_table,
    extension_variant_table,
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


def test_every_figure_has_its_numbers_beside_it(written):
    figures = {path.stem for path in (written / "figures").glob("*.png")}
    assert figures == {path.stem for path in (written / "figures").glob("*.csv")}
    assert figures >= {
        "differences",
        "compute",
        "extension-github",
        "share-github",
        "settings",
        "routing-Nexus",
        "routing-Nexus-refit",
        "cosine-Nexus",
        "cosine-Nexus-centred",
    }


def test_cosines_are_drawn_of_projections_alone(found, tmp_path):
    found |= {"extensions": [], "evaluations": {"linear": found["evaluations"]["nexus"]}}
    titles = [section.title for section in comparison_sections(found, tmp_path)]
    assert "Routing of Linear router" in titles and not any(
        "projection" in title for title in titles
    )


def test_csv_of_a_figure_holds_what_was_measured(written, found):
    rows = rows_of(written / "figures" / "extension-github.csv")
    (row,) = [
        r
        for r in rows
        if r["extension"] == "Linear, reset"
        and r["finetune_tokens"] == "50000.0"
        and r["panel"].startswith("new")
    ]
    entry = next(e for e in found["extensions"] if e["name"] == "linear_reset")
    expected = [seed["budgets"]["50000"]["loss"]["github"] for seed in entry["seeds"].values()]
    assert float(row["mean"]) == pytest.approx(sum(expected) / 3) and float(row["deviation"]) > 0


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
    for section in comparison_sections(found, tmp_path):
        assert len([part for part in re.split(r"(?<=\.) ", section.text) if part.strip()]) == 2, (
            section.title
        )


def test_quality_table_is_paired_and_costs_stand_beside(found):
    table = quality_table(found)
    found_cell = cells(table, "Linear router", "minus Nexus")
    nexus, linear = (
        next(e for e in found["contenders"] if e["name"] == n) for n in ("nexus", "linear")
    )
    differences = [
        sum(linear["seeds"][s]["loss"][d] - nexus["seeds"][s]["loss"][d] for d in OLD) / 4
        for s in ("0", "1", "2")
    ]
    assert found_cell.mean == pytest.approx(sum(differences) / 3) and found_cell.signed
    assert cells(table, "Linear router", "seeds lower") == "0 of 3"
    assert cells(table, "Output ensemble (BTM)", "training TFLOP") == pytest.approx(5.1)
    assert cells(table, "Output ensemble (BTM)", "× Nexus's") == pytest.approx(0.85)
    assert cells(table, "Nexus", "M active") == pytest.approx(0.752)
    assert [table.rows[r][0] for r, c in best_cells(table)] == ["Output ensemble (BTM)"]


def test_start_and_end_of_the_training_stand_side_by_side(found):
    table = start_table(found)
    assert cells(table, "Nexus", "loss before").mean == pytest.approx(
        cells(table, "Nexus", "loss after").mean + 0.9
    )
    assert cells(table, "Nexus", "own share before").mean == pytest.approx(0.51)
    assert "Plain average" not in [row[0] for row in table.rows]


def test_domains_show_perplexity_and_their_role(found):
    table = domain_table(found)
    assert table.header[1:] == [*OLD, "c4 (pretraining)", "github (new)"]
    assert cells(table, "Nexus", "arxiv").mean == pytest.approx(84, abs=4)


def test_extension_tables_have_every_budget_and_the_start(found):
    table = extension_table(found, "github", new=False)
    assert table.header[:6] == [
        "extension",
        "mixture before",
        "before finetune",
        "after 25k",
        "after 50k",
        "after 100k",
    ]
    assert cells(table, "Nexus, refit", "mixture before").mean == pytest.approx(
        cells(quality_table(found), "Nexus", "loss, old domains").mean
    )
    assert cells(
        share_table(found, "github"), "Linear, reset", "leak at 100k"
    ).mean == pytest.approx(0.25)


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
        ["as the recipe stands", "Nexus"],
        ["low_balance", "Nexus"],
        ["equal_data", "Nexus"],
    ]
    assert table.rows[0][3] is None and table.rows[2][3].mean == pytest.approx(0.02, abs=0.01)
    assert variant_table(results(variants=False)) is None


def test_own_share_by_domain_includes_variants(found):
    names = [row[0] for row in own_table(found).rows]
    assert "Nexus" in names and "Nexus [equal_data]" in names and "Seed" not in names


def test_the_command_repeats_the_overrides(found, tmp_path):
    found |= {
        "overrides": ["training.lr=1e-3", "pipeline.domains=[a, b]"],
        "extensions": [],
        "evaluations": {},
    }
    command = comparison_sections(found, tmp_path)[-1].table.rows[0]
    assert command == [
        "repeat it",
        "nexus-ds compare --config compare-tiny --out DIR training.lr=1e-3 'pipeline.domains=[a, b]'",
    ]


def test_task_groups_when_they_were_run(found):
    assert task_table(found) is None
    for number, entry in enumerate(found["contenders"]):
        for seed in entry["seeds"].values():
            seed["tasks"] = {"science": 50.0 + number, "code": 10.0}
    table = task_table(found)
    assert (
        table.header == ["contender", "science", "code", "mean of the groups"]
        and table.best == "max"
    )
    assert cells(table, "Seed", "mean of the groups").mean == 30.0


@pytest.mark.parametrize(
    ("values", "unit"),
    [([0, 5e12], (1e12, "T")), ([3e21], (1e21, "Z")), ([500.0, None], (1, "")), ([], (1, ""))],
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
    write_comparison(found, tmp_path)
    assert "<h1>Comparison mine</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (terminal_tables(found) == "") == (change == "nothing")


def test_terminal_tables_fit_and_say_the_same(found):
    text = terminal_tables(found)
    assert max(len(line) for line in text.splitlines()) < 150
    table = quality_table(found)
    for row in table.rows:
        assert isinstance(row[1], Spread) and str(row[1]) in text


# Every column of every table and CSV -------------------------------------------------------------------------------


def seeds_of(found, kind, name, variant="", budget=None):
    """Return what was measured of a contender or extension, a dictionary a seed."""
    (entry,) = [e for e in found[kind] if e["name"] == name and e["variant"] == variant]
    seeds = list(entry["seeds"].values())
    return seeds if budget is None else [seed["budgets"][budget] for seed in seeds]


def mean_loss(seeds, domains):
    return [fmean(seed["loss"][domain] for domain in domains) for seed in seeds]


def approx(values, digits=3, signed=False):
    """A cell that shows the mean and the deviation of one number a seed."""
    return Spread(
        pytest.approx(fmean(values)), pytest.approx(stdev(values), abs=1e-12), digits, signed
    )


def minus(values, others):
    """The cells of a paired difference: its mean and deviation, and in how many seeds it is
    lower."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return approx(
        differences, signed=True
    ), f"{sum(d < 0 for d in differences)} of {len(differences)}"


def assert_row(table, row, expected):
    """Check all cells of the rows that begin with `row`; `expected` names every column, in
    order."""
    assert list(table.header) == list(expected)
    (line,) = [line for line in table.rows if line[: len(row)] == row]
    assert list(line) == list(expected.values())


def test_every_column_of_the_contenders(found):
    linear, nexus = (seeds_of(found, "contenders", name) for name in ("linear", "nexus"))
    for number, seed in enumerate(linear):
        seed |= {"own_share": 0.40 + number / 100, "gate": 0.60 + number / 50}
    difference, lower = minus(mean_loss(linear, OLD), mean_loss(nexus, OLD))
    next(e for e in found["contenders"] if e["name"] == "linear")["compute"] = {
        "training_flops": 3e12,
        "training_tokens": 7_000_000,
        "parameters": {"total": 1_194_000, "active": 752_000},
        "seconds": 61.5,
    }
    assert_row(
        quality_table(found),
        ["Linear router"],
        {
            "contender": "Linear router",
            "loss, old domains": approx(mean_loss(linear, OLD)),
            "minus Nexus": difference,
            "seeds lower": lower,
            "own share": approx([0.40, 0.41, 0.42], 2),
            "gate": approx([0.60, 0.62, 0.64], 2),
            "training TFLOP": 3.0,
            "× Nexus's": 0.5,
            "M tokens": 7.0,
            "M active": 0.752,
            "M total": 1.194,
            "seconds": 61.5,
        },
    )


def test_every_column_of_before_and_after_training(found):
    nexus = seeds_of(found, "contenders", "nexus")
    for number, seed in enumerate(nexus):
        seed["own_share"], seed["untrained"]["own_share"] = 0.57 + number / 100, 0.31 + number / 50
    before = mean_loss([seed["untrained"] for seed in nexus], OLD)
    assert_row(
        start_table(found),
        ["Nexus"],
        {
            "contender": "Nexus",
            "loss before": approx(before),
            "own share before": approx([0.31, 0.33, 0.35], 2),
            "loss after": approx(mean_loss(nexus, OLD)),
            "own share after": approx([0.57, 0.58, 0.59], 2),
        },
    )


def test_every_column_of_the_domains(found):
    nexus = seeds_of(found, "contenders", "nexus")
    heads = {**{d: d for d in OLD}, "c4": "c4 (pretraining)", "github": "github (new)"}
    shown = {}
    for domain, head in heads.items():
        perplexity = [math.exp(seed["loss"][domain]) for seed in nexus]
        shown[head] = approx(perplexity, 0 if fmean(perplexity) >= 1000 else 1)
    assert_row(domain_table(found), ["Nexus"], {"contender": "Nexus", **shown})


def test_every_column_of_the_tasks(found):
    for number, seed in enumerate(seeds_of(found, "contenders", "nexus")):
        seed["tasks"] = {"science": 50.0 + number, "code": 10.0 + 2 * number}
    assert_row(
        task_table(found),
        ["Nexus"],
        {
            "contender": "Nexus",
            "science": approx([50, 51, 52], 1),
            "code": approx([10, 12, 14], 1),
            "mean of the groups": approx([30, 31.5, 33], 1),
        },
    )


def test_every_column_of_the_own_shares(found):
    nexus = seeds_of(found, "contenders", "nexus")
    for number, seed in enumerate(nexus):
        seed["own_share"] = 0.9 + number / 100
        for place, domain in enumerate(OLD):
            seed["routing"][domain] = {other: 0.0 for other in OLD} | {
                domain: 0.2 + place / 10 + number / 100
            }
    shares = {d: approx([0.2 + k / 10, 0.21 + k / 10, 0.22 + k / 10], 2) for k, d in enumerate(OLD)}
    expected = {"contender": "Nexus", **shares, "mean": approx([0.9, 0.91, 0.92], 2)}
    assert_row(own_table(found), ["Nexus"], expected)


@pytest.mark.parametrize("new", [True, False])
def test_every_column_of_the_extensions(found, new):
    domains = ["github"] if new else OLD
    last = {
        name: mean_loss(seeds_of(found, "extensions", name, budget="100000"), domains)
        for name in ("linear_reset", "nexus_refit")
    }
    difference, lower = minus(last["linear_reset"], last["nexus_refit"])
    start = mean_loss(seeds_of(found, "contenders", "linear"), domains)  # what it was extended from
    expected = {"extension": "Linear, reset", "mixture before": approx(start)}
    for budget, head in (
        ("0", "before finetune"),
        ("25000", "after 25k"),
        ("50000", "after 50k"),
        ("100000", "after 100k"),
    ):
        expected[head] = approx(
            mean_loss(seeds_of(found, "extensions", "linear_reset", budget=budget), domains)
        )
    expected |= {"minus Nexus, refit": difference, "seeds lower": lower}
    next(e for e in found["extensions"] if e["name"] == "linear_reset")["compute"][
        "training_tokens"
    ] = 4_000_000
    expected |= {"training TFLOP": 7.5, "M tokens": 4.0} if new else {}
    assert_row(extension_table(found, "github", new=new), ["Linear, reset"], expected)


def test_every_column_of_the_shares(found):
    heads = {"0": "0", "25000": "25k", "50000": "50k", "100000": "100k"}
    for place, budget in enumerate(heads):
        for number, seed in enumerate(seeds_of(found, "extensions", "nexus_refit", budget=budget)):
            seed |= {
                "share": 0.5 + place / 10 + number / 100,
                "leak": 0.1 + place / 50 + number / 200,
            }
            seed["own_share"] = 0.9 - place / 20 - number / 100
    expected = {"extension": "Nexus, refit"}
    expected |= {
        f"share at {h}": approx([0.5 + k / 10 + n / 100 for n in range(3)], 2)
        for k, h in enumerate(heads.values())
    }
    expected |= {
        f"leak at {h}": approx([0.1 + k / 50 + n / 200 for n in range(3)], 2)
        for k, h in enumerate(heads.values())
    }
    expected |= {
        "own share at 0": approx([0.9, 0.89, 0.88], 2),
        "own share at 100k": approx([0.75, 0.74, 0.73], 2),
    }
    assert_row(share_table(found, "github"), ["Nexus, refit"], expected)


def test_every_column_of_the_changed_settings(found):
    changed, same = (seeds_of(found, "contenders", "linear", v) for v in ("equal_data", ""))
    for number, seed in enumerate(changed):
        seed |= {"own_share": 0.40 + number / 100, "gate": 0.60 + number / 50}
    difference, lower = minus(mean_loss(changed, OLD), mean_loss(same, OLD))
    assert_row(
        variant_table(found),
        ["equal_data", "Linear router"],
        {
            "setting": "equal_data",
            "contender": "Linear router",
            "loss, old domains": approx(mean_loss(changed, OLD)),
            "minus the recipe": difference,
            "seeds lower": lower,
            "own share": approx([0.40, 0.41, 0.42], 2),
            "gate": approx([0.60, 0.62, 0.64], 2),
        },
    )


def test_every_column_of_the_changed_extensions(found):
    changed, same = (
        seeds_of(found, "extensions", "nexus_refit", v, "100000") for v in ("low_balance", "")
    )
    for number, seed in enumerate(seeds_of(found, "extensions", "nexus_refit", "low_balance", "0")):
        seed |= {"share": 0.40 + number / 100, "leak": 0.10 + number / 50}
    table = extension_variant_table(found)
    assert table.header == [
        "setting",
        "extension",
        "added",
        "loss, new",
        "minus the recipe",
        "lower",
        "loss, old",
        "minus the recipe",
        "lower",
        "share before finetune",
        "leak before finetune",
    ]
    (row,) = table.rows
    expected = ["low_balance", "Nexus, refit", "github"]
    for domains in (["github"], OLD):
        losses = [mean_loss(seeds, domains) for seeds in (changed, same)]
        expected += [approx(losses[0]), *minus(*losses)]
    assert row == [*expected, approx([0.40, 0.41, 0.42], 2), approx([0.10, 0.12, 0.14], 2)]


def test_every_column_of_what_describes_the_comparison(found, tmp_path):
    found |= {"evaluations": {}, "overrides": ["a=1"]}
    sections = {section.title: section.table for section in comparison_sections(found, tmp_path)}
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
    for section in comparison_sections(found, tmp_path):
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


def assert_csv(path, columns, line):
    """Check one line of a CSV, found by its text columns; numbers agree approximately."""
    rows = rows_of(path)
    assert list(rows[0]) == list(columns)
    keys = [column for column, value in zip(columns, line, strict=True) if isinstance(value, str)]
    wanted = dict(zip(columns, line, strict=True))
    (row,) = [row for row in rows if all(row[key] == wanted[key] for key in keys)]
    numbers = [float(row[column]) for column in columns if column not in keys]
    assert numbers == pytest.approx([value for value in line if not isinstance(value, str)])


def test_every_column_of_the_figures_csv(written, found):
    folder = written / "figures"
    linear, nexus = (seeds_of(found, "contenders", name) for name in ("linear", "nexus"))
    losses, base = mean_loss(linear, OLD), mean_loss(nexus, OLD)
    assert_csv(
        folder / "differences.csv",
        ("contender", "seed", "difference_nats"),
        ("Linear router", "1", losses[1] - base[1]),
    )
    level = ("panel", "contender", "training_flops", "mean", "deviation")
    assert_csv(
        folder / "compute.csv", level, ("", "Linear router", 6e12, fmean(losses), stdev(losses))
    )
    last = seeds_of(found, "extensions", "linear_reset", budget="50000")
    columns = ("panel", "extension", "finetune_tokens", "mean", "deviation")
    for panel, domains in (
        ("new domain: github", ["github"]),
        (f"old domains: {', '.join(OLD)}", OLD),
    ):
        values = mean_loss(last, domains)
        line = (panel, "Linear, reset", "50000.0", fmean(values), stdev(values))
        assert_csv(folder / "extension-github.csv", columns, line)
    for panel, key in (
        ("share: github's tokens at the new expert", "share"),
        ("leak: old domains' tokens there", "leak"),
    ):
        values = [seed[key] for seed in last]
        line = (panel, "Linear, reset", "50000.0", fmean(values), stdev(values))
        assert_csv(folder / "share-github.csv", columns, line)
    changed = mean_loss(seeds_of(found, "contenders", "linear", "equal_data"), OLD)
    assert_csv(
        folder / "settings.csv",
        ("setting", "contender", "mean", "deviation"),
        ("equal_data", "Linear router", fmean(changed), stdev(changed)),
    )
