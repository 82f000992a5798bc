"""Tokenizers of models: what is the same in other files, what is another, what is refused, what is
taken along."""

import json
import re
import shutil

import pytest

from nexus_ds.checkpoint.tokenizer import (
    check_tokenizer,
    copy_tokenizer,
    read_tokenizer,
    same_tokenizer_files,
)
from nexus_ds.data.tokenizer import open_tokenizer, train_tokenizer
from nexus_ds.errors import CheckpointError, IncompatibleModelsError, UnsupportedModelError
from nexus_ds.upcycling.same_tokenizers import check_tokenizers
from tests.data.conftest import save_sentencepiece, sentences

SIZE = 300  # of the byte-level tokenizer
TEMPLATE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    *TEMPLATE_FILES,
)


def edit_json(path, change):
    value = json.loads(path.read_text()) if path.is_file() else {}
    change(value)
    path.write_text(json.dumps(value))


def difference(first, second):
    return read_tokenizer(first).difference(read_tokenizer(second))


@pytest.fixture(scope="module")
def fast_dir(tmp_path_factory):
    """A byte-level BPE of Qwen's kind as tokenizer.json."""
    out = tmp_path_factory.mktemp("tokenizer") / "fast"
    train_tokenizer(iter(sentences(1, 50)), SIZE, out)
    open_tokenizer(slow_of(out, out.parent / "slow")).save_pretrained(out)
    return out


def slow_of(fast, out, **config):
    """Save the vocabulary and merges of a tokenizer.json as vocab.json and merges.txt, and no
    tokenizer.json."""
    from tokenizers import Tokenizer

    out.mkdir(parents=True)
    Tokenizer.from_file(str(fast / "tokenizer.json")).model.save(str(out))
    given = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"} | config
    (out / "tokenizer_config.json").write_text(json.dumps(given))
    return out


def added(index, content, **flags):
    plain = {
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    } | flags
    return {"added_tokens_decoder": {str(index): {"content": content, **plain}}}


@pytest.fixture(scope="module")
def chat_dir(fast_dir, tmp_path_factory):
    """The same with one more token, of which a chat's turns end; a document doesn't."""
    out = tmp_path_factory.mktemp("tokenizer")
    open_tokenizer(slow_of(fast_dir, out / "slow", **added(SIZE, "<|im_end|>"))).save_pretrained(
        out / "chat"
    )
    return out / "chat"


# The same, and others -----------------------------------------------------------------------------


def test_one_tokenizer_in_two_forms_is_one(fast_dir, tmp_path):
    for form, slow in (
        ("bpe", slow_of(fast_dir, tmp_path / "bpe")),
        ("spm", save_sentencepiece(tmp_path / "spm")),
    ):
        saved = tmp_path / f"{form}-saved"
        open_tokenizer(slow).save_pretrained(saved)
        assert (saved / "tokenizer.json").is_file() and not (slow / "tokenizer.json").is_file()
        a, b = read_tokenizer(slow), read_tokenizer(saved)
        assert (a.difference(b), a.other_roles(b), a.fingerprint == b.fingerprint) == (
            None,
            [],
            True,
        )
        assert not same_tokenizer_files(slow, saved) and same_tokenizer_files(slow, slow)


