"""Verdicts: signs, bands, noise, the mean, the limit and its exit code; what the windows do not
decide is said."""

import argparse
import json
import math

import pytest

from nexus_ds.errors import ConfigError
from nexus_ds.report.verdict import EXIT_WORSE, add_options, judge, parse_limit, percent

T9 = 2.26216  # Student's t, 9 degrees of freedom, 97.5%
BEFORE = {"law": 2.0, "code": 1.0, "cats": 3.0}
AFTER = {"law": 1.9, "code": 1.005, "cats": 3.2}


def pair(change, error, count=10, before=2.0):
    """Return losses of `count` windows whose paired difference has the mean `change` (nats) and the
    standard error."""
    apart = error * math.sqrt(count - 1)
    level = [before + 0.3 * (i % 5 - 2) for i in range(count)]
    return level, [loss + change + (apart if i % 2 else -apart) for i, loss in enumerate(level)]


def judged(changes, limit=None, count=10):
    """Judge domains {name: (relative change, standard error in nats)}."""
    pairs = {
        name: pair(math.log1p(change), error, count) for name, (change, error) in changes.items()
    }
    return judge({d: p[0] for d, p in pairs.items()}, {d: p[1] for d, p in pairs.items()}, limit)


def sure(limit=None):
    """Judge BEFORE and AFTER, with a standard error of 0.001 nats."""
    pairs = {d: pair(AFTER[d] - BEFORE[d], 0.001, before=BEFORE[d]) for d in BEFORE}
    return judge({d: p[0] for d, p in pairs.items()}, {d: p[1] for d, p in pairs.items()}, limit)


def test_each_domain_gets_a_verdict_and_all_count_the_same():
    verdict = sure()
    assert {name: c.verdict for name, c in verdict.domains.items()} == {
        "law": "better",
        "code": "same",
        "cats": "worse",
    }
    assert verdict.domains["cats"].before == pytest.approx(math.exp(3.0))
    assert verdict.domains["cats"].after == pytest.approx(math.exp(3.2))
    assert verdict.domains["cats"].change == pytest.approx(math.exp(0.2) - 1)
    assert verdict.all.before == pytest.approx(math.exp(2.0))
    assert verdict.all.change == pytest.approx(math.exp((-0.1 + 0.005 + 0.2) / 3) - 1)
    assert verdict.all.difference.error == pytest.approx(0.001 / math.sqrt(3))
    assert verdict.all.verdict == "worse"


def test_windows_of_chats_count_by_their_answer_tokens():
    before = {"law": [2.0, 1.0], "code": [1.0, 1.0]}
    after = {"law": [1.0, 2.0], "code": [1.1, 1.1]}
    verdict = judge(before, after, labels={"law": [3, 1]})
    law = verdict.domains["law"]
    assert law.before == pytest.approx(math.exp(7 / 4))
    assert law.after == pytest.approx(math.exp(5 / 4))
    assert law.difference.mean == pytest.approx(-0.5)
    assert verdict.domains["code"].difference.mean == pytest.approx(0.1)
    assert verdict.all.before == pytest.approx(math.exp((7 / 4 + 1) / 2))
    assert verdict.all.after == pytest.approx(math.exp((5 / 4 + 1.1) / 2))
    assert judge(before, after).domains["law"].difference.mean == 0


def test_every_column_of_the_table():
    lines = [line.split("  ") for line in sure().text().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["perplexity of", "before", "after", "change", "in nats", "verdict"],
        ["law", "7.39", "6.69", "-9.5 ± 0.1 %", "-0.100 ± 0.001", "better"],
        ["code", "2.72", "2.73", "+0.5 ± 0.1 %", "+0.005 ± 0.001", "same"],
        ["cats", "20.09", "24.53", "+22.1 ± 0.1 %", "+0.200 ± 0.001", "worse"],
        ["all", "7.39", "7.65", "+3.6 ± 0.1 %", "+0.035 ± 0.001", "worse"],
    ]


