"""Chats as token ids with their labels: the tokenizer's own template, and loss on answers alone.

A chat is a row with `messages`, each with a `role` and a `content`. The template that the tokenizer
carries renders it as the model will read it. What a model is to learn are its answers: where a
template marks them ({% generation %}) they are what it marks, else what an assistant's message adds
to the template's rendering of all that stands before it, prompt for an answer included. Where that
can't be told the chat is refused by name.

Not covered: tools, images, templates that differ by what a caller passes along, windows that begin
at a chat's start.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nexus_ds.data.rows import REMEDY, Chat
from nexus_ds.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANSWERS = "assistant"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
SHOWN = 60  # characters of a text in a message
# Some templates write the date. For all of them it is Llama 3's own default, so that token files
# are the same whenever they are made.
DAY = datetime(2024, 7, 26)
CLOCK = "strftime_now"
# What a format of the date may ask for.
CODES = ("%Y", "%y", "%m", "%-m", "%b", "%B", "%d", "%-d", "%a", "%A", "%H", "%M", "%S")

Span = tuple[int, int]
"""Characters [start, stop) of a rendered chat."""
Render = Callable[..., tuple[list[str], list[list[Span]]]]
"""transformers' own: of each conversation the text, and what the template marks."""


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer renders chats."""

    template: str
    """In Jinja, as the tokenizer carries it."""
    tokens: tuple[tuple[str, str], ...]
    """What a template may name: bos_token and the like, by name."""
    special: tuple[str, ...]
    """Tokens that are no text: a content that holds one would be read as the template's own."""

    @property
    def fingerprint(self) -> str:
        """A sha256 over all of it."""
        facts = [self.template, self.tokens, self.special]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Labelled:
    """A chat as ids."""

    ids: list[int]
    learned: list[bool]
    """Whether each is a label that the model learns."""


def chat_format(tokenizer: PreTrainedTokenizerFast, directory: Path) -> ChatFormat:
    """Return how a tokenizer renders chats.

    Args:
        tokenizer: as transformers loads it.
        directory: where it comes from, for messages.

    Raises:
        CheckpointError: it has no chat template, or several and no default.
    """
    template = tokenizer.chat_template
    # several, by name: with tools, for retrieval; as transformers does, the one for plain chats
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or not template:
        raise CheckpointError(
            f"{directory}: the tokenizer has no chat template, by which data.chat reads messages; "
            "put chat_template.jinja there, of the model that this one is to talk like"
        )
    named = {name: getattr(tokenizer, name) for name in ROLES}
    tokens = tuple((name, str(token)) for name, token in named.items() if token is not None)
    return ChatFormat(template, tokens, tuple(sorted(map(str, tokenizer.all_special_tokens))))


# Rendering ----------------------------------------------------------------------------------------


def _rendered(chat: ChatFormat, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
    """Return messages as the template renders them; `prompt`: and the beginning of an answer."""
    text, _ = _render(chat, messages, prompt, False)
    return text


def _dated(template: str) -> str:
    """Return a template for which today is DAY."""
    if CLOCK not in template:
        return template
    # A macro: transformers hands a template no functions but its own, and this name hides that one.
    filters = [f"replace('{code}', '{DAY.strftime(code)}')" for code in CODES]
    body = " | ".join(["format", *filters])
    return f"{{% macro {CLOCK}(format) %}}{{{{ {body} }}}}{{% endmacro %}}{template}"


def _render(
    chat: ChatFormat, messages: Sequence[dict[str, str]], prompt: bool, marked: bool
) -> tuple[str, list[Span]]:
    # transformers' own sandbox: it takes a second to load, which plain text should not pay
    from transformers.utils.chat_template_utils import render_jinja_template

    render = cast("Render", render_jinja_template)
    try:
        texts, spans = render(
            conversations=[list(messages)],
            chat_template=_dated(chat.template),
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **dict(chat.tokens),
        )
    # a template is a program of whoever made the tokenizer: it may do without a key, divide, or
    # call itself for ever
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"the tokenizer's chat template refuses the messages ({said}); {REMEDY}"
        ) from error
    return texts[0], list(spans[0]) if marked else []


