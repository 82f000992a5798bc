"""Token files: each domain's documents, tokenised once into the flat files that training reads.

A token file is a binary file of token ids of one domain and split, each document opened by what the
tokenizer puts before a text (BOS, or nothing) and closed by the end-of-text token; a manifest
beside it says from what it was made, and a fingerprint of text, tokenizer and settings is part of
its name. Blocks of any length are slices of that file, so packing costs nothing. The manifest has a
hash of the ids, by which whoever asks for the file finds out whether they still are what was made.
Where chats are read, a second file has a byte for each id: 1 where it is a label that the model
learns. A block that says so has ~id, which is negative, in the place of the others.

Not covered: shuffling documents (blocks are permuted when they are drawn, see mixture.py), masking
attention between documents of a block, removing token files that are no longer used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict, cast

import numpy as np

from nexus_ds.data.encoding import Batches, Packed, Tokenizer, cores, load_tokenizer, packer
from nexus_ds.data.rows import BadRows, Document
from nexus_ds.data.sources import SPLITS, Source, open_source, passes, read, require_domains
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.outputs import TEMPORARY_END, create, new_file, write_text
from nexus_ds.progress import Progress, say
from nexus_ds.sealed import read_sealed, seal
from nexus_ds.typed_json import typed

__all__ = [
    "Document",
    "Source",
    "TokenFile",
    "open_source",
    "require_domains",
    "token_files",
    "windows",
]

FORMAT = 1  # of the token files; another number makes old caches be made again
BATCH_CHARACTERS = 1 << 20  # of text that one process tokenises at once
HASHED_AT_ONCE = 16 << 20  # bytes of a token file
TOLD_BYTES = 4 << 30  # of token files; seconds of hashing, less needs no line
WIDTHS = {"uint16": 2, "uint32": 4}
"""Bytes of an id, by its type."""
LITTLE_TEXT = 8 << 20  # bytes; less is tokenised faster than processes start
# What a killed process leaves of a token file; a cache may be a folder of the user's own files.
LEFTOVER = re.compile(
    rf"\..+-({'|'.join(SPLITS)})-[0-9a-f]{{16}}\.(bin|labels|json){TEMPORARY_END}"
)


@dataclass
class TokenFile:
    """Token ids of one domain and split on disk."""

    path: Path
    """Flat binary file of ids; the manifest lies beside it with the suffix .json."""
    dtype: str
    """uint16 or uint32."""
    tokens: int
    """Ids in the file, ends of documents included."""
    documents: int
    """Documents in the file."""
    skipped: int
    """Damaged rows that were left out."""
    fingerprint: str
    """sha256 over text, tokenizer and settings."""
    answers: int | None = None
    """Ids that are labels; None where all are."""
    made_from: dict[str, str] = field(default_factory=dict)
    """The sha256 of the `text` and of the `tokenizer` alone; empty where they are not known."""

    @cached_property
    def _stream(self) -> BinaryIO:
        return self.path.open("rb", buffering=0)

    @cached_property
    def _labels(self) -> BinaryIO:
        return _labels_of(self.path).open("rb", buffering=0)

    def __getstate__(self) -> dict[str, object]:
        # an open file can't be sent to another process; it opens its own
        streams = ("_stream", "_labels")
        return {key: value for key, value in self.__dict__.items() if key not in streams}

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids `start` to `start + count` as [count] int64; DataError if there are fewer.

        A read, not a memory map: pages of a map count as this process's memory, and a file that was
        cut short kills it.
        """
        return _numbers(self._stream, self.path, self.dtype, start, count).astype(np.int64)

    def blocks(self, length: int) -> int:
        """Return how many blocks of `length` inputs (and one more label) there are."""
        return max(self.tokens - 1, 0) // length

    def block(self, index: int, length: int) -> np.ndarray:
        """Return block `index` as [length + 1] int64.

        Inputs are all but the last, labels all but the first; so blocks share one id with the next.
        """
        return self.read(index * length, length + 1)

    def _learned(self, index: int, length: int) -> np.ndarray:
        """Return which ids of a block are labels as [length + 1] bool; not of plain text."""
        path = _labels_of(self.path)
        found = _numbers(self._labels, path, "uint8", index * length, length + 1)
        return found.astype(bool)

    def marked(self, index: int, length: int) -> np.ndarray:
        """Return a block as `block` does, with ~id in the place of ids that are no labels."""
        ids = self.block(index, length)
        if self.answers is None:
            return ids
        return np.where(self._learned(index, length), ids, ~ids)

    def labels(self, index: int, length: int) -> int:
        """Return how many labels of a block the model learns."""
        if self.answers is None:
            return length
        # the first id is no label of this block, but of the one before
        return int(self._learned(index, length)[1:].sum())