@pytest.mark.parametrize(
    ("change", "error", "called"),
    [
        (0.05, 0.01, "worse"),
        (-0.05, 0.01, "better"),
        (0.015, 0.01, "same"),  # inside 2.26 standard errors, though above 1%
        (-0.015, 0.01, "same"),
        (0.015, 0.005, "worse"),
        (0.008, 0.0001, "same"),  # sure, and too small to matter
    ],
)
def test_same_is_within_the_band_or_the_noise(change, error, called):
    assert judged({"law": (change, error)}).domains["law"].verdict == called


def test_few_windows_need_a_larger_difference():
    """Student's t: 12.7 standard errors with two windows, 2.26 with ten."""
    # ln 1.5 = 0.405 < 12.7 * 0.04
    assert judged({"law": (0.5, 0.04)}, count=2).domains["law"].verdict == "same"
    assert judged({"law": (0.7, 0.04)}, count=2).domains["law"].verdict == "worse"  # ln 1.7 = 0.531
    assert judged({"law": (0.1, 0.04)}).domains["law"].verdict == "worse"  # 0.0953 > 2.26 * 0.04


def test_the_interval_and_the_error_of_a_change():
    change = judged({"law": (0.057, 0.01)}).domains["law"]
    assert change.error == pytest.approx(1.057 * 0.01)
    low, high = (1.057 * math.exp(side * T9 * 0.01) - 1 for side in (-1, 1))
    assert change.interval == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "failed", "undecided"),
    [
        (0.02, False, False),
        (0.04, False, True),
        (0.057, False, True),
        (0.08, True, False),
        (-0.5, False, False),
    ],
)
def test_a_limit_fails_where_all_of_the_interval_is_above_it(
    tmp_path, capsys, change, failed, undecided
):
    verdict = judged({"law": (change, 0.01), "code": (0.0, 0.001)}, 0.05)
    assert (verdict.failed, verdict.undecided) == (["law"] * failed, ["law"] * undecided)
    assert verdict.exit_code("evaluate", tmp_path / "out") == (EXIT_WORSE if failed else 0)
    assert bool(capsys.readouterr().err) == (failed or undecided)


def test_what_the_windows_do_not_decide_is_said_with_how_many_would(tmp_path, capsys):
    """(2.2622 + 0.8416) * 0.01 / (ln 1.057 - ln 1.05) = 4.6712; its square times 10 windows is
    218."""
    verdict = judged({"law": (0.057, 0.01), "code": (0.2, 0.01)}, 0.05)
    assert verdict.exit_code("evaluate", tmp_path / "out") == EXIT_WORSE
    assert capsys.readouterr().err == (
        "nexus-ds evaluate: 10 windows do not decide --fail-if-worse 5% for law (+5.7 ± 1.1 %), "
        "so that passes; about 220 windows a domain (--windows) of that much more text would\n"
        "nexus-ds evaluate: worse than --fail-if-worse 5% allows: code (+20.0 ± 1.2 %); "
        f"{tmp_path / 'out'} is written all the same\n"
    )
    assert "do not decide" not in verdict.text(), "said once"
    (note,) = judged({"law": (0.0501, 0.01)}, 0.05).notes()
    assert note.endswith("so that passes; not even 100 times as many windows would")


def test_the_same_for_want_of_windows_is_said():
    """2.2622 * 0.01 / ln 1.01 = 2.2735; its square times 10 windows is 51.7."""
    verdict = judged({"law": (0.003, 0.01), "code": (0.003, 0.001), "cats": (0.2, 0.03)})
    assert verdict.text().splitlines()[-1] == (
        "the same as far as 10 windows can tell: law (+0.3 ± 1.0 %); about 52 windows a domain "
        "(--windows) of that much more text would show a change of 1 %"
    )
    assert judged({"code": (0.003, 0.001), "cats": (0.2, 0.03)}).notes() == []


def test_one_window_is_open(tmp_path, capsys):
    verdict = judge({"law": [2.0]}, {"law": [3.0]}, 0.03)
    assert verdict.domains["law"].verdict == verdict.all.verdict == "open"
    assert verdict.exit_code("remove", tmp_path) == 0
    assert capsys.readouterr().err == (
        "nexus-ds remove: one window has no standard error, so nothing is called better or worse; "
        "give --windows 48\n"
    )
    assert verdict.text().splitlines()[1].split() == [
        "law",
        "7.39",
        "20.09",
        "+171.8",
        "%",
        "+1.000",
        "open",
    ]
    value = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["domains"]["law"]
    assert value["change_error"] is None and value["interval"] is None and value["nats"] == 1.0


