"""The JSON files of a model directory, read strictly and only from inside it; without torch.

Not covered: writing them (`outputs.write_json`), the headers of weight files (`tensors`).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from nexus_ds.errors import CheckpointError
from nexus_ds.inputs import read_bounded, require_few_values

MAX_JSON = 100_000_000  # bytes of an index or configuration
MAX_DEPTH = 64  # of what lies in each other; whatever walks it afterwards calls itself as deep
MAX_NUMBER = 1 << 63  # of whole numbers: no size, offset or token is larger
NO_LIMIT = int(1e30)
"""What transformers writes for "no limit", as model_max_length of a tokenizer."""
DIGITS = re.compile(r"[0-9]{1,9}")
"""A number in a name; `int` takes neither more than 4,300 digits nor all that isdigit() takes."""


def require_directory(directory: Path) -> Path:
    """Return `directory` if it is one; CheckpointError else, for instance for a name on a hub."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; expected a local model directory "
            "(nothing is downloaded: fetch the model first)"
        )
    return directory


def _half_a_character(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return True
    return False


def confined(directory: Path, name: str) -> Path:
    """Return `directory / name`, a file that really lies in `directory`.

    A directory of the Hugging Face cache (`snapshots/REVISION`) consists of links to its sibling
    `blobs`: these are the one kind of link that may leave the directory.

    Raises:
        CheckpointError: absolute, upward or linked paths that lead out of the directory, NUL bytes,
            half a character, as JSON can name one.
    """
    if _half_a_character(name):
        raise CheckpointError(
            f"{directory}: found a file named {name!a}, expected a name in UTF-8; "
            "fetch or save the model again"
        )
    root = directory.parent.parent if directory.parent.name == "snapshots" else directory
    path = directory / name
    outside = "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts
    if outside or not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(
            f"{directory}: the file {name!r} lies outside the model's directory; "
            "only files in it are read. "
            "Copy the model so that its directory holds the files themselves"
        )
    return path


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a name that stands twice (ValueError)."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} stands twice")
        result[name] = value
    return result


def _whole_number(digits: str) -> int:
    """Return a whole number; ValueError for one that is no size of anything."""
    value = int(digits)
    if abs(value) >= MAX_NUMBER and value != NO_LIMIT:
        raise ValueError(f"the number {digits[:20]}.. is too large")
    return value


def _check_depth(value: object) -> None:
    """Raise ValueError for JSON that is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists and objects in each other")


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no doubled names, bounded depth and numbers.

    CheckpointError starts with `what`.
    """
    try:
        require_few_values(text)
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_doubles, parse_int=_whole_number
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} is not valid JSON ({error}); fetch or save it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what} holds {type(value).__name__}, expected a JSON object; fetch or save it again"
        )
    return value


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """Read the JSON object in `directory / name`.

    Raises:
        CheckpointError: missing, outside the directory, larger than 100 MB, or not an object.
    """
    path = confined(directory, name)
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {name}; expected a model directory as transformers saves it"
        )
    return parse_json_object(read_bounded(path, MAX_JSON), str(path))