def test_tokens_of_other_ids_are_named(fast_dir, tmp_path):
    other = shutil.copytree(fast_dir, tmp_path / "other")
    words = [
        w
        for w, i in json.loads((fast_dir / "tokenizer.json").read_text())["model"]["vocab"].items()
        if 5 <= i < 11
    ]

    def rotate(value):  # the same vocabulary with six tokens in another order
        vocabulary = value["model"]["vocab"]
        ids = [vocabulary[word] for word in words]
        vocabulary.update(zip(words, ids[1:] + ids[:1], strict=True))

    edit_json(other / "tokenizer.json", rotate)
    said = difference(fast_dir, other)
    assert said.startswith(
        f"6 of {SIZE} tokens differ, the first: 5 {words[0]!r} / {words[5]!r}; 6 "
    )
    assert said.count(";") == 4  # the first five
    assert read_tokenizer(fast_dir).fingerprint != read_tokenizer(other).fingerprint


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json"])
def test_added_tokens_count_in_every_form(fast_dir, tmp_path, form):
    for name, content in (("a", "<law>"), ("b", "<med>")):
        out = slow_of(fast_dir, tmp_path / name)
        if form == "added_tokens.json":
            (out / form).write_text(json.dumps({content: SIZE}))
        else:
            edit_json(out / "tokenizer_config.json", lambda v, c=content: v.update(added(SIZE, c)))
        if form == "tokenizer.json":
            open_tokenizer(out).save_pretrained(tmp_path / f"{name}2")
            shutil.rmtree(out)
            (tmp_path / f"{name}2").rename(out)
    a, b, plain = tmp_path / "a", tmp_path / "b", slow_of(fast_dir, tmp_path / "plain")
    assert difference(a, b) == f"1 of {SIZE + 1} tokens differ, the first: {SIZE} '<law>' / '<med>'"
    assert (
        difference(plain, b)
        == f"1 of {SIZE + 1} tokens differ, the first: {SIZE} nothing / '<med>'"
    )
    assert (
        difference(b, plain)
        == f"1 of {SIZE + 1} tokens differ, the first: {SIZE} '<med>' / nothing"
    )
    check_tokenizer(plain, SIZE)
    check_tokenizer(a, SIZE + 1)
    with pytest.raises(
        IncompatibleModelsError,
        match=rf"ids up to {SIZE} \('<law>'\), the model embeds {SIZE}; give the",
    ):
        check_tokenizer(a, SIZE)


def test_ids_with_gaps_are_counted_to_the_last(fast_dir, tmp_path):
    out = shutil.copytree(fast_dir, tmp_path / "gap")
    edit_json(out / "tokenizer.json", lambda v: v["model"]["vocab"].update(far=SIZE + 99))
    check_tokenizer(out, SIZE + 100)
    with pytest.raises(
        IncompatibleModelsError,
        match=rf"ids up to {SIZE + 99} \('far'\), the model embeds {SIZE + 99}",
    ):
        check_tokenizer(out, SIZE + 99)


@pytest.mark.parametrize("name", FILES)
def test_files_that_differ_are_not_the_same(fast_dir, tmp_path, name):
    other = shutil.copytree(fast_dir, tmp_path / "other")
    assert same_tokenizer_files(fast_dir, other)
    (other / name).parent.mkdir(exist_ok=True)
    (other / name).write_bytes(b"{}")
    assert not same_tokenizer_files(fast_dir, other)
    another_reader = shutil.copytree(fast_dir, tmp_path / "reader")
    (another_reader / "config.json").write_text('{"model_type": "llama"}')
    assert not same_tokenizer_files(fast_dir, another_reader)


def test_another_sentencepiece_file_is_another_tokenizer(tmp_path):
    one, other = (
        save_sentencepiece(tmp_path / "one"),
        save_sentencepiece(tmp_path / "other", seed=7),
    )
    assert re.match(r"\d+ of \d+ tokens differ, the first: \d+ '", difference(one, other))
    check_tokenizer(one, read_tokenizer(one).size)
    with pytest.raises(IncompatibleModelsError, match="the model embeds 300"):
        check_tokenizer(one, 300)


