"""The page's opening: a short paper's parts in their order, with the comparison's own numbers."""

from made_up_results import read, results, with_longer_seed

from nexus_ds.experiments.comparison.report_findings import verdict
from nexus_ds.experiments.comparison.report_opening import opening_sections


def opened(found, folder):
    sections = opening_sections(read(found), "nexus-ds compare --out DIR", folder)
    return {section.title: section for section in sections}


def test_its_parts_stand_in_the_order_of_a_paper(tmp_path):
    found = results()
    sections = opened(found, tmp_path)
    assert list(sections) == ["Answer", "Setup", "Result", "Limits", "Reproduce"]
    assert sections["Answer"].text == "\n\n".join(verdict(read(found)))
    assert sections["Result"].table.header[0] == "contender"
    assert sections["Result"].figure == tmp_path / "differences.png"
    assert sections["Result"].figure.stat().st_size > 10_000
    assert sections["Reproduce"].text.startswith("nexus-ds compare --out DIR\n\n")


def test_the_figure_is_that_of_regimes_where_there_are_some(tmp_path):
    sections = opened(with_longer_seed(results()), tmp_path)
    assert sections["Result"].figure == tmp_path / "regimes.png"
    assert "has read 530k tokens" in sections["Setup"].text


def test_what_is_told_follows_from_the_results(tmp_path):
    found = results() | {"seeds": [0, 1], "seconds": 90.0, "machine": "2 CPU cores, x86_64"}
    found["domains"] |= {"old": ["a", "b", "c"], "pretraining": ["d"], "new": []}
    found["data"] = {"windows": 7, "length": 64}
    sections = opened(found, tmp_path)
    assert sections["Setup"].text.startswith(
        "One expert each for a, b and c. d without an expert. Seeds 0, 1, 7 validation windows of "
        "64 tokens a domain."
    )
    assert "2 seeds. What is best of several settings" in sections["Limits"].text
    assert sections["Reproduce"].text.endswith("It took 1m30s on 2 CPU cores, x86_64.")
    plain = results(variants=False) | {"seconds": None, "contenders": []}
    sections = opened(plain, tmp_path)
    assert "Result" not in sections and "best of several" not in sections["Limits"].text
    assert sections["Reproduce"].text.endswith("not made again.")
