"""New output directories and files: written under a temporary name, renamed when whole, never over something else.

Not covered: two writers of one output at the same moment on a file system without atomic rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_ds.errors import OutputExistsError


def refuse_existing(out: Path) -> None:
    """Raise OutputExistsError if `out` exists (an empty directory counts as free)."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise OutputExistsError(f"{out} exists already; give another --out or remove it first")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `out` that becomes `out` when the block ends well, and vanishes when not."""
    out = Path(out)
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `out` that becomes `out` when the block ends well, and vanishes when not."""
    out = Path(out)
    if not overwrite:
        refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step."""
    with new_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
