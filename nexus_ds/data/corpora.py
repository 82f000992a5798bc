"""Token files: each domain's documents, tokenised once into the flat files that training reads.

A token file is a binary file of token ids of one domain and split, each document closed by the end-of-text token; a
manifest beside it says from what it was made, and a fingerprint of text, tokenizer and settings is part of its name.
Blocks of any length are slices of that file, so packing costs nothing.

Not covered: shuffling documents (blocks are permuted when they are drawn, see mixture.py), masking attention between
documents of a block, removing token files that are no longer used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nexus_ds.data.offline import stay_offline
from nexus_ds.data.rows import BadRows, Document
from nexus_ds.data.sources import SPLITS, Source, open_source, require_domains
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.outputs import new_file, write_json
from nexus_ds.progress import Progress

__all__ = ["Document", "Source", "TokenFile", "open_source", "require_domains", "token_files", "windows"]

FORMAT = 1  # of the token files; another number makes old caches be made again
BATCH_BYTES = 4 << 20  # text that is tokenised at once


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

    @cached_property
    def array(self) -> np.ndarray:
        """[tokens] memory map, read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "array"}  # a memmap pickles as its content

    def blocks(self, length: int) -> int:
        """Return how many blocks of `length` inputs (and one more label) there are."""
        return max(self.tokens - 1, 0) // length

    def block(self, index: int, length: int) -> np.ndarray:
        """Return block `index` as [length + 1] int64: inputs are all but the last, labels all but the first."""
        start = index * length
        return np.asarray(self.array[start : start + length + 1], dtype=np.int64)


class _Tokenizer(NamedTuple):
    """A fast tokenizer set up for whole documents, and what identifies it."""

    backend: Any
    end: int
    vocabulary: int
    fingerprint: str


def _load_tokenizer(directory: Path) -> _Tokenizer:
    """Load a tokenizer from a model directory; CheckpointError if it has none that serves."""
    if not Path(directory).is_dir():
        raise CheckpointError(f"no tokenizer at {directory}; expected a directory with tokenizer.json")
    stay_offline()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises whatever the first of its loaders met
        raise CheckpointError(
            f"{directory}: no tokenizer that can be loaded ({error}); expected tokenizer.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{directory}: the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json"
        )
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not the end of it
    facts = f"{backend.to_str()} {tokenizer.eos_token_id}"
    return _Tokenizer(backend, tokenizer.eos_token_id, len(tokenizer), hashlib.sha256(facts.encode()).hexdigest())


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """Let the tokenizer use `workers` threads (0: one a CPU core); its pool is made once a process."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers != 1 else "false"
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    try:
        yield
    finally:  # left at "true", a forked child that tokenises could hang
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Hold the cache's lock: one process makes token files, the others wait. It goes when its holder dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Group texts into lists of about BATCH_BYTES characters."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _existing(path: Path) -> TokenFile | None:
    """Return the token file at `path` if its manifest is there and agrees with it."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (OSError, ValueError):
        return None
    if size != facts["tokens"] * np.dtype(facts["dtype"]).itemsize:
        return None
    return TokenFile(
        path, facts["dtype"], facts["tokens"], facts["documents"], facts["skipped"]["count"], facts["fingerprint"]
    )


