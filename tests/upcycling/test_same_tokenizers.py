"""Vocabularies that grew: every row of the new embeddings from the models that know its token."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from branches import (
    NAMES,
    ROWS,
    edit_config,
    edit_tensors,
    embed,
    grow,
    left_over,
    make_parts,
    stock,
    tensors_of,
    upcycle,
)

from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.records import read_manifest
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.checkpoint.tokenizer import read_tokenizer
from nexus_ds.config import load_config
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.outputs import new_directory
from nexus_ds.upcycling.compatible import Waived
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.same_tokenizers import Alignment, Embedder, aligned
from nexus_ds.upcycling.sources import Part, mean_of

ALIGN = Waived(vocabulary=True)


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe; all with a head of their own."""
    make_parts(tmp_path, dense_dir, text_folder)
    for name in ("seed", *NAMES):
        generator = torch.Generator().manual_seed(len(name))

        def add_head(tensors, generator=generator):
            noise = torch.randn(ROWS, 16, generator=generator)
            tensors[HEAD] = tensors[EMBEDDING] + noise

        edit_tensors(tmp_path / name, add_head)
        edit_config(tmp_path / name, tie_word_embeddings=False)
    return tmp_path


def test_rows_come_from_the_models_that_know_their_token(parts, capsys):
    """alpha added two tokens; gamma has nine rows of padding, of which it uses none."""
    grow(parts / "alpha", ["<|im_start|>", "<|im_end|>"])
    grow(parts / "gamma", [], rows=40)
    upcycle(parts, waived=ALIGN)
    branches, out = [tensors_of(parts / name) for name in NAMES], tensors_of(parts / "out")
    for name in (EMBEDDING, HEAD):
        alpha, _, gamma = (branch[name] for branch in branches)
        mean = torch.stack([branch[name][:ROWS] for branch in branches]).mean(0)
        torch.testing.assert_close(out[name][:ROWS], mean, atol=1e-7, rtol=1e-6)
        assert torch.equal(out[name][31:33], alpha[31:]) and torch.equal(out[name][33:], gamma[33:])
    said = capsys.readouterr().err
    assert "note: rows 31 to 32 of the embeddings come from expert alpha alone" in said
    assert "note: rows 33 to 39 of the embeddings come from expert gamma alone" in said
    assert f"note: the tokenizer is that of {parts / 'alpha'}" in said
    assert read_tokenizer(parts / "out").tokens == read_tokenizer(parts / "alpha").tokens
    model = stock(parts / "out")
    assert model(torch.tensor([[1, 32]])).logits.shape == (1, 2, 40)


def test_a_seed_that_is_kept_gives_all_rows_that_it_has(parts, capsys):
    """Tokens that it lacks are the weighted mean of the branches that have them."""
    grow(parts / "seed", [], rows=32)
    grow(parts / "alpha", ["<one>", "<two>"])
    grow(parts / "beta", ["<one>", "<two>"], rows=40)
    upcycle(parts, "model.merge=seed", "model.merge_weights={beta: 3}", waived=ALIGN)
    seed, alpha, beta, out = [tensors_of(parts / name) for name in ("seed", "alpha", "beta", "out")]
    for name in (EMBEDDING, HEAD):
        assert torch.equal(out[name][:31], seed[name][:31]) and len(out[name]) == 40
        mean = (alpha[name][31:33] + 3 * beta[name][31:33]) / 4
        torch.testing.assert_close(out[name][31:33], mean)
        assert torch.equal(out[name][33:], beta[name][33:])
    said = capsys.readouterr().err
    assert "note: rows 0 to 30 of the embeddings come from the seed alone" in said
    assert "note: rows 31 to 32 of the embeddings come from expert alpha, expert beta alone" in said
    assert re.search(r"upcycle: (\d+)/\1 tensors", said), "each counts once, whatever its pieces"
    assert read_tokenizer(parts / "out").tokens == read_tokenizer(parts / "alpha").tokens


@pytest.mark.parametrize("merge", ["mean", "seed"])
def test_without_growth_nothing_changes(merge, parts, capsys):
    upcycle(parts, f"model.merge={merge}")
    plain = (parts / "out" / "model.safetensors").read_bytes()
    lineage = read_manifest(parts / "out").lineage
    shutil.rmtree(parts / "out")
    upcycle(parts, f"model.merge={merge}", waived=ALIGN)
    assert (parts / "out" / "model.safetensors").read_bytes() == plain
    assert read_manifest(parts / "out").lineage == lineage
    assert "note: rows" not in capsys.readouterr().err


