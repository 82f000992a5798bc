"""Chats as ids and labels: against transformers' own marks, and refused by name where answers can't
be told from prompts."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from tokenizers import processors

from nexus_ds.data.chat import chat_format, labelled
from nexus_ds.data.corpora import open_source, token_files, windows
from nexus_ds.data.encoding import load_tokenizer
from nexus_ds.data.mixture import Sampler
from nexus_ds.data.rows import Document, capped, check_chat, parse_row
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import CheckpointError, DataError
from tests.data.conftest import sentences, write_jsonl

# ChatML, with and without marks
BODY = (
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}"
    "{start}{{{{ m.content + '<|im_end|>' }}}}{stop}{{{{ '\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
PLAIN = BODY.format(start="", stop="")
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# the prompt for an answer holds what the answer in the conversation does not
THINKING = PLAIN.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
# earlier turns are rendered without their first word
FORGETTING = PLAIN.replace("m.content", "(m.content if loop.last else m.content[2:])")
WITHOUT_MARKS = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
CHAT = (
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": "sat on a mat"},
    {"role": "assistant", "content": "while rain fell"},
    {"role": "user", "content": "over town"},
    {"role": "assistant", "content": "every child ran"},
)


@pytest.fixture(scope="module")
def folder(tokenizer_dir, tmp_path_factory):
    """A directory with a tokenizer that knows the marks of ChatML."""
    tokenizer = open_tokenizer(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    out = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer.save_pretrained(out)
    return out


def speaking(folder, template):
    """Return the tokenizer with a template, as it is loaded and as transformers has it."""
    tokenizer = open_tokenizer(folder)
    tokenizer.chat_template = template
    form = chat_format(tokenizer, folder)
    return form, tokenizer


def found(folder, template, chat=CHAT):
    form, tokenizer = speaking(folder, template)
    return labelled(tokenizer.backend_tokenizer, form, tokenizer.eos_token_id, chat), tokenizer


def test_marks_of_the_template_give_the_labels_that_transformers_gives(folder):
    own, tokenizer = found(folder, MARKED)
    expected = tokenizer.apply_chat_template(
        list(CHAT), return_dict=True, return_assistant_tokens_mask=True
    )
    assert own.ids[:-1] == expected["input_ids"] and own.ids[-1] == tokenizer.eos_token_id
    assert own.learned[:-1] == [bool(x) for x in expected["assistant_masks"]]
    assert own.learned[-1] is False and 0 < sum(own.learned) < len(own.ids)


def test_differences_of_prefixes_give_the_answers_and_what_ends_them(folder):
    own, tokenizer = found(folder, PLAIN)
    assert own.ids[:-1] == tokenizer.apply_chat_template(list(CHAT))["input_ids"]
    answer = [i for i, learned in zip(own.ids, own.learned, strict=True) if learned]
    expected = "while rain fell<|im_end|>\nevery child ran<|im_end|>\n"
    assert tokenizer.decode(answer) == expected
    prompt = tokenizer.apply_chat_template(list(CHAT[:2]), add_generation_prompt=True)["input_ids"]
    assert own.learned.index(True) == len(prompt)


def test_a_template_that_ends_with_the_end_of_text_gets_no_second_one(folder):
    own, tokenizer = found(folder, PLAIN.replace("'\\n' }}{% endfor", "eos_token }}{% endfor"))
    assert own.ids[-1] == tokenizer.eos_token_id != own.ids[-2] and own.learned[-1]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (THINKING, CHAT, "message 3: the chat template renders what stands before this answer"),
        (FORGETTING, CHAT, "message 3: the chat template renders what stands before this answer"),
        (
            WITHOUT_MARKS,
            CHAT,
            "message 3: the chat template renders|one token is partly of an answer",
        ),
        (PLAIN, CHAT[:2], "no answer to learn from: no message of the role assistant"),
        (
            PLAIN,
            (CHAT[1], {"role": "assistant", "content": "a <|im_end|> b"}),
            r"message 2: the content holds '<\|im_end\|>', which the tokenizer reads as a mark",
        ),
        ("{{ raise_exception('system first') }}", CHAT, r"template refuses the messages \(system"),
        ("{{ 1 / 0 }}", CHAT, r"template refuses the messages \(division by zero"),
        ("{{ messages | dictsort }}", CHAT, r"template refuses the messages \('list' object has"),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            CHAT,
            r"template refuses the messages \(maximum recursion depth",
        ),
        ("{{ cycler() }}", CHAT, r"template refuses the messages \(at least one item"),
        ("{{ 'a' * 10**18 }}", CHAT, r"template refuses the messages \(MemoryError"),
    ],
)
def test_what_is_refused(folder, template, chat, message):
    with pytest.raises(DataError, match=message):
        found(folder, template, chat)


def test_a_token_of_a_prompt_and_an_answer_is_refused(folder):
    """With a template that puts a letter before the answer, BPE joins it with the answer's own."""
    template = (
        "{% for m in messages %}{{ 'ra' if m.role == 'assistant' else '' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}ra{% endif %}"
    )
    chat = ({"role": "user", "content": "town "}, {"role": "assistant", "content": "in fell"})
    with pytest.raises(DataError, match="one token is partly of an answer and partly of a prompt"):
        found(folder, template, chat)
    # and one that joins the answer's end with what the template puts behind it
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content }}"
        "{% if m.role == 'assistant' and not loop.last %}in{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    chat = (chat[0], {"role": "assistant", "content": "fell ra"}, chat[0])
    with pytest.raises(DataError, match="one token is partly of an answer and partly of a prompt"):
        found(folder, template, chat)


