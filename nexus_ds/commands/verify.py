"""The verb `verify`: whether a Nexus checkpoint is what was written, and made of what it says.

Every byte is read, without torch. What a foreign tool has changed is named by tensor.
Not covered: dense models, which carry no hashes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError
from nexus_ds.upcycling.verification import verify, verify_sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="Nexus checkpoint")
    parser.add_argument(
        "--sources",
        nargs="*",
        metavar="NAME=DIR",
        help="also compare it with the models that its last step put together; NAME=DIR where one "
        "is not where it was (an expert's name, seed, or checkpoint; base: the model that adapters "
        "were merged into)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _given(values: list[str]) -> dict[str, Path]:
    """Parse the NAME=DIR of --sources; ConfigError for another form."""
    given: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not equals or not directory:
            raise ConfigError(f"--sources {value!r}: expected NAME=DIR")
        given[name] = Path(directory)
    return given


def run(args: argparse.Namespace) -> int:
    """Print what was checked and what is wrong; exit code 1 where something is."""
    given = _given(args.sources or [])
    found = verify(args.directory)
    if args.sources is not None:
        more = verify_sources(args.directory, given)
        found.problems += more.problems
        found.notes += more.notes
        found.checked += more.checked
    if args.json:
        print_text(json.dumps(vars(found) | {"sound": not found.problems}, indent=2))
        return 1 if found.problems else 0
    lines = [f"checked: {one}" for one in found.checked]
    lines += [f"note: {one}" for one in found.notes]
    lines += [f"DIFFERS: {one}" for one in found.problems]
    lines.append(f"{args.directory}: {'NOT ' if found.problems else ''}what was written")
    print_text("\n".join(lines))
    return 1 if found.problems else 0
