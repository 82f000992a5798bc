"""What all models are asked, and what the answers are held against."""

import pytest

from nexus_ds.data.held_out import HeldOut
from nexus_ds.evaluation.distance import distance, units
from nexus_ds.evaluation.measures import Questions

WORDS = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(120)]
TEXTS = {
    name: HeldOut([" ".join(WORDS[start:] + WORDS) for start in starts], WORDS)
    for name, starts in (("a", (0, 5)), ("b", (9, 3, 1)))
}


def test_only_what_is_asked_is_chosen():
    assert not Questions(TEXTS, ["bits"]).passages
    asked = Questions(TEXTS, ["cloze", "generation"])
    assert list(asked.passages) == list(asked.stretches) == ["a", "b"]


def test_each_domain_gets_the_continuations_of_its_own_prompts():
    asked = Questions(TEXTS, ["generation"])
    given = []

    def continued(prompts):
        given.extend(prompts)
        return [f"{prompt} and more" for prompt in prompts]

    found = asked.measured("generation", None, continued)
    for domain, stretches in asked.stretches.items():
        documents = [each.document for each in stretches]
        words = [units(each.prompt)[:32] for each in stretches]
        expected = distance(documents, words, [each.real for each in stretches])
        # the prompt's words without the last one of the continuation, of which 32 count
        assert found[domain].values == pytest.approx(expected.values)
    assert given == [each.prompt for part in asked.stretches.values() for each in part]


def test_references():
    asked = Questions(TEXTS, ["bits", "cloze", "generation"])
    assert asked.reference("bits") == {}
    chance = asked.reference("cloze")
    assert {domain: part.values.tolist() for domain, part in chance.items()} == {
        "a": [0.1],
        "b": [0.1],
    }
    real = asked.reference("generation")
    perfect = asked.measured(
        "generation", None, lambda _: [f"{' '.join(e.after)} x" for e in every(asked)]
    )
    for domain in TEXTS:
        assert real[domain].values == pytest.approx(perfect[domain].values)
        assert real[domain].values.mean() > 0


def every(asked):
    return [each for part in asked.stretches.values() for each in part]
