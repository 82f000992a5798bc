"""What a model adds to prompts: several at once, each token told as it comes.

transformers' own `generate` runs the model, its cache, and what generation_config.json asks for.
Shapes: B prompts, S tokens of the longest one (shorter ones are padded at the left), N tokens that
may be added, T tokens of both.
Not covered: beams, assistants, several answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus_ds.generation.drawing import Drawing, Drawn, numbers
from nexus_ds.generation.pieces import Pieces
from nexus_ds.generation.prompts import Prompt, require_room
from nexus_ds.generation.routes import Decision, Routes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STRETCHED = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies follow the longest sequence of a batch."""


GREEDY = Drawing()


@dataclass(frozen=True)
class Said:
    """A token, as it is told."""

    token: int
    text: str
    """That it completes; '' for special tokens and parts of characters."""
    decision: Decision | None = None
    """None where routes were not asked for."""
    added: bool = True
    """By the model; else it is the prompt's."""


Tell = Callable[[Said], None]


@dataclass
class Continuation:
    """A prompt and what a model added to it."""

    said: list[Said] = field(default_factory=list)
    """The added tokens; before them, where routes were asked for, the prompt's."""
    tokens: int = 0
    """That were added, the end of a text included."""

    @property
    def text(self) -> str:
        """Return the added text."""
        added = [said.text for said in self.said if said.added]
        return "".join(added)


@dataclass(frozen=True)
class Asked:
    """What is asked of a model."""

    tokens: int
    """Most tokens to add to a prompt."""
    drawing: Drawing = GREEDY
    routed: bool = False
    """Whether each token's routes are told, the prompt's too."""


class _Row:
    """A prompt in a batch: its tokens wait for their routes, and are told one by one."""

    def __init__(
        self,
        prompt: Prompt,
        pieces: Pieces,
        asked: Asked,
        tell: Tell,
    ) -> None:
        self.prompt = len(prompt.ids)
        self.tokens = list(prompt.ids)
        self.routed = asked.routed
        self.room = asked.tokens
        self.ends: set[int] = set()
        self.pieces = pieces
        self.tell = tell
        self.decisions: list[Decision] = []
        # without routes the prompt is nobody's news
        self.told = 0 if asked.routed else self.prompt
        self.found = Continuation()

    def limit(self, model: PreTrainedModel) -> None:
        """Learn where a model ends a text, and how many tokens it has room for."""
        self.ends = _ends(model)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit:
            # its own: a longer neighbour in the batch takes none of it away
            self.room = min(self.room, limit - self.prompt)

    def take(self, token: int) -> None:
        """Add a token, unless the text has ended before it."""
        added = len(self.tokens) - self.prompt
        last = self.tokens[-1]
        # an end in the prompt ends nothing: templates put one behind every message
        ended = added and last in self.ends
        if ended or added >= self.room:
            return
        self.tokens.append(token)
        # with routes it waits for the pass that reads it
        if not self.routed:
            self._tell_up_to(len(self.tokens))

    def sent(self, decisions: list[Decision]) -> None:
        """Learn where the next tokens were sent; padding at the left, and after the end, is none
        of them."""
        left = len(self.tokens) - len(self.decisions)
        if left:
            # the last ones: a prompt's padding lies before it
            self.decisions += decisions[-left:]
        self._tell_up_to(len(self.decisions))

    def finish(self) -> Continuation:
        """Tell what was held back, and return all."""
        rest = self.pieces.rest()
        if rest:
            # the same token said on: bytes that became no character
            last = self.found.said.pop()
            held_back = replace(last, text=rest)
            self.tell(held_back)
            whole = replace(last, text=last.text + rest)
            self.found.said.append(whole)
        self.found.tokens = len(self.tokens) - self.prompt
        return self.found

    def _tell_up_to(self, end: int) -> None:
        while self.told < end:
            token = self.tokens[self.told]
            text = self.pieces.add(token)
            decision = self.decisions[self.told] if self.routed else None
            added = self.told >= self.prompt
            said = Said(token, text, decision, added)
            # counted before it is told: whoever is told may end all this with an exception
            self.told += 1
            self.found.said.append(said)
            self.tell(said)


class _Listener:
    """What transformers calls a streamer: it gets the prompts, then the next token of each."""

    def __init__(
        self, rows: Sequence[_Row], routes: Routes | None, step: Callable[[], None]
    ) -> None:
        self.rows = rows
        self.routes = routes
        self.step = step
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Take a token [B] for each row; the first call has the prompts [B, S]."""
        # before the new token: routes are those of the tokens that led to it
        if self.begun:
            self.route()
            tokens = value.tolist()
            for row, token in zip(self.rows, tokens, strict=True):
                row.take(token)
            self.step()
        self.begun = True

    def route(self) -> None:
        """Tell the rows where the tokens of the last pass were sent."""
        if self.routes is None:
            return
        taken = self.routes.take()
        for row, decisions in zip(self.rows, taken, strict=True):
            row.sent(decisions)

    def end(self) -> None:
        """Do nothing: what comes last is known after one more pass."""


def rows_at_once(
    model: PreTrainedModel,
    longest: int,
    rows: int,
) -> int:
    """Return how many prompts may be in a batch so that none changes another's tokens.

    Args:
        model: of transformers.
        longest: tokens of the longest prompt, with what may be added.
        rows: that were asked for.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    # up to this length the frequencies are the same for all
    trained = rope.get("original_max_position_embeddings") or 0
    stretched = rope.get("rope_type") in STRETCHED
    return 1 if stretched and longest > trained else rows


