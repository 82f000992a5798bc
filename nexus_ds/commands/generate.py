"""The verb `generate`: continue a prompt with any checkpoint, dense or Nexus.

A model that does not fit runs layer by layer, with the same tokens: every token then reads the
whole checkpoint.
Not covered: chat templates, batches, text as it comes, serving.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.needs import ADDED
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import ConfigError
from nexus_ds.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="dense or Nexus checkpoint",
    )
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument(
        "--tokens",
        type=int,
        default=ADDED,
        metavar="N",
        help="most tokens to add (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: always the likeliest token (default)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the draws at a temperature above 0",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "stored"),
        help="auto: fp32 on a CPU, the stored dtype on a GPU",
    )
    parser.add_argument("--json", action="store_true", help="print prompt, text and speed as JSON")


def _check(args: argparse.Namespace) -> None:
    if args.tokens < 1:
        raise ConfigError(f"--tokens: expected a number above 0, found {args.tokens}")
    if not math.isfinite(args.temperature) or args.temperature < 0:
        raise ConfigError(
            f"--temperature: expected 0 or a positive number, found {args.temperature}"
        )


class _Counted:
    """What transformers calls a streamer: it gets the prompt, then each token, then the end."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.begun = False

    def put(self, value: object) -> None:
        """Count a token, but not the prompt."""
        self.progress.advance(int(self.begun))
        self.begun = True

    def end(self) -> None:
        """Do nothing: the progress line ends with its context."""


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    progress: Progress | None = None,
) -> tuple[str, int]:
    """Return the text that transformers' model adds to `prompt`, and its number of tokens.

    Raises:
        ConfigError: a prompt without a token, with one that the model does not embed, or one that
            leaves the model no room for another.
    """
    # not at the top: `generate --help` waits for no torch
    import torch

    ids_1T = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    length = ids_1T.shape[1]
    if not length:
        raise ConfigError("the prompt has no token; write at least one word")
    # a GPU would say no more than that an index was out of bounds
    largest = int(ids_1T.max())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ConfigError(
            f"the prompt has the token id {largest}, the model embeds {rows}; "
            "give the checkpoint the tokenizer that it was trained with"
        )
    # not every family has positions that end
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and length >= limit:
        raise ConfigError(f"the prompt has {length} tokens, the model reads {limit}; shorten it")
    room = min(tokens, limit - length) if limit else tokens
    # top_k=0 draws from all tokens; transformers' default keeps 50
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0}
    choice = draw if temperature else {"do_sample": False}
    # one prompt needs no padding, but generate() warns without a token for it
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id
    torch.manual_seed(seed)
    with torch.inference_mode():
        output_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=room,
            pad_token_id=padding,
            streamer=_Counted(progress) if progress else None,
            **choice,
        )
    added_T = output_1T[0, length:]
    return tokenizer.decode(added_T, skip_special_tokens=True), len(added_T)


def _generated(args: argparse.Namespace) -> tuple[str, int, float]:
    """Return the text that is added, its tokens, and the seconds that it took."""
    # not at the top: they import torch, for which `generate --help` doesn't wait
    from nexus_ds.checkpoint.loading import device
    from nexus_ds.checkpoint.needs import Way
    from nexus_ds.checkpoint.pieces import (
        in_pieces,
        need_of,
        open_way,
        planned_way,
        warn_of_time,
    )

    tokenizer = open_tokenizer(args.checkpoint)
    place = device()
    need = need_of(args.checkpoint, args.precision, place).with_cache()
    length = len(tokenizer(args.prompt).input_ids) + args.tokens
    chosen = planned_way(need, [place], 1, length, "generate")
    slow = warn_of_time("generate", need, length, place, args.tokens if chosen.streamed else 0)

    def work(way: Way) -> tuple[str, int, float]:
        model = open_way(args.checkpoint, args.precision, place, way)
        started = time.perf_counter()
        asked = (args.prompt, args.tokens, args.temperature, args.seed)
        if not (slow or way.streamed):
            return *continue_prompt(model, tokenizer, *asked), time.perf_counter() - started
        with Progress("generate", args.tokens, "tokens") as progress:
            found = continue_prompt(model, tokenizer, *asked, progress)
        return *found, time.perf_counter() - started

    return in_pieces("generate", chosen, work)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    _check(args)
    text, count, seconds = _generated(args)
    speed = count / max(seconds, 1e-9)
    if args.json:
        answer = {"prompt": args.prompt, "text": text, "tokens": count, "tokens_per_second": speed}
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print(args.prompt + text)
    return 0