def change_merges(value):
    value["model"]["merges"] = value["model"]["merges"][::-1]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (change_merges, "merges"),
        (lambda v: v.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda v: v["pre_tokenizer"]["pretokenizers"].pop(0), "pre_tokenizer"),
        (lambda v: v["added_tokens"][0].update(lstrip=True), "added tokens"),
    ],
)
def test_another_way_to_split_a_text_is_another_tokenizer(fast_dir, tmp_path, change, part):
    other = shutil.copytree(fast_dir, tmp_path / "other")
    for directory in (other, shutil.copytree(fast_dir, tmp_path / "plain")):
        edit_json(
            directory / "tokenizer_config.json",
            lambda v: v.update(tokenizer_class="PreTrainedTokenizerFast"),
        )
        edit_json(
            directory / "tokenizer_config.json", lambda v: v.pop("added_tokens_decoder", None)
        )
    edit_json(other / "tokenizer.json", change)
    said = difference(tmp_path / "plain", other)
    assert re.match(rf"the same text becomes other tokens \({part}\), as '.+' / '.+'", said)


def test_what_changes_no_token_is_no_difference(fast_dir, tmp_path):
    """Normalisers of one name less, flags that nothing reads: the ids of every text decide."""
    for name in ("a", "b"):
        out = shutil.copytree(fast_dir, tmp_path / name)
        edit_json(
            out / "tokenizer_config.json",
            lambda v: v.update(tokenizer_class="PreTrainedTokenizerFast"),
        )
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    edit_json(tmp_path / "b" / "tokenizer.json", lambda v: v.update(truncation=cut, padding=fill))
    nothing = {"type": "Replace", "pattern": {"String": "\x07"}, "content": "\x07"}
    edit_json(
        tmp_path / "b" / "tokenizer.json",
        lambda v: v.update(
            normalizer={"type": "Sequence", "normalizers": [v["normalizer"], nothing]}
        ),
    )
    a, b = read_tokenizer(tmp_path / "a"), read_tokenizer(tmp_path / "b")
    assert a.splitting != b.splitting and a.difference(b) is None


def test_a_vocabulary_of_words_is_compared_without_a_token_for_the_unknown(dense_dir, tmp_path):
    for name in ("a", "b"):
        out = shutil.copytree(dense_dir, tmp_path / name)
        edit_json(out / "tokenizer.json", lambda v: v["model"].update(unk_token="none"))
    same = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
    edit_json(tmp_path / "b" / "tokenizer.json", lambda v: v.update(pre_tokenizer=same))
    a, b = read_tokenizer(tmp_path / "a"), read_tokenizer(tmp_path / "b")
    assert a.splitting != b.splitting and a.difference(b) is None


