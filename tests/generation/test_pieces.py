"""Pieces of text: together they are what the tokenizer decodes at once, and none is half a
character."""

import pytest
from conftest import save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nexus_ds.data.tokenizer import open_tokenizer, train_tokenizer
from nexus_ds.generation.pieces import Pieces

TEXT = "naïve 日本 x👩‍🚀  tree\n\n\tleaf"


def byte_level(folder):
    train_tokenizer(iter(["tree leaf naïve"] * 3), 270, folder / "t")
    return open_tokenizer(folder / "t")


def like_llamas(folder):
    """A space belongs to the word behind it, and the first one is dropped; bytes where no token
    is."""
    words = ["▁tree", "▁leaf", "▁", "x", "▁x", "leaf"]
    known = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.Unigram([(word, -1.0) for word in known], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def of_words(folder):
    save_tokenizer(folder / "w")
    return open_tokenizer(folder / "w")


KINDS = pytest.mark.parametrize("make", [byte_level, like_llamas, of_words])


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@KINDS
@pytest.mark.parametrize("start", [0, 1, 3])
def test_pieces_make_the_whole_text(make, start, tmp_path):
    tokenizer = make(tmp_path)
    ids = tokenizer(TEXT if make is not of_words else "tree leaf . ship sail").input_ids
    pieces = Pieces(tokenizer, ids[:start])
    told = [pieces.add(token) for token in ids[start:]]
    told.append(pieces.rest())
    # no byte is told before its character is whole
    assert not any("\ufffd" in piece for piece in told)
    assert "".join(told) == decoded(tokenizer, ids)[len(decoded(tokenizer, ids[:start])) :]
    assert sum(piece != "" for piece in told) > 1


@KINDS
def test_special_tokens_have_no_text_and_cost_no_space(make, tmp_path):
    tokenizer = make(tmp_path)
    special = tokenizer.bos_token_id if make is like_llamas else tokenizer.eos_token_id
    leaf = tokenizer("leaf", add_special_tokens=False).input_ids
    ids = [special, *leaf, special, special, *leaf]
    pieces = Pieces(tokenizer)
    told = [pieces.add(token) for token in ids]
    assert "".join(told) + pieces.rest() == decoded(tokenizer, ids)
    assert told[0] == ""


def test_bytes_that_become_no_character_are_told_at_the_end(tmp_path):
    tokenizer = byte_level(tmp_path)
    ids = [*tokenizer("x").input_ids, *tokenizer("日").input_ids[:2]]
    pieces = Pieces(tokenizer)
    assert [pieces.add(token) for token in ids] == ["x", "", ""]
    assert pieces.rest() == decoded(tokenizer, ids)[1:] != ""
    assert pieces.rest() == ""


def test_each_token_is_decoded_beside_few_others(tmp_path, monkeypatch):
    """A long text does not take longer a token."""
    tokenizer = byte_level(tmp_path)
    ids = tokenizer("tree leaf " * 50).input_ids
    pieces = Pieces(tokenizer)
    seen = []
    whole = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda window, **how: seen.append(len(window)) or whole(window, **how)
    )
    for token in ids:
        pieces.add(token)
    assert len(ids) > 50 and max(seen) <= 3
