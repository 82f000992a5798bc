"""What trainings read, made by their settings: the tokenizer of a run, and token files.

Trainings make what they miss; the stage `tokens` makes all of it before, on a machine without GPUs.
Not covered: the text of domain embeddings and scores, which is read as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nexus_ds.data.corpora import TokenFile, open_source, token_files
from nexus_ds.data.sources import SPLITS, Source
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.settings import Config, DataConfig

# Text of a domain that a tokenizer is trained on, where data.max_bytes sets no limit.
TOKENIZER_BYTES = 4_000_000


def make_tokenizer(config: Config) -> None:
    """Train the tokenizer of a run whose seed is a new model, unless it is there."""
    tokenizer = Path(config.model.tokenizer)
    if config.stage != "seed" or config.model.path or tokenizer.exists():
        return
    pipe, data = config.pipeline, config.data
    source = open_source(data.path)
    limit = data.max_bytes or TOKENIZER_BYTES
    domains = pipe.tokenizer_domains or pipe.domains or data.domains
    documents = chain.from_iterable(
        source.documents(domain, "train", data.on_bad_row, limit) for domain in domains
    )
    texts = (document.text for document in documents)
    train_tokenizer(texts, pipe.vocabulary, tokenizer)


def tokenised(
    data: DataConfig,
    source: Source,
    domains: Sequence[str],
    split: str,
    tokenizer: Path,
    verify: bool = True,
) -> dict[str, TokenFile]:
    """Return the token file of each domain, made if it is missing or damaged; see `token_files`."""
    return token_files(
        source,
        domains,
        split,
        tokenizer,
        Path(data.cache),
        workers=data.workers,
        max_bytes=data.max_bytes,
        on_bad_row=data.on_bad_row,
        bos=data.bos,
        chat=data.chat,
        verify=verify,
    )


@dataclass
class _Text:
    """Domains that are tokenised alike, in one pass over a source that is a stream."""

    data: DataConfig
    tokenizer: Path
    domains: dict[str, dict[str, None]] = field(default_factory=dict)
    """By split; a dictionary for its order."""

    def add(self, data: DataConfig) -> None:
        named = zip(SPLITS, (data.domains, data.validation_domains), strict=True)
        for split, domains in named:
            self.domains.setdefault(split, {}).update(dict.fromkeys(domains))


def tokenise(configs: Iterable[Config]) -> dict[str, int]:
    """Make all that these trainings will read; return the tokens of each new or old file, by path.

    Validation text comes first: it is little, and what is wrong with it is told before hours go
    into the other.

    Args:
        configs: of the trainings, in the order of the run, with all paths.

    Raises:
        DataError: text that is missing or damaged.
        CheckpointError: no tokenizer that serves.
    """
    texts: dict[tuple[object, ...], _Text] = {}
    for config in configs:
        make_tokenizer(config)
        data, tokenizer = config.data, config.model.tokenizer
        read = (data.on_bad_row, data.bos, data.chat)
        alike = (data.path, data.cache, data.max_bytes, read, tokenizer)
        texts.setdefault(alike, _Text(data, Path(tokenizer))).add(data)
    made: dict[str, int] = {}
    for split in reversed(SPLITS):
        for text in texts.values():
            source = open_source(text.data.path)
            files = tokenised(text.data, source, list(text.domains[split]), split, text.tokenizer)
            made |= {str(file.path): file.tokens for file in files.values()}
    return made