def test_roles_of_tokens_are_no_difference(chat_dir, tmp_path):
    other = shutil.copytree(chat_dir, tmp_path / "other")
    edit_json(other / "tokenizer_config.json", lambda v: v.update(eos_token="<|im_end|>"))
    begin = {"id": "<|im_end|>", "ids": [SIZE], "tokens": ["<|im_end|>"]}
    processor = {
        "type": "TemplateProcessing",
        "pair": [],
        "special_tokens": {"<|im_end|>": begin},
        "single": [
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
    edit_json(other / "tokenizer.json", lambda v: v.update(post_processor=processor))
    a, b = read_tokenizer(chat_dir), read_tokenizer(other)
    assert a.difference(b) is None and a.fingerprint != b.fingerprint
    assert a.other_roles(b) == [
        "eos_token is '<|im_end|>', not '<|endoftext|>'",
        "what is put before a text is '<|im_end|>', not nothing",
    ]


# Between models -----------------------------------------------------------------------------------


def test_an_expert_of_another_vocabulary_is_refused_with_a_remedy(fast_dir, tmp_path):
    other = slow_of(fast_dir, tmp_path / "law", **added(SIZE, "<law>"))
    message = (
        rf"tokenizer of expert law \({other}\) is not that of {fast_dir}: "
        rf"1 of {SIZE + 1} tokens differ, .*; "
        r"experts of one model must be trained on one tokenizer. "
        r"Tokens were only added: --align-vocab .* If no text .* "
        rf"copy the tokenizer files of {fast_dir} over those in {other}"
    )
    with pytest.raises(IncompatibleModelsError, match=message):
        check_tokenizers(fast_dir, {"law": other})
    for name in ("vocab.json", "merges.txt"):
        (other / name).unlink()
    shutil.copytree(fast_dir, other, dirs_exist_ok=True)  # the remedy
    check_tokenizers(fast_dir, {"law": other})


def test_an_expert_with_another_end_of_text_is_taken_with_a_note(chat_dir, tmp_path, capsys):
    other, same = (
        shutil.copytree(chat_dir, tmp_path / "law"),
        shutil.copytree(chat_dir, tmp_path / "same"),
    )
    edit_json(other / "tokenizer_config.json", lambda v: v.update(eos_token="<|im_end|>"))
    check_tokenizers(chat_dir, {"same": same, "law": other})
    assert capsys.readouterr().err == (
        "note: expert law: eos_token is '<|im_end|>', not '<|endoftext|>': "
        "every id means the same, and the new "
        "checkpoint keeps the latter; its tokenizer_config.json can change it\n"
    )


@pytest.mark.parametrize("where", [*TEMPLATE_FILES, "tokenizer_config.json"])
def test_a_chat_template_that_is_left_behind_is_said(fast_dir, tmp_path, capsys, where):
    law = shutil.copytree(fast_dir, tmp_path / "law")
    (law / where).parent.mkdir(exist_ok=True)
    if where.endswith(".json"):
        edit_json(law / where, lambda v: v.update(chat_template="{{ messages }}"))
    else:
        (law / where).write_text("{{ messages }}")
    check_tokenizers(fast_dir, {"law": law})
    said = (
        f"note: expert law: its chat template ({where} in {law}) is not taken along, "
        "the new checkpoint has {}: "
        "copy it there, as chat_template.jinja, to chat as this expert does\n"
    )
    assert capsys.readouterr().err == said.format("none")
    seed = shutil.copytree(law, tmp_path / "seed")
    check_tokenizers(seed, {"law": law})
    assert capsys.readouterr().err == ""
    shutil.rmtree(seed)
    shutil.copytree(fast_dir, seed)
    (seed / "chat_template.jinja").write_text("another")
    check_tokenizers(seed, {"law": law})
    assert capsys.readouterr().err == said.format(f"that of {seed}")


# What is refused ----------------------------------------------------------------------------------


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no tokenizer that can be loaded .*; expected tokenizer.json"
    ):
        copy_tokenizer(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="some/model is not a directory"):
        check_tokenizer("some/model", 5)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_model_is_refused_and_not_run(fast_dir, tmp_path, file):
    source = shutil.copytree(fast_dir, tmp_path / "evil")
    (source / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        source / file, lambda v: v.update(auto_map={"AutoTokenizer": ["code.Evil", "code.Evil"]})
    )
    (tmp_path / "out").mkdir()
    for use in (
        lambda: read_tokenizer(source),
        lambda: check_tokenizer(source, 999),
        lambda: copy_tokenizer(source, tmp_path / "out"),
        lambda: check_tokenizers(fast_dir, {"law": source}),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"{file}: auto_map .* never run"):
            use()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil", "out"] and not list(
        (tmp_path / "out").iterdir()
    )


def test_files_that_a_configuration_names_outside_are_refused(fast_dir, tmp_path):
    source = shutil.copytree(fast_dir, tmp_path / "source")
    edit_json(source / "tokenizer_config.json", lambda v: v.update(vocab_file="/etc/passwd"))
    with pytest.raises(CheckpointError, match="'/etc/passwd' lies outside the model's directory"):
        copy_tokenizer(source, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_links_that_lead_out_are_not_followed(fast_dir, tmp_path, name):
    source, out = shutil.copytree(fast_dir, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "secret").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=rf"'{name}' lies outside the model's directory"):
        copy_tokenizer(source, out)
    assert not list(out.iterdir())


