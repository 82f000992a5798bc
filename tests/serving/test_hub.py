"""What is shown on the hub: a card, a license, a checkpoint that can be extended, no local path."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import yaml
from branches import make_parts, upcycle
from launch import file_limit

from nexus_ds.checkpoint.hashes import record_hashes
from nexus_ds.checkpoint.model_card import metadata_of, split_card
from nexus_ds.checkpoint.records import OtherStep, manifest_json, read_manifest
from nexus_ds.errors import ServingError
from nexus_ds.outputs import write_json
from nexus_ds.serving.directory import open_checkpoint
from nexus_ds.serving.hub import LOCAL, public, public_card, public_manifest, write_public
from nexus_ds.upcycling.new_checkpoint import open_old
from nexus_ds.upcycling.verification import verify


@pytest.fixture
def made(tmp_path, dense_dir, text_folder):
    """A mixture of whose parts one is on the hub and one in a folder."""
    make_parts(tmp_path, dense_dir, text_folder)
    upcycle(tmp_path)
    out = tmp_path / "out"
    manifest = read_manifest(out)
    first, second, third = manifest.experts
    experts = [
        dataclasses.replace(first, source="someone/law", license="mit"),
        dataclasses.replace(second, source="runs/own/branches/beta"),
        third,
    ]
    other = OtherStep(verb="merge", written={"verb": "merge", "checkpoint": "runs/own/before"})
    lineage = [dataclasses.replace(manifest.lineage[0], seed_model="runs/own/seed"), other]
    changed = dataclasses.replace(manifest, experts=experts, lineage=lineage)
    write_json(out / "nexus.json", manifest_json(changed))
    (out / "README.md").unlink()
    record_hashes(out)
    (out / "training.yaml").write_text("data: {path: /home/me/text}\n")
    (out / ".hidden").write_text("")
    return out


def shown(source, out, license_name=""):
    out.mkdir()
    notes = write_public(open_checkpoint(source), out, license_name)
    record_hashes(out)
    return notes


def test_a_mixture_on_the_hub_can_be_extended_by_others(made, tmp_path):
    notes = shown(made, tmp_path / "hub")
    assert "left out: training.yaml" in notes
    assert any("no license is stated for all parts: give one with --license" in n for n in notes)
    assert verify(tmp_path / "hub").problems == []
    before, after = open_old(made), open_old(tmp_path / "hub")
    assert [e.name for e in after.sidecar.experts] == [e.name for e in before.sidecar.experts]
    assert np.array_equal(after.sidecar.vectors, before.sidecar.vectors)
    assert (tmp_path / "hub" / "nexus" / "nexus_router.safetensors").is_file()


def test_weights_that_do_not_fit_are_named_with_need_and_room(made, tmp_path):
    said = r"File too large: need [\d,]+ bytes more, free [\d,]+: '.*/hub/model[^/]*\.safetensors'$"
    with file_limit(20_000), pytest.raises(OSError, match=said):
        shown(made, tmp_path / "hub")


def test_no_file_says_where_anything_lay(made, tmp_path):
    shown(made, tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    sidecar = (tmp_path / "hub" / "nexus.json").read_text()
    for words in (text, sidecar):
        assert "runs/own" not in words and str(tmp_path) not in words
        assert "someone/law" in words and "beta" in words
    steps = json.loads(sidecar)["lineage"]
    assert (steps[0]["seed_model"], steps[1]["checkpoint"]) == ("seed", "before")
    # the hub refuses base models that are none
    assert metadata_of(tmp_path / "hub")["base_model"] == ["someone/law"]


def test_the_license_is_the_owners_or_what_the_parts_come_to(made, tmp_path):
    notes = shown(made, tmp_path / "hub", "apache-2.0")
    assert metadata_of(tmp_path / "hub")["license"] == "apache-2.0"
    assert not any("license" in note for note in notes)


def test_a_card_that_somebody_wrote_is_kept(made, tmp_path):
    own = (
        "---\nbase_model: runs/own/seed\nlicense: mit\ntags: [law]\n---\n\n# Mine\n\nruns/own/seed"
    )
    (made / "README.md").write_text(own)
    assert shown(made, tmp_path / "hub") == ["left out: training.yaml"]
    text = (tmp_path / "hub" / "README.md").read_text()
    metadata, body = split_card(text, "README.md")
    assert metadata == {"license": "mit", "tags": ["law"]} and body == "\n# Mine\n\nseed"
    (made / "README.md").write_text("# Mine")
    shutil.rmtree(tmp_path / "hub")
    shown(made, tmp_path / "hub", "mit")
    assert (tmp_path / "hub" / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine"
    (made / "README.md").write_bytes("# für alle".encode("latin-1"))
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(ServingError, match=r"README.md: found other bytes than UTF-8 .*save it as"):
        shown(made, tmp_path / "hub")
    os.truncate(made / "README.md", 3 << 30)
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(ServingError, match=r"README.md has 3,221,225,472 bytes, expected at most"):
        shown(made, tmp_path / "hub")


def test_a_card_that_can_not_be_read_is_text():
    assert split_card("---\n: [\n---\nx", "c") == ({}, "---\n: [\n---\nx")
    assert split_card("---\na: 1\n", "c") == ({}, "---\na: 1\n")
    assert split_card("---\na: 1\n---\nx", "c") == ({"a": 1}, "x")


def test_a_local_path_in_any_other_place_is_refused_by_name(made, tmp_path):
    (made / "README.md").write_text("Trained on /home/me/text, see and/or https://a.b/c/d.")
    with pytest.raises(ServingError, match=r"README.md of the checkpoint .* '/home/me/text"):
        shown(made, tmp_path / "hub")
    (made / "README.md").write_text("fine")
    shutil.rmtree(tmp_path / "hub")
    config = json.loads((made / "tokenizer_config.json").read_text())
    places = {"name_or_path": "/home/me/seed"}
    write_json(made / "tokenizer_config.json", config | places)
    shown(made, tmp_path / "hub")
    assert json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text()) == config
    write_json(made / "config.json", json.loads((made / "config.json").read_text()) | {"x": "~/m"})
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(ServingError, match=r"config.json of the checkpoint holds .* '~/m'; take"):
        shown(made, tmp_path / "hub")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in /home/me/x.", "/home/me/x."),
        ('"file:///data/x"', "file:///data/x"),
        ("C:\\Users\\me", "C:\\Users\\me"),
        ("~/models", "~/models"),
        ("https://huggingface.co/a/b", None),
        ("and/or/else, 1/2/3", None),
        ("</s/>", None),
        ("a / b /c", None),
        ("[card](docs/card.md)", None),
    ],
)
def test_local_paths_are_told_from_other_text(text, found):
    match = LOCAL.search(text)
    assert (match and match[0]) == found


def test_models_keep_their_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public("owner/name") == "owner/name" and public("a/b/c") == "c" and public("c") == "c"
    (tmp_path / "models" / "law").mkdir(parents=True)
    assert public("models/law") == "law"


def test_several_base_models_and_none(made):
    manifest = public_manifest(read_manifest(made))
    card = yaml.safe_dump({"base_model": ["someone/law", "beta"], "base_model_relation": "merge"})
    text, licensed = public_card(f"---\n{card}---\nx", manifest, "")
    assert split_card(text, "c")[0] == {
        "base_model": ["someone/law"],
        "base_model_relation": "merge",
    }
    assert licensed is False
