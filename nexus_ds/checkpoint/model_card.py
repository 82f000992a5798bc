"""README.md of a checkpoint: the model card as the hub reads it, and what others' cards say.

Its metadata (base models, license, tags) is YAML between two lines of dashes; the hub links a model
to those it was made of by `base_model`. The rest is for people: experts with their domains, hashes
and licenses, the encoder, how the model came about, and its scores where it was scored.

Not covered: uploading; judging whether licenses go together; names on the hub of models that were
given as directories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from nexus_ds.checkpoint.cards import DomainCard, has_card, read_card
from nexus_ds.checkpoint.records import Manifest, Step, TrainStep, UpcycleStep
from nexus_ds.config import parse_yaml
from nexus_ds.console import in_line
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.outputs import write_text

MODEL_CARD = "README.md"
FENCE = "---\n"  # around a model card's metadata
MOST_CHARACTERS = 1 << 20  # of a model card from elsewhere that are looked at
SHOWN = 16  # digits of a hash
NOT_SAID = "not said"


def metadata_of(directory: Path) -> dict[str, object]:
    """Return the metadata of a directory's model card; empty where there is none to be read."""
    path = directory / MODEL_CARD
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as stream:
        return split_card(stream.read(MOST_CHARACTERS), str(path))[0]


def split_card(text: str, where: str) -> tuple[dict[str, object], str]:
    """Return a model card's metadata and what follows; without any, nothing and the text.

    Args:
        text: of a README.md.
        where: its name.
    """
    if not text.startswith(FENCE):
        return {}, text
    head, fence, rest = text.removeprefix(FENCE).partition("\n" + FENCE)
    try:
        found = parse_yaml(head, where) if fence else {}
    # a text for people, whoever wrote it: nothing depends on it
    except ConfigError:
        return {}, text
    return (found, rest) if fence and isinstance(found, dict) else ({}, text)


def stated_license(directory: Path) -> str:
    """Return the license that a model's domain card or model card states; empty: none.

    A card that can't be read states none: whoever needs more of it is told.
    """
    with suppress(CheckpointError):
        own = read_card(directory).license if has_card(directory) else ""
        if own:
            return own
    stated = metadata_of(directory).get("license")
    return stated if isinstance(stated, str) else ""


# Writing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card is made of."""

    title: str
    base_models: Sequence[str]
    relation: str
    """To the base models, in the hub's words: merge | finetune."""
    license: str
    """Of the whole; empty: not said."""
    tags: Sequence[str]
    parts: list[str] = field(default_factory=list)
    """Paragraphs, in Markdown."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; bars and line ends in cells do not break it."""
    lines = [header, ["---"] * len(header), *rows]
    texts = []
    for line in lines:
        cells = [in_line(cell).replace("|", "\\|") for cell in line]
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)


def card_text(card: ModelCard) -> str:
    """Return the README.md."""
    metadata: dict[str, object] = {}
    if card.base_models:
        # a branch twice, or the seed among its branches: the hub wants each once
        metadata["base_model"] = list(dict.fromkeys(card.base_models))
        metadata["base_model_relation"] = card.relation
    metadata["library_name"] = "transformers"
    if card.license:
        metadata["license"] = card.license
    metadata |= {"pipeline_tag": "text-generation", "tags": list(card.tags)}
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return "\n\n".join([f"{FENCE}{head}{FENCE}\n# {in_line(card.title)}", *card.parts]) + "\n"


def joint_license(licenses: Mapping[str, str]) -> str:
    """Return the license of what is made of parts: theirs if they have one, `other` if they differ,
    empty where one says none."""
    stated = set(licenses.values())
    if not stated or "" in stated:
        return ""
    return stated.pop() if len(stated) == 1 else "other"


def _scores(scores: Mapping[str, float]) -> list[str]:
    """Return a table of perplexities; nothing where there are none."""
    if not scores:
        return []
    rows = [[domain, f"{value:.2f}"] for domain, value in scores.items()]
    said = "Perplexity on validation text at the end of the training:"
    return [f"## Evaluation\n\n{said}", table(["domain", "perplexity"], rows)]


def _step_text(step: Step) -> str:
    """Return one step of the lineage for people."""
    entry = step.entry()
    kept = ("seed_model", "checkpoint", "experts", "lambda", "stage", "steps", "tokens", "mixture")
    facts = [f"{key} {entry[key]}" for key in kept if entry.get(key) not in (None, "")]
    return in_line(f"{entry.get('verb', '?')}: {'; '.join(facts)}")


