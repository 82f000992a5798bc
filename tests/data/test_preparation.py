"""A tokenizer where a run makes one, and all token files of a run's trainings in as few passes as
can be."""

import dataclasses
from pathlib import Path

import pytest
from conftest import WORDS, save_tokenizer

from nexus_ds.config import load_config
from nexus_ds.data import preparation
from nexus_ds.data.preparation import make_tokenizer, tokenise
from nexus_ds.errors import DataError
from nexus_ds.pipeline import resolve


@pytest.fixture
def configured(tmp_path, text_folder):
    """Settings of a stage of a run on tiny text."""

    def settings(*words):
        run = (f"pipeline.run={tmp_path / 'run'}", "pipeline.domains=[alpha,beta]")
        more = ("pipeline.new_domains=[gamma]", "pipeline.vocabulary=300")
        return resolve(load_config("demo", [*run, *more, f"data.path={text_folder}", *words]))

    return settings


def test_a_tokenizer_is_made_for_a_new_seed_alone_and_once(configured, tmp_path, monkeypatch):
    for words in (["stage=moe"], ["stage=seed", "model.path=models/seed"]):
        make_tokenizer(configured(*words))
    assert not (tmp_path / "run").exists()
    make_tokenizer(configured("stage=seed"))
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    monkeypatch.setattr(preparation, "train_tokenizer", lambda *_: pytest.fail("made again"))
    make_tokenizer(configured("stage=seed"))


def test_domains_that_are_tokenised_alike_share_a_pass(configured, tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "run" / "tokenizer", WORDS)
    passes = []
    real = preparation.tokenised

    def noted(data, source, domains, split, tokenizer):
        passes.append((split, *domains))
        return real(data, source, domains, split, tokenizer)

    monkeypatch.setattr(preparation, "tokenised", noted)
    seed, branch = configured("stage=seed"), configured("stage=branch", "branch=gamma")
    tokenise([seed, branch])
    domains = ("alpha", "beta", "gamma")
    assert passes == [("validation", *domains), ("train", *domains)]
    passes.clear()
    other = dataclasses.replace(branch, data=dataclasses.replace(branch.data, max_bytes=500))
    made = tokenise([seed, other])
    assert passes == [
        ("validation", *domains),
        ("validation", *domains),
        ("train", "alpha", "beta"),
        ("train", "gamma"),
    ]
    assert len(made) == 6 and all(made.values()), "validation text is the same file"


def test_what_is_wrong_with_the_text_is_told(configured, tmp_path):
    save_tokenizer(tmp_path / "run" / "tokenizer", WORDS)
    with pytest.raises(DataError, match="omega"):
        tokenise([configured("stage=branch", "branch=omega")])
    made = Path(tmp_path / "run" / "tokens").glob("*.bin")
    assert not [path for path in made if "-train-" in path.name]
