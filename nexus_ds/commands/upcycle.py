"""The verb `upcycle`: a seed and its dense branches become one mixture (paper section 2.1).

The seed's FFN becomes the shared expert, each branch's FFN a routed expert, everything else the
mean over the branches.
Not covered: branches of different sizes, or whose vocabularies did not only grow (refused);
training (`train`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nexus_ds.command_lines import next_training
from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.outputs import new_directory, refuse_existing
from nexus_ds.upcycling import compatible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--seed",
        metavar="DIR",
        required=True,
        help="dense model that all experts were trained from",
    )
    parser.add_argument(
        "--expert",
        metavar="NAME=DIR",
        required=True,
        action="append",
        help="a dense branch, or a LoRA adapter; NAME is also its domain, a row of --domains, "
        "unless its domain card names another (repeat for each expert)",
    )
    parser.add_argument(
        "--domains",
        metavar="FILE",
        help="domain embeddings, from nexus-ds embed; default: the domain cards in the branches' "
        "directories",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="dense model that adapters are merged into; default: the one that they name",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="new directory of the Nexus checkpoint",
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default="demo",
        help="recipe with the router's settings",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="text for the router's warm start, and for model.merge_rows=counted; default: what "
        "was embedded for --domains",
    )
    compatible.add_options(parser)
    parser.add_argument("--no-warm-start", action="store_true", help="router.warm_start=none")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="settings over those of the recipe",
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, write the checkpoint under a temporary name, fit its router, rename.

    Raises:
        IncompatibleModelsError: models that differ (one table of all differences), or their
            tokenizers.
        UnsupportedModelError: a model that a Qwen2-MoE can't express.
        CheckpointError: missing, damaged, NaN or all-zero tensors.
        ConfigError, DataError: options, recipe, domain embeddings or text.
        OutputExistsError: --out is taken. In all cases --out is not made.
    """
    # not at the top: `upcycle --help` doesn't wait for numpy
    from nexus_ds.checkpoint.cards import Packages, embeddings_for
    from nexus_ds.data.token_counts import count_tokens
    from nexus_ds.upcycling.blend import parse_experts
    from nexus_ds.upcycling.upcycle import upcycled

    out = Path(args.out)
    refuse_existing(out)
    # last, so that the option holds against an override
    cold = ["router.warm_start=none"] if args.no_warm_start else []
    config = load_config(args.config, ["stage=moe", *args.overrides, *cold])
    seed = Path(args.seed)
    experts = parse_experts(args.expert)
    bare = seed if config.router.kind == "linear" else None
    embeddings, cards = embeddings_for(args.domains, experts, bare)
    packages = Packages(cards, Path(args.base) if args.base else None)
    waived = compatible.waived_by(args)
    # the embeddings' own record of where their text lies
    data = args.data or embeddings.data
    counts = None
    if config.model.merge_rows == "counted":
        domains = {name: cards[name].domain if name in cards else name for name in experts}
        counts = count_tokens(data, domains, seed, config.data)
    model = upcycled(seed, experts, embeddings, config, packages, waived, out, counts)
    text = model.fit_text(data, config, "--no-warm-start")
    with new_directory(out) as directory:
        report = model.write(directory, text, config.router, config.seed)
    command = next_training(out, data or "DIR", args.config, "moe")
    if args.json:
        print_text(json.dumps(model.summary(out, report) | {"next": command}, indent=2))
    else:
        print_text(model.describe(out, report))
        print_text(f"next: {command}")
    return 0
