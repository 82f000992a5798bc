"""Tables of a comparison: paired differences, costs, and every column of every table."""

import copy
import math
from statistics import fmean, stdev

import pytest
from made_up_results import (
    METHODS,
    OLD,
    assert_row,
    mean_loss,
    read,
    results,
    seeds_of,
    with_longer_seed,
)

from nexus_ds.experiments.comparison.report_tables import (
    UNCHANGED,
    domain_table,
    extension_table,
    extension_variant_table,
    own_table,
    quality_table,
    regime_table,
    regimes,
    result_table,
    share_table,
    start_table,
    task_table,
    unit_of,
    variant_table,
)
from nexus_ds.report.page import Spread, best_cells


def cells(table, row, column):
    (line,) = [line for line in table.rows if line[0] == row]
    return line[table.header.index(column)]


def test_quality_table_is_paired_and_costs_stand_beside(found):
    table = quality_table(read(found))
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
    table = start_table(read(found))
    assert cells(table, "Nexus", "loss before").mean == pytest.approx(
        cells(table, "Nexus", "loss after").mean + 0.9
    )
    assert cells(table, "Nexus", "own share before").mean == pytest.approx(0.51)
    assert "Plain average" not in [row[0] for row in table.rows]


def test_domains_show_perplexity_and_their_role(found):
    table = domain_table(read(found))
    assert table.header[1:] == [*OLD, "c4 (pretraining)", "github (new)"]
    assert cells(table, "Nexus", "arxiv").mean == pytest.approx(84, abs=4)


def test_extension_tables_have_every_budget_and_the_start(found):
    table = extension_table(read(found), "github", new=False)
    assert table.header[:6] == [
        "extension",
        "mixture before",
        "before finetune",
        "after 25k",
        "after 50k",
        "after 100k",
    ]
    assert cells(table, "Nexus, refit", "mixture before").mean == pytest.approx(
        cells(quality_table(read(found)), "Nexus", "loss, old domains").mean
    )
    assert cells(
        share_table(read(found), "github"), "Linear, reset", "leak at 100k"
    ).mean == pytest.approx(0.25)


@pytest.mark.parametrize("added", ["github+legal", "github, then legal"])
def test_several_domains_added(found, added):
    found["domains"]["scored"].append("legal")
    for entry in found["extensions"]:
        entry["added"] = added
        for seed in entry["seeds"].values():
            for value in seed["budgets"].values():
                value["loss"]["legal"] = value["loss"]["github"] + 2
    table = extension_table(read(found), added, new=True)
    single = results()
    assert cells(table, "Nexus, refit", "after 100k").mean == pytest.approx(
        cells(extension_table(read(single), "github", new=True), "Nexus, refit", "after 100k").mean
        + 1
    )


def test_variants_are_set_against_the_same_contender_unchanged(found):
    table = variant_table(read(found))
    assert [row[:2] for row in table.rows[:3]] == [
        ["as the recipe stands", "Nexus"],
        ["low_balance", "Nexus"],
        ["equal_data", "Nexus"],
    ]
    assert table.rows[0][3] is None and table.rows[2][3].mean == pytest.approx(0.02, abs=0.01)
    assert variant_table(read(results(variants=False))) is None


def test_own_share_by_domain_includes_variants(found):
    names = [row[0] for row in own_table(read(found)).rows]
    assert "Nexus" in names and "Nexus [equal_data]" in names and "Seed" not in names


def test_task_groups_when_they_were_run(found):
    assert task_table(read(found)) is None
    for number, entry in enumerate(found["contenders"]):
        for seed in entry["seeds"].values():
            seed["tasks"] = {"science": 50.0 + number, "code": 10.0}
    table = task_table(read(found))
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


# Every column of every table ----------------------------------------------------------------------


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
        quality_table(read(found)),
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
        start_table(read(found)),
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
    assert_row(domain_table(read(found)), ["Nexus"], {"contender": "Nexus", **shown})


