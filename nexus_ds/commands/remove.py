"""The verb `remove`: an expert leaves the mixture, all else stays; what that costs, on request.

Not covered: what the expert gave to the averaged weights; train on text of the others to wash that
out.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from nexus_ds.config import named_once
from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import new_directory, refuse_existing
from nexus_ds.report import verdict as before_after
from nexus_ds.settings import RouterConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        type=Path,
        help="Nexus checkpoint",
    )
    parser.add_argument(
        "--expert",
        required=True,
        action="append",
        metavar="NAME",
        help="expert that leaves (repeat)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="new checkpoint")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="text of the domains: score both models on it and print a table before and after "
        "(seconds for small models, two passes over N windows a domain for all)",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="of that text: documents don't begin with the BOS of the model's tokenizer",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="of that text: rows may be chats, rendered by the tokenizer's template, and their "
        "answers alone scored (trained with data.chat=true)",
    )
    before_after.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the smaller mixture; score it beside the larger one, or say how."""
    # not at the top: `remove --help` doesn't wait for numpy
    from nexus_ds.upcycling.remove import reduced

    limit = before_after.parse_limit(args.limit)
    if limit is not None and not args.data:
        raise ConfigError("--fail-if-worse needs --data DIR, the text to judge by")
    if named_once("--scored", args.scored) and not args.data:
        raise ConfigError("--scored needs --data DIR, the text to score; or leave it out")
    refuse_existing(args.out)
    model = reduced(args.checkpoint, args.expert)
    scored = None
    if args.data:
        # it imports torch, for which nothing else here waits
        from nexus_ds.evaluation.before_after import BeforeAfter, chosen

        domains = chosen(args.scored, args.checkpoint, [])
        # the old model is scored first: text that can't be read is told before anything is written
        bos = not args.no_bos
        scored = BeforeAfter(args.checkpoint, args.data, domains, args.windows, bos, args.chat)
    with new_directory(args.out) as directory:
        # nothing is fitted, so neither the router's settings nor the seed matter
        model.write(directory, None, RouterConfig(), 0)
    verdict = None
    if scored:
        # the checkpoint under its final name, as whoever uses it will read it
        after = scored.after(args.out)
        verdict = before_after.judge(scored.before, after, limit, scored.labels)
    command = _evaluation(args)
    if args.json:
        result = model.summary(args.out, None) | {
            "verdict": verdict.as_dict() if verdict else None,
            "next": command,
        }
        print_text(json.dumps(result, indent=2))
    else:
        print_text(model.describe(args.out, None))
        if verdict:
            print_text(verdict.text())
        print_text(f"next: {command}")
    return verdict.exit_code("remove", args.out) if verdict else 0


def _evaluation(args: argparse.Namespace) -> str:
    """Return the command, quoted for a shell, that scores both models."""
    words = ["--checkpoint", str(args.checkpoint), "--checkpoint", str(args.out)]
    words += ["--data", args.data or "DIR"]
    words += ["--no-bos"] if args.no_bos else []
    words += ["--chat"] if args.chat else []
    return shlex.join(["nexus-ds", "evaluate", *words, "--out", f"{args.out}-report"])
