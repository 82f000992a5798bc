"""Rows of JSON-lines files, checked: each is a document or an error that names its file and line.

A row is one JSON object a line with `text` (a string that holds something) or `messages` (a chat),
and, optionally, `meta` (anything; an object in SlimPajama); other keys are ignored, and so are
blank lines and byte order marks. Files may be compressed with gzip or zstandard. Memory is bounded
by the longest line that is allowed, whatever the file holds.

Not covered: other formats, other encodings than UTF-8, normalisation of the text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import zstandard

from nexus_ds.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_LINE_BYTES = 16 << 20  # a long book has 5 MB
KEPT_MESSAGES = 10
CHUNK = 1 << 16  # bytes that are read at once
ZSTD_STEP = 1 << 9
"""Bytes of a zstandard file that are decompressed at once: four may say 128 KiB of one character
(RFC 8878, 3.1.1.2), so that a step gives at most 16 MiB, which is the longest line."""
REMEDY = (
    "mend it, or skip such rows with data.on_bad_row=skip (--on-bad-row skip of embed and evaluate)"
)


Chat = tuple[dict[str, str], ...]
"""Messages, each with a `role` and a `content`."""


@dataclass(frozen=True)
class Document:
    """One document of a domain."""

    text: str
    """Of a chat: the contents of its messages, for whoever only wants to know what it is about."""
    meta: object
    """As the row has it; an empty object where it has none."""
    where: str
    """file:line, or data set and row number, for messages."""
    chat: Chat | None = None
    """None of plain text."""


@dataclass
class BadRows:
    """Rows that were skipped: how many, and the first few messages."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(message)


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a zstandard file of one or more frames.

    The library's own reader ends in silence where a file was cut short; this one complains.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.context = zstandard.ZstdDecompressor()
        self.frame = self.context.decompressobj()
        self.pending = b""
        """Decompressed, and read up to `position`."""
        self.position = 0
        self.inside = False
        """Whether a frame has begun that has not ended."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.position >= len(self.pending):
            # what stood behind a frame's end in the last step begins the next frame
            step = self.frame.unused_data or self.raw.read(ZSTD_STEP)
            if self.frame.eof:
                self.frame = self.context.decompressobj()
                self.inside = False
            if not step:
                if self.inside:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self.pending = self.frame.decompress(step)
            self.position = 0
            self.inside = not self.frame.eof
        count = min(len(buffer), len(self.pending) - self.position)
        buffer[:count] = self.pending[self.position : self.position + count]
        self.position += count
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open `path` for reading, decompressed if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path.open("rb", CHUNK)), CHUNK)
    return path.open("rb")


def _lines(stream: io.BufferedIOBase, limit: int) -> Iterator[bytes | None]:
    """Yield the lines of `stream`; None for a line of more than `limit` bytes.

    A long line is passed over piece by piece. So is a byte order mark at a line's start: editors
    put one before a file, and files are put together.
    """
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line.removeprefix(codecs.BOM_UTF8)
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(limit)
        yield None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # JSON's own parser keeps the last of two in silence
    row: dict[str, object] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"the key {key!r} stands twice")
        row[key] = value
    return row


def check_text(text: object, where: str) -> str:
    """Return `text` if it is a non-empty string that can be tokenised.

    Raises:
        DataError: it is not; the message starts with `where`.
    """
    if not isinstance(text, str):
        raise DataError(f"{where}: text is {type(text).__name__}, expected a string; {REMEDY}")
    if not text.strip():
        raise DataError(f"{where}: text is empty; {REMEDY}")
    if "\0" in text:
        raise DataError(f"{where}: text holds a NUL character; {REMEDY}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: text holds a lone surrogate at character {error.start}; {REMEDY}"
        ) from error
    return text


def check_chat(messages: object, where: str) -> Chat:
    """Return `messages` if they are a chat that can be rendered.

    Raises:
        DataError: they are not; the message starts with `where`.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is no list that holds some; {REMEDY}")
    chat = []
    # from 1, as people count who look for it in the file
    for number, message in enumerate(messages, start=1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{here}: expected an object with role and content; {REMEDY}")
        # what calls a tool has no words of its own, and would be rendered as an empty answer
        if message.get("tool_calls"):
            raise DataError(f"{here}: it calls tools, which no answer here does; {REMEDY}")
        content = check_text(message.get("content"), f"{here}: content")
        chat.append({"role": message["role"], "content": content})
    return tuple(chat)


def parse_row(line: bytes, where: str) -> Document:
    """Turn one line into a document; DataError starting with `where` if it isn't one."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(
                f"{where}: the file is UTF-16, expected UTF-8; save it as UTF-8"
            ) from error
        raise DataError(
            f"{where}: invalid UTF-8 at byte {error.start} of the line; {REMEDY}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply; {REMEDY}") from error
    except ValueError as error:
        raise DataError(
            f"{where}: broken JSON ({error}); expected one object a line; {REMEDY}"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a JSON {type(row).__name__}, expected an object with the key text; {REMEDY}"
        )
    meta = {} if row.get("meta") is None else row["meta"]
    if "text" in row:
        return Document(check_text(row["text"], where), meta, where)
    if "messages" not in row:
        raise DataError(f"{where}: no key text; found: {', '.join(row) or 'no keys'}; {REMEDY}")
    chat = check_chat(row["messages"], where)
    text = "\n\n".join(message["content"] for message in chat)
    return Document(text, meta, where, chat)


def read_rows(
    path: Path,
    on_bad_row: str = "error",
    bad_rows: BadRows | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Document]:
    """Yield the documents of a .jsonl, .jsonl.gz or .jsonl.zst file in order.

    Args:
        path: the file.
        on_bad_row: error: the first damaged row raises | skip: it is counted in `bad_rows`.
        bad_rows: where skipped rows are counted.
        max_line_bytes: longest line, uncompressed; a longer one is a damaged row.

    Raises:
        DataError: `file:line: what is wrong`; a file that can't be decompressed raises in either
            case.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            for line in _lines(stream, max_line_bytes):
                number += 1
                where = f"{path}:{number}"
                try:
                    if line is None:
                        raise DataError(
                            f"{where}: a line of more than {max_line_bytes:,} bytes; "
                            f"split the document; {REMEDY}"
                        )
                    if line.strip():
                        yield parse_row(line, where)
                except DataError as error:
                    if on_bad_row != "skip":
                        raise
                    if bad_rows is not None:
                        bad_rows.add(str(error))
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}:{number + 1}: can't be read ({error}); copy the file again"
        ) from error


class Cap:
    """Cuts text off where it makes `max_bytes` of UTF-8; 0: nowhere."""

    def __init__(self, max_bytes: int) -> None:
        self.capped = bool(max_bytes)
        self.left = max_bytes

    @property
    def full(self) -> bool:
        """Whether no more text is wanted."""
        return self.capped and self.left <= 0

    def cut(self, document: Document) -> Document | None:
        """Return the document, its beginning if it is too much, None if nothing is left of it."""
        if not self.capped:
            return document
        text = document.text
        content = text.encode("utf-8")
        if len(content) > self.left:
            # half a chat may be all question
            left = 0 if document.chat else self.left
            # a character that was cut through goes
            text = content[:left].decode("utf-8", errors="ignore")
        self.left -= len(content)
        return replace(document, text=text) if text.strip() else None


def capped(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """Yield documents until they make `max_bytes` of UTF-8, the last one cut to fit; 0: all."""
    cap = Cap(max_bytes)
    for document in documents:
        kept = cap.cut(document)
        if kept is not None:
            yield kept
        if cap.full:
            return