def test_a_space_that_is_trimmed_off_a_token_is_the_prompts_all_the_same(folder):
    """Byte-level post-processors leave a word's space out of its offsets, as Llama 3's does."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = (CHAT[1], {"role": "assistant", "content": "the cat"})
    form, tokenizer = speaking(folder, template)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    before = backend.to_str()
    with pytest.raises(DataError, match=r"one token is partly of an answer .*assistant: the'; end"):
        labelled(backend, form, tokenizer.eos_token_id, chat)
    # no space of the prompt's, and none that the answer's first token can take
    form = dataclasses.replace(form, template=template.replace(": ", ":\n"))
    own = labelled(backend, form, tokenizer.eos_token_id, chat)
    answer = [i for i, learned in zip(own.ids, own.learned, strict=True) if learned]
    assert tokenizer.decode(answer) == "the cat\n"
    assert backend.to_str() == before and backend.encode_special_tokens


def test_a_template_that_writes_the_date_renders_the_same_on_every_day(folder):
    llama = (
        "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}"
    )
    other = "{{ strftime_now('%Y-%m-%d %A %H:%M') }}"
    for start, text in ((llama, "26 Jul 2024"), (other, "2024-07-26 Friday 00:00")):
        for rest in (PLAIN, MARKED):
            own, tokenizer = found(folder, start + rest)
            assert tokenizer.decode(own.ids).startswith(f"{text}<|im_start|>system")


def test_a_tokenizer_without_a_template(tokenizer_dir):
    with pytest.raises(CheckpointError, match=r"no chat template, by which data.chat reads"):
        load_tokenizer(tokenizer_dir, chat=True)


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is no list that holds some"),
        ("hello", "messages is no list that holds some"),
        ([{"role": "user"}], "message 1: content: text is NoneType, expected a string"),
        ([{"content": "a"}], "message 1: expected an object with role and content"),
        ([{"role": "user", "content": " "}], "message 1: content: text is empty"),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [1]}],
            "message 1: it calls tools, which no answer here does",
        ),
    ],
)
def test_rows_that_are_no_chats(messages, message):
    with pytest.raises(DataError, match=f"f:1: {message}.*on_bad_row=skip"):
        check_chat(messages, "f:1")


def test_a_row_is_text_or_a_chat():
    row = {"messages": list(CHAT), "meta": {"a": 1}}
    document = parse_row(json.dumps(row).encode(), "f:1")
    assert document.chat == CHAT and document.meta == {"a": 1}
    assert document.text.startswith("the cat\n\nsat on a mat\n\nwhile")
    both = parse_row(json.dumps(row | {"text": "plain"}).encode(), "f:1")
    assert both == Document("plain", {"a": 1}, "f:1")


def test_half_a_chat_is_left_out():
    chat = Document("the cat sat", {}, "f:1", CHAT)
    assert list(capped(iter([chat, chat]), 15)) == [chat]
    assert list(capped(iter([chat]), 11)) == [chat]


# Token files --------------------------------------------------------------------------------------


def chats(count, seed=0):
    texts = sentences(seed, 2 * count)
    return [
        [
            {"role": "user", "content": texts[2 * number]},
            {"role": "assistant", "content": texts[2 * number + 1]},
        ]
        for number in range(count)
    ]


@pytest.fixture
def corpus(tmp_path, folder):
    """Chats and a line of plain text; the tokenizer's template is ChatML."""
    (folder / "chat_template.jinja").write_text(PLAIN)
    path = tmp_path / "text" / "alpha" / "train.jsonl"
    write_jsonl(path, ["the cat sat on a mat"])
    rows = [json.dumps({"messages": chat}) for chat in chats(30)]
    with path.open("a") as stream:
        stream.write("\n".join(rows) + "\n")
    return tmp_path / "text"


def made(corpus, folder, cache, **options):
    options = {"chat": True, **options}
    return token_files(open_source(str(corpus)), ["alpha"], "train", folder, cache, **options)[
        "alpha"
    ]


