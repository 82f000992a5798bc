"""What a model takes, and the largest pieces of it that fit."""

from dataclasses import replace

import pytest

from nexus_ds.checkpoint.needs import Need, Way, features_fit, per_token, way

ALL = 1e18


@pytest.fixture
def need():
    return Need(
        weights=1000.0,
        layer=100.0,
        outside=50.0,
        resident=30.0,
        token=1.0,
        hidden=2.0,
        cache=3.0,
        active=600.0,
        stored=500.0,
        vocabulary=0,
        width=2.0,
    )


@pytest.mark.parametrize(
    ("room", "host", "expected"),
    [
        (ALL, ALL, Way(False, 8)),
        # 1000 + 4 rows of 10 tokens, but not 8
        (1045 / 0.9, ALL, Way(False, 4)),
        (1009 / 0.9, ALL, Way(True, 8)),
        # one layer and what is on the device besides, and two rows
        (155 / 0.9, ALL, Way(True, 2)),
        # what is outside, and the states of two rows before a layer and after
        (ALL, 135 / 0.9, Way(True, 2)),
        (10.0, ALL, Way(True, 1)),
        # the device has room, main memory none to load it through
        (ALL, 1050 / 0.9, Way(True, 8)),
    ],
)
def test_the_largest_pieces_that_fit_are_taken(need, room, host, expected):
    assert way(need, 8, 10, room, host) == expected


def test_logits_are_made_in_slices(need):
    few, many = replace(need, vocabulary=31), replace(need, vocabulary=10**6)
    assert few.working(2, 10) == 20 + 20 * 31 * 12
    assert many.working(2, 10) == 20 + (1 << 24) * 12
    # lm-eval has no slices: logits and their log-probabilities, two bytes each
    assert many.with_all_logits().working(2, 10) == 20 + 20 * 10**6 * 2 * 2


def test_logits_of_a_streamed_model_come_back_to_main_memory(need):
    many = replace(need, vocabulary=1000).with_all_logits()
    assert many.beside(2, 10) == 50 + 2 * 20 * 2 + 20 * 1000 * 4
    assert way(many, 8, 10, 1e6, 1000.0) == Way(True, 1)


def test_pieces_become_smaller_to_the_last():
    found = [Way(False, 5)]
    while (smaller := found[-1].smaller()) is not None:
        found.append(smaller)
    assert [str(way) for way in found] == [
        "whole, 5 sequences at once",
        "whole, 2 sequences at once",
        "whole, 1 sequence at once",
        "layer by layer, 1 sequence at once",
    ]


def test_a_token_takes_its_states_and_its_cache():
    found = per_token(width=2, hidden=8, keys=4, inner=40, layers=3)
    token = 2 * (8 * 8 + 3 * 20 * 2)
    expected = {"width": 2, "token": token, "hidden": 16, "cache": 2 * 4 * 3 * 2, "score": 0}
    assert found == expected
    scored = per_token(width=2, hidden=8, keys=4, inner=40, layers=3, scored=4)
    assert scored == expected | {"score": 4 * (2 + 4 + 2)}


def test_a_warm_start_keeps_a_quarter_of_the_device_for_features():
    assert features_fit(25.0, 100.0) and not features_fit(26.0, 100.0)
