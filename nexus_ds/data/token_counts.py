"""How often the text of a domain has each token: the weights of merged embeddings' rows.

Not covered: a sample from all over the text; it is counted from its start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nexus_ds.data.corpora import TokenFile, open_source, token_files
from nexus_ds.errors import ConfigError
from nexus_ds.settings import DataConfig

COUNTED_BYTES = 8 << 20
"""Of each domain's training text at most; a twentieth of it did as well (docs/merging.md)."""
AT_ONCE = 1 << 20
"""Tokens."""

TokenCounts = Mapping[str, NDArray[np.int64]]
"""For each expert how often its text has each token, up to the last one that it has."""


def counted(file: TokenFile) -> NDArray[np.int64]:
    """Return how often a file has each token [V], up to the last one that it has."""
    counts_V = np.zeros(0, np.int64)
    for start in range(0, file.tokens, AT_ONCE):
        ids = file.read(start, min(AT_ONCE, file.tokens - start))
        more_V = np.bincount(ids, minlength=len(counts_V))
        more_V[: len(counts_V)] += counts_V
        counts_V = more_V
    return counts_V


def count_tokens(
    data: str,
    domains: Mapping[str, str],
    tokenizer: Path,
    settings: DataConfig,
) -> TokenCounts:
    """Count the tokens of each expert's training text, `COUNTED_BYTES` of it at most.

    Args:
        data: folder of domains or other source.
        domains: of the experts, by their names.
        tokenizer: directory that has it.
        settings: how text is read.

    Raises:
        ConfigError: nothing says where the text is.
        DataError: text that is missing or damaged.
        CheckpointError: no tokenizer that serves.
    """
    if not data:
        raise ConfigError(
            "model.merge_rows=counted counts the tokens of each expert's text, and nothing says "
            "where it is: give --data DIR, or set model.merge_rows=alike"
        )
    with tempfile.TemporaryDirectory() as cache:
        files = token_files(
            open_source(data),
            list(domains.values()),
            "train",
            tokenizer,
            Path(cache),
            workers=settings.workers,
            max_bytes=min(settings.max_bytes or COUNTED_BYTES, COUNTED_BYTES),
            on_bad_row=settings.on_bad_row,
            bos=settings.bos,
            chat=settings.chat,
        )
        return {name: counted(files[domain]) for name, domain in domains.items()}
