"""Domain embeddings: what a domain's training text is about, as one vector (paper section 1.4).

The vector of a domain is the mean over a seeded sample of its training documents of their unit-norm
embeddings by a sentence encoder, or by a language model. A document longer than the encoder's
window is cut into windows, and its embedding is the normalised mean of its windows' embeddings.
Embeddings live in one safetensors file: the tensor `vectors`, and in its metadata who made them and
from what, so that a later extension can refuse vectors of another encoder.

Shape letters: D domains, M dimension of the encoder, W windows.

Not covered: the encoder (`sentence_encoder`); more than one vector a domain; adding rows to an
existing file (embed the new domains into a file of their own).
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Protocol

import numpy as np

from nexus_ds.data.rows import Document
from nexus_ds.data.sources import Source
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.outputs import create, new_file
from nexus_ds.progress import Progress
from nexus_ds.typed_json import typed

METADATA_KEY = "nexus_domains"
ENCODE_BATCH = 32  # documents whose windows are encoded together


@dataclass
class DomainEmbeddings:
    """Vectors of domains and where they come from; `len(names) == vectors.shape[0]`."""

    names: list[str]
    """Domains, in the order of the rows."""
    vectors: np.ndarray
    """[D, M] float32, mean of unit-norm document embeddings (norm at most 1, not normalised
    itself)."""
    encoder: str
    """Encoder as given: a packaged name, a directory's name, or a hub name."""
    revision: str
    """sha256 over the encoder's weight files (`encoder_files.weights_hash`)."""
    max_tokens: int
    """Tokens of one window."""
    windows: int
    """Windows of a document that were embedded at most."""
    documents: dict[str, int]
    """Documents in each domain's mean."""
    seed: int
    """Seed of the sample of documents."""
    data: str
    """The text's source as given (`--data`)."""
    text_documents: dict[str, int] = field(default_factory=dict)
    """Documents that each domain's sample was drawn from; empty where they were not counted."""
    text_bytes: dict[str, int] = field(default_factory=dict)
    """UTF-8 bytes of the same."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])

    def vector(self, domain: str) -> np.ndarray:
        """Return the [M] float32 vector of `domain`; DataError names the domains that exist."""
        if domain not in self.names:
            raise DataError(
                f"no embedding of the domain {domain!r}; the file has: {', '.join(self.names)}. "
                f"Embed it with the same encoder ({self.encoder})"
            )
        return self.vectors[self.names.index(domain)]


class Encoder(Protocol):
    """What turns texts into vectors; `SentenceEncoder` is the real one."""

    name: str
    revision: str
    max_tokens: int

    def windows(self, text: str, limit: int) -> list[str]:
        """Cut `text` into at most `limit` pieces that fit the encoder."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return [W, M] float32 unit-norm embeddings of pieces of text."""
        ...


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return `vectors` [..., M] scaled to norm 1 over the last axis."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    # a vector of zeros stays one, instead of turning into NaN
    return vectors / np.maximum(norms, 1e-12)


def sample_documents(
    documents: Iterator[Document],
    count: int,
    seed: int,
    domain: str,
) -> list[Document]:
    """Return `count` of `documents` chosen uniformly, without holding more than `count` of them.

    Each document's position is hashed with the seed and the smallest hashes win, so the choice does
    not depend on how the text is read; fewer are returned if there are fewer. The result is in
    reading order.
    """
    # a heap whose top is the largest hash: (-hash, -position, document)
    kept: list[tuple[int, int, Document]] = []
    for position, document in enumerate(documents):
        key = f"{seed}\0{domain}\0{position}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        rank = -int.from_bytes(digest)
        item = (rank, -position, document)
        if len(kept) < count:
            heapq.heappush(kept, item)
        # without the document, which can't be compared
        elif item[:2] > kept[0][:2]:
            heapq.heapreplace(kept, item)
    return [document for _, _, document in sorted(kept, key=lambda item: -item[1])]


