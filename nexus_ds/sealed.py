"""JSON files of the project's own that tell whether they are what was written.

A manifest says of other files what they should be; it can itself be cut off, flipped or edited. So
it carries a hash of all that it says. Whoever has the right hash has the types and keys that were
written too, so that nobody need check them one by one.
Not covered: somebody who computes the hash anew. It detects damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

MAX_BYTES = 1 << 30  # of such a file: a manifest names each parameter of a model
SEAL = "sealed"


def _hash(value: Mapping[str, object]) -> str:
    # Not sorted: the order of a mapping may mean something, as that of domains does.
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def seal(value: Mapping[str, object]) -> str:
    """Return `value`, a mapping that JSON can hold, as the text of such a file."""
    # As it will be read: a tuple comes back as a list, a number as a key comes back as a text.
    plain = json.loads(json.dumps(value))
    return json.dumps({**plain, SEAL: _hash(plain)}, indent=1) + "\n"


def read_sealed(path: Path) -> dict[str, object]:
    """Return what was sealed in the file at `path`.

    Raises:
        ValueError: it is not what was written; says how, not where.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        # Asked first: read(n) takes memory for n bytes, however few there are.
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        text = file.read()
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict) or SEAL not in value:
        raise ValueError(f"found no hash of itself under {SEAL!r}")
    told = value.pop(SEAL)
    try:
        found = _hash(value)
    # Deeper than what can be read is what can't be written.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not what was written ({error})") from error
    if found != told:
        raise ValueError(f"found sha256 {found[:12]} of what it says, expected {str(told)[:12]}")
    return value