def _padding(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return a token that no one looks at."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _ends(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _padded(
    prompts: Sequence[Prompt],
    padding: int,
) -> tuple[Tensor, Tensor]:
    """Return tokens [B, S] and their mask, 0 for padding."""
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths)
    tokens = []
    masks = []
    for prompt in prompts:
        length = len(prompt.ids)
        # at the left, so that all rows go on at the same place
        empty = longest - length
        tokens.append([padding] * empty + prompt.ids)
        masks.append([0] * empty + [1] * length)
    return torch.tensor(tokens), torch.tensor(masks)


def _send_last(
    model: PreTrainedModel,
    mask_BS: Tensor,
    output: object,
) -> None:
    """Pass the last tokens through the model, whose routers have not seen them.

    Args:
        model: with hooks at its routers.
        mask_BS: of the prompts.
        output: of `generate`.
    """
    tokens_BT: Tensor = output.sequences  # type: ignore[attr-defined]
    count, length = tokens_BT.shape
    added = length - mask_BS.shape[1]
    added_BN = mask_BS.new_ones((count, added))
    mask_BT = torch.cat([mask_BS, added_BN], dim=1)
    real_B1 = mask_BT.sum(dim=1, keepdim=True)
    model(
        input_ids=tokens_BT[:, -1:],
        attention_mask=mask_BT,
        position_ids=real_B1 - 1,
        past_key_values=output.past_key_values,  # type: ignore[attr-defined]
        use_cache=True,
    )


def _quiet(said: object = None) -> None:
    """Tell nobody."""


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    asked: Asked,
    tell: Tell = _quiet,
    step: Callable[[], None] = _quiet,
) -> list[Continuation]:
    """Return what a model adds to each of some prompts, which go through it together.

    Args:
        model: as transformers loads it, or streamed.
        tokenizer: of the model.
        prompts: B of them; prompt number i is drawn with the seed `asked.drawing.seed` + i.
        asked: how many tokens, drawn how, with routes or not.
        tell: is given every token as soon as it is known; of one prompt, or they mix.
        step: is called after each pass.

    Raises:
        ConfigError: a prompt that the model can't continue.
    """
    for prompt in prompts:
        require_room(model, prompt)
    rows = []
    for prompt in prompts:
        pieces = _pieces(tokenizer, prompt, asked)
        row = _Row(prompt, pieces, asked, tell)
        row.limit(model)
        rows.append(row)
    watching = Routes(model, len(prompts)) if asked.routed else nullcontext()
    padding = _padding(tokenizer)
    tokens_BS, mask_BS = _padded(prompts, padding)
    tokens_BS = tokens_BS.to(model.device)
    mask_BS = mask_BS.to(model.device)
    with torch.inference_mode(), watching as routes:
        listener = _Listener(rows, routes, step)
        output = model.generate(  # type: ignore[operator]
            tokens_BS,
            attention_mask=mask_BS,
            pad_token_id=padding,
            streamer=listener,
            **_options(asked, rows, tokens_BS),
        )
        if asked.routed:
            _send_last(model, mask_BS, output)
            listener.route()
    return [row.finish() for row in rows]


def _pieces(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    asked: Asked,
) -> Pieces:
    return Pieces(tokenizer) if asked.routed else Pieces(tokenizer, prompt.ids)


def _options(
    asked: Asked,
    rows: Sequence[_Row],
    tokens_BS: Tensor,
) -> dict[str, object]:
    """Return what `generate` is told beside the prompts."""
    room = max(row.room for row in rows)
    options: dict[str, object] = {
        "max_new_tokens": room,
        # a draw is a processor, which leaves one token
        "do_sample": False,
        "num_beams": 1,
        "return_dict_in_generate": True,
    }
    if asked.routed:
        # the last tokens' own pass goes on from it
        # a checkpoint's own settings may switch it off
        options["use_cache"] = True
    if asked.drawing.temperature:
        numbers_BN = numbers(asked.drawing.seed, len(rows), room)
        numbers_BN = numbers_BN.to(tokens_BS.device)
        length = tokens_BS.shape[1]
        drawn = Drawn(asked.drawing, numbers_BN, length)
        options["logits_processor"] = [drawn]
    return options
