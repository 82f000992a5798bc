"""The verb `adopt`: a mixture that another program has trained becomes a Nexus checkpoint again.

Not covered: the training (docs/finetuning.md says what to freeze), adapters that are not merged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from nexus_ds.checkpoint.records import keeps_seed, start_scale
from nexus_ds.command_lines import next_extension
from nexus_ds.console import print_text
from nexus_ds.outputs import new_directory, refuse_existing
from nexus_ds.settings import RouterConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="what Trainer, TRL or a merged PEFT adapter has saved; it stays as it is",
    )
    parser.add_argument(
        "--from",
        required=True,
        dest="nexus",
        type=Path,
        metavar="NEXUS",
        help="Nexus checkpoint that the training began from",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new checkpoint (default: DIR-adopted)"
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="set trained gates of shared experts back, and replace router rows that no P gives "
        "by the nearest: changes what the model computes",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the trained mixture with its sidecar; say how well P gives its rows."""
    # it imports torch, for which `adopt --help` doesn't wait
    from nexus_ds.upcycling.adopt import adopted

    directory: Path = args.directory
    out: Path = args.out or directory.absolute().with_name(f"{directory.absolute().name}-adopted")
    refuse_existing(out)
    found = adopted(directory, args.nexus, args.approximate)
    with new_directory(out) as temporary:
        # nothing is fitted to text, so neither the router's settings nor the seed matter
        found.model.write(temporary, None, RouterConfig(), 0)
    lineage = found.model.sidecar.lineage
    far = start_scale(lineage, "task") != 1.0
    command = next_extension(out, seed=far, kept=keeps_seed(lineage))
    if args.json:
        layers = [dataclasses.asdict(layer) for layer in found.layers]
        result = found.model.summary(out, None) | {"layers": layers, "next": command}
        print_text(json.dumps(result, indent=2))
        return 0
    print_text(found.text())
    print_text(found.model.describe(out, None))
    print_text(f"next: {command}")
    return 0
