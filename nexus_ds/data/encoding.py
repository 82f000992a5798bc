"""Text to token ids on all cores: one process reads, others tokenise, and the ids come back in the order of the text.

The tokenizer's own thread pool leaves the other cores idle while one reads, parses and packs, so each worker process does
a whole batch instead: tokenise it and pack its ids. The bytes are the same for any number of workers.

Not covered: reading on several cores. One reader (gunzip, JSON, checks) feeds about twenty cores of tokenising.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nexus_ds.data.offline import stay_offline
from nexus_ds.errors import CheckpointError, DataError

AHEAD = 3  # batches a worker that are under way at once, so that none waits for the reader


@dataclass(frozen=True)
class Tokenizer:
    """What makes token ids of text."""

    definition: str
    """As JSON of the `tokenizers` library."""
    end: int
    """Id that closes each document."""
    dtype: str
    """uint16 or uint32: of ids on disk."""
    fingerprint: str
    """sha256 over definition and end."""

    def backend(self) -> Any:
        """Return the `tokenizers` object, set up for whole documents."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.definition)
        backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not the end of it
        return backend


class Packed(NamedTuple):
    """Token ids of some documents, each closed by the end-of-text token."""

    ids: bytes
    tokens: int
    documents: int


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load a tokenizer from a model directory; CheckpointError if it has none that serves."""
    if not Path(directory).is_dir():
        raise CheckpointError(f"no tokenizer at {directory}; expected a directory with tokenizer.json")
    stay_offline()
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of a model that it does not know, where only a tokenizer is asked for
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
    definition, end = backend.to_str(), tokenizer.eos_token_id
    fingerprint = hashlib.sha256(f"{definition} {end}".encode()).hexdigest()
    return Tokenizer(definition, end, "uint16" if len(tokenizer) < 1 << 16 else "uint32", fingerprint)


def _pack(backend: Any, tokenizer: Tokenizer, texts: list[str]) -> Packed:
    ids: list[int] = []
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        ids += encoding.ids
        ids.append(tokenizer.end)
    return Packed(np.asarray(ids, dtype=tokenizer.dtype).tobytes(), len(ids), len(texts))


_worker: tuple[Any, Tokenizer]  # of a worker process


def _start_worker(tokenizer: Tokenizer) -> None:
    """Set up a worker process, which ends with the one that started it, however that ends."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the starting process too, which decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _worker = (tokenizer.backend(), tokenizer)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(texts: list[str]) -> Packed:
    return _pack(*_worker, texts)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def _without_threads() -> Iterator[None]:
    """Keep the tokenizer's thread pool off: a process that has one can hang when it is forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


Batches = Iterator[tuple[str, list[str]]]


@contextmanager
def packer(tokenizer: Tokenizer, workers: int) -> Iterator[Callable[[Batches], Iterator[tuple[str, Packed]]]]:
    """Yield a function that turns (key, texts) into (key, packed ids), in order.

    Args:
        tokenizer: what makes ids of texts.
        workers: processes, each of which takes a batch at a time; 1: this one does the work. They are started anew (not
            forked), so a script that calls this needs the usual `if __name__ == "__main__":`.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        backend = tokenizer.backend()
        with _without_threads():
            yield lambda batches: ((key, _pack(backend, tokenizer, texts)) for key, texts in batches)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads could hang
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer,))
    try:
        yield lambda batches: _in_order(batches, pool, AHEAD * workers)
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes that tokenise was killed, perhaps for want of memory; start again with a "
            "lower data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(batches: Batches, pool: ProcessPoolExecutor, ahead: int) -> Iterator[tuple[str, Packed]]:
    waiting: deque[tuple[str, Future[Packed]]] = deque()
    for key, texts in batches:
        waiting.append((key, pool.submit(_work, texts)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for key, future in waiting:
        yield key, future.result()
