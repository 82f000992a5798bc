"""Which text of a domain is embedded: the options of `embed` and of `card`, and what they ask for.

Not covered: a training that makes a card, whose recipe says it (pipeline.documents and others).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nexus_ds.data.domains import DomainEmbeddings, embed_domains
from nexus_ds.data.sentence_encoder import DEFAULT_ENCODER, SentenceEncoder
from nexus_ds.data.sources import Source
from nexus_ds.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare --encoder and which text it reads."""
    parser.add_argument(
        "--encoder",
        default=DEFAULT_ENCODER,
        help="sentence-transformers model: a packaged name, a directory, or a downloaded hub name; "
        "or a dense model's directory, the seed's for one; all experts of a mixture have the same "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=200,
        help="documents sampled a domain (default: %(default)s)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=2,
        help="windows of a long document that are averaged at most (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sample (default: %(default)s)"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=0,
        help="look only at the first bytes of a domain's text; 0: all (default)",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="what a damaged line does (default: %(default)s)",
    )


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that are no sample; before anything is read."""
    if args.documents < 1 or args.windows < 1:
        raise ConfigError(
            f"--documents {args.documents} and --windows {args.windows}: expected numbers above 0"
        )


def embedded(
    args: argparse.Namespace, source: Source, domains: Sequence[str], encoder: SentenceEncoder
) -> DomainEmbeddings:
    """Return the embeddings of domains, of the sample that the options ask for.

    Errors: `embed_domains`.
    """
    return embed_domains(
        source,
        list(domains),
        encoder,
        args.documents,
        args.seed,
        windows=args.windows,
        max_bytes=args.max_bytes,
        on_bad_row=args.on_bad_row,
    )
