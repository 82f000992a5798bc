"""Sources of text: documents by domain and split.

Three kinds look alike: a folder with one sub-folder a domain, a data set of the `datasets` library
whose rows name their domain, and text that every installation has on its disk.

Not covered: shuffling of documents, a domain's text in several files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nexus_ds.data.demo_text import demo_source
from nexus_ds.data.hub import SET_NAME, HubSource
from nexus_ds.data.rows import SUFFIXES, BadRows, Document, capped, read_rows
from nexus_ds.errors import DataError
from nexus_ds.progress import say

SPLITS = ("train", "validation")
# bytes; larger files are known by size and time of change: every start asks
HASHED_WHOLE = 64 << 20
SHORTEST_GZIP = 18  # bytes of a header and a trailer
ZSTD_RATIO = 3  # of text, about: zstandard need not say the size


class Source(Protocol):
    """Text by domain and split."""

    name: str
    """As the user gave it."""

    def domains(self) -> list[str]:
        """Return the domains, sorted."""
        ...

    def documents(
        self,
        domain: str,
        split: str,
        on_bad_row: str = "error",
        max_bytes: int = 0,
        bad_rows: BadRows | None = None,
    ) -> Iterator[Document]:
        """Yield documents in a fixed order; at least one, or DataError."""
        ...

    def fingerprint(self, domain: str, split: str) -> str:
        """Return a hash that changes when the text does."""
        ...

    def size(self, domain: str, split: str) -> int:
        """Return about how many bytes of text there are, for progress and planning only; 0:
        unknown."""
        ...


def open_source(path: str) -> Source:
    """Open text: a folder of domains, `hub:NAME[#COLUMN]`, or `demo`.

    `hub:` takes a data set's name, a directory of `save_to_disk`, or a directory of parquet or JSON
    files; rows are streamed and split by `meta.redpajama_set_name` or by COLUMN (dots go into
    structures).

    Raises:
        DataError: there is no such text.
    """
    if path == "demo":
        return demo_source()
    if path.startswith("hub:"):
        name, _, column = path.removeprefix("hub:").partition("#")
        return HubSource(path, name, column or SET_NAME)
    return FolderSource(path)


def _checked(documents: Iterator[Document], what: str) -> Iterator[Document]:
    """Yield `documents`; DataError if there are none."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise DataError(
            f"{what}: no documents; a domain needs text in both splits, or must be left out"
        )


def require_domains(source: Source, domains: Sequence[str]) -> None:
    """Raise DataError if `source` lacks one of `domains`, naming those that it has.

    Of a stream, whose end alone can tell, it is only said.
    """
    known = source.domains()
    missing = [domain for domain in domains if domain not in known]
    if not missing:
        return
    message = f"{source.name}: no domain {', '.join(missing)}; found: {', '.join(known) or 'none'}"
    if not isinstance(source, HubSource):
        raise DataError(message)
    say(f"{message} in the first rows; the stream is read on, to its end if need be")


def passes(source: Source, domains: Sequence[str]) -> list[list[str]]:
    """Return which domains are read together, for `read`."""
    if isinstance(source, HubSource):
        # all rows come by in one stream, whichever domain is asked for
        return [list(domains)]
    return [[domain] for domain in domains]


def read(
    source: Source,
    domains: Sequence[str],
    split: str,
    on_bad_row: str,
    max_bytes: int,
    bad_rows: Mapping[str, BadRows],
) -> Iterator[tuple[str, Document]]:
    """Yield (domain, document) of several domains in one pass, each domain's in a fixed order."""
    if isinstance(source, HubSource):
        yield from source.stream(domains, split, on_bad_row, max_bytes, bad_rows)
        return
    for domain in domains:
        for document in source.documents(domain, split, on_bad_row, max_bytes, bad_rows[domain]):
            yield domain, document


class FolderSource:
    """A folder with `<domain>/{train,validation}.jsonl[.gz|.zst]`."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.root = Path(path)
        if not self.root.is_dir():
            raise DataError(
                f"no text at {path}; expected a folder with <domain>/train.jsonl[.gz|.zst] and "
                "<domain>/validation.jsonl[.gz|.zst], hub:NAME, or demo"
            )

    def domains(self) -> list[str]:
        """Return the sub-folders that hold a file of text, sorted."""
        folders = sorted(folder for folder in self.root.iterdir() if folder.is_dir())
        found = [folder.name for folder in folders if self._has_text(folder.name)]
        if not found:
            raise DataError(
                f"{self.name}: no domains; expected sub-folders with train.jsonl[.gz|.zst]"
            )
        return found

    def _has_text(self, domain: str) -> bool:
        return any(self._files(domain, split) for split in SPLITS)

    def _files(self, domain: str, split: str) -> list[Path]:
        paths = [self.root / domain / f"{split}{suffix}" for suffix in SUFFIXES]
        return [path for path in paths if path.is_file()]

    def file(self, domain: str, split: str) -> Path:
        """Return the one file of a domain's split; DataError says what is there instead."""
        require_domains(self, [domain])
        files = self._files(domain, split)
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(path.name for path in files)
            raise DataError(
                f"{self.root / domain}: {split} text in several files: {names}; keep one"
            )
        present = ", ".join(sorted(path.name for path in (self.root / domain).iterdir()))
        raise DataError(
            f"{self.root / domain}: no {split} text; "
            f"expected {split}.jsonl[.gz|.zst], found: {present}"
        )

    def documents(
        self,
        domain: str,
        split: str,
        on_bad_row: str = "error",
        max_bytes: int = 0,
        bad_rows: BadRows | None = None,
    ) -> Iterator[Document]:
        """Yield the file's documents in order.

        Raises:
            DataError: `file:line: ...` of a damaged row; an empty file.
        """
        path = self.file(domain, split)
        return _checked(capped(read_rows(path, on_bad_row, bad_rows), max_bytes), str(path))

    def fingerprint(self, domain: str, split: str) -> str:
        """Return the sha256 of the file's bytes; above 64 MiB of its size and time of change."""
        path = self.file(domain, split)
        status = path.stat()
        if status.st_size > HASHED_WHOLE:
            facts = f"{path.name} {status.st_size} {status.st_mtime_ns}"
            return hashlib.sha256(facts.encode()).hexdigest()
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def size(self, domain: str, split: str) -> int:
        """Return the file's size, uncompressed as far as can be told without reading it."""
        path = self.file(domain, split)
        stored = path.stat().st_size
        if path.suffix == ".gz" and stored >= SHORTEST_GZIP:
            with path.open("rb") as stream:
                # gzip's last field: uncompressed size modulo 2^32 (RFC 1952, section 2.3.1)
                stream.seek(-4, os.SEEK_END)
                return max(int.from_bytes(stream.read(4), "little"), stored)
        return stored * ZSTD_RATIO if path.suffix == ".zst" else stored
