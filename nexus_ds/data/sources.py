"""Sources of text: documents by domain and split.

Three kinds look alike: a folder with one sub-folder a domain, a data set of the `datasets` library whose rows name their
domain, and text that every installation has on its disk.

Not covered: data sets that need code to be loaded, shuffling of documents, a domain's text in several files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nexus_ds.data.demo_text import demo_source
from nexus_ds.data.offline import stay_offline
from nexus_ds.data.rows import SUFFIXES, BadRows, Document, capped, check_text, read_rows
from nexus_ds.errors import DataError

SPLITS = ("train", "validation")
HASHED_WHOLE = 1 << 30  # bytes; larger files are known by size and time of change
SET_NAME = "meta.redpajama_set_name"
SET_DOMAINS = {
    "RedPajamaArXiv": "arxiv",
    "RedPajamaBook": "books",
    "RedPajamaC4": "c4",
    "RedPajamaCommonCrawl": "commoncrawl",
    "RedPajamaGithub": "github",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wikipedia",
}


class Source(Protocol):
    """Text by domain and split."""

    name: str
    """As the user gave it."""

    def domains(self) -> list[str]:
        """Return the domains, sorted."""
        ...

    def documents(
        self, domain: str, split: str, on_bad_row: str = "error", max_bytes: int = 0, bad_rows: BadRows | None = None
    ) -> Iterator[Document]:
        """Yield documents in a fixed order; at least one, or DataError."""
        ...

    def fingerprint(self, domain: str, split: str) -> str:
        """Return a hash that changes when the text does."""
        ...

    def size(self, domain: str, split: str) -> int:
        """Return about how many bytes of text there are, for progress only."""
        ...


def open_source(path: str) -> Source:
    """Open text: a folder of domains, `hub:NAME[#COLUMN]`, or `demo`.

    `hub:` takes a data set's name, a directory of `save_to_disk`, or a directory of parquet or JSON files; rows are
    split by `meta.redpajama_set_name` or by COLUMN (dots go into structures).

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
        raise DataError(f"{what}: no documents; a domain needs text in both splits, or must be left out")


def require_domains(source: Source, domains: Sequence[str]) -> None:
    """Raise DataError if `source` lacks one of `domains`, naming those that it has."""
    known = source.domains()
    missing = [domain for domain in domains if domain not in known]
    if missing:
        raise DataError(f"{source.name}: no domain {', '.join(missing)}; found: {', '.join(known) or 'none'}")


