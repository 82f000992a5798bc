"""The verb `embed`: embed each domain's training text, once, for the router (paper section 1.4).

Not covered: adding rows to an existing file; embed new domains into a file of their own, with the
same encoder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nexus_ds.command_lines import typed_upcycling
from nexus_ds.config import named_once
from nexus_ds.console import print_text
from nexus_ds.data import sample_options
from nexus_ds.data.domains import (
    DomainEmbeddings,
    cosine_table,
    cosines,
    near_duplicates,
    write_domain_embeddings,
)
from nexus_ds.data.sentence_encoder import SentenceEncoder
from nexus_ds.data.sources import open_source, require_domains
from nexus_ds.outputs import held, refuse_existing
from nexus_ds.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--data", required=True, help="folder of domains, hub:NAME[#COLUMN], or demo"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="file to write (safetensors); must not exist",
    )
    parser.add_argument(
        "--domains",
        default="",
        help="comma-separated domains, in the order of the rows (default: all)",
    )
    sample_options.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Embed the domains, write the file, print the cosines between them."""
    # before anything is read, which takes minutes
    refuse_existing(args.out)
    sample_options.check(args)
    source = open_source(args.data)
    # nothing reads a file in which a name stands twice
    domains = named_once("--domains", args.domains) or source.domains()
    # before the encoder is loaded, which takes seconds
    require_domains(source, domains)
    encoder = SentenceEncoder(args.encoder)
    # two of them on one file would embed the same text twice
    with held(args.out):
        embeddings = sample_options.embedded(args, source, domains, encoder)
        write_domain_embeddings(args.out, embeddings)
    pairs = near_duplicates(embeddings)
    for first, second, cosine in pairs:
        # on stderr: with --json, stdout is for programs
        say(
            f"warning: {first} and {second} are nearly the same text (cosine {cosine:.3f}); "
            "a router can hardly tell their experts apart"
        )
    if args.json:
        print_text(json.dumps(_answer(args.out, embeddings, pairs), indent=2))
        return 0
    print_text(
        f"cosines between domains ({embeddings.encoder}, {embeddings.dimension} dimensions):"
    )
    print_text(cosine_table(embeddings))
    print_text(f"wrote {args.out}")
    experts = dict.fromkeys(embeddings.names, Path("DIR"))
    print_text(f"next: {typed_upcycling('DIR', experts, args.out)}")
    return 0


def _answer(
    out: Path, embeddings: DomainEmbeddings, pairs: list[tuple[str, str, float]]
) -> dict[str, object]:
    names = embeddings.names
    rows = zip(names, cosines(embeddings).tolist(), strict=True)
    return {
        "out": str(out),
        "encoder": {
            "name": embeddings.encoder,
            "revision": embeddings.revision,
            "dimension": embeddings.dimension,
            "max_tokens": embeddings.max_tokens,
            "windows": embeddings.windows,
        },
        "documents": embeddings.documents,
        "seed": embeddings.seed,
        "cosine": {name: dict(zip(names, row, strict=True)) for name, row in rows},
        "near_duplicates": [list(pair) for pair in pairs],
    }