def _labels_of(path: Path) -> Path:
    """Return where the labels of a token file lie."""
    return path.with_suffix(".labels")


def _numbers(stream: BinaryIO, path: Path, dtype: str, start: int, count: int) -> np.ndarray:
    """Return `count` numbers of a file; DataError if there are fewer."""
    width = np.dtype(dtype).itemsize
    content = os.pread(stream.fileno(), count * width, start * width)
    if len(content) != count * width:
        raise DataError(
            f"{path}: found {len(content)} bytes at {start * width}, "
            f"expected {count * width}; the file was cut short: remove it, and it is made again"
        )
    return np.frombuffer(content, dtype=dtype)


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left half written; the cache's lock is ours."""
    for path in cache.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink()


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Hold the cache's lock: one process makes token files, the others wait.

    It is the system's (flock) and goes when its holder dies.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _batches(
    documents: Iterator[tuple[str, Document]], chats: bool
) -> Iterator[tuple[str, list[Document]]]:
    """Group (domain, document) into (domain, documents) of about BATCH_CHARACTERS.

    Each domain's documents keep their order.

    Raises:
        DataError: a chat where none is read.
    """
    batches: dict[str, list[Document]] = {}
    sizes: Counter[str] = Counter()
    for domain, document in documents:
        # no damaged row: what is wrong is how the text is read
        if document.chat and not chats:
            raise DataError(
                f"{document.where}: a chat (messages), expected text; data.chat=true reads chats "
                "by the tokenizer's template (--chat of evaluate and remove)"
            )
        batches.setdefault(domain, []).append(document)
        sizes[domain] += len(document.text)
        if sizes[domain] >= BATCH_CHARACTERS:
            yield domain, batches.pop(domain)
            del sizes[domain]
    yield from batches.items()


def _counted(
    batches: Iterator[tuple[str, list[Document]]], progress: Progress, chats: bool
) -> Batches:
    """Yield what processes that tokenise are to read, and advance the bar."""
    for domain, documents in batches:
        texts = [document.text for document in documents]
        yield domain, documents if chats else texts
        done = sum(map(len, texts)) >> 10
        if progress.total:
            # the total is an estimate, which more text must not exceed
            done = min(done, progress.total - progress.done)
        progress.advance(done)


class _Skipped(TypedDict):
    """Damaged rows that were left out."""

    count: int
    first: list[str]


class _Labels(TypedDict):
    """Which ids are labels."""

    count: int
    sha256: str


class _Manifest(TypedDict):
    """What lies beside a token file."""

    domain: str
    split: str
    dtype: str
    tokens: int
    documents: int
    skipped: _Skipped
    max_bytes: int
    fingerprint: str
    sha256: str
    """Of the ids, as they were handed to the system."""
    labels: NotRequired[_Labels]
    """Where chats are read."""


def _manifest(path: Path) -> _Manifest | None:
    """Return the manifest of the token file at `path` if it is one and agrees with the file's size.

    None yet, one of a process that was killed, one that a disk has damaged: it is made again.
    """
    try:
        # whoever computes the hash anew may have written other types
        manifest = typed(read_sealed(path.with_suffix(".json")), _Manifest)
        width = WIDTHS[manifest["dtype"]]
        whole = path.stat().st_size == manifest["tokens"] * width
        if "labels" in manifest:
            whole = whole and _labels_of(path).stat().st_size == manifest["tokens"]
        return manifest if whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _existing(path: Path) -> TokenFile | None:
    """Return the token file at `path` if its manifest is there and agrees with it."""
    manifest = _manifest(path)
    if manifest is None:
        return None
    return TokenFile(
        path,
        dtype=manifest["dtype"],
        tokens=manifest["tokens"],
        documents=manifest["documents"],
        skipped=manifest["skipped"]["count"],
        fingerprint=manifest["fingerprint"],
        answers=manifest["labels"]["count"] if "labels" in manifest else None,
    )