class FolderSource:
    """A folder with `<domain>/{train,validation}.jsonl[.gz|.zst]`."""

    def __init__(self, path: str) -> None:
        self.name, self.root = path, Path(path)
        if not self.root.is_dir():
            raise DataError(
                f"no text at {path}; expected a folder with <domain>/train.jsonl[.gz|.zst] and "
                "<domain>/validation.jsonl[.gz|.zst], hub:NAME, or demo"
            )

    def domains(self) -> list[str]:
        """Return the sub-folders that hold a file of text, sorted."""
        found = [
            d.name for d in sorted(self.root.iterdir()) if d.is_dir() and any(self._files(d.name, s) for s in SPLITS)
        ]
        if not found:
            raise DataError(f"{self.name}: no domains; expected sub-folders with train.jsonl[.gz|.zst]")
        return found

    def _files(self, domain: str, split: str) -> list[Path]:
        return [path for suffix in SUFFIXES if (path := self.root / domain / f"{split}{suffix}").is_file()]

    def file(self, domain: str, split: str) -> Path:
        """Return the one file of a domain's split; DataError says what is there instead."""
        require_domains(self, [domain])
        files = self._files(domain, split)
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(path.name for path in files)
            raise DataError(f"{self.root / domain}: {split} text in several files: {names}; keep one")
        present = ", ".join(sorted(path.name for path in (self.root / domain).iterdir()))
        raise DataError(f"{self.root / domain}: no {split} text; expected {split}.jsonl[.gz|.zst], found: {present}")

    def documents(
        self, domain: str, split: str, on_bad_row: str = "error", max_bytes: int = 0, bad_rows: BadRows | None = None
    ) -> Iterator[Document]:
        """Yield the file's documents in order; DataError `file:line: ...` on a damaged row or an empty file."""
        path = self.file(domain, split)
        return _checked(capped(read_rows(path, on_bad_row, bad_rows), max_bytes), str(path))

    def fingerprint(self, domain: str, split: str) -> str:
        """Return the sha256 of the file's bytes (of a file above 1 GiB: of its size and time of change)."""
        path = self.file(domain, split)
        facts = path.stat()
        if facts.st_size > HASHED_WHOLE:
            return hashlib.sha256(f"{path.name} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def size(self, domain: str, split: str) -> int:
        """Return the file's size, uncompressed as far as can be told without reading it."""
        path = self.file(domain, split)
        stored = path.stat().st_size
        if path.suffix == ".gz" and stored >= 18:
            with path.open("rb") as stream:
                stream.seek(-4, os.SEEK_END)  # gzip's last field: uncompressed size modulo 2**32
                return max(int.from_bytes(stream.read(4), "little"), stored)
        return stored * 3 if path.suffix == ".zst" else stored


class HubSource:
    """Rows of a data set of the `datasets` library, split into domains by a column.

    SlimPajama's set names become short names (RedPajamaArXiv: arxiv); other values stay as they are. Nothing is
    downloaded unless the user has set HF_HUB_OFFLINE=0.
    """

    def __init__(self, path: str, name: str, column: str) -> None:
        self.name, self.column = path, column
        self.data = _load_dataset(path, name)
        columns = {split: data.column_names for split, data in self.data.items()}
        top = column.split(".")[0]
        for split, names in columns.items():
            if "text" not in names or top not in names:
                raise DataError(
                    f"{path}: the split {split} has the columns {', '.join(names)}; expected text and {column}; "
                    "name the column that holds the domain with hub:NAME#COLUMN"
                )

    def _values(self, table: Any) -> Any:
        """Return the column of domains of an arrow table, as an arrow array of strings."""
        import pyarrow as pa
        import pyarrow.compute as pc

        top, *inner = self.column.split(".")
        array = table[top].combine_chunks()
        for field in inner:
            if not pa.types.is_struct(array.type) or array.type.get_field_index(field) < 0:
                raise DataError(f"{self.name}: the column {self.column} has no field {field}; found {array.type}")
            array = pc.struct_field(array, field)
        return pc.cast(array, pa.string())

    @cached_property
    def _names(self) -> dict[str, str]:
        """Domain -> value of the column."""
        found: set[str] = set()
        for data in self.data.values():
            column = data.select_columns([self.column.split(".")[0]]).with_format("arrow")
            for table in column.iter(batch_size=100_000):
                found.update(v for v in self._values(table).unique().to_pylist() if v)
        return {SET_DOMAINS.get(value, value): value for value in sorted(found)}

    def domains(self) -> list[str]:
        """Return the domains that occur in any split, sorted."""
        return sorted(self._names)

    def _split(self, domain: str, split: str) -> Any:
        require_domains(self, [domain])
        if split not in self.data:
            raise DataError(f"{self.name}: no split {split}; found: {', '.join(self.data)}")
        return self.data[split]

    def documents(
        self, domain: str, split: str, on_bad_row: str = "error", max_bytes: int = 0, bad_rows: BadRows | None = None
    ) -> Iterator[Document]:
        """Yield the domain's rows in order; DataError names the data set, split and row of what is wrong."""
        data = self._split(domain, split)
        rows = self._rows(data, self._names[domain], split, on_bad_row, bad_rows)
        return _checked(capped(rows, max_bytes), f"{self.name}, split {split}, domain {domain}")

    def _rows(self, data: Any, value: str, split: str, on_bad_row: str, bad_rows: BadRows | None) -> Iterator[Document]:
        import pyarrow.compute as pc

        start = 0
        for table in data.with_format("arrow").iter(batch_size=1000):
            mask = pc.fill_null(pc.equal(self._values(table), value), False)
            texts = table["text"].filter(mask).to_pylist()
            for offset, text in zip(np.flatnonzero(mask.to_numpy(zero_copy_only=False)), texts, strict=True):
                where = f"{self.name}[{split}]:{start + int(offset)}"
                try:
                    yield Document(check_text(text, where), {self.column: value}, where)
                except DataError as error:
                    if on_bad_row != "skip":
                        raise
                    if bad_rows is not None:
                        bad_rows.add(str(error))
            start += table.num_rows

    def fingerprint(self, domain: str, split: str) -> str:
        """Return the data set's own fingerprint, with the domain and the number of rows."""
        data = self._split(domain, split)
        facts = f"{data._fingerprint} {len(data)} {self.column} {self._names[domain]}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def size(self, domain: str, split: str) -> int:
        """Return the bytes of the split divided by the number of domains."""
        return int(self._split(domain, split).data.nbytes) // max(len(self._names), 1)


def _load_dataset(path: str, name: str) -> dict[str, Any]:
    """Return {split: Dataset} of a saved directory, a directory of files, or a data set's name."""
    stay_offline()
    import datasets

    local = Path(name)
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds for a name that isn't there
        raise DataError(
            f"{path}: the data set can't be opened ({type(error).__name__}: {str(error).splitlines()[0]}); give a "
            "directory of save_to_disk or of parquet files, or set HF_HUB_OFFLINE=0 to let it be downloaded"
        ) from error
    return {"train": data} if isinstance(data, datasets.Dataset) else dict(data)
