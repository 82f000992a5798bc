"""results.json: read as it was written, and what is missing there stays missing."""

import json
import math

import pytest
from made_up_results import read

from nexus_ds.experiments.comparison.result_file import (
    BudgetScores,
    Compute,
    ExtensionRow,
    MethodRow,
    SeedScores,
    Validation,
    budgets_of,
    mean_loss,
)

SHARES = {"a": {"a": 0.8, "b": 0.2}}
METHOD = {"name": "nexus", "label": "Nexus", "variant": "low", "about": "It.", "group": "router"}
EXTENSION = {
    "name": "refit",
    "label": "Refit",
    "variant": "",
    "about": "It.",
    "added": "b",
    "starts_from": "nexus",
}


def small():
    """Results with everything that a comparison writes, as it writes it."""
    validation = {"loss": {"a": 3.25}, "own_share": 0.8, "routing": SHARES, "gate": 0.7}
    untrained = {"loss": {"a": 5.0}, "own_share": 0.3, "routing": SHARES, "gate": None}
    cost = {
        "training_flops": 0,
        "training_tokens": 4096,
        "seconds": None,
        "parameters": {"total": 33952, "active": 23952},
    }
    budget = {"loss": {"a": 4.0}, "routing": SHARES, "share": 0.5, "leak": 0.1, "own_share": 0.8}
    turns = [{"added": "b", "loss": {"a": 4.5}}, {"added": "c", "loss": {"a": 4.0}}]
    extended = {"budgets": {"0": budget}, "turns": turns}
    seeds = {
        "0": validation | {"untrained": untrained},
        "1": {"loss": {"a": 2.5}, "tasks": {"science": 31.5}},
    }
    measured = {"mean": 2.5, "standard_error": 0.5, "values": [2.0, 3.0], "weights": [1.0, 1.0]}
    return {
        "recipe": "compare-tiny",
        "overrides": ["a=1"],
        "seeds": [0, 1],
        "seconds": 1.5,
        "machine": "2 CPU cores",
        "data": {"path": "demo", "windows": 4, "length": 8},
        "domains": {"old": ["a"], "pretraining": ["c"], "new": ["b"], "scored": ["a", "c", "b"]},
        "contenders": [METHOD | {"compute": cost, "seeds": seeds}],
        "extensions": [EXTENSION | {"compute": cost, "seeds": {"0": extended}}],
        "evaluations": {"nexus": {"checkpoint": {"kind": "Nexus"}, "tokens_per_second": 10.5}},
        "variants": {"low": {"overrides": ["b=2"]}},
        "not_run": [{"name": "BTX", "why": "not asked for"}],
        "contender_settings": {"union": ["c=3"]},
        "measures": {"bits": {"models": {"Nexus": {"a": measured}}, "reference": {}}},
        "seed_tokens": {"": 1_000_000, "v": 2_000_000},
        "seed_curve": [{"tokens": 500_000, "loss": {"a": 4.5}}],
    }


def test_what_is_read_is_what_was_written():
    text = json.dumps(small(), indent=2)
    assert json.dumps(read(json.loads(text)).to_json(), indent=2) == text


def test_keys_that_are_not_known_are_ignored():
    assert read(small() | {"note": "joined by hand"}) == read(small())


def test_what_is_null_or_missing_was_not_measured():
    optional = ("contenders", "extensions", "evaluations", "variants", "not_run", "data", "machine")
    null = small() | dict.fromkeys(optional)
    missing = {key: value for key, value in small().items() if key not in optional}
    assert read(null) == read(missing)
    assert read(null).methods == [] and read(null).data.path is None


def test_a_row_is_called_by_its_label_and_its_setting():
    assert MethodRow.from_json(METHOD).title == "Nexus [low]"
    assert MethodRow.from_json({"name": "nexus"}).title == "nexus"


def test_a_missing_domain_makes_no_mean():
    assert mean_loss({"a": 2.0, "b": 4.0}, ["a", "b"]) == 3.0
    for found in ({"a": 2.0}, {}):
        assert mean_loss(found, ["a", "b"]) is None
    assert mean_loss({"a": 2.0}, []) is None


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True])
def test_what_is_no_finite_number_is_not_measured(value):
    found = SeedScores.from_json({"loss": {"a": 2.0, "b": value}, "gate": value})
    assert found == SeedScores(loss={"a": 2.0})
    assert Compute.from_json({"training_flops": value}) == Compute()


def test_failed_seeds_are_left_out():
    seeds = {
        "0": {"loss": {"a": 1.0}, "gate": 0.5},
        "1": None,
        "2": {"loss": None, "gate": None},
    }
    row = MethodRow.from_json(METHOD | {"seeds": seeds})
    assert row.losses(["a"]) == {"0": 1.0} and row.gates() == {"0": 0.5}
    assert MethodRow.from_json(METHOD | {"seeds": None}).losses(["a"]) == {}


def test_budgets_are_ordered_as_numbers():
    seeds = {
        "0": {"budgets": {"100000": {}, "25000": {}}},
        "1": {"budgets": {"0": {}}},
        "2": {},
    }
    row = ExtensionRow.from_json(EXTENSION | {"seeds": seeds})
    assert row.budgets == budgets_of([row]) == ["0", "25000", "100000"]


def test_numbers_of_an_extension_by_seed():
    one = BudgetScores(loss={"a": 1.0, "b": 3.0}, own_share=0.9, share=0.5, leak=None)
    other = BudgetScores(loss={"a": 2.0}, share=0.7, leak=0.1)
    seeds = {"0": {"0": one}, "1": {"0": other}, "2": {}}
    row = ExtensionRow(
        name="r",
        label="R",
        variant="",
        about="",
        compute=Compute(),
        added="b",
        starts_from="nexus",
        seeds=seeds,
    )
    assert row.losses(["a", "b"], "0") == {"0": 2.0}
    assert row.shares("0") == {"0": 0.5, "1": 0.7} and row.leaks("0") == {"1": 0.1}
    assert row.own_shares("0") == {"0": 0.9} and row.shares("25000") == {}


def test_what_was_not_trained_is_written_with_its_loss_alone():
    assert SeedScores(loss={"a": 1.0}).to_json() == {"loss": {"a": 1.0}}
    trained = SeedScores(loss={"a": 1.0}, untrained=Validation(loss={"a": 2.0}))
    assert list(trained.to_json()) == ["loss", "own_share", "routing", "gate", "untrained"]
