"""The verb `extend`: further dense branches become experts of a mixture (paper section 2.3).

Their FFNs are appended, everything else is merged in with the share lambda, and the router's rows
of the new experts are P(d_new): no router parameter is added. With --replace they take the places
of experts of the same names.
Not covered: removing experts; branches of another seed (refused: sizes, tokenizer or weights tell);
training (`train`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.command_lines import next_training
from nexus_ds.config import load_config, named_once
from nexus_ds.console import print_text
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import new_directory, refuse_existing
from nexus_ds.report import verdict as before_after
from nexus_ds.settings import Config
from nexus_ds.upcycling import compatible

if TYPE_CHECKING:
    from nexus_ds.checkpoint.cards import DomainCard
    from nexus_ds.upcycling.new_checkpoint import NewModel

# evaluation/ imports torch, and upcycling/ numpy: functions below import them, so that
# `extend --help` waits for nothing.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="Nexus checkpoint to extend",
    )
    parser.add_argument(
        "--expert",
        metavar="NAME=DIR",
        required=True,
        action="append",
        help="a new dense branch, or a LoRA adapter; NAME is also its domain, a row of --domains, "
        "unless its domain card names another (repeat for each expert)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="the checkpoint has experts of these names: put the branches in their place",
    )
    parser.add_argument(
        "--domains",
        metavar="FILE",
        help="embeddings of the new domains, from the checkpoint's encoder; default: the domain "
        "cards in the branches' directories; with --replace and no card the text is the old one",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="dense model that adapters are merged into; default: the one that they name; where "
        "experts started with model.task_scale: their seed, into which only adapters are merged "
        "that name no directory of a model here",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="new directory of the extended checkpoint",
    )
    parser.add_argument(
        "--lambda",
        metavar="X",
        dest="share",
        type=float,
        help="total share of the new branches in averaged weights; default: k/(n+k) for k new "
        "beside n old experts, k/n for k of n that are replaced",
    )
    parser.add_argument(
        "--linear-init",
        choices=("keep", "reset"),
        default="keep",
        help="linear routers only: keep the old rows and add random ones, or reset all rows "
        "(the paper's baseline)",
    )
    _add_router_options(parser)


def _add_router_options(parser: argparse.ArgumentParser) -> None:
    """Declare how the router is refitted, and what is said of the result."""
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default=None,
        help="recipe with the router's settings",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="text of old and new domains for the refit; default: as embedded",
    )
    parser.add_argument(
        "--no-refit",
        action="store_true",
        help="leave P (or the linear rows): router.warm_start=none",
    )
    parser.add_argument(
        "--verdict",
        action="store_true",
        help="score both models on validation text of --data and print a table before and after "
        "(before any finetune); seconds for small models, two passes over N windows a domain "
        "for all",
    )
    before_after.add_options(parser)
    compatible.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="settings over those of the recipe",
    )


def _describe(
    args: argparse.Namespace,
    experts: dict[str, Path],
    embeddings: DomainEmbeddings | None,
    cards: dict[str, DomainCard],
    config: Config,
) -> NewModel:
    """Return the new mixture; lambda is --lambda, else that of --config's recipe, else k/(n+k)."""
    from nexus_ds.checkpoint.cards import Packages
    from nexus_ds.upcycling.extend import extended
    from nexus_ds.upcycling.replace import replaced

    checkpoint, out = Path(args.checkpoint), Path(args.out)
    packages = Packages(cards, Path(args.base) if args.base else None)
    waived = compatible.waived_by(args)
    share = args.share
    # of a recipe that was asked for: the default one is for the router's settings alone
    if share is None and args.config:
        share = config.pipeline.merge_weight
    if args.replace and args.linear_init != "keep":
        raise ConfigError(
            f"--linear-init {args.linear_init} is for experts that are added; "
            "with --replace the rows stay"
        )
    if args.replace:
        return replaced(checkpoint, experts, embeddings, config, share, packages, waived, out)
    assert embeddings is not None
    init = args.linear_init
    return extended(checkpoint, experts, embeddings, config, share, init, packages, waived, out)


def _embedded(
    args: argparse.Namespace, experts: dict[str, Path]
) -> tuple[DomainEmbeddings | None, dict[str, DomainCard]]:
    """Return the new domains' embeddings and the cards that they come from; None where the text of
    experts that are replaced is the old one."""
    from nexus_ds.checkpoint.cards import embeddings_for, has_card

    if args.replace and not args.domains and not any(map(has_card, experts.values())):
        return None, {}
    return embeddings_for(args.domains, experts)


def run(args: argparse.Namespace) -> int:
    """Check everything, write the checkpoint in a temporary place, refit, rename, score.

    lambda is --lambda, else `pipeline.merge_weight` of a recipe given with --config, else k/(n+k).

    Raises:
        IncompatibleModelsError: models, tokenizers or encoder that differ from the checkpoint's.
        UnsupportedModelError: a model that a Qwen2-MoE can't express.
        CheckpointError: missing, damaged, NaN or all-zero tensors, or rows that are not P(D).
        ConfigError, DataError: options, recipe, domain embeddings or text.
        OutputExistsError: --out is taken. In all cases --out is not made.
    """
    from nexus_ds.upcycling.blend import parse_experts

    out = Path(args.out)
    experts = parse_experts(args.expert)
    limit = before_after.parse_limit(args.limit)
    scores = args.verdict or limit is not None
    if named_once("--scored", args.scored) and not scores:
        raise ConfigError("--scored is of a table: give --verdict or --fail-if-worse too")
    refuse_existing(out)
    # last, so that the option holds against an override
    cold = ["router.warm_start=none"] if args.no_refit else []
    config = load_config(args.config or "demo", ["stage=extend", *args.overrides, *cold])
    embeddings, cards = _embedded(args, experts)
    model = _describe(args, experts, embeddings, cards, config)
    data = args.data or (embeddings.data if embeddings else "")
    # whether the warm start needs text is for `fit_text` to say
    if not data and scores:
        raise ConfigError(
            "without --domains nothing says where the text is: give --data DIR, "
            "or leave out --verdict and --fail-if-worse"
        )
    text = model.fit_text(data, config, "--no-refit")
    scored = None
    checkpoint = Path(args.checkpoint)
    if scores:
        from nexus_ds.evaluation.before_after import BeforeAfter, chosen

        # the old model is scored first: text that can't be read is told before anything is written
        domains = chosen(args.scored, checkpoint, model.domains_of(experts))
        read = config.data
        scored = BeforeAfter(checkpoint, data, domains, args.windows, read.bos, read.chat)
    with new_directory(out) as directory:
        report = model.write(directory, text, config.router, config.seed)
    verdict = None
    if scored:
        verdict = before_after.judge(scored.before, scored.after(out), limit, scored.labels)
    command = next_training(out, data or "DIR", args.config or "demo", "extend")
    if args.json:
        result = model.summary(out, report) | {
            "lambda": model.sidecar.lineage[-1].entry()["lambda"],
            "next": command,
            "verdict": verdict.as_dict() if verdict else None,
        }
        print_text(json.dumps(result, indent=2))
    else:
        print_text(model.describe(out, report))
        if verdict:
            print_text(verdict.text())
        print_text(f"next: {command}")
    return verdict.exit_code("extend", out) if verdict else 0