def test_an_extension_merges_rows_by_the_weights_of_those_that_have_them(parts):
    upcycle(parts)
    grow(parts / "alpha", ["<new>"])
    grow(parts / "beta", ["<new>"])
    embed(parts / "more.safetensors", ("delta", "epsilon"), "gone", seed=3)
    with new_directory(parts / "wider") as directory:
        extended(
            parts / "out",
            {"delta": parts / "alpha", "epsilon": parts / "beta"},
            read_domain_embeddings(parts / "more.safetensors"),
            load_config(str(parts / "recipe.yaml")),
            share=0.5,
            waived=ALIGN,
        ).write(directory, None, load_config("demo").router, 0)
    old, new = tensors_of(parts / "out"), tensors_of(parts / "wider")
    alpha, beta = tensors_of(parts / "alpha"), tensors_of(parts / "beta")
    for name in (EMBEDDING, HEAD):
        merged = 0.5 * old[name] + 0.25 * (alpha[name][:ROWS] + beta[name][:ROWS])
        torch.testing.assert_close(new[name][:ROWS], merged, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(new[name][ROWS:], (alpha[name] + beta[name])[ROWS:] / 2)
    assert "<new>" in read_tokenizer(parts / "wider").tokens.values()


def test_rows_that_weigh_nothing_still_come_from_those_that_have_them(parts):
    grow(parts / "alpha", ["<new>"])
    found = aligned(
        [Embedder("old", parts / "seed", ROWS), Embedder("new", parts / "alpha", ROWS + 1)]
    )
    assert list(found.pieces()) == [(0, ROWS, [0, 1]), (ROWS, ROWS + 1, [1])]
    assert found.rows == ROWS + 1 and found.tokenizer == parts / "alpha"


def test_a_token_in_a_row_of_padding_does_not_count_the_others_padding(parts):
    grow(parts / "alpha", ["<new>"], rows=40)
    grow(parts / "beta", [], rows=40)
    models = [Embedder(name, parts / name, 40) for name in ("alpha", "beta")]
    pieces = [(0, ROWS, [0, 1]), (ROWS, ROWS + 1, [0]), (ROWS + 1, 40, [0, 1])]
    assert list(aligned(models).pieces()) == pieces


def test_an_id_that_means_two_things_is_refused(parts):
    grow(parts / "alpha", ["<one>", "<two>"])
    grow(parts / "beta", ["<other>"])
    with pytest.raises(
        IncompatibleModelsError,
        match=r"expert beta .*did not grow to that of .*alpha: 1 tokens differ, the first: "
        r"31 '<other>' / '<one>'; --align-vocab is for",
    ):
        upcycle(parts, waived=ALIGN)
    assert not left_over(parts)


def test_a_vocabulary_that_grew_is_refused_unless_asked_for_and_the_option_is_named(parts):
    grow(parts / "alpha", ["<new>"])
    with pytest.raises(IncompatibleModelsError) as caught:
        upcycle(parts)
    said = str(caught.value)
    assert "vocabulary: where tokens were only added, --align-vocab keeps them all" in said
    assert "31 nothing / '<new>'" in said and "Tokens were only added: --align-vocab" in said
    assert not left_over(parts)


def test_another_way_to_split_a_text_is_no_growth(parts):
    grow(parts / "alpha", ["<new>"])
    path = parts / "alpha" / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    path.write_text(json.dumps(definition))
    with pytest.raises(IncompatibleModelsError, match="the same text becomes other tokens"):
        upcycle(parts, waived=ALIGN)


def test_padding_of_zeros_is_no_damage(parts):
    """Rows beyond all tokenizers are a piece of their own, of all models."""
    counts = np.array([[True, True, True, True], [True, True, False, True]])
    reader = TensorReader(parts / "seed")
    whole = mean_of([Part("a", reader, "w"), Part("b", reader, "w")])
    found = Alignment(parts / "seed", counts).blend(whole)
    assert [(start, stop) for start, stop, _ in found.pieces] == [(0, 2), (2, 3), (3, 4)]
    assert all(part.zeros for _, _, blend in found.pieces for part in blend.parts)
