"""Chunks of text with embeddings of their own, from which a warm start learns P.

They serve `router.warm_start: chunks | closed_form`.
The embeddings are kept in a folder, one file a domain, found again by text and encoder: several
warm starts of one run embed their text once.
Not covered: an encoder that only another machine has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from nexus_ds.data.domains import (
    ENCODE_BATCH,
    SentenceEncoder,
    document_vectors,
    encoder_directory,
    weights_hash,
)
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.outputs import create, new_file
from nexus_ds.progress import Progress

WINDOWS = 2  # pieces of a chunk that are averaged at most


def _place(cache: Path, texts: Sequence[str], revision: str) -> Path:
    """Return the file of a domain's embeddings, found again by encoder and text."""
    digest = hashlib.sha256(f"{revision} {WINDOWS}".encode())
    for text in texts:
        # with an end: other borders between the same characters are other chunks
        digest.update(text.encode() + b"\0")
    return cache / f"chunks-{digest.hexdigest()[:24]}.safetensors"


def embed_chunks(
    texts: Mapping[str, Sequence[str]],
    encoder: str,
    revision: str,
    cache: Path,
) -> dict[str, Tensor]:
    """Return for each domain the unit-norm embeddings [N, M] fp32 of its chunks.

    Args:
        texts: N chunks of each domain.
        encoder: packaged name, directory or hub name, as for `nexus-ds embed`.
        revision: hash of the weights that it must have: P only understands its own encoder.
        cache: folder of embeddings that were made before; made if missing.

    Raises:
        ConfigError: no such encoder on this machine.
        IncompatibleModelsError: it has other weights.
    """
    _check_revision(encoder, revision)
    places = {domain: _place(cache, chunks, revision) for domain, chunks in texts.items()}
    missing = [domain for domain, path in places.items() if not path.is_file()]
    # loading the encoder takes seconds, which a repeated warm start doesn't pay
    if missing:
        model = SentenceEncoder(encoder)
        total = sum(len(texts[domain]) for domain in missing)
        with Progress("embed chunks", total, "chunk") as progress:
            for domain in missing:
                vectors_NM = _embedded(texts[domain], model, progress)
                _write(places[domain], vectors_NM)
    return {domain: load_file(path)["vectors"] for domain, path in places.items()}


def _check_revision(encoder: str, revision: str) -> None:
    # of the weights: a name says little of what lies on this machine
    found = weights_hash(encoder_directory(encoder))
    if found != revision:
        raise IncompatibleModelsError(
            f"the encoder {encoder} has the revision {found[:12]}, the domain embeddings were "
            f"made with {revision[:12]}; set pipeline.encoder to the one that made them"
        )


def _embedded(chunks: Sequence[str], encoder: SentenceEncoder, progress: Progress) -> Tensor:
    """Return [N, M] fp32 unit-norm embeddings."""
    parts = []
    for start in range(0, len(chunks), ENCODE_BATCH):
        batch = chunks[start : start + ENCODE_BATCH]
        vectors = document_vectors(batch, encoder, WINDOWS)
        parts.append(torch.from_numpy(vectors).float())
        progress.advance(len(batch))
    return torch.cat(parts)


def _write(path: Path, vectors_NM: Tensor) -> None:
    # overwrite: another warm start may have made the same meanwhile
    with new_file(path, overwrite=True) as temporary, create(temporary) as stream:
        stream.write(save({"vectors": vectors_NM}))
