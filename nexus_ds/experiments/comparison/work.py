"""Small pieces of a comparison that are no verbs of their own.

    python -m nexus_ds.experiments.comparison.work NAME '{"out": ...}'

Each writes one output that was not there, and reads nothing but its arguments.
Not covered: training; that is the verb `train`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.build import DTYPES, new_dense
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.config import load_config
from nexus_ds.data.corpora import open_source, token_files
from nexus_ds.data.corpora import windows as windows_of
from nexus_ds.data.domains import read_domain_embeddings, unit, write_domain_embeddings
from nexus_ds.data.tokenizer import open_tokenizer, train_tokenizer, vocabulary_size
from nexus_ds.errors import NexusError
from nexus_ds.experiments.comparison.ensemble import ensemble_losses
from nexus_ds.model.router import layer_generator
from nexus_ds.outputs import exit_on_signals, new_directory, write_json
from nexus_ds.progress import say
from nexus_ds.upcycling.average import average_dense

# Of a domain's text, where the recipe sets no limit: a small vocabulary needs no more.
TOKENIZER_BYTES = 4_000_000


def tokenizer(
    out: str,
    data: str,
    domains: list[str],
    vocabulary: int,
    max_bytes: int,
    on_bad_row: str,
) -> None:
    """Train the tokenizer that all contenders share."""
    source = open_source(data)
    texts = (
        document.text
        for name in domains
        for document in source.documents(name, "train", on_bad_row, max_bytes or TOKENIZER_BYTES)
    )
    train_tokenizer(texts, vocabulary, Path(out))


def average(out: str, models: list[str]) -> None:
    """Write the plain mean of dense models."""
    average_dense([Path(model) for model in models], Path(out))


def random_dense(
    out: str,
    config: str,
    tokenizer: str,
    number: int,
) -> None:
    """Write a dense model of the recipe's sizes with random weights; only its FFNs depend on
    `number`.

    So models of several numbers put together are one mixture with random weights everywhere: their
    mean is no smaller.
    """
    settings = load_config(config)
    words = open_tokenizer(Path(tokenizer))
    size = vocabulary_size(words)
    model = new_dense(settings.model, size, words.eos_token_id, settings.seed)
    generator = layer_generator(settings.seed, number)
    for layer in model.model.layers:
        for parameter in layer.mlp.parameters():
            parameter.data.normal_(0.0, model.config.initializer_range, generator=generator)
    with new_directory(Path(out)) as directory:
        model.to(DTYPES[settings.model.dtype]).save_pretrained(directory)
        copy_tokenizer(Path(tokenizer), directory)


def embedding(
    out: str,
    source: str,
    change: str,
    seed: int,
) -> None:
    """Write domain embeddings that are worse than they could be; see `compare.embedding`."""
    given = read_domain_embeddings(Path(source))
    normal = np.random.default_rng(seed).standard_normal(given.vectors.shape)
    chance = normal.astype(np.float32)
    if change == "shuffled" and len(given.names) > 1:
        # Every domain gets its neighbour's: none keeps its own.
        given.vectors = np.roll(given.vectors, 1, axis=0)
    elif change == "noise":
        # As long as the embedding itself, so half of what is left is noise.
        given.vectors = unit(unit(given.vectors) + unit(chance))
    else:
        # random; a domain on its own has no other to change places with
        given.vectors = unit(chance)
    write_domain_embeddings(Path(out), given)


def score(
    out: str,
    models: list[str],
    data: str,
    domains: list[str],
    windows: int,
    length: int,
    cache: str,
    bos: bool = True,
) -> None:
    """Write the losses of one model, or of several as a BTM ensemble.

    On the windows that training validates on.
    """
    source = open_source(data)
    # All members have one tokenizer.
    tokenizer = Path(models[0])
    files = token_files(source, domains, "validation", tokenizer, Path(cache), bos=bos)
    texts = {domain: windows_of(files[domain], windows, length) for domain in domains}
    losses = ensemble_losses([Path(model) for model in models], texts)
    write_json(Path(out), {"loss": losses})


PIECES: dict[str, Callable[..., None]] = {
    piece.__name__: piece for piece in (tokenizer, average, random_dense, embedding, score)
}


def main(argv: list[str] | None = None) -> int:
    """Do one piece of work; a mistake is one line and exit code 1."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 2 or words[0] not in PIECES:
        say(f"expected a name ({', '.join(PIECES)}) and its arguments as JSON, found {words}")
        return 2
    try:
        with exit_on_signals():
            PIECES[words[0]](**json.loads(words[1]))
    except (NexusError, OSError) as error:
        say(f"{words[0]}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
