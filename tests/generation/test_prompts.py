"""Prompts: files of them, conversations in the tokenizer's template, and what is refused."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import save_tokenizer
from tokenizers.processors import TemplateProcessing

from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.generation.prompts import Prompt, read_prompts, require_room, tokenised

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }} {{ m.content }} <|endoftext|> {% endfor %}"
    "{% if add_generation_prompt %}tree{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "plain")
    return open_tokenizer(tmp_path / "plain")


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_file_of_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefftree leaf\r\n\n  {ship}\u2028x\n".encode())
    assert read_prompts(path) == {f"{path}:1": "tree leaf", f"{path}:3": "  {ship}\u2028x"}


def test_a_file_of_objects(tmp_path):
    path = tmp_path / "p.jsonl"
    talk = [{"role": "system", "content": "sum"}, {"role": "user", "content": "tree"}]
    rows = [{"prompt": "a\nb", "id": 7}, {"messages": talk}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == {f"{path}:1": "a\nb", f"{path}:3": talk}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n", r"p.txt: no prompt; expected one a line"),
        ("p.txt", b"\xff", r"p.txt: can't be read \(.*; expected a file of prompts in UTF-8"),
        ("p.jsonl", b"tree", r"p.jsonl:1: broken JSON \(.* another name than .jsonl"),
        ("p.jsonl", b"[" * 100_000, r"p.jsonl:1: broken JSON \("),
        ("p.jsonl", b'\n{"text": "x"}', r'p.jsonl:2: found \{"text": "x"\}, expected an object'),
        ("p.jsonl", b"[1]", r"found \[1\], expected an object with prompt \(text\) or messages"),
        ("p.jsonl", b'{"messages": []}', r"messages is empty; write one of the user"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', r"messages holds \{'role': 'user'\}, exp"),
        ("p.jsonl", b'{"messages": "tree"}', r"messages holds tree, expected a list of"),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": 1}]}',
            r"messages holds .*mend the",
        ),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_a_file_larger_than_memory(tmp_path):
    (tmp_path / "p.txt").touch()
    os.truncate(tmp_path / "p.txt", 3 << 30)
    with pytest.raises(DataError, match="has 3,221,225,472 bytes, expected at most 100,000,000"):
        read_prompts(tmp_path / "p.txt")


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"none: can't be read .*expected a file of prompts"):
        read_prompts(tmp_path / "none")


def test_text_begins_as_documents_do_and_is_not_closed(tokenizer):
    """Whatever the tokenizer puts around a text itself."""
    ids = tokenizer("tree leaf").input_ids
    assert tokenised(tokenizer, "tree leaf", "it") == Prompt("tree leaf", ids, "it", chat=False)
    around = [("<unk>", 1), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <|endoftext|>", special_tokens=around
    )
    assert tokenizer("tree leaf").input_ids == [1, *ids, 0]
    assert tokenised(tokenizer, "tree leaf", "it", begin=(1,)).ids == [1, *ids]
    assert tokenised(tokenizer, "tree leaf", "it").ids == ids


def test_a_conversation_is_written_by_the_template(chatty):
    found = tokenised(chatty, "leaf", "it", chat=True)
    assert found.chat and found.given == "leaf"
    assert chatty.decode(found.ids) == "<unk> leaf <|endoftext|> tree"
    talk = [{"role": "user", "content": "sum"}]
    # messages are a conversation, whether --chat is said or not
    assert tokenised(chatty, talk, "it").ids == tokenised(chatty, "sum", "it", chat=True).ids


def test_a_template_writes_the_beginning_itself(chatty):
    """A tokenizer that puts a token before every text does not do it once more."""
    state = json.loads(chatty.backend_tokenizer.to_str())
    special = {"<unk>": {"id": "<unk>", "ids": [1], "tokens": ["<unk>"]}}
    begins = {"SpecialToken": {"id": "<unk>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    state["post_processor"] = {"type": "TemplateProcessing", "pair": [], "single": [begins, text]}
    state["post_processor"]["special_tokens"] = special
    from tokenizers import Tokenizer

    chatty._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert tokenised(chatty, "leaf", "it", begin=(1,)).ids[0] == 1
    assert len(tokenised(chatty, "leaf", "it", chat=True, begin=(1,)).ids) == 4


def test_conversations_that_are_refused(tokenizer, chatty):
    with pytest.raises(ConfigError, match=r"it: the chat template refuses it .*no tools"):
        tokenised(chatty, [{"role": "tool", "content": "x"}], "it")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="it: the tokenizer has no chat template; leave --chat o"):
        tokenised(tokenizer, "leaf", "it", chat=True)


def test_half_characters_are_refused(chatty):
    for chat in (False, True):
        with pytest.raises(ConfigError, match=r"it: character \d+ is half of one"):
            tokenised(chatty, "leaf \ud800", "it", chat)


def model(rows=31, limit=8):
    embeddings = torch.nn.Embedding(rows, 2)
    config = SimpleNamespace(max_position_embeddings=limit)
    return SimpleNamespace(config=config, get_input_embeddings=lambda: embeddings)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "it has no token; write at least one word"),
        ([3, 31], "it has the token id 31, the model embeds 31; .* the tokenizer that"),
        ([1] * 8, "it has 8 tokens, the model reads 8; shorten it"),
    ],
)
def test_prompts_that_a_model_can_not_continue(ids, message):
    with pytest.raises(ConfigError, match=message):
        require_room(model(), Prompt("", ids, "it", chat=False))


def test_prompts_that_it_can():
    require_room(model(), Prompt("", [30] * 7, "it", chat=False))
    require_room(model(limit=None), Prompt("", [30] * 99, "it", chat=False))


def test_templates_are_rendered_in_a_sandbox(chatty):
    """SECURITY.md promises it."""
    chatty.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ConfigError, match=r"the chat template refuses it .*unsafe"):
        tokenised(chatty, "leaf", "it", chat=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages | dictsort }}", "'list' object has no attribute 'items'"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "maximum recursion depth"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 10**18 }}", "MemoryError"),
    ],
)
def test_whatever_a_template_raises_is_told(chatty, template, said):
    chatty.chat_template = template
    with pytest.raises(ConfigError, match=rf"it: the chat template refuses it \({said}"):
        tokenised(chatty, "x", "it", chat=True)