def _sha256(path: Path, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASHED_AT_ONCE):
            digest.update(chunk)
            if progress:
                progress.advance(len(chunk) >> 20)
    return digest.hexdigest()


def _damage(path: Path, progress: Progress | None = None) -> str:
    """Return what is wrong with the ids of a token file; '' for nothing, or where there is none."""
    manifest = _manifest(path)
    if manifest is None:
        return ""
    # a flipped label teaches a prompt, or hides an answer, as silently as a flipped id
    expected = {path: manifest["sha256"]}
    if "labels" in manifest:
        expected[_labels_of(path)] = manifest["labels"]["sha256"]
    for file, sha256 in expected.items():
        found = _sha256(file, progress)
        if found != sha256:
            return f"{file}: found sha256 {found[:12]}, expected {sha256[:12]}"
    return ""


def _drop_damaged(paths: Sequence[Path], cache: Path) -> None:
    """Make token files whose ids are not what was written count as missing, and say so.

    A flipped id would train like any other. Files are read side by side, each by a thread.
    """
    # All bytes at every start: a flip leaves a file's size, time and inode as they were, so none of
    # these may stand for its hash. By rank 0 for all: others would mostly wait for the same disk.
    files = [file for path in paths for file in (path, _labels_of(path))]
    size = sum(file.stat().st_size for file in files if file.is_file())
    with ExitStack() as stack:
        progress = None
        if size >= TOLD_BYTES:
            label = "check token files"
            progress = stack.enter_context(Progress(label, size >> 20, "MB"))
        threads = stack.enter_context(ThreadPoolExecutor(cores()))
        problems = threads.map(lambda path: _damage(path, progress), paths)
        found = zip(paths, problems, strict=True)
        damaged = [path for path, problem in found if problem]
    if not damaged:
        return
    with _locked(cache):
        for path in damaged:
            # Another process may have made it again.
            if problem := _damage(path):
                say(f"{problem}; the file is damaged and is made again")
                path.with_suffix(".json").unlink()


@dataclass
class _Job:
    """One token file to be made."""

    domain: str
    path: Path
    fingerprint: str
    text: str
    """Fingerprint of the text alone."""
    tokenizer: str
    """That of the tokenizer."""
    expected: int = 0
    """Bytes of text, about; 0: unknown."""
    tokens: int = 0
    documents: int = 0
    bad_rows: BadRows = field(default_factory=BadRows)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """Of the ids."""
    answers: int | None = None
    """Ids that are labels; None where no chats are read."""
    label_digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def files(self, chats: bool) -> list[Path]:
        """Return what is to be written; of chats the labels too, which are counted from then on."""
        if not chats:
            return [self.path]
        self.answers = 0
        return [self.path, _labels_of(self.path)]

    def add(self, part: Packed, on_bad_row: str) -> None:
        """Count what was tokenised.

        Raises:
            DataError: a chat that can't be read, where that is an error.
        """
        if part.bad and on_bad_row != "skip":
            raise DataError(part.bad[0])
        for message in part.bad:
            self.bad_rows.add(message)
        self.digest.update(part.ids)
        self.tokens += part.tokens
        self.documents += part.documents
        if self.answers is not None:
            self.answers += part.answers
            self.label_digest.update(part.learned)

    def finish(self, dtype: str, split: str, max_bytes: int) -> None:
        """Write the manifest, which makes the token file valid, and tell of damaged rows."""
        bad = self.bad_rows
        manifest: _Manifest = {
            "domain": self.domain,
            "split": split,
            "dtype": dtype,
            "tokens": self.tokens,
            "documents": self.documents,
            "skipped": {"count": bad.count, "first": bad.messages},
            "max_bytes": max_bytes,
            "fingerprint": self.fingerprint,
            "sha256": self.digest.hexdigest(),
        }
        if self.answers is not None:
            labels: _Labels = {"count": self.answers, "sha256": self.label_digest.hexdigest()}
            manifest["labels"] = labels
        with new_file(self.path.with_suffix(".json"), overwrite=True) as temporary:
            write_text(temporary, seal(cast(dict[str, object], manifest)))
        if bad.count:
            what = f"{self.domain}/{split}: {bad.count} damaged rows skipped"
            say(f"{what}, first: {bad.messages[0]}")


