"""Modelfiles: chat templates in Ollama's language, against what Jinja renders."""

import re
import shutil

import pytest

from nexus_ds.errors import ServingError
from nexus_ds.serving.modelfile import TRIALS, find_pieces, modelfile
from tests.serving.test_gguf_words import WAYS, save_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a system message of its own where there is none
QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
# puts the system message into the first question
INTO_THE_FIRST = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if loop.first %}{{ '[A]' + first + m.content + '[B]' }}"
    "{% else %}{{ '[' + m.role[:1] + ']' + m.content + '[B]' }}{% endif %}{% endfor %}"
)

# no more than fixed text in a short talk
LATER = CHATML.replace("{{ '<|im", "{% if loop.index > 3 %}{{ 'and ' }}{% endif %}{{ '<|im", 1)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_bpe(tmp_path_factory.mktemp("words") / "w", *WAYS["gpt-2"])


def with_template(words, out, template):
    shutil.copytree(words, out)
    (out / "chat_template.jinja").write_text(template)
    return out


def as_ollama(template, messages):
    """Return what Ollama renders: the few words of Go's language that a Modelfile here uses."""
    system = messages[0]["role"] == "system"
    begin, rest = re.fullmatch(
        r"(?:{{ if not \.System }}(.*?){{ end }})?{{ range \.Messages }}(.*)", template, re.S
    ).groups()
    inner, answer = re.fullmatch(r"(.*){{ end }}{{ end }}(.*)", rest, re.S).groups()
    branches = re.split(r"{{ (?:else )?if eq \.Role ", inner)[1:]
    around = {}
    for branch in branches:
        role, text = re.fullmatch(r'"(\w+)" }}(.*)', branch, re.S).groups()
        around[role] = text.split("{{ .Content }}")
    text = "" if system else begin or ""
    for message in messages:
        before, after = around[message["role"]]
        text += before + message["content"] + after
    return text + answer


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA2], ids=["chatml", "qwen", "llama2"])
def test_a_conversation_reads_as_with_the_checkpoints_own_template(template, words, tmp_path):
    from nexus_ds.data.tokenizer import open_tokenizer

    folder = with_template(words, tmp_path / "t", template)
    text, notes = modelfile(folder)
    [written] = re.findall(r'TEMPLATE """(.*?)"""', text, re.S)
    tokenizer = open_tokenizer(folder)
    allowed = template != LLAMA2
    assert bool(notes) != allowed
    for trial in TRIALS:
        for start in ([("system", "Short.")], []) if allowed else ([],):
            talk = [{"role": role, "content": said} for role, said in [*start, *trial]]
            own = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            assert as_ollama(written, talk) == own


def test_what_a_modelfile_says(words, tmp_path):
    text, notes = modelfile(with_template(words, tmp_path / "t", CHATML))
    lines = text.splitlines()
    assert lines[0] == "FROM ./model.gguf" and notes == []
    assert lines[-2:] == ['PARAMETER stop "<|end|>"', 'PARAMETER stop "<|im_end|>"']


def test_without_a_template_a_prompt_is_continued(words):
    text, notes = modelfile(words)
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in text
    assert notes == [
        "the checkpoint has no chat template: Ollama continues the prompt as it is",
    ]


@pytest.mark.parametrize(
    "template",
    [
        INTO_THE_FIRST,
        LATER,
        "{{ messages[0].content | upper }}",
    ],
    ids=["into the first", "later", "upper"],
)
def test_a_template_that_does_more_is_refused(template, words, tmp_path):
    folder = with_template(words, tmp_path / "t", template)
    with pytest.raises(ServingError, match=r"can't be written as Ollama's.*use --for llamacpp"):
        modelfile(folder)


COMMANDS = '"""\nADAPTER /etc/passwd\n#'
OWN = r'""" and {{ have a meaning of their own there'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("<|im_end|>", '"""'), OWN),
        # what begins a talk without a system message stands in no talk that has one
        (QWEN.replace("Help.", COMMANDS), OWN),
        (QWEN.replace("Help.<|im_end|>\n", "{"), OWN),
        (CHATML.replace("<|im_end|>", "{' + '{x"), OWN),
        (CHATML.replace("<|im_start|>assistant", COMMANDS), OWN),
        (CHATML.replace("<|im_end|>", "<\u200b>"), r"characters that are not printed"),
        (QWEN.replace("Help.", "He\x07lp."), r"characters that are not printed"),
    ],
    ids=["quotes", "begin", "brace", "action", "answer", "no width", "bell"],
)
def test_a_templates_text_is_no_word_of_the_modelfile(template, said, words, tmp_path):
    folder = with_template(words, tmp_path / "t", template)
    with pytest.raises(ServingError) as caught:
        modelfile(folder)
    assert str(caught.value).startswith(f"{folder}: the chat template can't be written as Ollama's")
    assert said in str(caught.value) and "use --for llamacpp" in str(caught.value)


ENDS = ['</s>"\nADAPTER /etc/passwd\nSYSTEM "obey', "<\nx>", 'a"', "\x1b["]


def stop_is_refused(folder, end):
    with pytest.raises(ServingError) as caught:
        modelfile(folder)
    assert str(caught.value) == (
        f"{folder}: the tokenizer ends answers with {end!r}, expected printed text without "
        "quotes, as a Modelfile has it in a line; use --for llamacpp, which needs none"
    )


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_a_text_is_one_line_without_quotes(end, tmp_path):
    stop_is_refused(save_bpe(tmp_path, *WAYS["gpt-2"], end=end), end)


@pytest.mark.parametrize("end", ENDS[:3])
def test_what_ends_a_templates_answer_is_one_line_without_quotes(end, words, tmp_path):
    template = CHATML.replace("<|im_end|>", end)
    stop_is_refused(with_template(words, tmp_path / "t", template), end)


def test_bos_is_left_to_llama_cpp():
    def render(messages, answer):
        return "".join(f"<{role}>{said}</>" for role, said in messages) + "<a>" * answer

    pieces = find_pieces(render)
    assert pieces.user == ("<user>", "</>") and pieces.answer == "<a>" and pieces.begin == ""
    assert pieces.system == ("<system>", "</>")
