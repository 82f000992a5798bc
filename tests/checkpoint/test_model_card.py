"""The README.md of a checkpoint: what is read of others', and what is written."""

import dataclasses

import pytest

from nexus_ds.checkpoint.cards import CARD, DomainCard
from nexus_ds.checkpoint.model_card import (
    card_text,
    dense_card,
    joint_license,
    metadata_of,
    nexus_card,
    stated_license,
    table,
    write_model_card,
)
from nexus_ds.checkpoint.records import (
    EncoderRecord,
    ExpertRecord,
    Manifest,
    RouterRecord,
    TrainStep,
    UpcycleStep,
)
from nexus_ds.settings import RouterConfig


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", {"license": "mit", "tags": ["a"]}),
        ("# Model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nmit\n---\n", {}),
    ],
)
def test_metadata(tmp_path, text, found):
    assert metadata_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert metadata_of(tmp_path) == found
    assert stated_license(tmp_path) == found.get("license", "")


def test_a_domain_card_that_cannot_be_read_states_no_license(tmp_path):
    (tmp_path / CARD).write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert stated_license(tmp_path) == "mit"


# What is written ----------------------------------------------------------------------------------

STEP = TrainStep(stage="moe", steps=3, tokens=4096, mixture={"law": 1.0}, perplexity={"law": 8.125})


def manifest(**licenses):
    """What nexus.json says of a mixture of a seed and two branches with these licenses."""
    experts = [
        ExpertRecord("law", "legal", "models/law", "1" * 64, licenses.get("law", "mit")),
        ExpertRecord("code", "code", "hub/code", "2" * 64, licenses.get("code", "mit")),
    ]
    settings = RouterConfig()
    names = [field.name for field in dataclasses.fields(RouterRecord)]
    router = RouterRecord(**{name: getattr(settings, name) for name in names})
    made = UpcycleStep(
        seed_model="seed",
        family="llama",
        router=settings,
        seed=0,
        seed_license=licenses.get("seed", "mit"),
    )
    encoder = EncoderRecord("minilm", "3" * 64, 384, 200, True)
    return Manifest(
        experts=experts, router=router, encoder=encoder, lineage=[made], versions={"nexus_ds": "1"}
    )


def test_a_mixture(tmp_path):
    """As the hub reads it, and for people; scores where its last step was a training."""
    found = manifest()
    write_model_card(tmp_path, nexus_card(found))
    assert metadata_of(tmp_path) == {
        "base_model": ["seed", "models/law", "hub/code"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe", "merge", "nexus", "legal", "code"],
    }
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model:\n- seed\n")
    assert "\n---\n\n# A mixture of law, code" in text
    assert f"| law | legal | models/law | mit | `{'1' * 16}` |" in text
    assert f"minilm, revision `{'3' * 16}`, 384 numbers, of at least 200 documents" in text
    assert "1. upcycle: seed_model seed" in text and "Evaluation" not in text
    found.lineage.append(STEP)
    text = card_text(nexus_card(found, "apache-2.0"))
    assert "\nlicense: apache-2.0\n" in text and "| law | 8.12 |" in text
    assert "2. train: stage moe; steps 3; tokens 4096; mixture {'law': 1.0}" in text


@pytest.mark.parametrize(
    ("licenses", "joint"),
    [({}, "mit"), ({"law": "gpl-3.0"}, "other"), ({"law": ""}, ""), ({"seed": ""}, "")],
)
def test_licenses_of_parts(licenses, joint):
    card = nexus_card(manifest(**licenses))
    assert card.license == joint
    assert ("license: not said" in card_text(card)) == (licenses == {"seed": ""})
    assert joint_license({}) == ""


def test_a_dense_model(tmp_path):
    embedding = [0.5] * 4
    numbers = {"max_tokens": 5, "documents": 6, "windows": 2, "sample_seed": 0}
    text = {"text_documents": 9, "text_bytes": 99, "seed_sha256": "4" * 64, "ffn_sha256": "5" * 64}
    named = {"domain": "legal", "license": "", "encoder": "minilm", "revision": "3" * 64}
    domain = DomainCard(**named, **numbers, **text, embedding=embedding)
    write_model_card(tmp_path, dense_card("seed", "mit", domain, STEP))
    assert metadata_of(tmp_path)["base_model"] == ["seed"]
    assert metadata_of(tmp_path)["base_model_relation"] == "finetune"
    said = (tmp_path / "README.md").read_text()
    assert "# A branch for legal" in said and f"| seed's FFN sha256 | `{'4' * 16}` |" in said
    assert "from seed with nexus_ds on 4,096 tokens (law 100%)" in said and "| law | 8.12 |" in said
    write_model_card(tmp_path, dense_card("", "", None, dataclasses.replace(STEP, perplexity={})))
    assert set(metadata_of(tmp_path)) == {"library_name", "pipeline_tag", "tags"}
    assert "Evaluation" not in (tmp_path / "README.md").read_text()


def test_foreign_text_stays_in_its_cell():
    assert table(["a"], [["x | y\n# z"]]) == "| a |\n| --- |\n| x \\| y # z |"


def test_foreign_text_begins_no_line(tmp_path):
    """A branch's card states its license and encoder, and its directory's name may be anything."""
    evil = "mit\n---\n\n# Approved"
    found = manifest(law=evil, code=evil, seed=evil)
    encoder = EncoderRecord(evil, "\n# Approved", 384, 200, True)
    made = dataclasses.replace(found.lineage[0], seed_model=evil)
    found = dataclasses.replace(found, encoder=encoder, lineage=[made], versions={"x": evil})
    write_model_card(tmp_path, nexus_card(found))
    text = (tmp_path / "README.md").read_text()
    # in the metadata it is text that YAML reads back as it was, its lines indented
    assert metadata_of(tmp_path)["license"] == evil
    assert metadata_of(tmp_path)["base_model"][0] == evil
    assert text.count("\n---\n") == 1 and "\n# Approved" not in text
    assert "): mit --- # Approved, license: mit --- # Approved." in text


def test_half_a_character_is_told_as_json_tells_it(tmp_path):
    """Found by tests/fuzz.py: an export for the hub ended in a UnicodeEncodeError."""
    half = "a\ud800"
    found = manifest(law=half, code="mit", seed=half)
    encoder = EncoderRecord(half, half, 384, 200, True)
    made = dataclasses.replace(found.lineage[0], seed_model=half)
    experts = [dataclasses.replace(one, name=half, sha256=half) for one in found.experts]
    found = dataclasses.replace(found, encoder=encoder, lineage=[made], experts=experts)
    write_model_card(tmp_path, nexus_card(found))
    text = (tmp_path / "README.md").read_text()
    assert "Domain embeddings: a\\ud800, revision `a\\ud800`" in text
    assert metadata_of(tmp_path)["base_model"][0] == half
