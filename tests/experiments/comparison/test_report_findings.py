"""The verdict says what the numbers say, and no more."""

import pytest
from made_up_results import EXTENSIONS, read, results, with_longer_seed

from nexus_ds.experiments.comparison.report_findings import verdict


def set_loss(results, name, shift, kind="contenders"):
    """Put one method at Nexus' losses plus `shift` (one number a seed)."""
    nexus = next(e for e in results[kind] if e["name"] == "nexus")
    entry = next(e for e in results[kind] if e["name"] == name and not e["variant"])
    for seed, by in zip(nexus["seeds"], shift, strict=True):
        entry["seeds"][seed]["loss"] = {d: v + by for d, v in nexus["seeds"][seed]["loss"].items()}


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ((0.03, 0.02, 0.04), "better than Linear router (by 0.030 ± 0.010)"),
        ((-0.03, -0.02, -0.04), "worse than Linear router (by 0.030 ± 0.010)"),
        (
            (0.03, -0.02, 0.02),
            "not told apart from Linear router (-0.010 ± 0.026, lower in 2 of 3 seeds)",
        ),
        (
            (0.003, 0.002, 0.004),
            "not told apart from Linear router (-0.003 ± 0.001, lower in 3 of 3 seeds)",
        ),
    ],
)
def test_first_sentence_sets_nexus_beside_the_papers_baseline(found, shift, said):
    found["contenders"] = [e for e in found["contenders"] if e["name"] in ("nexus", "linear")]
    set_loss(found, "linear", shift)
    (first, *_) = verdict(read(found))
    assert (
        first.startswith("Upcycling: Nexus reaches ")
        and "over 3 seeds) on the 4 domains of its experts" in first
    )
    assert first.endswith(f"It is {said}.")


def test_more_or_less_training_is_said(found):
    text = " ".join(verdict(read(found)))
    assert "Seed (by 0.900 ± 0.000; no further training)" in text
    assert "Output ensemble (BTM) (by 0.123 ± 0.002; 0.85 × the training)" in text
    assert "Linear router (by 0.033 ± 0.003)" in text  # as much training: nothing to say


def test_a_branch_makes_no_finding_of_its_own(found):
    assert "Branch" not in " ".join(verdict(read(found)))


def test_extension_speaks_of_new_and_old_domains_apart(found):
    new, old, at_once = [
        text for text in verdict(read(found)) if text.startswith(("Adding", "Nexus, append"))
    ]
    assert new.startswith(
        "Adding github, the new domain after 100k tokens of finetuning: Nexus, refit reaches 4.6"
    )
    assert old.startswith(
        "Adding github, the old domains after 100k tokens of finetuning: Nexus, refit reaches 4.8"
    )
    assert "better than" in new and "Linear, reset (by 0.0" in new
    assert "Linear, label fit" in new.split("not told apart from")[1]
    assert at_once.startswith(
        "Nexus, append, before any finetuning: 0.08 ± 0.01 of github's tokens and 0.07"
    )


def test_settings_that_matter_are_named_and_others_counted(found):
    (text,) = [text for text in verdict(read(found)) if text.startswith("Settings")]
    assert "equal_data (+0.019 ± 0.002, worse)" in text and "low_balance" not in text
    assert "1 of 2 changed settings can't be told apart" in text


def test_one_seed_calls_nothing_better():
    texts = verdict(read(results(seeds=[0])))
    assert "better than" not in " ".join(texts) and "worse than" not in " ".join(texts)
    assert " in 1 of 1" not in " ".join(texts) and " in 0 of 1" not in " ".join(texts)
    assert "lower (in 1 seed, too few to call it better) than" in texts[0]
    assert texts[-1].startswith("From 1 seed: ") and "run at least 3 seeds" in texts[-1]


def test_the_last_sentence_says_how_often_chance_does_the_same(found):
    assert "in 1 of 4 comparisons of 3 seeds" in verdict(read(found))[-1]


def test_without_nexus_nothing_is_said_about_it(found):
    found["contenders"] = [e for e in found["contenders"] if not e["name"].startswith("nexus")]
    found["extensions"] = [e for e in found["extensions"] if not e["name"].startswith("nexus")]
    texts = verdict(read(found))
    assert texts[0] == "No Nexus mixture was measured, so nothing is said about upcycling."
    assert texts[1] == "Adding github: no Nexus extension was measured."


def test_an_extension_that_failed_in_one_seed_is_compared_over_the_others(found):
    entry = next(e for e in found["extensions"] if e["name"] == "linear_reset")
    entry["seeds"]["2"] = {}
    (new, *_) = [text for text in verdict(read(found)) if text.startswith("Adding")]
    assert f"too few to call it better) than {EXTENSIONS['linear_reset'][0]} (by" in new


def test_a_seed_that_has_read_more_is_no_setting_of_the_mixture():
    found = with_longer_seed(results())
    said = [text for text in verdict(read(found)) if text.startswith("Settings,")]
    assert not any("longer" in text for text in said)
    # of a seed model that was given nothing is known
    found["seed_tokens"] = {}
    said = [text for text in verdict(read(found)) if text.startswith("Settings,")]
    assert "longer" in said[0]
