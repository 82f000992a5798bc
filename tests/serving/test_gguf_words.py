"""Tokenizers in GGUF: just those that llama.cpp splits text with as transformers does."""

import json

import llama_cpp
import pytest
from conftest import save_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nexus_ds.checkpoint.tokenizer import ODD_TEXT
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import ServingError
from nexus_ds.serving.directory import open_checkpoint
from nexus_ds.serving.gguf_file import write_gguf
from nexus_ds.serving.gguf_words import (
    BYTE,
    CONTRACTIONS,
    CONTROL,
    LONGEST,
    NFC,
    NORMAL,
    OWN,
    REST,
    SPACED,
    UNKNOWN,
    UNUSED,
    read_words,
)
from tests.checkpoint.test_older_stacks import make
from tests.data.conftest import save_sentencepiece, sentences

NOTED = ["caf e\u0301 x", " two spaces"]
"""Texts that some notes are about."""
ODD = [text.replace("e\u0301", "").strip() for text in ODD_TEXT]


def step(regex):
    return pre_tokenizers.Split(Regex(regex), "isolated")


def bytes_of(split):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)


WAYS = {
    "gpt-2": (bytes_of(True), None),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of(True)]),
        None,
    ),
    "llama-bpe": (
        pre_tokenizers.Sequence([step(CONTRACTIONS + r"\p{N}{1,3}" + REST), bytes_of(False)]),
        None,
    ),
    "qwen2": (
        pre_tokenizers.Sequence([step(CONTRACTIONS + r"\p{N}" + REST), bytes_of(False)]),
        normalizers.NFC(),
    ),
}


def save_bpe(out, before, normalizer=None, end="<|end|>", **more):
    """Train a byte-level BPE that splits text in a given way, and save it."""
    backend = Tokenizer(models.BPE(**more))
    backend.pre_tokenizer, backend.normalizer = before, normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*sentences(1, 50), *ODD_TEXT * 3], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    wrapped.add_tokens(["<own>"])
    wrapped.save_pretrained(out)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_a_byte_level_bpe_is_known_by_how_it_splits(way, tmp_path):
    before, normalizer = WAYS[way]
    save_bpe(tmp_path, before, normalizer, ignore_merges=way == "llama-bpe")
    words = read_words(tmp_path, 410)
    assert (words.model, words.way) == ("gpt2", way)
    tokenizer = open_tokenizer(tmp_path)
    known = len(tokenizer)
    assert words.tokens[:known] == tokenizer.convert_ids_to_tokens(list(range(known)))
    assert words.tokens[known] == f"[PAD{known}]" and len(words.tokens) == 410
    assert (words.types[0], words.types[1]) == (CONTROL, NORMAL)
    assert (words.types[known - 1], words.types[known]) == (OWN, UNUSED)
    assert words.roles == {"eos": 0} and not words.begins and not words.scores
    # two symbols each, which may not be spaces
    assert words.merges and all(merge.count(" ") == 1 for merge in words.merges)


def test_of_sentencepiece_merges_are_scores(tmp_path):
    save_sentencepiece(tmp_path)
    words = read_words(tmp_path, 330)
    assert words.model == "llama" and words.merges == [] and words.spaced and words.begins
    assert words.scores == [-float(index) for index in range(330)]
    assert [words.types[i] for i in (0, 1, 2, 3)] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert words.roles["bos"] == 1 and words.roles["eos"] == 2


def edit(directory, change):
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(directory, said):
    with pytest.raises(ServingError) as error:
        read_words(directory, 500)
    assert said in str(error.value) and "gpt-2, smollm, llama-bpe, qwen2" in str(error.value)


def test_what_llama_cpp_has_no_way_for_is_refused_by_name(tmp_path):
    save_tokenizer(tmp_path / "words")
    refused(tmp_path / "words", "is of type WordLevel")
    plain = save_bpe(tmp_path / "plain", *WAYS["gpt-2"])
    edit(plain, lambda value: value["model"].update(ignore_merges=True))
    refused(plain, "splits as gpt-2, but has ignore_merges True")
    edit(plain, lambda value: value["model"].update(ignore_merges=False, dropout=0.5))
    refused(plain, "has dropout 0.5")
    save_bpe(tmp_path / "other", pre_tokenizers.Sequence([step(r"\d"), bytes_of(False)]))
    refused(tmp_path / "other", r"splits text in these steps: (('Split', '\\d')")
    save_bpe(tmp_path / "prefix", pre_tokenizers.ByteLevel(add_prefix_space=True))
    refused(tmp_path / "prefix", "splits text in these steps")
    save_bpe(tmp_path / "lower", bytes_of(True), normalizers.Lowercase())
    refused(tmp_path / "lower", "Lowercase")


