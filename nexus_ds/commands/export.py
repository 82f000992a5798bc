"""The verb `export`: a mixture for another program, just what that reads, and checked.

What a program would compute otherwise than transformers 5, or not load, is refused by name with the
version that was looked at (`serving.targets`).
Not covered: starting the program, quantisation (its own tools do it), dense models (any program
takes them as they are).
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import refuse_existing

PROGRAMS = ("transformers4", "vllm", "sglang", "llamacpp", "ollama", "hub")
"""Also the keys of `serving.targets.TARGETS`, which `--help` doesn't wait for."""


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
        "--for",
        required=True,
        dest="target",
        choices=PROGRAMS,
        help="the program that is to read it",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="new directory")
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help="of hub: license of the whole, in the hub's words (apache-2.0); "
        "default: what the parts' licenses come to",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the directory and say how it is used.

    Raises:
        CheckpointError, UnsupportedModelError: no Nexus checkpoint, or a damaged one.
        ConfigError: an option of another program, a package that is missing.
        OutputExistsError: `--out` is taken.
        ServingError: the program can't load the model, or would compute it wrongly.
    """
    # not at the top: they import numpy, for which `export --help` doesn't wait
    from nexus_ds.serving.exporting import export_to
    from nexus_ds.serving.targets import TARGETS

    if args.license and args.target != "hub":
        raise ConfigError("--license is of --for hub: other programs read no model card")
    # before a large model is read
    refuse_existing(args.out)
    target = TARGETS[args.target]
    tensors, notes = export_to(args.checkpoint, target, args.out, args.license)
    # as on the disk, tokenizer included
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    command = target.command.replace("DIR", shlex.quote(str(args.out)))
    if args.json:
        facts = {
            "out": str(args.out),
            "for": target.name,
            "program": target.program,
            "version": target.version,
            "seen": target.seen,
            "tensors": tensors,
            "bytes": size,
            "notes": notes,
            "next": command,
        }
        print_text(json.dumps(facts, indent=2))
        return 0
    seen = {"run": "was run with", "read": "was read of"}[target.seen]
    print_text(f"wrote {args.out} for {target.program}: {tensors} tensors, {size:,} bytes, checked")
    print_text(f"what that program does {seen} version {target.version}")
    for note in notes:
        print_text(f"note: {note}")
    print_text(f"next: {command}")
    return 0
