"""What is forgotten where experts are added one after another: every cell of the table."""

import copy
import json
import math

import pytest
from made_up_results import assert_row, read

from nexus_ds.experiments.comparison.report import terminal_tables, write_comparison
from nexus_ds.experiments.comparison.report_turns import forgotten, turn_table

ADDED = "github, then legal+german"


@pytest.fixture
def in_turn(found):
    """Results of one extension in turn: github first, then two domains at once; every domain's loss
    begins at 3, and each addition takes 0.1 off the others and leaves its own at 2."""
    new = ["github", "legal", "german"]
    scored = ["arxiv", *new]
    found["domains"] |= {"old": ["arxiv"], "pretraining": [], "new": new, "scored": scored}
    (nexus,) = [e for e in found["contenders"] if e["name"] == "nexus" and not e["variant"]]
    (refit,) = [e for e in found["extensions"] if e["name"] == "nexus_refit" and not e["variant"]]
    refit |= {"added": ADDED}
    for seed, scores in refit["seeds"].items():
        base = int(seed)
        nexus["seeds"][seed]["loss"] = dict.fromkeys(scored, 3.0 + base)
        first = dict.fromkeys(scored, 3.1 + base) | {"github": 2.0 + base}
        second = {"arxiv": 3.2 + base, "github": 2.1 + base, "legal": 2.0, "german": 2.0}
        scores["turns"] = [
            {"added": "github", "loss": first},
            {"added": "legal+german", "loss": second},
        ]
    found["contenders"] = [nexus]
    found["extensions"] = [refit]
    return found


def test_every_domain_is_followed_through_every_addition(in_turn):
    table = turn_table(read(in_turn), ADDED)
    label = in_turn["extensions"][0]["label"]
    assert [line[1] for line in table.rows] == ["arxiv", "github", "legal", "german"]
    (line,) = [line for line in table.rows if line[1] == "arxiv"]
    assert [cell.mean for cell in line[2:5]] == [
        pytest.approx(sum(math.exp(loss + seed) for seed in (0, 1, 2)) / 3)
        for loss in (3.0, 3.1, 3.2)
    ]
    # of an old domain since the mixture before, and signed
    assert line[5].mean == pytest.approx(100 * (math.exp(0.2) - 1)) and line[5].signed
    (line,) = [line for line in table.rows if line[1] == "github"]
    # of a new one since its own addition
    assert line[5].mean == pytest.approx(100 * (math.exp(0.1) - 1))
    (line,) = [line for line in table.rows if line[1] == "german"]
    expected = {
        "extension": label,
        "domain": "german",
        "mixture before": line[2],
        "after github": line[3],
        "after legal+german": line[4],
        # nothing came after it
        "forgotten, %": None,
    }
    assert_row(table, [label, "german"], expected)
    assert line[4].mean == pytest.approx(math.exp(2.0))


def test_a_changed_setting_has_lines_of_its_own(in_turn):
    gentle = copy.deepcopy(in_turn["extensions"][0]) | {"variant": "gentle"}
    in_turn["extensions"].append(gentle)
    table = turn_table(read(in_turn), ADDED)
    assert len(table.rows) == 8 and table.rows[4][0].endswith("[gentle]")


def test_a_single_addition_has_no_turns(found):
    assert turn_table(read(found), "github") is None


def test_a_seed_that_lacks_turns_is_left_out(in_turn):
    del in_turn["extensions"][0]["seeds"]["0"]["turns"]
    in_turn["extensions"][0]["seeds"]["1"]["turns"].pop()
    table = turn_table(read(in_turn), ADDED)
    assert table.rows[0][3].mean == pytest.approx((math.exp(4.1) + math.exp(5.1)) / 2)
    assert table.rows[0][4].mean == pytest.approx(math.exp(5.2))


def test_a_seed_without_a_start_tells_nothing_of_forgetting():
    assert forgotten({"0": 1.0}, {"0": 1.0, "1": 3.0}) == {"0": 0.0}
    # a run that diverged
    assert forgotten({"0": 1.0}, {"0": 800.0}) == {"0": 100 * math.expm1(700)}


def test_the_page_and_the_terminal_show_it(in_turn, tmp_path):
    results = read(json.loads(json.dumps(in_turn)))
    write_comparison(results, tmp_path)
    title = f"Adding {ADDED}: what is forgotten"
    assert title in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Adding {ADDED}: perplexity after each" in terminal_tables(results)
