"""Domain cards: what they keep, that floats survive, and what is refused of others' files."""

import dataclasses
import json

import numpy as np
import pytest
from branches import embed

from nexus_ds.checkpoint.cards import (
    CARD,
    card_of,
    check_card,
    embeddings_for,
    embeddings_of,
    ffn_sha256,
    has_card,
    read_card,
    read_cards,
    write_card,
)
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import CheckpointError, ConfigError, DataError, IncompatibleModelsError


@pytest.fixture
def embeddings(tmp_path):
    return read_domain_embeddings(embed(tmp_path / "d.safetensors", ("alpha", "beta"), "text"))


def card(embeddings, domain="alpha", **changes):
    return dataclasses.replace(card_of(embeddings, {domain: 1.0}, domain), **changes)


def test_a_card_keeps_every_bit_of_the_embedding(tmp_path, embeddings):
    write_card(tmp_path, card(embeddings, license="apache-2.0"))
    assert has_card(tmp_path) and read_card(tmp_path) == card(embeddings, license="apache-2.0")
    again = embeddings_of(read_cards({"law": tmp_path}))
    assert again.names == ["law"] and again.documents == {"law": 5} and again.data == ""
    assert np.array_equal(again.vector("law"), embeddings.vector("alpha"))
    assert (again.encoder, again.revision) == ("tiny", "1" * 64)


def test_a_card_over_several_domains_is_their_weighted_mean(embeddings):
    made = card_of(embeddings, {"alpha": 0.25, "beta": 0.75}, "both", "mit")
    a, b = embeddings.vectors
    assert np.allclose(made.embedding, 0.25 * a + 0.75 * b, atol=1e-7)
    assert (made.domain, made.license, made.documents) == ("both", "mit", 10)


def test_the_hash_of_a_model_is_that_of_its_ffn(dense_dir):
    model = open_dense(dense_dir)
    assert ffn_sha256(model) == sha256_of_tensors(model.reader, model.ffn_names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1; make the card again"),
        ({"more": 1}, "found the keys .*'more'.*expected "),
        ({"documents": "many"}, "documents is 'many', expected <class 'int'>"),
        ({"documents": True}, "documents is 'True', expected"),
        ({"embedding": ["a"]}, "embedding is .*expected list"),
        ({"embedding": []}, "the embedding is empty, zero or has values that are not numbers"),
        ({"embedding": [float("nan")] * 8}, "not numbers"),
        ({"embedding": [0.0] * 8}, "zero"),
        ({"embedding": [int(1e30)] * 8 + [1e39]}, "not numbers"),
    ],
)
def test_damaged_cards(tmp_path, embeddings, change, message):
    write_card(tmp_path, card(embeddings))
    path = tmp_path / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_card(tmp_path)


def test_cards_that_do_not_go_together(tmp_path, embeddings):
    first = card(embeddings)
    other = dataclasses.replace(first, revision="2" * 64)
    shorter = dataclasses.replace(first, embedding=first.embedding[:4])
    for second in (other, shorter):
        with pytest.raises(IncompatibleModelsError, match=r"different encoders \(a: tiny 1111.*b:"):
            embeddings_of({"a": first, "b": second})
    with pytest.raises(DataError, match=r"expert a: its domain_card.json is of other weights"):
        check_card("a", dataclasses.replace(first, ffn_sha256="1"), "2")
    # not said: not checked
    check_card("a", first, "2")


def test_where_embeddings_come_from(tmp_path, embeddings):
    file, bare, packed = tmp_path / "d.safetensors", tmp_path / "bare", tmp_path / "packed"
    bare.mkdir()
    write_card(packed, card(embeddings))
    assert embeddings_for(str(file), {"a": packed})[1] == {}
    found, cards = embeddings_for(None, {"a": packed, "seed": bare}, bare)
    assert found.names == list(cards) == ["a"]
    # the same folder, spelled and linked otherwise
    (tmp_path / "link").symlink_to(bare)
    for seed in (tmp_path / "packed" / ".." / "bare", tmp_path / "link"):
        assert list(embeddings_for(None, {"a": packed, "seed": bare}, seed)[1]) == ["a"]
    for experts in ({"a": packed, "b": bare}, {"seed": bare}):
        with pytest.raises(ConfigError, match=r"no domain card .* give --domains .*nexus-ds card"):
            embeddings_for(None, experts, None if "b" in experts else bare)
