"""Chunks of text with embeddings of their own, from which a warm start learns P.

They serve `router.warm_start: chunks | closed_form`.
The embeddings are kept in a folder, one file a domain, found again by text and encoder: several
warm starts of one run embed their text once. A file that is damaged is made again.
Not covered: an encoder that only another machine has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nexus_ds.data.domains import ENCODE_BATCH, document_vectors
from nexus_ds.data.encoder_files import weights_hash
from nexus_ds.data.sentence_encoder import SentenceEncoder, encoder_directory
from nexus_ds.errors import IncompatibleModelsError, one_line
from nexus_ds.outputs import create, new_file
from nexus_ds.progress import Progress, say

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
    found = {}
    for domain, path in places.items():
        vectors_NM = _kept(path)
        if vectors_NM is not None:
            found[domain] = vectors_NM
    missing = {domain: texts[domain] for domain in texts if domain not in found}
    # loading the encoder takes seconds, which a repeated warm start doesn't pay
    if missing:
        found |= _made(missing, encoder, places)
    return {domain: found[domain] for domain in texts}


def _made(
    texts: Mapping[str, Sequence[str]],
    encoder: str,
    places: Mapping[str, Path],
) -> dict[str, Tensor]:
    """Embed chunks, and keep the embeddings at their domain's place."""
    model = SentenceEncoder(encoder)
    found = {}
    with Progress("embed chunks", sum(map(len, texts.values())), "chunk") as progress:
        for domain, chunks in texts.items():
            found[domain] = _embedded(chunks, model, progress)
            _write(places[domain], found[domain])
    return found


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


def _sha256(vectors_NM: Tensor) -> str:
    return hashlib.sha256(vectors_NM.numpy().tobytes()).hexdigest()


def _write(path: Path, vectors_NM: Tensor) -> None:
    content = save({"vectors": vectors_NM}, {"sha256": _sha256(vectors_NM)})
    # overwrite: another warm start may have made the same meanwhile
    with new_file(path, overwrite=True) as temporary, create(temporary) as stream:
        stream.write(content)


def _kept(path: Path) -> Tensor | None:
    """Return the embeddings [N, M] fp32 of a file; None if there is none, or a damaged one."""
    if not path.is_file():
        return None
    problem = ""
    try:
        with safe_open(path, framework="pt") as file:
            vectors_NM: Tensor = file.get_tensor("vectors")
            expected = (file.metadata() or {}).get("sha256")
        if _sha256(vectors_NM) == expected:
            return vectors_NM
        problem = f"vectors that are not of sha256 {expected}"
    # of sizes that torch or numpy can't have, the last two
    except (SafetensorError, OSError, TypeError, RuntimeError, ValueError) as error:
        problem = one_line(error)
    say(f"{path}: found {problem}; the file is damaged, or of an older version, and is made again")
    return None
