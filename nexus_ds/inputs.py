"""Files from outside that are read whole: none that is no file, none that is too large.

Not covered: what is in them (`json_files`, `typed_json`, `config`), files that are read by blocks.
"""

from __future__ import annotations

from pathlib import Path

from nexus_ds.errors import CheckpointError, NexusError

MOST_BYTES = 100_000_000
MOST_VALUES = 4_000_000  # of JSON: "{}," takes 100 bytes of memory for 3 of the file


def require_file(
    path: Path, most: int | None = None, error: type[NexusError] = CheckpointError
) -> int:
    """Return the size in bytes of a file that is about to be read.

    Args:
        path: of the file.
        most: bytes that it may have; None: it is not read whole.
        error: what is raised.

    Raises:
        error: more bytes, a folder, or what may be read for ever, as a named pipe.
        OSError: there is nothing of this name, or nothing that may be looked at.
    """
    size = path.stat().st_size
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise error(f"{path} is {kind}, expected a file; put the file itself there")
    # asked first: a file with holes costs whoever made it nothing
    if most is not None and size > most:
        raise error(f"{path} has {size:,} bytes, expected at most {most:,}; is it the right file?")
    return size


def read_bounded(
    path: Path, most: int = MOST_BYTES, error: type[NexusError] = CheckpointError
) -> bytes:
    """Return the content of a file; `require_file` has arguments and errors."""
    require_file(path, most, error)
    return path.read_bytes()


def require_few_values(text: bytes) -> None:
    """Raise ValueError for JSON that may hold more than MOST_VALUES values.

    A tokenizer with 262,144 tokens and 514,000 merges has 2 million.
    """
    # a comma within a text is taken for one more: too many are counted, never too few
    most = sum(text.count(mark) for mark in (b",", b"{", b"["))
    if most > MOST_VALUES:
        raise ValueError(f"some {most:,} values, expected at most {MOST_VALUES:,}")
