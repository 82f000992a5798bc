"""Tokenizers read without transformers: they mean what transformers makes of them, or it is
asked."""

import json
import subprocess
import sys

import pytest

from nexus_ds.checkpoint import tokenizer as module
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import MIXTURES
from nexus_ds.checkpoint.plain_tokenizer import OWN_WAYS, plain_tokenizer
from nexus_ds.checkpoint.tokenizer import read_tokenizer
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import CheckpointError
from tests.checkpoint.test_tokenizer import added, edit_json
from tests.data.conftest import sentences

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture
def folder(tmp_path):
    """A tokenizer as this package trains it, beside a Llama's config.json."""
    out = tmp_path / "tokenizer"
    train_tokenizer(iter(sentences(1, 50)), 300, out)
    (out / "config.json").write_text('{"model_type": "llama"}')
    return out


def by_transformers(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "plain_tokenizer", lambda directory: None)
        return read_tokenizer(folder)


def assert_same(folder, monkeypatch):
    plain = read_tokenizer(folder)
    loaded = by_transformers(folder, monkeypatch)
    assert plain.loaded is None and loaded.loaded is not None
    assert (plain.tokens, plain.roles) == (loaded.tokens, loaded.roles)
    assert plain.splitting == loaded.splitting
    assert plain.fingerprint == loaded.fingerprint


@pytest.mark.parametrize("model_type", [*FAMILIES, *MIXTURES])
def test_every_family_as_transformers_reads_it(folder, model_type, monkeypatch):
    edit_json(folder / "config.json", lambda value: value.update(model_type=model_type))
    if model_type in OWN_WAYS:
        assert plain_tokenizer(folder) is None
    else:
        assert_same(folder, monkeypatch)


def test_an_id_that_takes_gigabytes_to_save_is_refused(folder):
    edit_json(folder / "tokenizer.json", lambda value: value["model"]["vocab"].update(far=1 << 31))
    message = "has the token id 2147483648 .'far'., expected at most 16777216"
    with pytest.raises(CheckpointError, match=message):
        plain_tokenizer(folder)


def own(value):
    """List the added tokens of tokenizer.json, as most hubs' tokenizer_config.json does."""
    value.update(added(0, "<|endoftext|>"))


def test_listed_tokens_a_beginning_and_a_template(folder, monkeypatch):
    edit_json(folder / "tokenizer_config.json", own)
    # not read where tokens are listed
    (folder / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    begin = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    edit_json(folder / "tokenizer.json", lambda value: value.update(post_processor=begin))
    assert_same(folder, monkeypatch)
    assert read_tokenizer(folder).roles["what is put before a text"] == "<|endoftext|>"


CHANGES = {
    "another token for a role": {"eos_token": "<end>"},
    "a token that is none of its own": {"unk_token": "a"},
    "a role as an object": {"eos_token": {"content": "<|endoftext|>", **FLAGS}},
    "tokens that are listed otherwise": added(0, "<|endoftext|>", lstrip=True),
    "more tokens": {"additional_special_tokens": ["<more>"]},
    "a beginning": {"add_bos_token": True},
    "another class": {"tokenizer_class": "LlamaTokenizer"},
    "a length that is none": {"model_max_length": "long"},
    "a key that nobody knows": {"split_special_tokens": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_says_more_is_left_to_transformers(folder, change):
    edit_json(folder / "tokenizer_config.json", lambda value: value.update(change))
    assert plain_tokenizer(folder) is None


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "vocab.json", "tokenizer.model", "special_tokens_map.json"]
)
def test_files_that_say_more_are_left_to_transformers(folder, name):
    (folder / name).write_text("{}")
    assert plain_tokenizer(folder) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_file_that_is_missing_is_left_to_transformers(folder, name):
    (folder / name).unlink()
    assert plain_tokenizer(folder) is None


@pytest.mark.parametrize("damage", ["{}", "[", '{"version": "1.0", "added_tokens": []}'])
def test_a_damaged_definition_is_left_to_transformers(folder, damage):
    (folder / "tokenizer.json").write_text(damage)
    assert plain_tokenizer(folder) is None


def test_an_end_that_is_no_special_token_is_left_to_transformers(folder):
    def plain(value):
        value["added_tokens"][0]["special"] = False

    edit_json(folder / "tokenizer.json", plain)
    assert plain_tokenizer(folder) is None


def test_transformers_is_not_imported(folder):
    code = (
        "import sys; from pathlib import Path; from nexus_ds.checkpoint.tokenizer import *; "
        "check_tokenizer(Path(sys.argv[1]), 300); out = Path(sys.argv[2]); out.mkdir(); "
        "(out / 'config.json').write_text('{\"model_type\": \"qwen2_moe\"}'); "
        "copy_tokenizer(Path(sys.argv[1]), out); print('transformers' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(folder), str(folder.parent / "out")]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
    copied = json.loads((folder.parent / "out" / "tokenizer.json").read_text())
    assert copied == json.loads((folder / "tokenizer.json").read_text())
