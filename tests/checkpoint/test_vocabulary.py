"""Ids and tokens from files of any form, against what transformers makes of the same files."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import add_token, save_tokenizer

from nexus_ds.checkpoint.tokenizer import read_tokenizer
from nexus_ds.checkpoint.vocabulary import read_vocabulary
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import CheckpointError
from tests.checkpoint.test_tokenizer import SIZE, added, edit_json, slow_of
from tests.data.conftest import save_sentencepiece, sentences


def resaved(source, out):
    """Save a tokenizer as today's transformers does, in tokenizer.json alone."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One byte-level BPE and one sentencepiece model, each in the old form and the new."""
    root = tmp_path_factory.mktemp("forms")
    train_tokenizer(iter(sentences(1, 50)), SIZE, root / "trained")
    slow_of(root / "trained", root / "words")
    resaved(root / "words", root / "words-fast")
    save_sentencepiece(root / "pieces")
    resaved(root / "pieces", root / "pieces-fast")
    return root


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_one_vocabulary_in_two_forms_is_one_and_what_transformers_reads(forms, kind):
    old, new = read_vocabulary(forms / kind), read_vocabulary(forms / f"{kind}-fast")
    assert (old.form, new.form) == (
        {"words": "vocab.json", "pieces": "tokenizer.model"}[kind],
        "tokenizer.json",
    )
    assert old.difference(new) is None and old.fingerprint == new.fingerprint
    for name, found in ((kind, old), (f"{kind}-fast", new)):
        meant = read_tokenizer(forms / name)
        assert found.tokens == meant.tokens and found.size == meant.size
        named = {role: token for role, token in found.roles.items() if role in meant.roles}
        assert all(meant.roles[role] == token for role, token in named.items())


@pytest.mark.parametrize("name", ["words", "words-fast"])
@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "a role"])
def test_added_tokens_count_wherever_they_stand(forms, tmp_path, name, where):
    shutil.copytree(forms / name, tmp_path / "x")
    before = read_vocabulary(tmp_path / "x")
    if where == "added_tokens.json":
        (tmp_path / "x" / where).write_text(json.dumps({"<new>": before.size}))
    else:
        more = added(before.size, "<new>") if "config" in where else {"eos_token": "<new>"}
        edit_json(tmp_path / "x" / "tokenizer_config.json", lambda value: value.update(more))
    after = read_vocabulary(tmp_path / "x")
    assert after.tokens == before.tokens | {before.size: "<new>"}
    assert before.grew_to(after) and not after.grew_to(before) and not before.grew_to(before)
    assert before.difference(after).endswith(f"the first: {before.size} None / '<new>'")


def test_a_word_tokenizer_with_a_token_too_many(tmp_path):
    rows = save_tokenizer(tmp_path)
    assert read_vocabulary(tmp_path).size == rows
    add_token(tmp_path)
    assert read_vocabulary(tmp_path).size == rows + 1 == read_tokenizer(tmp_path).size


def test_scores_of_a_unigram_model_number_its_tokens(tmp_path):
    model = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert read_vocabulary(tmp_path).tokens == {0: "a", 1: "b"}


def test_none(tmp_path):
    assert read_vocabulary(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: expected an object from tokens to ids"),
        ("vocab.json", '{"a": true}', "vocab.json: expected an object from tokens to ids"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}',
            "expected id and content of each added token",
        ),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": [{"id": 1e999, "content": "a"}]}',
            "expected id and content of each added token",
        ),
        *(
            ("tokenizer.json", f'{{"model": {{"vocab": [{pair}]}}}}', "score. of each piece; fetch")
            for pair in ('["a", 0.5], {"b": 1}', "1", "null", "[]")
        ),
        ("tokenizer.model", "no protobuf", "expected a sentencepiece model; fetch or save"),
        ("added_tokens.json", '{"a": "1"}', "added_tokens.json: expected an object from tokens"),
        *(
            (
                "tokenizer_config.json",
                f'{{"added_tokens_decoder": {{"{index}": {{"content": "a"}}}}}}',
                "expected added_tokens_decoder from ids to tokens",
            )
            for index in ("x", "²", "9" * 5000)
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, said):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_vocabulary(tmp_path)


def test_a_piece_that_is_no_text(forms, tmp_path):
    """Found by tests/fuzz.py: the traceback of a UnicodeDecodeError."""
    content = (forms / "pieces" / "tokenizer.model").read_bytes()
    assert b"<unk>" in content
    (tmp_path / "tokenizer.model").write_bytes(content.replace(b"<unk>", b"<un\xeb>"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected a sentencepiece model"):
        read_vocabulary(tmp_path)


def test_nothing_heavy_is_imported(forms):
    code = (
        "import sys; from pathlib import Path; from nexus_ds.checkpoint.vocabulary import *; "
        f"read_vocabulary(Path({str(forms / 'pieces')!r})); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
