"""The card of a branch in training: whose text, from where, and what ends a run at its start."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from branches import branch, embed

from nexus_ds.checkpoint.cards import CARD, ffn_sha256, read_card
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.config import load_config
from nexus_ds.data.domains import read_domain_embeddings, write_domain_embeddings
from nexus_ds.errors import ConfigError
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import domain_card
from nexus_ds.runtime.domain_card import place_card, prepare_card, wants_card


class OneHot:
    """An encoder whose vectors tell which domain's words a text has most of."""

    name, revision, max_tokens = "one", "1" * 64, 64

    def __init__(self, encoder="one"):
        pass

    def windows(self, text, limit):
        return [text]

    def encode(self, texts):
        return np.eye(8, dtype=np.float32)[[len(text) % 8 for text in texts]]


@pytest.fixture
def config(tmp_path, dense_dir, text_folder, monkeypatch):
    monkeypatch.setattr(domain_card, "SentenceEncoder", OneHot)
    monkeypatch.setattr(domain_card, "encoder_directory", lambda encoder: encoder)
    monkeypatch.setattr(domain_card, "weights_hash", lambda directory: "1" * 64)
    words = ["stage=branch", "branch=beta", f"model.path={dense_dir}", f"data.path={text_folder}"]
    places = [f"pipeline.run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]
    return resolve(load_config("demo", [*words, *places, "pipeline.embedding_documents=7"]))


def test_only_branches_get_one(config):
    assert wants_card(config)
    assert not wants_card(dataclasses.replace(config, stage="moe"))
    config.pipeline.card = False
    assert not wants_card(config)


def test_it_waits_beside_the_states_and_goes_with_the_weights(config, tmp_path, dense_dir):
    work = tmp_path / "out.training"
    config.model.license = "mit"
    prepare_card(config, {"beta": 1.0}, work)
    waiting = read_card(work)
    assert (waiting.domain, waiting.documents, waiting.text_documents) == ("beta", 7, 60)
    assert waiting.license == "mit" and waiting.ffn_sha256 == ""
    seed = ffn_sha256(open_dense(dense_dir))
    assert waiting.seed_sha256 == seed
    # of a run that is resumed the card is there
    (work / CARD).write_text((work / CARD).read_text().replace('"mit"', '"other"'))
    prepare_card(config, {"beta": 1.0}, work)
    shutil.copytree(dense_dir, tmp_path / "branch")
    place_card(config, tmp_path / "branch")
    placed = read_card(tmp_path / "branch")
    assert (placed.license, placed.ffn_sha256) == ("other", seed)


def changed_text(config, seed):
    file = Path(config.data.path) / "beta" / "train.jsonl"
    file.write_text("\n".join(json.dumps({"text": "x" * 6}) for _ in range(9)) + "\n")


def changed_seed(config, seed):
    config.model.path = str(branch(Path(config.model.path), seed, 1))


def changed_sample(config, seed):
    config.pipeline.embedding_documents = 3


def changed_drawing(config, seed):
    config.seed = 5


def damaged_record(config, seed):
    path = Path(config.output + ".training") / domain_card.RECORD
    path.write_text(path.read_text().replace('"beta"', '"gamma"'))


def no_record(config, seed):
    (Path(config.output + ".training") / domain_card.RECORD).unlink()


CHANGES = (
    changed_text,
    changed_seed,
    changed_sample,
    changed_drawing,
    damaged_record,
    no_record,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_waiting_card_of_something_else_is_made_again(config, tmp_path, text_folder, change):
    config.data.path = str(shutil.copytree(text_folder, tmp_path / "text"))
    work = tmp_path / "out.training"
    prepare_card(config, {"beta": 1.0}, work)
    # what tells the old card from a new one, whatever else is equal
    (work / CARD).write_text((work / CARD).read_text().replace('"one"', '"old"'))
    change(config, tmp_path / "other")
    prepare_card(config, {"beta": 1.0}, work)
    prepare_card(config, {"beta": 1.0}, tmp_path / "fresh")
    assert read_card(work).encoder == "one"
    assert read_card(work) == read_card(tmp_path / "fresh")


def test_a_kill_between_card_and_record_leaves_no_record_of_another_card(
    config, tmp_path, monkeypatch
):
    work = tmp_path / "work"
    prepare_card(config, {"beta": 1.0}, work)

    def killed(directory, card):
        raise KeyboardInterrupt

    monkeypatch.setattr(domain_card, "write_card", killed)
    config.seed = 5
    with pytest.raises(KeyboardInterrupt):
        prepare_card(config, {"beta": 1.0}, work)
    assert not (work / domain_card.RECORD).exists()


def test_the_license_of_the_seed_is_the_branch_s(config, tmp_path):
    seed = tmp_path / "seed"
    shutil.copytree(config.model.path, seed)
    (seed / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    config.model.path = str(seed)
    prepare_card(config, {"beta": 1.0}, tmp_path / "work")
    assert read_card(tmp_path / "work").license == "apache-2.0"


def test_what_the_run_has_embedded_is_not_embedded_again(config, tmp_path):
    path = embed(tmp_path / "run" / "domains.safetensors", ("alpha", "beta"), config.data.path)
    vector = read_domain_embeddings(path).vector("beta")
    prepare_card(config, {"beta": 1.0}, tmp_path / "first")
    assert read_card(tmp_path / "first").embedding == vector.tolist()
    others = {"seed": 1, "data": "elsewhere", "revision": "2" * 64, "names": ["alpha", "gamma"]}
    for key, value in others.items():
        given = dataclasses.replace(read_domain_embeddings(path), **{key: value})
        write_domain_embeddings(path, given, overwrite=True)
        prepare_card(config, {"beta": 1.0}, tmp_path / key)
        assert read_card(tmp_path / key).embedding != vector.tolist(), key
        embed(path, ("alpha", "beta"), config.data.path)
    path.write_text(json.dumps({}))
    prepare_card(config, {"beta": 1.0}, tmp_path / "damaged")
    assert read_card(tmp_path / "damaged").encoder == "one"


def test_an_encoder_that_is_not_there_is_told_before_the_training(config, tmp_path, monkeypatch):
    def missing(encoder):
        raise ConfigError("no sentence encoder 'x' on this machine")

    monkeypatch.setattr(domain_card, "encoder_directory", missing)
    with pytest.raises(ConfigError, match=r"no sentence encoder .*pipeline.card=false trains with"):
        prepare_card(config, {"beta": 1.0}, tmp_path / "work")
