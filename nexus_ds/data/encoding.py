"""Text to token ids on all cores, in the order of the text.

One process reads, others tokenise. The tokenizer's own thread pool leaves the other cores idle
while one reads, parses and packs, so each worker process does a whole batch instead: tokenise it
and pack its ids. The bytes are the same for any number of workers.

Not covered: reading on several cores. One reader (gunzip, JSON, checks) feeds about twenty cores of
tokenising.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nexus_ds.data.chat import ChatFormat, Labelled, chat_format, labelled
from nexus_ds.data.rows import Document
from nexus_ds.data.tokenizer import open_tokenizer, vocabulary_size
from nexus_ds.errors import CheckpointError, DataError
from nexus_ds.outputs import ENDING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Texts = list[str] | list[Document]
"""Documents where chats are read, else what stands in them."""
PANIC = "PanicException"
"""Name of what the library raises where its Rust stumbles; pyo3's, which can't be imported."""
AHEAD = 3  # batches a worker that are under way at once, so that none waits for the reader


@dataclass(frozen=True)
class Tokenizer:
    """What makes token ids of text."""

    definition: str
    """As JSON of the `tokenizers` library."""
    begin: tuple[int, ...]
    """Ids that open each document: what the tokenizer itself puts before a text, BOS or nothing."""
    end: int
    """Id that closes each document."""
    dtype: str
    """uint16 or uint32: of ids on disk."""
    chat: ChatFormat | None = None
    """How chats are rendered; None: they are refused."""

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over definition, begin and end, and over how chats are rendered."""
        facts = [self.definition, str(self.end)]
        if self.begin:
            facts += ["begins with", *map(str, self.begin)]
        if self.chat:
            facts += ["chats", self.chat.fingerprint]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()

    def backend(self) -> Backend:
        """Return the `tokenizers` object, set up for whole documents."""
        # a compiled library; who finds all token files made needs none of it
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.definition)
        # "<|endoftext|>" inside a document is text, not the end of it
        backend.encode_special_tokens = True
        return backend


class Packed(NamedTuple):
    """Token ids of some documents, each closed by the end-of-text token."""

    ids: bytes
    tokens: int
    documents: int
    learned: bytes = b""
    """Where chats are read: a byte an id, 1 where it is a label."""
    answers: int = 0
    """How many are 1."""
    bad: tuple[str, ...] = ()
    """Of documents that were left out: what is wrong with each."""


def beginning(backend: Backend, directory: Path) -> tuple[int, ...]:
    """Return the ids that a `tokenizers` object puts before a text.

    BOS for a Llama's or a Gemma's, none for a Qwen's. `directory`: where it is from, for messages.

    Raises:
        CheckpointError: an id of which there is no token, or a post_processor that breaks the
            library.
    """
    found = _before_text(backend, directory)
    strange = [index for index in found if backend.id_to_token(index) is None]
    if strange:
        raise CheckpointError(
            f"{directory}: the tokenizer puts the id {strange[0]} before a text, but has no such "
            "token; "
            "mend post_processor in its tokenizer.json"
        )
    return found


def _before_text(backend: Backend, directory: Path) -> tuple[int, ...]:
    # the first text that it knows: a vocabulary need not have single letters
    for text in ("a", *backend.get_vocab(with_added_tokens=False)):
        try:
            encoding = backend.encode(text)
        # a vocabulary of words raises where it has none for the unknown
        except Exception:
            continue
        # what its Rust stumbles over is no Exception
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            raise CheckpointError(
                f"{directory}: the tokenizer can't encode {text!r} ({error}); "
                "mend post_processor in its tokenizer.json"
            ) from error
        # sequence_ids: 0 for a token of the text, None for one that was added
        if 0 in encoding.sequence_ids:
            first = encoding.sequence_ids.index(0)
            before = zip(encoding.ids[:first], encoding.attention_mask[:first], strict=True)
            # padding is not attended to
            return tuple(token for token, attended in before if attended)
    return ()


def load_tokenizer(directory: Path, bos: bool = True, chat: bool = False) -> Tokenizer:
    """Load a tokenizer from a model directory.

    Args:
        directory: which `AutoTokenizer` loads offline.
        bos: documents begin as the tokenizer begins a text; False: with their own first token.
        chat: documents may be chats.

    Raises:
        CheckpointError: it has none that serves, or no chat template.
    """
    tokenizer = open_tokenizer(directory)
    backend = tokenizer.backend_tokenizer
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{directory}: the tokenizer has no end-of-text token; "
            "set eos_token in tokenizer_config.json"
        )
    # a definition may ask for both, and documents are taken whole
    backend.no_truncation()
    backend.no_padding()
    form = chat_format(tokenizer, directory) if chat else None
    return Tokenizer(
        definition=backend.to_str(),
        begin=beginning(backend, directory) if bos else (),
        end=tokenizer.eos_token_id,
        dtype="uint16" if vocabulary_size(tokenizer) < 1 << 16 else "uint32",
        chat=form,
    )