# What is taken along ------------------------------------------------------------------------------


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_file_of_a_tokenizer_is_taken_along(fast_dir, tmp_path):
    source = slow_of(fast_dir, tmp_path / "source", **added(SIZE, "<law>"))
    for name in FILES:
        (source / name).parent.mkdir(exist_ok=True)
        if name == "tokenizer.json":
            open_tokenizer(source).save_pretrained(tmp_path / "saved")
            shutil.copy(tmp_path / "saved" / name, source)
        elif not (source / name).is_file():
            (source / name).write_text(
                json.dumps({"<law>": SIZE} if name == "added_tokens.json" else {})
            )
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "qwen2"}')
    copy_tokenizer(source, out)
    # what its own class read, for the class that transformers 4 and 5 know
    before, after = files_of(source), files_of(out)
    assert before.keys() == after.keys()
    assert [name for name in FILES if before[name] != after[name]] == ["tokenizer_config.json"]
    # and once it is written so it stays as it is, byte by byte
    (tmp_path / "again").mkdir()
    copy_tokenizer(out, tmp_path / "again")
    assert files_of(tmp_path / "again") == {n: b for n, b in after.items() if n != "config.json"}


def test_files_of_other_names_are_taken_along(tmp_path):
    """A vocabulary that only its class knows by name."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "vocab.txt").write_text(
        "[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\ntree\nleaf\n"
    )
    (tmp_path / "source" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer"}'
    )
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "source", tmp_path / "out")
    source, out = files_of(tmp_path / "source"), files_of(tmp_path / "out")
    assert out["vocab.txt"] == source["vocab.txt"] and "tokenizer.json" in out
    (tmp_path / "source" / "vocab.txt").rename(tmp_path / "elsewhere.txt")
    (tmp_path / "source" / "vocab.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(CheckpointError, match=r"'vocab.txt' lies outside the model's directory"):
        copy_tokenizer(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": None}, None])
def test_a_tokenizer_means_the_same_beside_the_config_of_a_mixture(tmp_path, config):
    """Without a class of its own transformers takes that of config.json's model type: a Qwen's for
    a Qwen2-MoE."""
    source, out = tmp_path / "source", tmp_path / "out"
    train_tokenizer(iter(sentences(1, 50)), SIZE, source)
    edit_json(source / "tokenizer.json", lambda v: v.update(normalizer={"type": "Lowercase"}))
    (source / "config.json").write_text('{"model_type": "llama"}')
    saved = json.loads((source / "tokenizer_config.json").read_text())
    if config is None:
        (source / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
        (source / "tokenizer_config.json").unlink()
    else:
        (source / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": saved["eos_token"]} | config)
        )
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "qwen2_moe"}')
    copy_tokenizer(source, out)
    before, after = open_tokenizer(source), open_tokenizer(out)
    for text in ("The CAT sat 1234 on a mat", "don't  <|endoftext|> a"):
        assert after(text).input_ids == before(text).input_ids
    assert (after.eos_token_id, read_tokenizer(out).fingerprint) == (
        0,
        read_tokenizer(source).fingerprint,
    )


def test_a_copy_names_a_class_and_keys_that_transformers_4_knows(tmp_path):
    """transformers 5 saves its own class, and tokens without a role as a list."""
    source, out = tmp_path / "source", tmp_path / "out"
    train_tokenizer(iter(sentences(1, 50)), SIZE, source)
    tokenizer = open_tokenizer(source)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<law>"]})
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(source)
    saved = json.loads((source / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"
    assert saved["extra_special_tokens"] == ["<law>"]
    out.mkdir()
    copy_tokenizer(source, out)
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in written
    assert written["additional_special_tokens"] == ["<law>"]
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert (written["padding_side"], written["eos_token"]) == ("left", "<|endoftext|>")
    assert read_tokenizer(out).fingerprint == read_tokenizer(source).fingerprint
    assert open_tokenizer(out).extra_special_tokens == ["<law>"]


def test_a_trained_tokenizer_is_copied_as_it_is(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    train_tokenizer(iter(sentences(1, 50)), SIZE, source)
    out.mkdir()
    copy_tokenizer(source, out)
    assert files_of(out) == files_of(source)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
