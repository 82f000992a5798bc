"""What a model is asked to continue: text or a conversation, one or a file of them.

Not covered: tools and documents in a conversation, pictures, prompts compressed or on a hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.errors import ConfigError, DataError
from nexus_ds.inputs import MOST_BYTES, require_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Message = Mapping[str, str]
Given = str | Sequence[Message]
"""A prompt as its author wrote it: text, or the messages of a conversation."""
KEYS = "prompt (text) or messages (a list of objects with role and content)"


@dataclass(frozen=True)
class Prompt:
    """A prompt and its tokens."""

    given: Given
    ids: list[int]
    name: str
    """For messages, as 'the prompt' or 'prompts.jsonl:3'."""
    chat: bool
    """Whether the tokenizer's template is around it."""


def _messages(
    value: object,
    where: str,
) -> list[Message]:
    """Return a conversation; DataError for anything else."""
    # checked here: templates fail on others in words of their own
    found: list[Message] = []
    for message in value if isinstance(value, list) else [value]:
        parts = message if isinstance(message, dict) else {}
        texts = {key: part for key, part in parts.items() if isinstance(part, str)}
        if parts.keys() != {"role", "content"} or len(texts) != 2:
            raise DataError(
                f"{where}: messages holds {str(message)[:60]}, expected a list of "
                '{"role": "user", "content": TEXT}; mend the line'
            )
        found.append(texts)
    if not found:
        raise DataError(f"{where}: messages is empty; write one of the user, or take the line out")
    return found


def _row(
    line: str,
    where: str,
) -> Given:
    """Return the prompt of a line of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: broken JSON ({error}); expected one object a line; mend the line, or give "
            "the file another name than .jsonl, and each line is a prompt"
        ) from error
    if isinstance(row, dict) and "messages" in row:
        return _messages(row["messages"], where)
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{where}: found {line[:60]}, expected an object with {KEYS}")
    return prompt


def read_prompts(path: Path) -> dict[str, Given]:
    """Return the prompts of a file by `file:line`: of a .jsonl its objects, else its lines.

    Blank lines are passed over.

    Raises:
        DataError: no file, no prompt in it, not UTF-8, or a line that is none; names it.
    """
    try:
        require_file(path, MOST_BYTES, DataError)
        # with a byte order mark or without
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read ({error}); expected a file of prompts in UTF-8"
        ) from error
    found: dict[str, Given] = {}
    # not splitlines(), which ends a line at characters that a prompt may hold
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}:{number}"
        if line.strip():
            found[where] = _row(line, where) if path.suffix == ".jsonl" else line.rstrip("\r")
    if not found:
        raise DataError(
            f"{path}: no prompt; expected one a line, in a .jsonl an object with {KEYS}"
        )
    return found


def _in_template(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    name: str,
) -> str:
    """Return a conversation as the tokenizer's template writes it, up to the answer."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{name}: the tokenizer has no chat template; leave --chat out and give text, or a "
            "checkpoint whose tokenizer has one (chat_template.jinja)"
        )
    try:
        # in a sandbox of transformers, without files
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    # a template is a program of its author, which may raise whatever it likes
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{name}: the chat template refuses it ({said}); "
            "give the roles in the order that it expects"
        ) from error
    return str(rendered)


def _require_characters(
    text: str,
    name: str,
) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name}: character {error.start} is half of one (a lone surrogate), expected text "
            "in UTF-8; write it anew"
        ) from error


def tokenised(
    tokenizer: PreTrainedTokenizerFast,
    given: Given,
    name: str,
    chat: bool = False,
    begin: Sequence[int] = (),
) -> Prompt:
    """Return a prompt with its tokens.

    Args:
        tokenizer: of the model.
        given: text, or messages, which always go through the tokenizer's chat template.
        name: for error messages.
        chat: text is the one message of a user.
        begin: ids before a text, as in training (`encoding.beginning`).

    Raises:
        ConfigError: no template, or one that refuses the messages; characters that are none.
    """
    if isinstance(given, str) and not chat:
        _require_characters(given, name)
        # Some tokenizers close a text, too, which a model has learned to end with.
        ids = tokenizer(given, add_special_tokens=False).input_ids
        return Prompt(given, [*begin, *ids], name, chat=False)
    # a system's message has to be written as one
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    text = _in_template(tokenizer, messages, name)
    _require_characters(text, name)
    # the template has written the beginning of a text itself
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return Prompt(given, list(ids), name, chat=True)


def require_room(
    model: PreTrainedModel,
    prompt: Prompt,
) -> None:
    """Refuse a prompt that a model can't continue.

    Raises:
        ConfigError: a prompt without a token, with one that the model does not embed, or one that
            leaves the model no room for another.
    """
    if not prompt.ids:
        raise ConfigError(f"{prompt.name} has no token; write at least one word")
    # a GPU would say no more than that an index was out of bounds
    largest = max(prompt.ids)
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if largest >= rows:
        raise ConfigError(
            f"{prompt.name} has the token id {largest}, the model embeds {rows}; "
            "give the checkpoint the tokenizer that it was trained with"
        )
    # what fills the model to its end leaves no place for an answer
    length = len(prompt.ids)
    # not every family has positions that end
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and length >= limit:
        raise ConfigError(f"{prompt.name} has {length} tokens, the model reads {limit}; shorten it")