def test_pieces_in_another_order_are_refused(tmp_path):
    open_tokenizer(save_sentencepiece(tmp_path / "slow")).save_pretrained(tmp_path / "spm")
    read_words(tmp_path / "spm", 330)
    edit(tmp_path / "spm", lambda value: value["model"]["merges"].reverse())
    refused(tmp_path / "spm", "merges pieces in another order than that of their ids")
    # its own class would put its own normalizer there
    path = tmp_path / "spm" / "tokenizer_config.json"
    own = {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    edit(tmp_path / "spm", lambda value: value.update(normalizer={"type": "NFC"}))
    refused(tmp_path / "spm", "takes NFC, Metaspace before its pieces")


def test_tokens_that_the_model_does_not_embed_are_refused(tmp_path):
    save_bpe(tmp_path, *WAYS["gpt-2"])
    known = len(open_tokenizer(tmp_path))
    assert len(read_words(tmp_path, known).tokens) == known
    with pytest.raises(ServingError) as error:
        read_words(tmp_path, known - 1)
    assert str(error.value) == (
        f"{tmp_path}: the tokenizer has token ids up to {known - 1} ('<own>'), the model embeds "
        f"{known - 1}; give it the tokenizer that it was trained with"
    )


def test_a_piece_that_would_take_hours_is_refused(tmp_path):
    """The work on it grows with the square of its length."""
    open_tokenizer(save_sentencepiece(tmp_path / "slow")).save_pretrained(tmp_path / "spm")
    edit(tmp_path / "spm", lambda value: value["model"]["vocab"].update({"a" * LONGEST: 320}))
    read_words(tmp_path / "spm", 330)
    edit(tmp_path / "spm", lambda value: value["model"]["vocab"].update({"a" * 1_000_000: 321}))
    with pytest.raises(ServingError) as error:
        read_words(tmp_path / "spm", 330)
    assert str(error.value) == (
        f"{tmp_path / 'spm'}: the tokenizer has a piece of 1,000,000 characters "
        f"('{'a' * 20}'..), expected at most 512; mend the vocabulary in its tokenizer.json"
    )


def test_a_text_without_an_end_and_with_another_beginning_is_refused(tmp_path):
    save_bpe(tmp_path, *WAYS["gpt-2"])
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    refused(tmp_path, "has no eos_token")


def test_the_chat_template_goes_along(tmp_path):
    save_bpe(tmp_path, *WAYS["gpt-2"])
    assert read_words(tmp_path, 410).template == ""
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_words(tmp_path, 410).template == "{{ messages }}"


@pytest.mark.slow
def test_llama_cpp_splits_text_as_transformers_does(tmp_path):
    llama_cpp.gguf()
    for way, (before, normalizer) in WAYS.items():
        more = {"ignore_merges": way == "llama-bpe"}
        save_bpe(tmp_path / way / "tokenizer", before, normalizer, **more)
    slow = save_sentencepiece(tmp_path / "slow")
    open_tokenizer(slow).save_pretrained(tmp_path / "spm" / "tokenizer")
    texts = [*ODD, *sentences(7, 5), "a <own> b"]
    folders = [*(tmp_path / way for way in WAYS), tmp_path / "spm"]
    cases, wanted = [], []
    for folder in folders:
        opened = open_checkpoint(make(folder, "llama", 3, 1)[0])
        words = read_words(opened.directory, opened.mixture.sizes.vocabulary)
        write_gguf(opened, words, folder / "m.gguf")
        cases.append({"file": str(folder / "m.gguf"), "ids": [0], "texts": texts + NOTED})
        tokenizer = open_tokenizer(opened.directory)
        every = tokenizer(texts + NOTED, add_special_tokens=False)
        wanted.append((every.input_ids, words.notes))
    for case, said, (ids, notes) in zip(
        cases, llama_cpp.answers(tmp_path, cases), wanted, strict=True
    ):
        same = [one == other for one, other in zip(said["ids"], ids, strict=True)]
        assert all(same[: len(texts)]), case
        # what is said to be otherwise is, and no more
        accents, space = same[len(texts) :]
        assert (accents, space) == (NFC not in notes, SPACED not in notes), case
    assert [notes for _, notes in wanted] == [[], [], [], [NFC], [SPACED]]
