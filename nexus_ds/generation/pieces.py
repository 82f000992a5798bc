"""The text of tokens as they come: each piece once, and all of them together the whole text.

Not covered: cleaning of spaces up (`clean_up_tokenization_spaces`), which takes back what was told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNFINISHED = "\ufffd"
"""How a decoder shows bytes that are no character yet."""


class Pieces:
    """Decodes tokens one by one, each beside those before it.

    A token alone says too little: some decoders drop a space at the beginning of what they are
    given, and a character can be of several tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        before: Sequence[int] = (),
    ) -> None:
        """Begin after the tokens `before`, whose text is known."""
        self.tokenizer = tokenizer
        self.ids = list(before)
        self.begin = 0
        """Tokens from here on are decoded together with what is new."""
        self.told = len(self.ids)
        """Tokens whose text was returned."""

    def add(self, token: int) -> str:
        """Return the text that a token completes; '' for a special one, or part of a character."""
        self.ids.append(token)
        return self._new(unfinished=False)

    def rest(self) -> str:
        """Return what was held back, at the end."""
        return self._new(unfinished=True)

    def _new(self, unfinished: bool) -> str:
        known = self._text(self.told)
        text = self._text(len(self.ids))
        # it may be finished by the next token
        if text.endswith(UNFINISHED) and not unfinished:
            return ""
        # what was known begins it: a decoder changes no earlier character
        piece = text[len(known) :]
        # Special tokens have no text, and would be no context for the next one.
        if piece:
            self.begin = self.told
        self.told = len(self.ids)
        return piece

    def _text(self, end: int) -> str:
        window = self.ids[self.begin : end]
        text = self.tokenizer.decode(
            window,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return str(text)
