"""Statistics over seeds and windows: what a paired difference is called, and its error."""

import math

import pytest

from nexus_ds.report.page import Spread
from nexus_ds.report.paired import (
    Difference,
    mean_difference,
    mean_loss,
    over_windows,
    paired,
    quantile,
    spread,
    standard_error,
)


def seeds(*values):
    return {str(seed): value for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ((-0.02, -0.03, -0.01), "better"),
        ((0.02, 0.03, 0.01), "worse"),
        ((-0.5, -0.6, 0.001), "open"),  # one seed has another sign
        ((-0.009, -0.008, -0.012), "open"),  # one sign, but too small
        ((-0.02, -0.03), "lower"),  # too few seeds to call it
        ((0.9,), "higher"),
        ((0.0, 0.0, 0.0), "open"),
    ],
)
def test_outcome(differences, outcome):
    assert paired(seeds(*differences), seeds(*[0.0] * len(differences))).outcome == outcome


def test_paired_uses_the_seeds_that_both_have():
    found = paired({"0": 1.0, "1": 2.0, "2": 9.0}, {"1": 1.5, "0": 1.25})
    assert found.by_seed == {"0": -0.25, "1": 0.5}
    assert found.agreement == "1 of 2"
    assert found.spread.mean == pytest.approx(0.125) and found.spread.deviation == pytest.approx(
        0.75 / math.sqrt(2)
    )
    assert paired({"0": 1.0}, {"1": 1.0}) is None


def test_the_pairing_takes_out_what_seeds_have_in_common():
    base = seeds(4.0, 5.0, 6.0)
    assert spread(base).deviation == pytest.approx(1.0)
    assert paired(
        {seed: value - 0.1 for seed, value in base.items()}, base
    ).spread.deviation == pytest.approx(0.0)


def test_one_seed_has_no_deviation():
    assert spread({"0": 2.0}) == Spread(2.0, None)
    assert str(spread({"0": 2.0})) == "2.000" and str(spread(seeds(2.0, 2.0))) == "2.000 ± 0.000"
    assert spread({}) is None


# Windows ------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_printed_tables():
    table = {1: 12.706, 3: 3.182, 9: 2.262, 47: 2.012, 1e9: 1.960}
    assert {freedom: round(quantile(freedom), 3) for freedom in table} == table
    assert quantile(0) == math.inf


def test_the_error_is_that_of_the_differences():
    found = over_windows([1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 3.7, 4.4])
    assert found.mean == pytest.approx(0.4)
    # deviations 0.1 -0.4 0.3 0
    assert found.error == pytest.approx(math.sqrt((0.01 + 0.16 + 0.09 + 0.0) / 3 / 4))
    assert found.freedom == 3 and found.noise == pytest.approx(3.182 * 0.147196, abs=1e-4)
    assert over_windows([1.0, 5.0], [1.25, 5.25]) == Difference(0.25, 0.0, 1), (
        "what windows have in common cancels"
    )


def test_neighbouring_windows_count_together():
    """20 windows in pairs that agree tell no more than ten windows; pairs that cancel leave
    nothing."""
    # mean 0.25, squared deviations add up to 0.345
    ten = [0.1, 0.3, 0.2, 0.5, 0.4, 0.1, 0.0, 0.2, 0.6, 0.1]
    error = math.sqrt(0.345 / 9 / 10)
    assert standard_error(ten) == pytest.approx(error)
    assert standard_error([value for value in ten for _ in range(2)]) == pytest.approx(error)
    assert standard_error([0.2, 0.4] * 10) == pytest.approx(0.0, abs=1e-9)
    assert over_windows([0.0] * 20, [0.2, 0.4] * 10).freedom == 9


def test_groups_of_unequal_size_count_by_their_windows():
    """Twelve windows in ten groups: the fifth and the last have two. Mean 1; one group of two is 3
    above it, twice."""
    values = [0.4] * 4 + [4.0, 4.0] + [0.4] * 6
    assert standard_error(values) == pytest.approx(
        math.sqrt(10 / 9 * (6.0**2 + 8 * 0.6**2 + 1.2**2)) / 12
    )


def test_windows_of_chats_count_by_their_answer_tokens():
    """Per token: 3 tokens at 0.5, 1 at 0.9; by hand, and the same as windows of one token each."""
    found = over_windows([2.0, 1.0], [2.5, 1.9], [3, 1])
    assert found.mean == pytest.approx((3 * 0.5 + 0.9) / 4)
    # sums -0.3 and 0.3
    assert found.error == pytest.approx(math.sqrt(2 * 2 * 0.3**2) / 4)
    values = [0.1, 0.3, 0.2, 0.5, 0.4, 0.1, 0.0, 0.2, 0.6, 0.1]
    assert standard_error(values, [7] * 10) == pytest.approx(standard_error(values))
    assert mean_loss(values, [7] * 10) == pytest.approx(mean_loss(values))
    # a change that is the same for each token has no error, however many a window has
    assert over_windows([0.0] * 3, [0.25] * 3, [1, 5, 2]) == Difference(0.25, 0.0, 2)


def test_one_window_has_no_error():
    found = over_windows([1.0], [1.5])
    assert found.mean == 0.5 and math.isnan(found.error) and found.noise == math.inf


def test_windows_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError, match="zip"):
        over_windows([1.0, 2.0], [1.0])


def test_the_mean_over_domains_has_the_error_of_independent_parts():
    found = mean_difference([Difference(0.1, 0.3, 4), Difference(-0.3, 0.4, 9)])
    # hypot(0.3, 0.4) / 2
    assert found.mean == pytest.approx(-0.1) and found.error == pytest.approx(0.25)
    assert found.freedom == pytest.approx(0.25**2 / (0.09**2 / 4 + 0.16**2 / 9))
    assert mean_difference([Difference(0.1, 0.0, 4), Difference(0.1, 0.0, 9)]).error == 0
    assert (
        mean_difference([Difference(0.1, 0.2, 4), Difference(0.1, math.nan, 0)]).noise == math.inf
    )
