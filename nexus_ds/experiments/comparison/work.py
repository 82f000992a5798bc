"""Small pieces of a comparison that are no verbs of their own: `python -m
nexus_ds.experiments.comparison.work NAME '{"out": ...}'`.

Each writes one output that was not there, and reads nothing but its arguments.
Not covered: training; that is the verb `train`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexus_ds.errors import NexusError
from nexus_ds.outputs import exit_on_signals


def tokenizer(
    out: str, data: str, domains: list[str], vocabulary: int, max_bytes: int, on_bad_row: str
) -> None:
    """Train the tokenizer that all contenders share."""
    from nexus_ds.data.corpora import open_source
    from nexus_ds.data.tokenizer import train_tokenizer

    source = open_source(data)
    texts = (
        d.text
        for name in domains
        for d in source.documents(name, "train", on_bad_row, max_bytes or 4_000_000)
    )
    train_tokenizer(texts, vocabulary, Path(out))


def average(out: str, models: list[str]) -> None:
    """Write the plain mean of dense models."""
    from nexus_ds.upcycling.average import average_dense

    average_dense([Path(model) for model in models], Path(out))


def random_dense(out: str, config: str, tokenizer: str, number: int) -> None:
    """Write a dense model of the recipe's sizes with random weights; only its FFNs depend on
    `number`.

    So models of several numbers put together are one mixture with random weights everywhere: their
    mean is no smaller.
    """

    from nexus_ds.checkpoint.build import DTYPES, new_dense
    from nexus_ds.checkpoint.tokenizer import copy_tokenizer
    from nexus_ds.config import load_config
    from nexus_ds.data.tokenizer import open_tokenizer, vocabulary_size
    from nexus_ds.model.router import layer_generator
    from nexus_ds.outputs import new_directory

    settings = load_config(config)
    words = open_tokenizer(Path(tokenizer))
    model = new_dense(settings.model, vocabulary_size(words), words.eos_token_id, settings.seed)
    generator = layer_generator(settings.seed, number)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.data.normal_(0.0, model.config.initializer_range, generator=generator)
    with new_directory(Path(out)) as directory:
        model.to(DTYPES[settings.model.dtype]).save_pretrained(directory)
        copy_tokenizer(Path(tokenizer), directory)


def embedding(out: str, source: str, change: str, seed: int) -> None:
    """Write domain embeddings that are worse than they could be; see `compare.embedding`."""
    import numpy as np

    from nexus_ds.data.domains import read_domain_embeddings, unit, write_domain_embeddings

    given = read_domain_embeddings(Path(source))
    chance = np.random.default_rng(seed).standard_normal(given.vectors.shape).astype(np.float32)
    if change == "shuffled" and len(given.names) > 1:
        given.vectors = np.roll(given.vectors, 1, axis=0)
    elif change == "noise":
        given.vectors = unit(unit(given.vectors) + unit(chance))
    else:  # random; a domain on its own has no other to change places with
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
    """Write the losses of one model, or of several as a BTM ensemble, on the windows that training
    validates on."""
    from nexus_ds.data.corpora import open_source, token_files
    from nexus_ds.data.corpora import windows as windows_of
    from nexus_ds.experiments.comparison.ensemble import ensemble_losses
    from nexus_ds.outputs import write_json

    files = token_files(
        open_source(data), domains, "validation", Path(models[0]), Path(cache), bos=bos
    )
    texts = {domain: windows_of(files[domain], windows, length) for domain in domains}
    write_json(Path(out), {"loss": ensemble_losses([Path(model) for model in models], texts)})


PIECES: dict[str, Callable[..., None]] = {
    piece.__name__: piece for piece in (tokenizer, average, random_dense, embedding, score)
}


def main(argv: list[str] | None = None) -> int:
    """Do one piece of work; a mistake is one line and exit code 1."""
    words: list[Any] = sys.argv[1:] if argv is None else argv
    if len(words) != 2 or words[0] not in PIECES:
        print(
            f"expected a name ({', '.join(PIECES)}) and its arguments as JSON, found {words}",
            file=sys.stderr,
        )
        return 2
    try:
        with exit_on_signals():
            PIECES[words[0]](**json.loads(words[1]))
    except (NexusError, OSError) as error:
        print(f"{words[0]}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
