"""The command line: one line a verb, in the order of the pipeline."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import nullcontext

from nexus_ds.config import parse_words
from nexus_ds.errors import NexusError
from nexus_ds.outputs import Ended, exit_on_signals

VERBS = {  # name: module
    "demo": "commands.demo",
    "discover": "commands.discover",
    "embed": "commands.embed",
    "upcycle": "commands.upcycle",
    "train": "train",
    "extend": "commands.extend",
    "remove": "commands.remove",
    "evaluate": "commands.evaluate",
    "compare": "commands.compare",
    "inspect": "commands.inspect_model",
    "plan": "commands.plan",
    "bench": "commands.bench",
    "generate": "commands.generate",
    "preflight": "commands.preflight",
    "stage": "commands.stage",
    "status": "commands.status",
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen verb's own arguments are declared in full."""
    parser = argparse.ArgumentParser(
        prog="nexus-ds",
        description="One mixture-of-experts out of several dense models, and more experts later.",
    )
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module_name in VERBS.items():
        module = importlib.import_module(f"nexus_ds.{module_name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        if name == verb:
            module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a user's mistake is one line on stderr and exit code 1.

    SIGTERM and its like end a verb in order, with 128 + their number; `train` saves its state
    instead (runtime/signals).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    words = sys.argv[1:] if argv is None else argv
    verb = next((word for word in words if not word.startswith("-")), None)
    args = parse_words(build_parser(verb), words)
    try:
        with nullcontext() if args.verb == "train" else exit_on_signals():
            return int(importlib.import_module(f"nexus_ds.{VERBS[args.verb]}").run(args))
    except (NexusError, OSError) as error:  # of the operating system: a path, permissions, space
        print(f"nexus-ds {args.verb}: {error}", file=sys.stderr, flush=True)
        return 1
    except Ended as ended:
        print(f"nexus-ds {args.verb}: ended by {ended.signal}", file=sys.stderr, flush=True)
        return int(ended.code or 0)
    except KeyboardInterrupt:
        print(f"nexus-ds {args.verb}: interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