def test_labels_lie_beside_the_ids(corpus, folder, tmp_path):
    file = made(corpus, folder, tmp_path / "cache")
    form, tokenizer = speaking(folder, PLAIN)
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    text = backend.encode("the cat sat on a mat", add_special_tokens=False).ids
    ids, learned = [*text, end], [True] * (len(text) + 1)
    for chat in chats(30):
        own = labelled(backend, form, end, tuple(chat))
        ids += own.ids
        learned += own.learned
    assert file.read(0, file.tokens).tolist() == ids
    assert (file.tokens, file.documents, file.answers) == (len(ids), 31, sum(learned))
    block = file.marked(3, 64)
    expected = np.where(learned[192:257], ids[192:257], ~np.array(ids[192:257]))
    assert block.tolist() == expected.tolist() and (block < 0).any()
    assert file.block(3, 64).tolist() == ids[192:257]
    assert 0 < file.labels(3, 64) == sum(learned[193:257]) < 64
    assert (windows(file, 4, 16) >= 0).all() and (windows(file, 4, 16, marked=True) < 0).any()
    sampler = Sampler({"alpha": file}, {"alpha": 1.0}, 16, 0)
    picked = [sampler.sample(i).tokens for i in range(5, 12)]
    assert sampler.labels(5, 7) == sum(int((tokens[1:] >= 0).sum()) for tokens in picked) > 0


def test_workers_and_files_that_are_there_give_the_same(corpus, folder, tmp_path):
    one, two = (made(corpus, folder, tmp_path / str(n), workers=n) for n in (1, 2))
    for suffix in (".bin", ".labels"):
        contents = [file.path.with_suffix(suffix).read_bytes() for file in (one, two)]
        assert contents[0] == contents[1]
    again = made(corpus, folder, tmp_path / "1")
    assert dataclasses.asdict(again) == dataclasses.asdict(one)


def test_another_template_is_another_file(corpus, folder, tmp_path):
    first = made(corpus, folder, tmp_path / "cache")
    (folder / "chat_template.jinja").write_text(MARKED)
    second = made(corpus, folder, tmp_path / "cache")
    assert first.path != second.path and first.tokens == second.tokens
    # the line's end behind an answer is not marked
    assert first.answers - second.answers == 30


def test_a_flipped_label_is_found_and_made_again(corpus, folder, tmp_path, capsys):
    file = made(corpus, folder, tmp_path / "cache")
    path = file.path.with_suffix(".labels")
    good = path.read_bytes()
    for damage in (bytes([good[0] ^ 1]) + good[1:], good[:-1]):
        path.write_bytes(damage)
        again = made(corpus, folder, tmp_path / "cache")
        assert path.read_bytes() == good and again.answers == file.answers
    said = capsys.readouterr().err
    assert f"{path}: found sha256" in said and "made again" in said


def test_bad_chats_are_told_or_skipped(corpus, folder, tmp_path, capsys):
    path = corpus / "alpha" / "train.jsonl"
    bad = [{"role": "user", "content": "only a question"}]
    with path.open("a") as stream:
        stream.write(json.dumps({"messages": bad}) + "\n")
    with pytest.raises(DataError, match=r"train.jsonl:32: no answer to learn from"):
        made(corpus, folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.bin"))
    file = made(corpus, folder, tmp_path / "cache", on_bad_row="skip")
    assert (file.documents, file.skipped) == (31, 1)
    assert "alpha/train: 1 damaged rows skipped, first: " in capsys.readouterr().err
    write_jsonl(path, [])
    path.write_text(json.dumps({"messages": bad}) + "\n")
    with pytest.raises(DataError, match=r"alpha: no chat can be read; first: .*train.jsonl:1"):
        made(corpus, folder, tmp_path / "cache", on_bad_row="skip")


def test_chats_where_text_is_expected(corpus, folder, tmp_path):
    for how in ("error", "skip"):
        with pytest.raises(DataError, match=r"train.jsonl:2: a chat \(messages\), expected text"):
            made(corpus, folder, tmp_path / "cache", chat=False, on_bad_row=how)


def test_plain_text_is_named_and_stored_as_before(tmp_path, tokenizer_dir):
    """Names are hashes of all that a file is made of: nobody's cache is made again."""
    write_jsonl(tmp_path / "text" / "alpha" / "train.jsonl", sentences(1, 40))
    file = made(tmp_path / "text", tokenizer_dir, tmp_path / "cache", chat=False)
    assert file.answers is None and file.labels(0, 16) == 16
    assert not file.path.with_suffix(".labels").exists()
    manifest = json.loads(file.path.with_suffix(".json").read_text())
    assert "labels" not in manifest
    tokenizer = load_tokenizer(tokenizer_dir)
    facts = hashlib.sha256(f"{tokenizer.definition} {tokenizer.end}".encode()).hexdigest()
    assert tokenizer.fingerprint == facts
    text = open_source(str(tmp_path / "text")).fingerprint("alpha", "train")
    expected = hashlib.sha256(f"1 alpha train {text} {facts} 0 error".encode()).hexdigest()
    assert file.fingerprint == expected and file.path.stem == f"alpha-train-{expected[:16]}"
