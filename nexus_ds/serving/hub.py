"""A mixture as it may be shown to everybody: card, license, sidecar, and no local path.

Models on the hub are called OWNER/NAME. Where a part of the mixture was a directory of this
machine, its name alone is kept, and it is no base model.
Not covered: uploading; licenses of the parts (`model_card.joint_license`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from nexus_ds.checkpoint.config_json import read_generation_config
from nexus_ds.checkpoint.headers import INDEX
from nexus_ds.checkpoint.json_files import confined, read_json_object
from nexus_ds.checkpoint.model_card import (
    FENCE,
    MODEL_CARD,
    card_text,
    nexus_card,
    split_card,
)
from nexus_ds.checkpoint.qwen3_next_headers import NORMS
from nexus_ds.checkpoint.records import (
    ROUTER,
    SIDECAR,
    ExtendStep,
    Manifest,
    OtherStep,
    RemoveStep,
    ReplaceStep,
    Step,
    UpcycleStep,
    manifest_json,
    read_manifest,
    router_name,
)
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.data.tokenizer import CONFIG
from nexus_ds.errors import ServingError
from nexus_ds.inputs import MOST_BYTES, require_file
from nexus_ds.outputs import copy_file, write_json, write_text
from nexus_ds.serving.directory import GENERATION, Opened, copy_licenses

NAMING = ("seed_model", "checkpoint")
"""Fields of a step that say where a model was."""
MADE_AT = ("name_or_path", "_name_or_path")
"""Keys in which transformers notes where it read a model."""
LOCAL = re.compile(r"(?<![\w./:<>\\-])(?:~|file://|[A-Za-z]:\\|/[\w.+-]+/)[\w.+/\\-]+")
"""An absolute path, or one in somebody's home."""
LOOKED_AT = ("*.json", "*.jinja", "*/*.jinja", MODEL_CARD)
WORDS = ("tokenizer.json", "vocab.json", "merges.txt", INDEX)
"""Files of words or names, in which anything may stand."""


def public(source: str) -> str:
    """Return how a model is called in public: OWNER/NAME, or the last part of a local path."""
    # the hub's names look like a folder in a folder
    on_hub = source.count("/") == 1 and not Path(source).exists()
    return source if on_hub else source.rpartition("/")[2]


def _public_step(step: Step) -> Step:
    # of another version: what it has is kept, but for where models lay
    if isinstance(step, OtherStep):
        named = {key: step.written[key] for key in NAMING if key in step.written}
        shown = {key: public(str(value)) for key, value in named.items()}
        return dataclasses.replace(step, written=step.written | shown)
    if isinstance(step, UpcycleStep):
        return dataclasses.replace(step, seed_model=public(step.seed_model))
    if isinstance(step, ExtendStep | ReplaceStep | RemoveStep):
        return dataclasses.replace(step, checkpoint=public(step.checkpoint))
    return step


def public_manifest(manifest: Manifest) -> Manifest:
    """Return what nexus.json says without local directories."""
    experts = [
        dataclasses.replace(expert, source=public(expert.source)) for expert in manifest.experts
    ]
    lineage = [_public_step(step) for step in manifest.lineage]
    return dataclasses.replace(manifest, experts=experts, lineage=lineage)


def _sources(manifest: Manifest) -> Iterator[str]:
    """Yield how the models were called that the mixture was made of."""
    for expert in manifest.experts:
        yield expert.source
    for step in manifest.lineage:
        entry = step.entry()
        for key in NAMING:
            if entry.get(key):
                yield str(entry[key])


def public_card(text: str, manifest: Manifest, license_name: str) -> tuple[str, bool]:
    """Return a README.md without local directories, and whether it states a license.

    Args:
        text: as it is, of whoever wrote it.
        manifest: of the checkpoint, with the names as they are.
        license_name: replaces the card's; empty: leaves it.
    """
    metadata, body = split_card(text, MODEL_CARD)
    # the longest first: one directory may lie in another
    for source in sorted(set(_sources(manifest)), key=len, reverse=True):
        body = body.replace(source, public(source))
    bases = metadata.pop("base_model", [])
    named = bases if isinstance(bases, list) else [bases]
    kept = [base for base in map(str, named) if "/" in public(base)]
    relation = metadata.pop("base_model_relation", "merge")
    # the hub takes no card whose base models it can't find
    if kept:
        metadata = {"base_model": kept, "base_model_relation": relation} | metadata
    if license_name:
        metadata["license"] = license_name
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"{FENCE}{head}{FENCE}{body}", bool(metadata.get("license"))


def refuse_local_paths(directory: Path) -> None:
    """Raise ServingError for the first local path in a file that is shown to everybody."""
    for pattern in LOOKED_AT:
        for path in sorted(directory.glob(pattern)):
            # a vocabulary may have any text as a token
            if path.name in WORDS:
                continue
            found = LOCAL.search(path.read_text("utf-8", errors="replace"))
            if found:
                raise ServingError(
                    f"{path.relative_to(directory)} of the checkpoint holds the local path "
                    f"{found[0][:100]!r}; take it out there, and export again"
                )


def write_public(opened: Opened, out: Path, license_name: str) -> list[str]:
    """Write a checkpoint for the hub into an empty directory; return what to know of it.

    Its hashes are left to be recorded when all stands there.

    Raises:
        ServingError: a local path in a file that is shown.
    """
    source = opened.directory
    manifest = read_manifest(source)
    shown = public_manifest(manifest)
    copied = _copy_files(opened, out)
    copy_tokenizer(source, out)
    _forget_places(out)
    copy_licenses(source, out)
    write_json(out / SIDECAR, manifest_json(shown))
    # people and `evaluate` go on writing it
    card = source / MODEL_CARD
    text = _written_card(card) if card.is_file() else card_text(nexus_card(shown))
    text, licensed = public_card(text, manifest, license_name)
    write_text(out / MODEL_CARD, text)
    refuse_local_paths(out)
    notes = [] if licensed else ["no license is stated for all parts: give one with --license"]
    there = {path.relative_to(out).as_posix() for path in out.rglob("*")} | copied
    # settings of the training, logs, and whatever else lies there
    names = {path.name for path in source.iterdir() if not path.name.startswith(".")}
    left = sorted(names - there)
    return notes + ([f"left out: {', '.join(left)}"] if left else [])


def _written_card(card: Path) -> str:
    require_file(card, MOST_BYTES, ServingError)
    try:
        return card.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ServingError(
            f"{card}: found other bytes than UTF-8 ({error}), expected a model card; "
            "save it as UTF-8, or remove it for a new one"
        ) from error


def _copy_files(opened: Opened, out: Path) -> set[str]:
    """Copy configuration, weights and sidecar; return the names that they had."""
    source = opened.directory
    names = [path.name for path in opened.raw.files()]
    for name in (INDEX, GENERATION, NORMS, "config.json"):
        if (source / name).is_file():
            names.append(name)
    # refused where it asks for code
    read_generation_config(source)
    (out / ROUTER).parent.mkdir()
    for name in names:
        copy_file(confined(source, name), out / name)
    router = router_name(source)
    copy_file(confined(source, router), out / ROUTER)
    return {*names, router}


def _forget_places(out: Path) -> None:
    """Take out of the tokenizer's configuration where it was read."""
    if not (out / CONFIG).is_file():
        return
    config = read_json_object(out, CONFIG)
    kept = {key: value for key, value in config.items() if key not in MADE_AT}
    if kept != config:
        write_json(out / CONFIG, kept)