def nexus_card(manifest: Manifest, license_name: str = "") -> ModelCard:
    """Return the model card of a mixture.

    Args:
        manifest: what nexus.json says; of a last step that trained the scores are shown.
        license_name: of the whole, as its owner says; empty: what its parts' licenses come to.
    """
    last = manifest.lineage[-1] if manifest.lineage else None
    scores = last.perplexity if isinstance(last, TrainStep) else {}
    made = [step for step in manifest.lineage if isinstance(step, UpcycleStep)]
    seeds = {step.seed_model: step.seed_license for step in made}
    names = [expert.name for expert in manifest.experts]
    licenses = seeds | {expert.source: expert.license for expert in manifest.experts}
    experts = [
        [
            expert.name,
            expert.domain,
            expert.source,
            expert.license or NOT_SAID,
            f"`{expert.sha256[:SHOWN]}`",
        ]
        for expert in manifest.experts
    ]
    parts = [
        f"A mixture of {len(names)} experts that were dense models of one seed, made with nexus_ds "
        "(Nexus, arXiv 2408.15901). `transformers` loads it; where `model_type` of `config.json` "
        "begins with `nexus_`, after `import nexus_ds.hf`.",
        "## Experts",
        table(["expert", "domain", "from", "license", "FFN sha256"], experts),
        "`nexus.json` has the hashes whole. Names are those of directories: where a model lies on "
        "the hub, write its name there into `base_model`.",
    ]
    for seed, license_of_seed in seeds.items():
        what = "shared expert" if manifest.shared_expert == "seed" else "start of the branches"
        parts.append(in_line(f"Seed ({what}): {seed}, license: {license_of_seed or NOT_SAID}."))
    router, encoder = manifest.router, manifest.encoder
    if encoder:
        parts.append(
            f"Domain embeddings: {in_line(encoder.name)}, "
            f"revision `{in_line(encoder.revision[:SHOWN])}`, "
            f"{encoder.dimension} numbers, of at least {encoder.documents} documents a domain. "
            f"Router: {router.kind}, top-{router.top_k}."
        )
    steps = [f"{number}. {_step_text(step)}" for number, step in enumerate(manifest.lineage, 1)]
    software = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    parts += ["## Recipe", "\n".join(steps), f"Written with {in_line(software)}."]
    return ModelCard(
        title=f"A mixture of {', '.join(names)}",
        base_models=list(licenses),
        relation="merge",
        license=license_name or joint_license(licenses),
        tags=["mixture-of-experts", "moe", "merge", "nexus", *(e.domain for e in manifest.experts)],
        parts=[*parts, *_scores(scores)],
    )


def dense_card(
    base: str,
    license_name: str,
    domain: DomainCard | None,
    step: TrainStep,
) -> ModelCard:
    """Return the model card of a dense model that was trained here.

    Args:
        base: the model that it started from; empty: none.
        license_name: empty: not said.
        domain: its domain card, of a branch.
        step: the training, with its scores.
    """
    start = f"from {base}" if base else "from nothing"
    parts = [
        f"A dense model, trained {start} with nexus_ds on {step.tokens:,} tokens "
        f"({', '.join(f'{name} {share:.0%}' for name, share in step.mixture.items())}); "
        "`training.yaml` has all settings."
    ]
    tags = ["nexus"]
    if domain:
        tags.append(domain.domain)
        rows = {
            "domain": domain.domain,
            "embedding": f"{len(domain.embedding)} numbers of {domain.encoder}, "
            f"revision `{domain.revision[:SHOWN]}`",
            "embedded": f"{domain.documents} documents, {domain.windows} windows of each at most",
            "FFN sha256": f"`{domain.ffn_sha256[:SHOWN]}`",
            "seed's FFN sha256": f"`{domain.seed_sha256[:SHOWN]}`",
        }
        parts += ["## Domain", table(["", ""], list(rows.items()))]
        parts.append(
            "It can become an expert of a mixture: `nexus-ds upcycle` and `nexus-ds extend` read "
            "its `domain_card.json`."
        )
    return ModelCard(
        title=f"A branch for {domain.domain}" if domain else "A dense model",
        base_models=[base] if base else [],
        relation="finetune",
        license=license_name,
        tags=tags,
        parts=[*parts, *_scores(step.perplexity)],
    )


def write_model_card(directory: Path, card: ModelCard) -> None:
    """Write README.md into a checkpoint that is not yet finished."""
    write_text(directory / MODEL_CARD, card_text(card))
