"""The verb `remove`: an expert leaves the mixture, everything else stays as it is.

Not covered: what the expert gave to the averaged weights; train on text of the others to wash that out.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

HELP = "take routed experts out of a mixture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", type=Path, help="Nexus checkpoint")
    parser.add_argument("--expert", required=True, action="append", metavar="NAME", help="expert that leaves (repeat)")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="new checkpoint")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the smaller mixture and say how to measure what it lost."""
    from nexus_ds.config import RouterConfig
    from nexus_ds.model.growth import reduced
    from nexus_ds.outputs import new_directory, refuse_existing

    refuse_existing(args.out)
    model = reduced(args.checkpoint, args.expert)
    with new_directory(args.out) as directory:
        model.write(directory, None, RouterConfig(), 0)
    words = ["--checkpoint", str(args.checkpoint), "--checkpoint", str(args.out), "--data", "DIR"]
    command = shlex.join(["nexus-ds", "evaluate", *words, "--out", f"{args.out}-report"])
    result = model.summary(args.out, None) | {"next": command}
    print(json.dumps(result, indent=2) if args.json else f"{model.describe(args.out, None)}\nnext: {command}")
    return 0
