"""One call for all programs: a checkpoint, a target, a new directory.

Not covered: the bytes (`directory`, `gguf_file`, `hub`), what a program is told to refuse
(`targets`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nexus_ds.checkpoint.hashes import record_hashes
from nexus_ds.outputs import new_directory, write_text
from nexus_ds.serving.directory import (
    Opened,
    copy_licenses,
    open_checkpoint,
    write_directory,
)
from nexus_ds.serving.gguf_file import (
    FILE,
    gguf_package,
    write_gguf,
)
from nexus_ds.serving.gguf_words import read_words
from nexus_ds.serving.hub import write_public
from nexus_ds.serving.modelfile import MODELFILE, modelfile
from nexus_ds.serving.targets import (
    Target,
    notes_on,
    refuse_unservable,
)


class Exported(NamedTuple):
    """What was written."""

    tensors: int
    notes: list[str]
    """What to know before using it."""


def export_to(checkpoint: Path, target: Target, out: Path, license_name: str = "") -> Exported:
    """Write a checkpoint for a program and check it.

    Args:
        checkpoint: a Nexus checkpoint.
        target: the program.
        out: new directory.
        license_name: of the hub: of the whole, in its words; empty: as the parts come to.

    Raises:
        CheckpointError, UnsupportedModelError: no Nexus checkpoint, or a damaged one.
        ConfigError: a package that is missing.
        OutputExistsError: `out` is taken.
        ServingError: the program can't load the model, or would compute it wrongly.
    """
    opened = open_checkpoint(checkpoint)
    refuse_unservable(target, opened.mixture, str(checkpoint))
    notes = notes_on(target, opened.mixture)
    with new_directory(out) as directory:
        if target.name == "hub":
            notes += write_public(opened, directory, license_name)
            # last: it is of all that stands there
            record_hashes(directory)
            return Exported(len(opened.raw.names()), notes)
        if target.name in ("llamacpp", "ollama"):
            return _gguf(opened, target, directory, notes)
        return Exported(write_directory(opened, target, directory), notes)


def _gguf(opened: Opened, target: Target, directory: Path, notes: list[str]) -> Exported:
    # a package that is missing is told before a tokenizer is read
    gguf_package()
    words = read_words(opened.directory, opened.mixture.sizes.vocabulary)
    notes += words.notes
    if target.name == "ollama":
        text, more = modelfile(opened.directory)
        notes += more
        write_text(directory / MODELFILE, text)
    copy_licenses(opened.directory, directory)
    return Exported(write_gguf(opened, words, directory / FILE), notes)