def test_every_column_of_the_tasks(found):
    for number, seed in enumerate(seeds_of(found, "contenders", "nexus")):
        seed["tasks"] = {"science": 50.0 + number, "code": 10.0 + 2 * number}
    assert_row(
        task_table(read(found)),
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
    assert_row(own_table(read(found)), ["Nexus"], expected)


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
    assert_row(extension_table(read(found), "github", new=new), ["Linear, reset"], expected)


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
    assert_row(share_table(read(found), "github"), ["Nexus, refit"], expected)


def test_every_column_of_the_changed_settings(found):
    changed, same = (seeds_of(found, "contenders", "linear", v) for v in ("equal_data", ""))
    for number, seed in enumerate(changed):
        seed |= {"own_share": 0.40 + number / 100, "gate": 0.60 + number / 50}
    difference, lower = minus(mean_loss(changed, OLD), mean_loss(same, OLD))
    assert_row(
        variant_table(read(found)),
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
    table = extension_variant_table(read(found))
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


def test_every_column_of_the_result(found):
    """The lowest mean of each, dense training at its own best beside it, branches left out."""
    with_longer_seed(found)
    # of the same seed model: one that has read more is better for all
    found["seed_tokens"] = {}
    table = result_table(read(found))
    nexus, union = (seeds_of(found, "contenders", name, "longer") for name in ("nexus", "union"))
    difference, lower = minus(mean_loss(nexus, OLD), mean_loss(union, OLD))
    (cost,) = [
        row["compute"]["parameters"]
        for row in found["contenders"]
        if row["name"] == "nexus" and row["variant"] == "longer"
    ]
    unit, letter = unit_of([cost["total"]], "G")
    row = next(line for line in table.rows if line[0] == "Nexus")
    assert table.header == [
        "contender",
        "its best setting",
        "loss, old domains",
        "minus Dense on the union",
        "seeds lower",
        f"{letter} active",
        f"{letter} total",
    ]
    assert row == [
        "Nexus",
        "longer",
        approx(mean_loss(nexus, OLD)),
        difference,
        lower,
        pytest.approx(cost["active"] / unit),
        pytest.approx(cost["total"] / unit),
    ]
    labels = [line[0] for line in table.rows]
    means = [line[2].mean for line in table.rows]
    assert means == sorted(means, reverse=True) and labels[-1] == "Output ensemble (BTM)"
    assert not any(label.startswith("Branch") for label in labels)
    (dense,) = [line for line in table.rows if line[0] == "Dense on the union"]
    assert dense[3:5] == [None, None]
    # the linear router has no longer variant
    assert next(line[1] for line in table.rows if line[0] == "Linear router") == UNCHANGED
    # of another seed model nothing is taken
    whole = with_longer_seed(results())
    same = result_table(read(whole))
    assert {line[1] for line in same.rows} <= {UNCHANGED, "low_balance", "equal_data"}


def test_every_column_of_the_regimes(found):
    assert regimes(read(found)) == {} and regime_table(read(found)) is None
    with_longer_seed(found)
    # a setting that leaves the seed alone is no regime of its own
    seed = next(row for row in found["contenders"] if row["name"] == "seed")
    found["contenders"].append(seed | {"variant": "gentler"})
    found["seed_tokens"]["gentler"] = found["seed_tokens"][""]
    # and a worse one is not the one that is shown
    worse = next(
        e for e in found["contenders"] if e["name"] == "nexus" and e["variant"] == "longer"
    )
    worse = copy.deepcopy(worse) | {"variant": "longer, worse"}
    for scores in worse["seeds"].values():
        scores["loss"] = {domain: loss + 0.1 for domain, loss in scores["loss"].items()}
    found["contenders"].append(worse)
    found["seed_tokens"]["longer, worse"] = found["seed_tokens"]["longer"]
    assert list(regimes(read(found))) == [1.0, 10.0]
    table = regime_table(read(found))
    nexus, union = (seeds_of(found, "contenders", name, "longer") for name in ("nexus", "union"))
    difference, lower = minus(mean_loss(nexus, OLD), mean_loss(union, OLD))
    assert_row(
        table,
        [10.0, "Nexus"],
        {
            "tokens a parameter": 10.0,
            "contender": "Nexus",
            "its best setting": "longer",
            "loss, old domains": approx(mean_loss(nexus, OLD)),
            "minus dense": difference,
            "seeds lower": lower,
        },
    )
    assert [line[0] for line in table.rows] == [1.0] * len(METHODS) + [10.0] * 4
    found["seed_tokens"] = {"": 530_000}
    assert regime_table(read(found)) is None