@dataclass(frozen=True)
class _Job:
    """One token file to be made."""

    source: Source
    domain: str
    split: str
    max_bytes: int
    on_bad_row: str
    path: Path
    fingerprint: str

    def make(self, tokenizer: _Tokenizer) -> None:
        """Tokenise the documents into the file, then write its manifest, which makes it valid."""
        bad_rows = BadRows()
        documents = self.source.documents(self.domain, self.split, self.on_bad_row, self.max_bytes, bad_rows)
        dtype = np.dtype("uint16" if tokenizer.vocabulary < 1 << 16 else "uint32")
        with new_file(self.path, overwrite=True) as temporary:
            tokens, count = self._write(documents, tokenizer, dtype, temporary)
        facts = {
            "domain": self.domain,
            "split": self.split,
            "dtype": dtype.name,
            "tokens": tokens,
            "documents": count,
            "skipped": {"count": bad_rows.count, "first": bad_rows.messages},
            "max_bytes": self.max_bytes,
            "fingerprint": self.fingerprint,
        }
        write_json(self.path.with_suffix(".json"), facts)
        if bad_rows.count:
            print(
                f"{self.domain}/{self.split}: {bad_rows.count} damaged rows skipped, first: {bad_rows.messages[0]}",
                file=sys.stderr,
            )

    def _write(
        self, documents: Iterator[Document], tokenizer: _Tokenizer, dtype: np.dtype[Any], path: Path
    ) -> tuple[int, int]:
        tokens = count = done = 0
        expected = self.source.size(self.domain, self.split)
        total = max(min(expected, self.max_bytes or expected) >> 10, 1)
        with path.open("wb") as stream, Progress(f"tokenise {self.domain}/{self.split}", total, "kB") as progress:
            for texts in _batches(documents):
                for encoding in tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False):
                    ids = np.asarray([*encoding.ids, tokenizer.end], dtype=dtype)
                    stream.write(ids.tobytes())
                    tokens += len(ids)
                count += len(texts)
                step = min(sum(map(len, texts)) >> 10, total - done)  # the total is an estimate
                done += step
                progress.advance(step)
            progress.advance(total - done)
        return tokens, count


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
) -> dict[str, TokenFile]:
    """Return the token file of each domain, tokenising what is not in the cache yet.

    Any number of processes may ask for the same files at the same time: one makes them, the others wait and read.

    Args:
        source: the text.
        domains: whose text; the order of the result.
        split: train | validation.
        tokenizer_dir: a directory that `AutoTokenizer` loads offline.
        cache: directory of token files; a file is found again by text, tokenizer and settings.
        workers: threads that tokenise; 0: one a CPU core.
        max_bytes: training text of a domain that is used, in bytes of UTF-8, from its start; 0: all. Validation text
            is always used whole.
        on_bad_row: error | skip (counted in the manifest and on stderr).

    Raises:
        ConfigError: an unknown split or `on_bad_row`.
        DataError: an unknown domain, a domain without text, damaged rows.
        CheckpointError: no tokenizer that serves.
    """
    if split not in SPLITS or on_bad_row not in ("error", "skip"):
        raise ConfigError(f"split {split!r}, on_bad_row {on_bad_row!r}: expected {' | '.join(SPLITS)} and error | skip")
    require_domains(source, domains)
    tokenizer = _load_tokenizer(tokenizer_dir)
    cap = max_bytes if split == "train" else 0
    jobs: list[_Job] = []
    for domain in domains:
        text = source.fingerprint(domain, split)
        facts = f"{FORMAT} {domain} {split} {text} {tokenizer.fingerprint} {cap} {on_bad_row}"
        fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        path = Path(cache) / f"{domain}-{split}-{fingerprint[:16]}.bin"
        jobs.append(_Job(source, domain, split, cap, on_bad_row, path, fingerprint))
    if any(_existing(job.path) is None for job in jobs):
        with _locked(Path(cache)), _threads(workers):
            for job in jobs:
                if _existing(job.path) is None:  # another process may have made it while this one waited
                    job.make(tokenizer)
    files = {job.domain: _existing(job.path) for job in jobs}
    gone = [domain for domain, file in files.items() if file is None]
    if gone:
        raise DataError(f"{cache}: token files of {', '.join(gone)} vanished while they were made; run again")
    return {domain: file for domain, file in files.items() if file is not None}


def windows(token_file: TokenFile, count: int, length: int, seed: int | None = None) -> np.ndarray:
    """Return `count` distinct windows of text as [count, length + 1] int64.

    Args:
        token_file: the text.
        count: windows.
        length: inputs of a window, in tokens; one more token is there as the last label.
        seed: None: windows lie evenly over the text | a seed: a sample of all blocks, in the order of the text.

    Raises:
        DataError: too little text.
    """
    blocks = token_file.blocks(length)
    if blocks < count:
        raise DataError(
            f"{token_file.path.name}: {token_file.tokens:,} tokens make {blocks} windows of {length}, expected {count}; "
            "give more text, fewer windows, or a shorter length"
        )
    if seed is None:
        chosen = np.arange(count) * blocks // count
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(blocks, size=count, replace=False))
    return np.stack([token_file.block(int(index), length) for index in chosen])