def test_a_model_compared_with_itself_passes_every_limit(tmp_path):
    losses = {"law": [2.0, 3.0, 4.0]}
    for limit in (None, 0.0, 0.03):
        verdict = judge(losses, losses, limit)
        assert (
            verdict.exit_code("remove", tmp_path) == 0
            and verdict.undecided == verdict.notes() == []
        )
        assert verdict.domains["law"].verdict == "same"


def test_only_rises_above_the_limit_fail(tmp_path, capsys):
    for limit, failed in ((None, []), (0.3, []), (0.2, ["cats"]), (0.0, ["code", "cats"])):
        verdict = sure(limit)
        assert verdict.failed == failed and verdict.as_dict()["failed"] == failed
        assert verdict.exit_code("remove", tmp_path / "out") == (EXIT_WORSE if failed else 0)
        said = capsys.readouterr().err
        assert bool(said) == bool(failed)
    assert said == (
        "nexus-ds remove: worse than --fail-if-worse 0% allows: code (+0.5 ± 0.1 %), "
        "cats (+22.1 ± 0.1 %); "
        f"{tmp_path / 'out'} is written all the same\n"
    )


@pytest.mark.parametrize(
    ("after", "failed"),
    [([720.0 + 0.01 * i for i in range(48)], ["law"]), ([5.0, 125.0], []), ([1e4, 3e4], [])],
)
def test_a_model_that_has_diverged_is_judged_like_any_other(after, failed, tmp_path):
    """By e^700, as perplexities are, where the change or the end of its interval is more."""
    verdict = judge({"law": [2.0] * len(after)}, {"law": after}, 0.03)
    assert verdict.failed == failed and verdict.undecided == ([] if failed else ["law"])
    law = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["domains"]["law"]
    assert law["interval"][1] == math.expm1(700) >= law["change"] > 1e20
    assert verdict.text() and bool(verdict.exit_code("evaluate", tmp_path)) == bool(failed)


def test_a_limit_below_the_band_narrows_it():
    assert sure(0.001).domains["code"].verdict == "worse"
    assert sure(0.5).domains["code"].verdict == "same"


def test_json_has_everything():
    value = sure(0.1).as_dict()
    assert list(value) == ["domains", "all", "limit", "failed", "undecided", "windows", "notes"]
    assert value["limit"] == 0.1 and value["windows"] == 10 and value["failed"] == ["cats"]
    assert value["undecided"] == value["notes"] == []
    ends = [math.exp(-0.1 + side * T9 * 0.001) - 1 for side in (-1, 1)]
    assert value["domains"]["law"] == {
        "before": pytest.approx(math.exp(2)),
        "after": pytest.approx(math.exp(1.9)),
        "change": pytest.approx(math.exp(-0.1) - 1),
        "change_error": pytest.approx(math.exp(-0.1) * 0.001),
        "interval": pytest.approx(ends, abs=1e-7),
        "nats": pytest.approx(-0.1),
        "nats_error": pytest.approx(0.001),
        "verdict": "better",
    }
    assert value["all"]["nats"] == pytest.approx(0.035)


def test_percentages():
    assert (parse_limit(None), parse_limit("3%"), parse_limit(" 0.5 % "), parse_limit("0%")) == (
        None,
        0.03,
        0.005,
        0,
    )
    for text in ("3", "0.03", "-1%", "three", "%", "1e3%"):
        with pytest.raises(ConfigError, match="expected a percentage such as 3%"):
            parse_limit(text)


@pytest.mark.parametrize(
    ("change", "shown"),
    [(-0.5, "-50.0 %"), (0.08, "+8.0 %"), (-0.0001, "+0.0 %"), (1e304, "+1e+306 %")],
)
def test_percent(change, shown):
    assert percent(change) == shown
    assert percent(change, 0.0123) == shown.replace(" %", " ± 1.2 %")


def test_help_names_the_exit_code_and_what_fails(capsys):
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "exit with 3 if the perplexity" in said
    assert "all of the 95% interval of the rise, window by window, lies above it" in said
