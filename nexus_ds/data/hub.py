"""Text of the `datasets` library: a data set of the hub, or of this disk, read as a stream.

Rows come one after the other, as they are downloaded; nothing is kept of them but what the reader
keeps, so neither the memory nor the disk has to hold the data set. The rows of all domains come in
one stream, and several domains are best read together, in one pass (`stream`).

Not covered: data sets that need code to be loaded or the name of a configuration; going on in the
middle of a stream that broke.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nexus_ds.data.offline import stay_offline
from nexus_ds.data.rows import BadRows, Cap, Document, check_text
from nexus_ds.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import DatasetBuilder, IterableDataset

# datasets and pyarrow take a second to load, which text in files should not pay: they are imported
# where they work.

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
SET_VALUES = {domain: value for value, domain in SET_DOMAINS.items()}
TABLE_ROWS = 100  # at once in memory
HEAD_TABLES = 10  # from which the domains are told


class Row(NamedTuple):
    """A row of a wanted domain, not checked yet."""

    value: str
    """Of the column of domains."""
    text: object
    where: str
    """Data set, split and number, for messages."""


class Opened(NamedTuple):
    """A data set that can be read."""

    splits: dict[str, IterableDataset]
    identity: str
    """Changes when the text does."""
    sizes: dict[str, int]
    """Bytes by split, as far as they are known."""


class HubSource:
    """Rows of a data set, split into domains by a column.

    SlimPajama's set names become short names (RedPajamaArXiv: arxiv); other values stay as they
    are. Nothing is downloaded unless the user has set HF_HUB_OFFLINE=0; a data set that `datasets`
    has in its cache is read from there.
    """

    def __init__(self, path: str, name: str, column: str) -> None:
        self.name = path
        self.column = column
        self.data, self._identity, self._sizes = _open(path, name)
        for split, data in self.data.items():
            if data.column_names is not None:
                self._check_columns(split, data.column_names)

    def _check_columns(self, split: str, names: Sequence[str]) -> None:
        if "text" not in names or self.column.split(".")[0] not in names:
            raise DataError(
                f"{self.name}: the split {split} has the columns {', '.join(names)}; expected text "
                f"and {self.column}; name the column that holds the domain with hub:NAME#COLUMN"
            )

    def _values(self, table: pa.Table) -> pa.Array:
        """Return the column of domains as an arrow array of strings.

        A dot in its name goes into a structure, or into JSON text.

        Raises:
            DataError: it has no such field, or holds what is no text.
        """
        import pyarrow as pa

        try:
            values = self._column(table)
            # a file may hold any bytes as text
            values.validate(full=True)
        except (pa.ArrowException, UnicodeError) as error:
            raise DataError(
                f"{self.name}: the column {self.column} can't be read as text "
                f"({_first_line(error)}); name the column that holds the domain with "
                "hub:NAME#COLUMN, or a field of it with hub:NAME#COLUMN.FIELD"
            ) from error
        return values

    def _column(self, table: pa.Table) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        top, *inner = self.column.split(".")
        array = table[top].combine_chunks()
        for depth, field in enumerate(inner):
            if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
                values = [self._in_json(text, inner[depth:]) for text in array.to_pylist()]
                return pa.array(values, pa.string())
            if not pa.types.is_struct(array.type) or array.type.get_field_index(field) < 0:
                raise DataError(
                    f"{self.name}: the column {self.column} has no field {field}; "
                    f"found {array.type}"
                )
            array = pc.struct_field(array, field)
        return pc.cast(array, pa.string())

    def _in_json(self, text: str | None, fields: Sequence[str]) -> str | None:
        """Return the value at `fields` of JSON text; None where there is none."""
        if text is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DataError(
                f"{self.name}: the column {self.column} has no field {fields[0]}; found text that "
                f"is no JSON object: {text[:60]!r}; name the column that holds the domain with "
                "hub:NAME#COLUMN"
            )
        for field in fields:
            value = value.get(field) if isinstance(value, dict) else None
        return None if value is None else str(value)

    def _split(self, split: str) -> IterableDataset:
        if split not in self.data:
            raise DataError(f"{self.name}: no split {split}; found: {', '.join(self.data)}")
        return self.data[split]

    def _tables(self, split: str) -> Iterator[pa.Table]:
        """Yield arrow tables of at most TABLE_ROWS rows."""
        tables = self._split(split).with_format("arrow").iter(batch_size=TABLE_ROWS)
        rows = 0
        while True:
            try:
                table = next(tables)
            except StopIteration:
                return
            except Exception as error:
                # of the network, of a file's format, of the library
                raise DataError(
                    f"{self.name}[{split}]: the stream broke after row {rows:,} "
                    f"({type(error).__name__}: {_first_line(error)}); no part of these token files "
                    "is kept; start again, or fetch the data set first with `hf download NAME "
                    "--repo-type dataset --local-dir DIR`, which goes on where it stopped, and "
                    "give hub:DIR"
                ) from error
            self._check_columns(split, table.column_names)
            rows += table.num_rows
            yield table

    @cached_property
    def _head(self) -> list[str]:
        found: set[str] = set()
        for split in self.data:
            for table in islice(self._tables(split), HEAD_TABLES):
                found.update(value for value in self._values(table).to_pylist() if value)
        return sorted(SET_DOMAINS.get(value, value) for value in found)

    def domains(self) -> list[str]:
        """Return the domains of the first thousand rows of each split, sorted.

        There may be more further on.
        """
        return self._head

    def stream(
        self,
        domains: Sequence[str],
        split: str,
        on_bad_row: str,
        max_bytes: int,
        bad_rows: Mapping[str, BadRows],
    ) -> Iterator[tuple[str, Document]]:
        """Yield (domain, document) in the order of the rows.

        It ends when each domain has `max_bytes` of text (0: all).

        Raises:
            DataError: a stream that breaks, a damaged row by its number, a domain without rows.
        """
        wanted = {SET_VALUES.get(domain, domain): domain for domain in domains}
        caps = {domain: Cap(max_bytes) for domain in domains}
        counts: Counter[str] = Counter()
        for row in self._rows(split, wanted):
            domain = wanted[row.value]
            # rows of a domain that has enough are passed over unchecked
            if not caps[domain].full:
                try:
                    text = check_text(row.text, row.where)
                except DataError as error:
                    if on_bad_row != "skip":
                        raise
                    bad_rows[domain].add(str(error))
                    continue
                document = Document(text, {self.column: row.value}, row.where)
                kept = caps[domain].cut(document)
                if kept:
                    counts[domain] += 1
                    yield domain, kept
            if all(cap.full for cap in caps.values()):
                return
        missing = [domain for domain in domains if not counts[domain]]
        if missing:
            raise self._nothing(split, missing)

    def _nothing(self, split: str, missing: Sequence[str]) -> DataError:
        return DataError(
            f"{self.name}, split {split}, domain {', '.join(missing)}: no documents; found: "
            f"{', '.join(self.domains())} in the first rows; a domain needs text in both "
            "splits, or must be left out"
        )

    def _rows(self, split: str, wanted: Mapping[str, str]) -> Iterator[Row]:
        """Yield the rows of the wanted values of the column."""
        import pyarrow as pa
        import pyarrow.compute as pc

        start = 0
        # of none, arrow would know no type
        known = pa.array(list(wanted), pa.string())
        for table in self._tables(split):
            values = self._values(table)
            # arrow filters before Python sees a row: most rows are of other domains
            mask = pc.is_in(values, value_set=known)
            rows = np.flatnonzero(mask.to_numpy(zero_copy_only=False))
            texts = _texts(table["text"].filter(mask))
            chosen = values.filter(mask).to_pylist()
            for row, value, text in zip(rows, chosen, texts, strict=True):
                yield Row(value, text, f"{self.name}[{split}]:{start + int(row)}")
            start += table.num_rows

    def documents(
        self,
        domain: str,
        split: str,
        on_bad_row: str = "error",
        max_bytes: int = 0,
        bad_rows: BadRows | None = None,
    ) -> Iterator[Document]:
        """Yield the domain's rows in order.

        Raises:
            DataError: with the data set, split and row of what is wrong.
        """
        # here, not when the first document is asked for
        self._split(split)
        counted = {domain: BadRows() if bad_rows is None else bad_rows}
        pairs = self.stream([domain], split, on_bad_row, max_bytes, counted)
        return (document for _, document in pairs)

    def fingerprint(self, domain: str, split: str) -> str:
        """Return a hash over the data set's own fingerprint, column and domain.

        Its own fingerprint is of its revision, or of its files' times.
        """
        self._split(split)
        facts = f"{self._identity} {split} {self.column} {domain}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def size(self, domain: str, split: str) -> int:
        """Return the bytes of the split divided by the number of domains; 0: unknown."""
        return self._sizes.get(split, 0) // max(len(self.domains()), 1)


def _texts(array: pa.ChunkedArray) -> list[object]:
    """Return values, as bytes where they are no UTF-8: such a row is refused by its number."""
    import pyarrow as pa

    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        found = array.cast(pa.binary()).to_pylist()
    for row, content in enumerate(found):
        with suppress(AttributeError, UnicodeDecodeError):
            found[row] = content.decode("utf-8")
    return found


def _first_line(error: Exception) -> str:
    """Return what an error says, of several lines the first."""
    return (str(error).splitlines() or [""])[0]


def _open(path: str, name: str) -> Opened:
    """Open a saved directory, files, or a data set of the hub."""
    stay_offline()
    import datasets

    local = Path(name)
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return _open_saved(name)
        builder = datasets.load_dataset_builder(name)
        return Opened(
            splits=dict(builder.as_streaming_dataset()),
            identity=f"{builder.hash} {builder.config_id}",
            sizes=_sizes(builder),
        )
    except Exception as error:
        # the library raises a dozen kinds for a name that isn't there
        raise DataError(
            f"{path}: the data set can't be opened ({type(error).__name__}: {_first_line(error)}); "
            "give a directory of save_to_disk or of parquet files, or set HF_HUB_OFFLINE=0 to let "
            "it be downloaded"
        ) from error


def _open_saved(name: str) -> Opened:
    """Open a directory of `save_to_disk`, which holds one data set or one for each split."""
    import datasets

    saved = datasets.load_from_disk(name)
    splits = {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    return Opened(
        splits={split: data.to_iterable_dataset() for split, data in splits.items()},
        identity=" ".join(data._fingerprint for data in splits.values()),
        sizes={split: int(data.data.nbytes) for split, data in splits.items()},
    )


def _sizes(builder: DatasetBuilder) -> dict[str, int]:
    """Return bytes by split as far as they are known: by the data set's card, or of local files."""
    told = builder.info.splits or {}
    if told:
        return {str(split): int(info.num_bytes or 0) for split, info in told.items()}
    found = {}
    for split, names in (builder.config.data_files or {}).items():
        # others are addresses
        local = filter(os.path.isfile, names)
        found[str(split)] = sum(map(os.path.getsize, local))
    return found
