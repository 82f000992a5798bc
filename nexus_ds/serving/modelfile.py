"""Ollama's Modelfile: which file to load, and the chat template in the language that Ollama has.

A checkpoint's template is Jinja, Ollama's is Go's. Most put fixed text around each message: the
text is found by rendering a conversation of marked messages, and tried on others; a template that
does more is refused.
Not covered: tools, images, templates that show their thinking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.checkpoint.tokenizer import read_tokenizer
from nexus_ds.errors import ServingError
from nexus_ds.serving.gguf_file import FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODELFILE = "Modelfile"
Message = tuple[str, str]
"""Role and content."""
Render = Callable[[Sequence[Message], bool], str]
"""Text of a conversation, with what begins an answer or without."""
ASKED, ANSWERED, ASKED_ON, RULES = "Qa1z", "Ab2y", "Qc3x", "Sd4w"
"""Contents that no template has of its own."""
TRIALS: tuple[tuple[Message, ...], ...] = (
    (("user", "Hello"),),
    (("user", "One"), ("assistant", "two"), ("user", "three")),
    (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
)
SYSTEM: Message = ("system", "Be brief")
QUOTES = '"""'


@dataclass(frozen=True)
class Pieces:
    """What stands around messages."""

    begin: str
    """Before the first of a conversation without a system message."""
    system: tuple[str, str] | None
    """None: a system message is not allowed for."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """What begins an answer."""

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation up to where its answer begins, as Ollama renders it."""
        around = {"user": self.user, "assistant": self.assistant, "system": self.system}
        parts = [self.begin] if messages[0][0] != "system" else []
        for role, content in messages:
            before, after = around[role] or ("", "")
            parts.append(before + content + after)
        return "".join([*parts, self.answer])

    def texts(self) -> list[str]:
        """Return all text that the template has between Go's actions."""
        around = chain(self.system or (), self.user, self.assistant)
        return [self.begin, *around, self.answer]

    def template(self) -> str:
        """Return the template in Go's language."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        branches = []
        for role, around in roles.items():
            if around:
                before, after = around
                content = f"{before}{{{{ .Content }}}}{after}"
                branches.append(f'if eq .Role "{role}" }}}}{content}')
        inner = "{{ " + "{{ else ".join(branches) + "{{ end }}"
        begin = f"{{{{ if not .System }}}}{self.begin}{{{{ end }}}}" if self.begin else ""
        return f"{begin}{{{{ range .Messages }}}}{inner}{{{{ end }}}}{self.answer}"


def _rendered(tokenizer: PreTrainedTokenizerFast) -> Render:
    """Return what renders by a tokenizer's template; BOS at the start is left to llama.cpp."""
    bos = str(tokenizer.bos_token or "")

    def render(messages: Sequence[Message], answer: bool) -> str:
        listed = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=answer)
        return str(text).removeprefix(bos)

    return render


def _split(text: str, *contents: str) -> list[str]:
    """Return what stands around contents, in order; ValueError where one is not there."""
    parts = []
    # in their order; a template that turns it around is refused
    for content in contents:
        before, there, text = text.partition(content)
        if not there:
            raise ValueError(f"{content} is not in the text")
        parts.append(before)
    return [*parts, text]


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{start!r} does not begin {text!r}")
    return text.removeprefix(start)


def _common_end(first: str, second: str) -> str:
    """Return the longest text that both end with."""
    length = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        length += 1
    return first[len(first) - length :]


def find_pieces(render: Render) -> Pieces:
    """Return what a template puts around messages.

    Raises:
        ValueError: it does more than that.
    """
    # one question tells what ends it, a talk what stands between
    opened, after_user = _split(render([("user", ASKED)], False), ASKED)
    talk = [("user", ASKED), ("assistant", ANSWERED), ("user", ASKED_ON)]
    _, between, again, closed = _split(render(talk, True), ASKED, ANSWERED, ASKED_ON)
    before_user = _common_end(opened, again)
    system = _system(render, before_user)
    pieces = Pieces(
        begin=opened.removesuffix(before_user),
        system=system,
        user=(before_user, after_user),
        assistant=(_without(between, after_user), again.removesuffix(before_user)),
        answer=_without(closed, after_user),
    )
    # found in one talk, tried on others: more than fixed text shows there
    for trial in TRIALS:
        for start in ([SYSTEM], []) if system else ([],):
            if pieces.text([*start, *trial]) != render([*start, *trial], True):
                raise ValueError(f"{[*start, *trial]} is rendered otherwise")
    return pieces


def _system(render: Render, before_user: str) -> tuple[str, str] | None:
    """Return what stands around a system message; None where the template refuses one."""
    try:
        text = render([("system", RULES), ("user", ASKED)], False)
    # Jinja's own errors: a template may raise whatever it likes
    except Exception:
        return None
    before, between, _ = _split(text, RULES, ASKED)
    if not between.endswith(before_user):
        raise ValueError(f"{before_user!r} does not end {between!r}")
    return before, between.removesuffix(before_user)


def modelfile(directory: Path) -> tuple[str, list[str]]:
    """Return the Modelfile of a checkpoint, and what to know of it.

    Raises:
        CheckpointError: no tokenizer there.
        ServingError: a chat template that Ollama's language can't say, or not so; a text that ends
            answers and would end its line, too.
    """
    tokenizer = read_tokenizer(directory).tokenizer
    stops = [str(tokenizer.eos_token)]
    notes = []
    if not tokenizer.chat_template:
        template = "{{ .Prompt }}"
        notes.append("the checkpoint has no chat template: Ollama continues the prompt as it is")
    else:
        pieces = _pieces_of(tokenizer, directory)
        template = pieces.template()
        # chat models often end an answer with another token than a text
        end = pieces.assistant[1].strip()
        stops += [end] if end not in ("", *stops) else []
        if pieces.system is None:
            notes.append("the chat template has no system message; Ollama leaves it out")
    lines = [f"FROM ./{FILE}", f"TEMPLATE {QUOTES}{template}{QUOTES}"]
    lines += [_stop(directory, stop) for stop in stops]
    return "\n".join(lines) + "\n", notes


def _is_kept(text: str, spaces: str = "") -> bool:
    """Return whether Ollama keeps all of a text: it leaves out what is not printed."""
    return all(character.isprintable() or character in spaces for character in text)


def _refuse_meaning(text: str) -> None:
    """Raise ValueError for a template's text that would not be read as the text that it is."""
    # an action may follow: a brace at the end would be its first
    if QUOTES in text or "{{" in text + "{":
        raise ValueError(f"{QUOTES} and {{{{ have a meaning of their own there")
    if not _is_kept(text, "\t\r\n"):
        raise ValueError(f"{text[:100]!r} has characters that are not printed, which it leaves out")


def _stop(directory: Path, token: str) -> str:
    """Return the line that ends an answer with a text; ServingError for what could end the line."""
    if '"' in token or not _is_kept(token):
        raise ServingError(
            f"{directory}: the tokenizer ends answers with {token[:100]!r}, expected printed text "
            f"without quotes, as a {MODELFILE} has it in a line; use --for llamacpp, which needs "
            "none"
        )
    return f'PARAMETER stop "{token}"'


def _pieces_of(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Pieces:
    try:
        pieces = find_pieces(_rendered(tokenizer))
        for text in pieces.texts():
            _refuse_meaning(text)
    # Jinja's own errors: a template may raise whatever it likes
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ServingError(
            f"{directory}: the chat template can't be written as Ollama's, which puts fixed text "
            f"around messages ({said}); use --for llamacpp, whose server reads it as it is"
        ) from error
    return pieces