@dataclass(frozen=True)
class _Maker:
    """Makes token files of one source and split."""

    source: Source
    split: str
    tokenizer: Tokenizer
    max_bytes: int
    on_bad_row: str

    def job(self, domain: str, cache: Path) -> _Job:
        """Return a domain's token file as it is or will be, named by all that it is made from."""
        text = self.source.fingerprint(domain, self.split)
        facts = (
            f"{FORMAT} {domain} {self.split} {text} {self.tokenizer.fingerprint} "
            f"{self.max_bytes} {self.on_bad_row}"
        )
        fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        path = cache / f"{domain}-{self.split}-{fingerprint[:16]}.bin"
        return _Job(domain, path, fingerprint, text, self.tokenizer.fingerprint)

    def make_all(self, jobs: Sequence[_Job], workers: int) -> None:
        """Tokenise some domains with `workers` processes; 0: as many as are worth their start."""
        for job in jobs:
            size = self.source.size(job.domain, self.split)
            # of two numbers the smaller one that is known; 0 is none
            job.expected = min(size or self.max_bytes, self.max_bytes or size)
        if not workers:
            total = _expected(jobs)
            workers = 1 if 0 < total < LITTLE_TEXT else cores()
        named = {job.domain: job for job in jobs}
        with packer(self.tokenizer, workers) as pack:
            for group in passes(self.source, list(named)):
                self._make([named[domain] for domain in group], pack)

    def _check_text(self, jobs: Sequence[_Job]) -> None:
        """Raise DataError where the text is not the one after which its token file is named."""
        for job in jobs:
            found = self.source.fingerprint(job.domain, self.split)
            if found != job.text:
                raise DataError(
                    f"{self.source.name}: the {self.split} text of {job.domain} was changed while "
                    f"it waited or was read: found fingerprint {found[:12]}, expected "
                    f"{job.text[:12]}; start again when nobody writes it any more"
                )

    def _make(
        self, jobs: Sequence[_Job], pack: Callable[[Batches], Iterator[tuple[str, Packed]]]
    ) -> None:
        """Tokenise the text of some domains in one pass over it.

        Raises:
            DataError: damaged rows, no chat that can be read, text that changes meanwhile.
        """
        # Before the hours that it may take, too: another process may have held the lock for long.
        self._check_text(jobs)
        named = {job.domain: job for job in jobs}
        bad_rows = {job.domain: job.bad_rows for job in jobs}
        documents = read(
            self.source, list(named), self.split, self.on_bad_row, self.max_bytes, bad_rows
        )
        total = _expected(jobs) >> 10
        label = f"tokenise {', '.join(named)}/{self.split}"
        chats = self.tokenizer.chat is not None
        with ExitStack() as stack:
            streams = {file: _stream(stack, file) for job in jobs for file in job.files(chats)}
            progress = stack.enter_context(Progress(label, total, "kB"))
            for domain, part in pack(_counted(_batches(documents, chats), progress, chats)):
                job = named[domain]
                job.add(part, self.on_bad_row)
                streams[job.path].write(part.ids)
                if chats:
                    streams[_labels_of(job.path)].write(part.learned)
            progress.advance(max(total - progress.done, 0))
            _check_documents(jobs)
            self._check_text(jobs)
        for job in jobs:
            job.finish(self.tokenizer.dtype, self.split, self.max_bytes)


def _stream(stack: ExitStack, file: Path) -> BinaryIO:
    """Return a new file that gets its name when `stack` ends well."""
    path = stack.enter_context(new_file(file, overwrite=True))
    return stack.enter_context(create(path))


def _check_documents(jobs: Sequence[_Job]) -> None:
    """Raise DataError where every chat of a domain was left out."""
    for job in jobs:
        if not job.documents:
            raise DataError(f"{job.domain}: no chat can be read; first: {job.bad_rows.messages[0]}")


def _expected(jobs: Sequence[_Job]) -> int:
    """Return about how many bytes of text there are; 0 where that of one is unknown."""
    sizes = [job.expected for job in jobs]
    return sum(sizes) if all(sizes) else 0


