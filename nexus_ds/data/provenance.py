"""Where a block of tokens comes from: the documents that it holds, by file and line.

A token file keeps no places of documents: they are counted by the ids that end them, and then read
again. That takes as long as reading the text up to there, so it is for what happens seldom, and
beyond the first READ_AGAIN tokens of a file, where all ranks would wait for minutes, the place in
the token file is told instead.
Not covered: the very words of a document that a block begins or ends with.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from nexus_ds.data.corpora import TokenFile, open_source
from nexus_ds.data.encoding import Tokenizer, load_tokenizer
from nexus_ds.errors import NexusError
from nexus_ds.settings import DataConfig

CHUNK = 1 << 22  # ids that are counted at once
READ_AGAIN = 1 << 26
"""Tokens up to which documents are looked for: about 250 MB of text, seconds to read."""


def documents_of(file: TokenFile, start: int, count: int, tokenizer: Tokenizer) -> range:
    """Return the numbers, from 0, of the documents that own the ids [start, start + count).

    Raises:
        DataError: the file is shorter than that.
    """
    ends = 0
    for first in range(0, start, CHUNK):
        ids_N = file.read(first, min(CHUNK, start - first))
        ends += int(np.count_nonzero(ids_N == tokenizer.end))
    # The last id ends a document or lies inside one: what comes after it does not count.
    inside = int(np.count_nonzero(file.read(start, count - 1) == tokenizer.end))
    # A tokenizer may open a text with the very token that closes it.
    each = 1 + tokenizer.begin.count(tokenizer.end)
    return range(ends // each, (ends + inside) // each + 1)


def told(data: DataConfig, tokenizer: Path, file: TokenFile, domain: str, block: int) -> str:
    """Return the domain and the first and last document of a block of training text, in words.

    Args:
        data: how the text was read.
        tokenizer: its directory.
        file: of the domain.
        domain: its name.
        block: number of the block, of `data.sequence_length` inputs.
    """
    length = data.sequence_length
    start = block * length
    # a template may write the token that ends a document anywhere
    if start > READ_AGAIN or file.answers is not None:
        return f"{domain}, tokens {start:,} to {start + length:,} of {file.path.name}"
    loaded = load_tokenizer(tokenizer, data.bos)
    numbers = documents_of(file, start, length + 1, loaded)
    try:
        documents = open_source(data.path).documents(
            domain, "train", data.on_bad_row, data.max_bytes
        )
        found = list(islice(documents, numbers.start, numbers.stop))
        first, last = found[0].where, found[-1].where
    except (NexusError, OSError, IndexError) as error:
        # Text may be gone once it is tokenised; that must not hide what this is asked for.
        return f"{domain}, documents {numbers.start + 1} to {numbers.stop} (can't be read: {error})"
    return f"{domain}, {first}" if len(numbers) == 1 else f"{domain}, {first} to {last}"
