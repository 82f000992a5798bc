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

from nexus_ds.errors import ConfigError

HELP = "continue a prompt with a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="dense or Nexus checkpoint"
    )
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument(
        "--tokens", type=int, default=40, metavar="N", help="most tokens to add (40)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token (default)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draws at a temperature above 0"
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
    model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float, seed: int
) -> tuple[str, int]:
    """Return the text that the model adds to `prompt`, and its number of tokens.

    Raises:
        ConfigError: a prompt without a token, with one that the model does not embed, or one that
            leaves the model no room for another.
    """
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not ids.shape[1]:
        raise ConfigError("the prompt has no token; write at least one word")
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise ConfigError(
            f"the prompt has the token id {int(ids.max())}, the model embeds {rows}; give the checkpoint the tokenizer that "
            "it was trained with"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and ids.shape[1] >= limit:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens, the model reads {limit}; shorten it"
        )
    room = min(tokens, limit - ids.shape[1]) if limit else tokens
    torch.manual_seed(seed)
    choice = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **choice,
        )
    added = output[0, ids.shape[1] :]
    return tokenizer.decode(added, skip_special_tokens=True), len(added)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    _check(args)
    from nexus_ds.checkpoint.loading import load_model
    from nexus_ds.data.tokenizer import open_tokenizer

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