def document_vectors(texts: Sequence[str], encoder: Encoder, windows: int) -> np.ndarray:
    """Return [D, M] float64 unit-norm embeddings of D documents.

    Each is the normalised mean of the embeddings of its windows.
    """
    pieces = [encoder.windows(text, windows) for text in texts]
    # all windows of all documents at once: the encoder is fastest with full batches
    encoded_WM = encoder.encode(list(chain.from_iterable(pieces)))
    counts = [len(document) for document in pieces]
    bounds = np.cumsum(counts)[:-1]
    parts = np.split(encoded_WM.astype(np.float64), bounds)
    # each document counts the same, however many windows it has
    means = [part_WM.mean(axis=0) for part_WM in parts]
    return np.stack([unit(mean_M) for mean_M in means])


class _Counted:
    """Documents on their way through, counted."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self.documents = documents
        self.seen = 0
        self.size = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.seen += 1
            self.size += len(document.text.encode(errors="replace"))
            yield document


def _mean_of(
    documents: list[Document],
    encoder: Encoder,
    windows: int,
    progress: Progress,
) -> np.ndarray:
    """Return the [M] float32 mean of the unit-norm embeddings of `documents`."""
    rows: list[np.ndarray] = []
    for start in range(0, len(documents), ENCODE_BATCH):
        batch = documents[start : start + ENCODE_BATCH]
        texts = [document.text for document in batch]
        rows.append(document_vectors(texts, encoder, windows))
        progress.advance(len(batch))
    return np.concatenate(rows).mean(axis=0).astype(np.float32)


def embed_domains(
    source: Source,
    domains: Sequence[str],
    encoder: Encoder,
    documents: int = 200,
    seed: int = 0,
    *,
    windows: int = 2,
    max_bytes: int = 0,
    on_bad_row: str = "error",
) -> DomainEmbeddings:
    """Embed each domain's training text: the mean over sampled documents (paper section 1.4).

    Args:
        source: the text.
        domains: domains to embed; the rows' order.
        encoder: turns pieces of text into unit-norm vectors.
        documents: sample size per domain; all documents if there are fewer.
        seed: of the sample.
        windows: pieces of a longer document that are averaged at most, spread evenly over it.
        max_bytes: how much of each domain's text is looked at, in bytes; 0: all.
        on_bad_row: error | skip, for damaged lines.

    Raises:
        ConfigError: sizes below 1, no or doubled domains.
        DataError: a domain without text, damaged rows.
    """
    if documents < 1 or windows < 1:
        raise ConfigError(
            f"documents and windows must be at least 1, found {documents} and {windows}"
        )
    if not domains or len(set(domains)) != len(domains):
        raise ConfigError(
            f"domains: expected at least one and each once, found {', '.join(domains) or 'none'}"
        )
    rows: list[np.ndarray] = []
    counts: dict[str, int] = {}
    seen: dict[str, int] = {}
    sizes: dict[str, int] = {}
    with Progress("embed", documents * len(domains), "doc") as progress:
        for domain in domains:
            texts = _Counted(source.documents(domain, "train", on_bad_row, max_bytes))
            sample = sample_documents(iter(texts), documents, seed, domain)
            counts[domain] = len(sample)
            seen[domain] = texts.seen
            sizes[domain] = texts.size
            rows.append(_mean_of(sample, encoder, windows, progress))
            progress.advance(documents - len(sample))
    return DomainEmbeddings(
        names=list(domains),
        vectors=np.stack(rows),
        encoder=encoder.name,
        revision=encoder.revision,
        max_tokens=encoder.max_tokens,
        windows=windows,
        documents=counts,
        seed=seed,
        data=source.name,
        text_documents=seen,
        text_bytes=sizes,
    )


# The file -----------------------------------------------------------------------------------------


def write_domain_embeddings(
    path: Path, embeddings: DomainEmbeddings, overwrite: bool = False
) -> None:
    """Write `embeddings` as one safetensors file.

    Raises:
        OutputExistsError: `path` is taken and not to be overwritten.
    """
    from safetensors.numpy import save

    about = vars(embeddings).copy()
    del about["vectors"]
    # safetensors writes the memory as it lies: a view would be written in its base's order
    vectors = np.ascontiguousarray(embeddings.vectors, dtype=np.float32)
    metadata = {METADATA_KEY: json.dumps(about, ensure_ascii=False)}
    content = save({"vectors": vectors}, metadata=metadata)
    with new_file(Path(path), overwrite=overwrite) as temporary, create(temporary) as stream:
        stream.write(content)


def read_domain_embeddings(path: Path) -> DomainEmbeddings:
    """Read what `write_domain_embeddings` wrote.

    Raises:
        DataError: the file is missing, is of another kind, or its parts contradict each other.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "make it with: nexus-ds embed --data DIR --out FILE"
    if not Path(path).is_file():
        raise DataError(f"no domain embeddings at {path}; {remedy}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            vectors = file.get_tensor("vectors") if "vectors" in names else None
    # what numpy has no type for is none of the library's own errors
    except (SafetensorError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(
            f"{path} is not a safetensors file of domain embeddings ({error}); {remedy}"
        ) from error
    if vectors is None or METADATA_KEY not in metadata:
        raise DataError(
            f"{path} holds {', '.join(names) or 'nothing'}, not domain embeddings; {remedy}"
        )
    # a missing or an unknown key is a TypeError, as another type is, text that is no JSON a
    # ValueError
    try:
        about = json.loads(metadata[METADATA_KEY])
        embeddings = typed(DomainEmbeddings(vectors=vectors, **about), DomainEmbeddings)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: its description of the domains is damaged ({error}); {remedy}"
        ) from error
    _check(path, embeddings)
    return embeddings


def _check(path: Path, embeddings: DomainEmbeddings) -> None:
    vectors = embeddings.vectors
    names = embeddings.names
    if vectors.ndim != 2 or vectors.dtype != np.float32 or len(names) != vectors.shape[0]:
        raise DataError(
            f"{path}: vectors are {vectors.dtype} {list(vectors.shape)}, expected float32 "
            f"[{len(names)}, dimension] for the domains {', '.join(names)}; embed again"
        )
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a domain stands twice: {', '.join(names)}; embed again")
    uncounted = [name for name in names if name not in embeddings.documents]
    if uncounted:
        raise DataError(
            f"{path}: documents has no number for {', '.join(uncounted)}, expected one for each "
            "domain; embed again"
        )
    usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    bad = [name for name, good in zip(names, usable, strict=True) if not good]
    if bad:
        raise DataError(
            f"{path}: the vector of {', '.join(bad)} is zero or has values that are not numbers; "
            "embed again"
        )


# What the vectors say -----------------------------------------------------------------------------


def cosines(embeddings: DomainEmbeddings) -> np.ndarray:
    """Return the [D, D] cosines between domain vectors."""
    unit_DM = unit(embeddings.vectors.astype(np.float64))
    return unit_DM @ unit_DM.T


def cosine_table(embeddings: DomainEmbeddings) -> str:
    """Return the cosines between domains as a text table, one row a domain."""
    names = embeddings.names
    first = max(len(name) for name in names)
    # a cosine takes five characters: -0.12
    widths = [max(len(name), 5) for name in names]
    header = [name.rjust(width) for name, width in zip(names, widths, strict=True)]
    lines = ["  ".join([" " * first, *header])]
    for name, row in zip(names, cosines(embeddings), strict=True):
        cells = [f"{value:>{width}.2f}" for value, width in zip(row, widths, strict=True)]
        lines.append("  ".join([name.ljust(first), *cells]))
    return "\n".join(lines)


def near_duplicates(
    embeddings: DomainEmbeddings, threshold: float = 0.95
) -> list[tuple[str, str, float]]:
    """Return pairs of domains whose cosine exceeds `threshold`.

    A router can hardly tell their experts apart.
    """
    values = cosines(embeddings)
    pairs = combinations(range(len(embeddings.names)), 2)
    return [
        (embeddings.names[i], embeddings.names[j], float(values[i, j]))
        for i, j in pairs
        if values[i, j] > threshold
    ]