def token_files(
    source: Source,
    domains: Sequence[str],
    split: str,
    tokenizer_dir: Path,
    cache: Path,
    *,
    workers: int = 0,
    max_bytes: int = 0,
    on_bad_row: str = "error",
    bos: bool = True,
    chat: bool = False,
    verify: bool = True,
) -> dict[str, TokenFile]:
    """Return the token file of each domain, tokenising what is not in the cache yet, or damaged.

    Any number of processes may ask for the same files at the same time: one makes them, the others
    wait and read.

    Args:
        source: the text.
        domains: whose text; the order of the result.
        split: train | validation.
        tokenizer_dir: a directory that `AutoTokenizer` loads offline.
        cache: directory of token files; a file is found again by text, tokenizer and settings.
        workers: processes that tokenise; 0: one a CPU core, or this process alone if there is
            little text. The result is the same.
        max_bytes: training text of a domain that is used, in bytes of UTF-8, from its start; 0:
            all. Validation text is always used whole.
        on_bad_row: error | skip (counted in the manifest and on stderr).
        bos: whether documents begin as the tokenizer begins a text.
        chat: whether chats are read, beside plain text; of them answers alone are labels.
        verify: whether the ids of files that are there are read and hashed; False where another
            process of this run has just done it.

    Raises:
        ConfigError: an unknown split or `on_bad_row`.
        DataError: an unknown domain, a domain without text, damaged rows, text that changes while
            it is read.
        CheckpointError: no tokenizer that serves, or of chats one without a template.
    """
    if split not in SPLITS or on_bad_row not in ("error", "skip"):
        raise ConfigError(
            f"split {split!r}, on_bad_row {on_bad_row!r}: "
            f"expected {' | '.join(SPLITS)} and error | skip"
        )
    tokenizer = load_tokenizer(tokenizer_dir, bos, chat)
    cap = max_bytes if split == "train" else 0
    maker = _Maker(source, split, tokenizer, cap, on_bad_row)
    jobs = [maker.job(domain, Path(cache)) for domain in domains]
    if verify:
        _drop_damaged([job.path for job in jobs], Path(cache))
    if any(_existing(job.path) is None for job in jobs):
        require_domains(source, domains)
        with _locked(Path(cache)):
            _remove_leftovers(Path(cache))
            # others may have made some
            missing = [job for job in jobs if _existing(job.path) is None]
            maker.make_all(missing, workers)
    return _made(jobs, cache)


def _made(jobs: Sequence[_Job], cache: Path) -> dict[str, TokenFile]:
    """Return the token files of jobs that are done; DataError for those that are gone."""
    files: dict[str, TokenFile] = {}
    for job in jobs:
        file = _existing(job.path)
        if file is not None:
            made_from = {"text": job.text, "tokenizer": job.tokenizer}
            files[job.domain] = replace(file, made_from=made_from)
    # somebody emptied the cache meanwhile
    gone = [job.domain for job in jobs if job.domain not in files]
    if gone:
        raise DataError(
            f"{cache}: token files of {', '.join(gone)} vanished while they were made; run again"
        )
    return files


def windows(
    token_file: TokenFile,
    count: int,
    length: int,
    seed: int | None = None,
    marked: bool = False,
) -> np.ndarray:
    """Return `count` distinct windows of text as [count, length + 1] int64.

    Args:
        token_file: the text.
        count: windows.
        length: inputs of a window, in tokens; one more token is there as the last label.
        seed: None: windows lie evenly over the text | a seed: a sample of all blocks, in the order
            of the text.
        marked: ~id in the place of ids that are no labels.

    Raises:
        DataError: too little text.
    """
    blocks = token_file.blocks(length)
    if blocks < count:
        raise DataError(
            f"{token_file.path.name}: {token_file.tokens:,} tokens make {blocks} windows of "
            f"{length}, expected {count}; give more text, fewer windows, or a shorter length"
        )
    read = token_file.marked if marked else token_file.block
    return np.stack([read(int(index), length) for index in _chosen(blocks, count, seed)])


def _chosen(blocks: int, count: int, seed: int | None) -> np.ndarray:
    """Return the numbers of `count` blocks: evenly spaced, or a sample."""
    if seed is None:
        return np.arange(count) * blocks // count
    drawn = np.random.default_rng(seed).choice(blocks, size=count, replace=False)
    # a disk reads forward faster
    return np.sort(drawn)
