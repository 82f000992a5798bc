"""The verb `card`: make the domain card of any dense model from the text it was trained on.

A branch that is trained here has one already. With it `upcycle` and `extend` need neither --domains
nor, with `router.fit_text=background`, any text of the domain.
Not covered: uploading; the model card (README.md), which comes with a finished checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from nexus_ds.console import print_text
from nexus_ds.data import sample_options
from nexus_ds.data.sentence_encoder import SentenceEncoder
from nexus_ds.data.sources import open_source, require_domains
from nexus_ds.errors import OutputExistsError
from nexus_ds.outputs import held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="dense model, or adapter of --seed-model; gets the card",
    )
    parser.add_argument(
        "--data", required=True, help="folder of domains, hub:NAME[#COLUMN], or demo"
    )
    parser.add_argument(
        "--domain", required=True, metavar="NAME", help="the model's domain, one of --data"
    )
    parser.add_argument(
        "--seed-model", metavar="DIR", type=Path, help="dense model that this one was trained from"
    )
    parser.add_argument(
        "--license", default="", help="license of the model, in the hub's words (apache-2.0)"
    )
    sample_options.add_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a card that is there")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")


def run(args: argparse.Namespace) -> int:
    """Embed the domain's text and write the card beside the model.

    Raises:
        ConfigError, DataError: options, encoder or text.
        CheckpointError, UnsupportedModelError: a model that can't become an expert.
        OutputExistsError: there is a card.
    """
    # not at the top: they import torch, for which `card --help` doesn't wait
    from nexus_ds.checkpoint import cards
    from nexus_ds.checkpoint.adapters import open_branch
    from nexus_ds.checkpoint.dense import open_dense
    from nexus_ds.checkpoint.model_card import stated_license

    path = args.directory / cards.CARD
    if cards.has_card(args.directory) and not args.overwrite:
        raise OutputExistsError(f"{path} exists already; --overwrite replaces it")
    sample_options.check(args)
    # what is wrong with the models or the text is told before the encoder is loaded
    model = open_branch(args.directory, args.seed_model)
    seed = open_dense(args.seed_model) if args.seed_model else None
    source = open_source(args.data)
    require_domains(source, [args.domain])
    license_name = args.license or stated_license(args.directory)
    encoder = SentenceEncoder(args.encoder)
    with held(path):
        embeddings = sample_options.embedded(args, source, [args.domain], encoder)
        card = dataclasses.replace(
            cards.card_of(embeddings, {args.domain: 1.0}, args.domain, license_name),
            seed_sha256=cards.ffn_sha256(seed) if seed else "",
            ffn_sha256=cards.ffn_sha256(model),
        )
        cards.write_card(args.directory, card)
    if args.json:
        print_text(json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False))
        return 0
    print_text(
        f"wrote {path}: {card.domain}, {card.documents} of {card.text_documents} documents "
        f"({card.text_bytes:,} bytes), {len(card.embedding)} numbers of {card.encoder}"
    )
    return 0
