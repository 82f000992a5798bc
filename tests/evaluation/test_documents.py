"""Bits per byte and cloze against plain transformers, token by token and text by text."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from held_out_text import WORDS, write_model, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ds.data.corpora import open_source
from nexus_ds.data.held_out import HeldOut, held_out
from nexus_ds.errors import DataError
from nexus_ds.evaluation import documents as module
from nexus_ds.evaluation.documents import (
    CHOICES,
    CONTEXT,
    NEAR,
    PASSAGES,
    Passage,
    Reader,
    bits_per_byte,
    cloze,
    passages,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    source = open_source(str(write_text(tmp_path_factory.mktemp("text"))))
    return {domain: held_out(source, domain, 3, seed=0) for domain in ("alpha", "beta")}


def plain(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(directory, local_files_only=True)


@torch.no_grad()
def cost(model, ids, first=1):
    """Return the nats of the ids from place `first` on, given those before."""
    logs_SV = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logs_SV[place - 1, ids[place]]) for place in range(first, len(ids)))


# Bits per byte -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "begin"), [(16, ()), (37, (5, 7)), (256, (5,))])
def test_bits_are_those_of_every_token_once(directory, held, length, begin):
    reader = Reader(directory, length, batch=3)
    reader.__dict__["tokenizer"] = dataclasses.replace(reader.tokenizer, begin=begin)
    texts = {"alpha": [held["alpha"].texts[0], "déjà vu 日本"], "beta": held["beta"].texts[1:2]}
    found = bits_per_byte(reader, texts)
    model, tokenizer = plain(directory)
    opening = list(begin or (tokenizer.eos_token_id,))
    for domain, documents in texts.items():
        for place, text in enumerate(documents):
            ids = opening + tokenizer(text).input_ids
            nats = 0.0
            # each token by itself, given what its piece has before it
            for token in range(len(opening), len(ids)):
                start = (token - 1) // length * length
                nats += cost(model, ids[start : token + 1], token - start)
            size = len(text.encode("utf-8"))
            assert found[domain].values[place] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
            assert found[domain].weights[place] == size


def test_bits_do_not_depend_on_the_tokenizer(tmp_path, held):
    """A model to which all tokens are equally likely pays log2 V a token, in any vocabulary."""
    texts = {"alpha": held["alpha"].texts}
    for vocabulary in (260, 400):
        directory = write_model(tmp_path / str(vocabulary), vocabulary=vocabulary)
        model, tokenizer = plain(directory)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        model.save_pretrained(directory)
        found = bits_per_byte(Reader(directory, 32), texts)["alpha"]
        tokens = [len(tokenizer(text).input_ids) for text in texts["alpha"]]
        expected = np.array(tokens) * math.log2(vocabulary) / found.weights
        assert found.values == pytest.approx(expected, rel=1e-6)


def test_unknown_tokens_are_told(dense_dir, capsys):
    bits_per_byte(Reader(dense_dir, 16, label="small"), {"alpha": ["what is nowhere ."]})
    said = capsys.readouterr().err
    assert "warning: 3 of 4 tokens are unknown to the tokenizer of small" in said
    assert "its bits per byte are too few" in said


# Cloze -------------------------------------------------------------------------------------------


def test_passages_are_text_before_frequent_words(held):
    text = held["alpha"]
    found = passages(text, "alpha", seed=3)
    assert found == passages(text, "alpha", seed=3) != passages(text, "alpha", seed=4)
    counts = np.bincount([passage.document for passage in found])
    assert counts.tolist() == [PASSAGES] * 3
    for passage in found:
        word = passage.choices[0]
        assert len(passage.before) == CONTEXT - 1
        assert f"{passage.before} {word}" in text.texts[passage.document]
        assert len(set(passage.choices)) == CHOICES
        # of like frequency: none further than the others could be
        ranks = [text.frequent.index(choice) for choice in passage.choices]
        assert max(ranks) - min(ranks) <= NEAR


def test_every_neighbour_may_be_a_choice():
    words = [f"w{number:02}" for number in range(50)]
    generator = np.random.default_rng(0)
    for rank, low in ((0, 0), (14, 0), (30, 15), (49, 19)):
        drawn = set()
        for _ in range(200):
            first, *others = module._choices(words, rank, generator)
            assert first == words[rank] and first not in others
            drawn.update(others)
        assert drawn == set(words[low : low + NEAR + 1]) - {words[rank]}


def test_no_choice_begins_the_right_word_or_is_begun_by_it():
    """The beginning of a word is as likely as the word or more: it could only win."""
    words = [f"w{number:02}" for number in range(50)]
    words[18:20], words[21:23] = ["w", "w2"], ["w20s", "w20so"]
    generator = np.random.default_rng(0)
    drawn = set()
    for _ in range(200):
        first, *others = module._choices(words, 20, generator)
        assert first == "w20" and len(set(others)) == CHOICES - 1
        drawn.update(others)
    # as many as ever: in their place come the next ones
    assert drawn == {*words[3:18], *words[23:38]}
    few = ["some" + "x" * number for number in range(40)]
    with pytest.raises(DataError) as caught:
        module._choices([*few, *WORDS[:8]], 5, generator)
    assert str(caught.value) == (
        "found 8 frequent words that neither begin 'somexxxxx' nor are begun by it, expected 9 or "
        "more; give more text, or leave cloze out of --measures"
    )


@pytest.mark.parametrize(("length", "begin"), [(40, (5,)), (256, ())])
def test_cloze_is_the_likeliest_of_the_whole_texts(directory, held, length, begin):
    reader = Reader(directory, length, batch=16)
    reader.__dict__["tokenizer"] = dataclasses.replace(reader.tokenizer, begin=begin)
    asked = {domain: passages(text, domain, seed=0) for domain, text in held.items()}
    found = cloze(reader, asked)
    model, tokenizer = plain(directory)
    some_right = some_wrong = False
    for domain, questions in asked.items():
        right = np.zeros(3)
        for passage in questions:
            rows = [tokenizer(f"{passage.before} {word}").input_ids for word in passage.choices]
            cut = max(0, max(map(len, rows)) - (length + 1 - len(begin)))
            costs = [cost(model, [*begin, *row[cut:]]) for row in rows]
            right[passage.document] += costs.index(min(costs)) == 0
        assert found[domain].values.tolist() == (right / PASSAGES).tolist()
        assert found[domain].weights.tolist() == [PASSAGES] * 3
        some_right |= right.any()
        some_wrong |= (right < PASSAGES).any()
    assert some_right and some_wrong


def test_a_tie_is_no_answer(dense_dir):
    """To a tokenizer that knows none of the words all are one."""
    passage = Passage(1, "before", WORDS[:CHOICES])
    found = cloze(Reader(dense_dir, 16), {"alpha": [passage]})["alpha"]
    assert found.values.tolist() == [0.0] and found.weights.tolist() == [1]


def test_a_choice_may_begin_another():
    reader = Reader("x", 16)
    reader.__dict__["tokenizer"] = dataclasses.make_dataclass("T", ["begin"])(())
    object.__setattr__(reader, "ids", lambda text: {"a b": [1, 2], "a bc": [1, 2, 3]}[text])
    rows = module._asked(reader, Passage(0, "a", ["b", "bc"]))
    assert rows == [([1, 2], 1), ([1, 2, 3], 1)]


def test_too_few_words():
    with pytest.raises(DataError) as caught:
        passages(HeldOut(["some text"], ["text"]), "alpha", 0)
    assert str(caught.value) == (
        "domain 'alpha': found 1 words of four letters or more in its validation text, expected "
        "more than 30; give more text, or leave cloze out of --measures"
    )


def test_no_passage():
    with pytest.raises(DataError, match=r"no passage of 160 characters ends with a frequent word"):
        passages(HeldOut(["some text"], WORDS), "alpha", 0)


def test_windows_that_are_too_short(directory, held):
    asked = {"alpha": passages(held["alpha"], "alpha", 0)[:1]}
    with pytest.raises(DataError, match=r"windows of 1 tokens are too short .* longer --length"):
        cloze(Reader(directory, 1), asked)
