"""The verb `generate`: continue a prompt with any checkpoint, dense or Nexus.

Not covered: chat templates, batches, streaming, serving.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import ConfigError


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
        default=40,
        metavar="N",
        help="most tokens to add (40)",
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


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
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
            **choice,
        )
    added_T = output_1T[0, length:]
    return tokenizer.decode(added_T, skip_special_tokens=True), len(added_T)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    # not at the top: it imports torch, for which `generate --help` doesn't wait
    from nexus_ds.checkpoint.loading import load_model

    _check(args)
    tokenizer = open_tokenizer(args.checkpoint)
    model = load_model(args.checkpoint, args.precision)
    started = time.perf_counter()
    text, count = continue_prompt(
        model, tokenizer, args.prompt, args.tokens, args.temperature, args.seed
    )
    speed = count / max(time.perf_counter() - started, 1e-9)
    if args.json:
        answer = {"prompt": args.prompt, "text": text, "tokens": count, "tokens_per_second": speed}
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print(args.prompt + text)
    return 0
