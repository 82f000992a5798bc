"""Verdicts: signs, bands, the mean, the limit and its exit code."""

import argparse
import math

import pytest

from nexus_ds.errors import ConfigError
from nexus_ds.report.verdict import EXIT_WORSE, add_options, judge, parse_limit, percent

BEFORE = {"law": 2.0, "code": 1.0, "cats": 3.0}
AFTER = {"law": 1.9, "code": 1.005, "cats": 3.2}


def test_each_domain_gets_a_verdict_and_all_count_the_same():
    verdict = judge(BEFORE, AFTER)
    assert {name: c.verdict for name, c in verdict.domains.items()} == {
        "law": "better",
        "code": "same",
        "cats": "worse",
    }
    assert verdict.domains["cats"].change == pytest.approx(math.exp(0.2) - 1)
    assert verdict.all.change == pytest.approx(math.exp((-0.1 + 0.005 + 0.2) / 3) - 1)
    assert verdict.text().splitlines()[0].split() == ["perplexity", "of", "before", "after", "change", "verdict"]
    assert verdict.text().splitlines()[3].split() == ["cats", "20.09", "24.53", "+22.1", "%", "worse"]
    assert verdict.text().splitlines()[4].split()[0] == "all"


def test_only_rises_above_the_limit_fail(tmp_path, capsys):
    for limit, failed in ((None, []), (0.3, []), (0.2, ["cats"]), (0.0, ["code", "cats"])):
        verdict = judge(BEFORE, AFTER, limit)
        assert verdict.failed == failed and verdict.as_dict()["failed"] == failed
        assert verdict.exit_code("remove", tmp_path / "out") == (EXIT_WORSE if failed else 0)
        said = capsys.readouterr().err
        assert bool(said) == bool(failed)
    assert said == (
        f"nexus-ds remove: worse than --fail-if-worse 0% allows: code (+0.5 %), cats (+22.1 %); {tmp_path / 'out'} is "
        "written all the same\n"
    )


def test_a_limit_below_the_band_narrows_it():
    assert judge(BEFORE, AFTER, 0.001).domains["code"].verdict == "worse"
    assert judge(BEFORE, AFTER, 0.5).domains["code"].verdict == "same"


def test_json_has_everything():
    value = judge(BEFORE, AFTER, 0.1).as_dict()
    assert list(value) == ["domains", "all", "limit", "failed"] and value["limit"] == 0.1
    assert value["domains"]["law"] == {
        "before": pytest.approx(math.exp(2)), "after": pytest.approx(math.exp(1.9)),
        "change": pytest.approx(math.exp(-0.1) - 1), "verdict": "better",
    }  # fmt: skip


def test_percentages():
    assert (parse_limit(None), parse_limit("3%"), parse_limit(" 0.5 % "), parse_limit("0%")) == (None, 0.03, 0.005, 0)
    for text in ("3", "0.03", "-1%", "three", "%", "1e3%"):
        with pytest.raises(ConfigError, match="expected a percentage such as 3%"):
            parse_limit(text)


@pytest.mark.parametrize(("change", "shown"), [(-0.5, "-50.0 %"), (0.08, "+8.0 %"), (-0.0001, "+0.0 %")])
def test_percent(change, shown):
    assert percent(change) == shown


def test_help_names_the_exit_code(capsys):
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "exit with 3 if the perplexity" in " ".join(capsys.readouterr().out.split())