def _differences(chat: ChatFormat, messages: Sequence[dict[str, str]], text: str) -> list[Span]:
    """Return what each answer adds to the rendering of all that stands before it.

    Raises:
        DataError: the template renders a beginning otherwise where more follows.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != ANSWERS:
            continue
        # as whoever asks the model for this answer will render it
        before = _rendered(chat, messages[:number], prompt=True)
        until = _rendered(chat, messages[: number + 1])
        for found in (before, until):
            if not text.startswith(found):
                raise DataError(
                    f"message {number + 1}: the chat template renders what stands before this "
                    "answer, or the answer, otherwise when more follows, so that nothing tells the "
                    "answer from the prompt; put {% generation %} around the answers in the "
                    f"template, or {REMEDY}"
                )
        spans.append((len(before), len(until)))
    return spans


def answers_of(chat: ChatFormat, messages: Chat) -> tuple[str, list[Span]]:
    """Return a chat as its template renders it, and where the answers stand in it.

    Raises:
        DataError: a content that holds a special token, messages that the template refuses, answers
            that can't be told from prompts, or none.
    """
    # who writes <|im_end|> into a message would end it: in a user's words a way to put others in
    for number, message in enumerate(messages):
        for token in chat.special:
            if token in message["content"]:
                raise DataError(
                    f"message {number + 1}: the content holds {token!r}, which the tokenizer reads "
                    f"as a mark of its own; {REMEDY}"
                )
    if MARKED.search(chat.template):
        text, spans = _render(chat, messages, False, True)
    else:
        text = _rendered(chat, messages)
        spans = _differences(chat, messages, text)
    # a template may leave an answer out, or mark an empty one
    spans = [span for span in spans if span[0] < span[1]]
    if not spans:
        raise DataError(f"no answer to learn from: no message of the role {ANSWERS}; {REMEDY}")
    return text, spans


# Ids ----------------------------------------------------------------------------------------------


def _learned(encoding: Encoding, spans: Sequence[Span], text: str) -> Iterator[bool]:
    """Yield for each token whether it is one of an answer.

    Raises:
        DataError: a token of which a part is of an answer, and a part is not.
    """
    # Pieces of one character that is several tokens have its offsets each: they are alike.
    for start, stop in encoding.offsets:
        inside = False
        for first, last in spans:
            inside = inside or first <= start < last
            # When the model is asked, the prompt is tokenised alone: it would never see this token.
            if start < first < stop or start < last < stop:
                raise DataError(
                    f"one token is partly of an answer and partly of a prompt: "
                    f"{text[max(0, start - SHOWN) : stop]!r}; end the template's prompts and "
                    f"answers with special tokens, or {REMEDY}"
                )
        yield inside


def _encoded(backend: Tokenizer, text: str) -> Encoding:
    """Return a rendered chat as ids, the template's special tokens read as such."""
    trimming = backend.post_processor
    # All that it does here is to take the space before a word out of the word's offsets: one that
    # is the prompt's would not be found out.
    backend.post_processor = None
    backend.encode_special_tokens = False
    try:
        return backend.encode(text, add_special_tokens=False)
    finally:
        # as it was: in plain text they are text
        backend.encode_special_tokens = True
        backend.post_processor = trimming


def labelled(backend: Tokenizer, chat: ChatFormat, end: int, messages: Chat) -> Labelled:
    """Return a chat as ids, closed by the end-of-text token.

    Args:
        backend: makes ids of text; special tokens of the template are read as such.
        chat: how it is rendered.
        end: id of the end-of-text token; it is not learned where the template does not write it.
        messages: checked by `rows.check_chat`.

    Raises:
        DataError: see `answers_of`; a token that is of a prompt and of an answer.
    """
    text, spans = answers_of(chat, messages)
    encoding = _encoded(backend, text)
    learned = list(_learned(encoding, spans, text))
    ids = list(encoding.ids)
    # documents are closed by it; a model that was never shown it after an answer is not taught it
    if ids[-1:] != [end]:
        ids.append(end)
        learned.append(False)
    return Labelled(ids, learned)
