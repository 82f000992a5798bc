"""The verb `extend`: further dense branches become experts of a trained mixture (paper section 2.3).

Their FFNs are appended, everything else is merged in with the share lambda, and the router's rows of the new experts are
P(d_new): no router parameter is added.
Not covered: removing experts; branches of another seed (refused where sizes or tokenizer tell); training (`train`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "add one or several dense branches as experts to a mixture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="Nexus checkpoint to extend")
    parser.add_argument(
        "--expert",
        metavar="NAME=DIR",
        required=True,
        action="append",
        help="a new dense branch; NAME is also its domain, a row of --domains (repeat for each expert)",
    )
    parser.add_argument(
        "--domains", metavar="FILE", required=True, help="embeddings of the new domains, from the checkpoint's encoder"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="new directory of the extended checkpoint")
    parser.add_argument(
        "--lambda",
        metavar="X",
        dest="share",
        type=float,
        help="total share of the new branches in averaged weights; default: k/(n+k) for k new beside n old experts",
    )
    parser.add_argument(
        "--linear-init",
        choices=("keep", "reset"),
        default="keep",
        help="linear routers only: keep the old rows and add random ones, or reset all rows (the paper's baseline)",
    )
    parser.add_argument("--config", metavar="RECIPE", default=None, help="recipe with the router's settings")
    parser.add_argument("--data", metavar="DIR", help="text of old and new domains for the refit; default: as embedded")
    parser.add_argument("--no-refit", action="store_true", help="leave P (or the linear rows) as they are")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings over those of the recipe")


def run(args: argparse.Namespace) -> int:
    """Extend: check everything, write the checkpoint under a temporary name, refit its router, rename.

    lambda is --lambda, else `pipeline.merge_weight` of a recipe given with --config, else k/(n+k).

    Raises:
        IncompatibleModelsError: models, tokenizers or encoder that differ from the checkpoint's.
        UnsupportedModelError: a model that a Qwen2-MoE can't express.
        CheckpointError: missing, damaged, NaN or all-zero tensors, or rows that are not P(D).
        ConfigError, DataError: options, recipe, domain embeddings or text.
        OutputExistsError: --out is taken. In all cases --out is not made.
    """
    from nexus_ds.config import load_config
    from nexus_ds.data.domains import read_domain_embeddings
    from nexus_ds.model.assembly import parse_experts
    from nexus_ds.model.growth import extended
    from nexus_ds.outputs import new_directory, refuse_existing
    from nexus_ds.pipeline import next_training

    out, experts = Path(args.out), parse_experts(args.expert)
    refuse_existing(out)
    config = load_config(args.config or "demo", ["stage=extend", *args.overrides])
    share = args.share
    if share is None and args.config:
        share = config.pipeline.merge_weight
    embeddings = read_domain_embeddings(Path(args.domains))
    model = extended(Path(args.checkpoint), experts, embeddings, config, share, args.linear_init)
    text = None
    if config.router.warm_start == "label_fit" and not args.no_refit:
        text = model.fit_windows(args.data or embeddings.data, config, "--no-refit")
    with new_directory(out) as directory:
        report = model.write(directory, text, config.router, config.seed)
    command = next_training(out, args.data or embeddings.data, args.config or "demo", "extend")
    result = model.summary(out, report) | {"lambda": model.sidecar.lineage[-1]["lambda"], "next": command}
    print(json.dumps(result, indent=2) if args.json else model.describe(out, report) + f"\nnext: {command}")
    return 0