def _pack(backend: Backend, tokenizer: Tokenizer, texts: Texts) -> Packed:
    if tokenizer.chat:
        documents = [text for text in texts if isinstance(text, Document)]
        return _pack_chats(backend, tokenizer, tokenizer.chat, documents)
    ids: list[int] = []
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        ids += tokenizer.begin
        ids += encoding.ids
        ids.append(tokenizer.end)
    return Packed(np.asarray(ids, dtype=tokenizer.dtype).tobytes(), len(ids), len(texts))


def _pack_chats(
    backend: Backend, tokenizer: Tokenizer, form: ChatFormat, documents: list[Document]
) -> Packed:
    """Pack chats, and plain text among them, of which every id is a label."""
    ids: list[int] = []
    learned: list[bool] = []
    bad: list[str] = []
    for document in documents:
        if document.chat is None:
            encoding = backend.encode(document.text, add_special_tokens=False)
            own = [*tokenizer.begin, *encoding.ids, tokenizer.end]
            found = Labelled(own, [True] * len(own))
        else:
            try:
                found = labelled(backend, form, tokenizer.end, document.chat)
            except DataError as error:
                bad.append(f"{document.where}: {error}")
                continue
        ids += found.ids
        learned += found.learned
    return Packed(
        np.asarray(ids, dtype=tokenizer.dtype).tobytes(),
        len(ids),
        len(documents) - len(bad),
        np.asarray(learned, dtype=np.uint8).tobytes(),
        sum(learned),
        tuple(bad),
    )


def serve(descriptor: int) -> None:
    """Be a worker: pack what comes over a pipe until its other end closes.

    It closes by choice or because that process ended.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pipe = Connection(descriptor)
    with suppress(EOFError, OSError):
        tokenizer = pipe.recv()
        backend = tokenizer.backend()
        while True:
            texts = pipe.recv()
            try:
                pipe.send(_pack(backend, tokenizer, texts))
            except Exception as error:
                # whatever it is, the starting process raises it
                pipe.send(error)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def _without_threads() -> Iterator[None]:
    """Keep the tokenizer's thread pool off.

    A process that has one can hang when it is forked later.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


Batches = Iterator[tuple[str, Texts]]


@contextmanager
def packer(
    tokenizer: Tokenizer, workers: int
) -> Iterator[Callable[[Batches], Iterator[tuple[str, Packed]]]]:
    """Yield a function that turns (key, texts) into (key, packed ids), in order.

    Args:
        tokenizer: what makes ids of texts.
        workers: processes, each of which takes a batch at a time; 1: this one does the work.

    Raises:
        DataError: a worker died.
    """
    if workers == 1:
        backend = tokenizer.backend()
        with _without_threads():
            yield lambda batches: (
                (key, _pack(backend, tokenizer, texts)) for key, texts in batches
            )
        return
    team = _Team(tokenizer, workers)
    # one for each process, which it feeds and waits for
    threads = ThreadPoolExecutor(workers)
    try:
        yield lambda batches: _in_order(batches, threads, team.pack, AHEAD * workers)
    finally:
        threads.shutdown(cancel_futures=True)
        team.end()


class _Team:
    """Worker processes, each with a pipe of its own.

    What is shared instead (a queue, a lock) hangs when its holder is killed.

    They are fresh processes: a fork of one with threads could hang, and multiprocessing's would run
    the caller's script.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self.tokenizer = tokenizer
        self.workers = workers
        self.own = threading.local()
        self.started: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def pack(self, texts: Texts) -> Packed:
        """Have the calling thread's own process pack `texts`; it is started with the first."""
        try:
            if not hasattr(self.own, "pipe"):
                self.own.pipe = self._start()
            self.own.pipe.send(texts)
            result = self.own.pipe.recv()
        except (EOFError, OSError) as error:
            raise DataError(
                f"one of {self.workers} processes that tokenise was killed, perhaps for want of "
                "memory; start again with a lower data.workers"
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        signals = [int(number) for number in (signal.SIGINT, *ENDING)]
        # They reach the starting process too, which decides. Before the imports: these take long.
        code = (
            f"import signal, sys; [signal.signal(n, signal.SIG_IGN) for n in {signals}]; "
            f"sys.path[:] = {sys.path!r}; "
            f"from {__name__} import serve; serve({theirs.fileno()})"
        )
        command = [sys.executable, "-c", code]
        with theirs:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self.started.append((process, ours))
        ours.send(self.tokenizer)
        return ours

    def end(self) -> None:
        """End the processes, which wait for their next texts."""
        for _, pipe in self.started:
            pipe.close()
        for process, _ in self.started:
            process.wait()


def _in_order(
    batches: Batches,
    threads: ThreadPoolExecutor,
    pack: Callable[[Texts], Packed],
    ahead: int,
) -> Iterator[tuple[str, Packed]]:
    """Yield results in the order of the batches, at most `ahead` of which are under way."""
    waiting: deque[tuple[str, Future[Packed]]] = deque()
    for key, texts in batches:
        waiting.append((key, threads.submit(pack, texts)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for key, future in waiting:
        yield key, future.result()
