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
        CHATML.replace("<|im_end|>", '"""'),
        "{{ messages[0].content | upper }}",
    ],
    ids=["into the first", "later", "quotes", "upper"],
)
def test_a_template_that_does_more_is_refused(template, words, tmp_path):
    folder = with_template(words, tmp_path / "t", template)
    with pytest.raises(ServingError, match=r"can't be written as Ollama's.*use --for llamacpp"):
        modelfile(folder)


def test_bos_is_left_to_llama_cpp():
    def render(messages, answer):
        return "".join(f"<{role}>{said}</>" for role, said in messages) + "<a>" * answer

    pieces = find_pieces(render)
    assert pieces.user == ("<user>", "</>") and pieces.answer == "<a>" and pieces.begin == ""
    assert pieces.system == ("<system>", "</>")
