"""README.md of a checkpoint: the model card as the hub reads it, and what others' cards say.

Not covered: uploading; judging whether licences go together.
"""

from __future__ import annotations

from pathlib import Path

from nexus_ds.checkpoint.cards import has_card, read_card
from nexus_ds.config import parse_yaml
from nexus_ds.errors import ConfigError

MODEL_CARD = "README.md"
FENCE = "---\n"  # around a model card's metadata
MOST_CHARACTERS = 1 << 20  # of a model card from elsewhere that are looked at


def metadata_of(directory: Path) -> dict[str, object]:
    """Return the metadata of a directory's model card; empty where there is none to be read."""
    path = directory / MODEL_CARD
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(MOST_CHARACTERS)
    if not text.startswith(FENCE):
        return {}
    head, fence, _ = text.removeprefix(FENCE).partition("\n" + FENCE)
    try:
        found = parse_yaml(head, str(path)) if fence else {}
    # a text for people, whoever wrote it: nothing depends on it
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def stated_license(directory: Path) -> str:
    """Return the license that a model's domain card or model card states; empty: none."""
    if has_card(directory):
        own = read_card(directory).license
        if own:
            return own
    stated = metadata_of(directory).get("license")
    return stated if isinstance(stated, str) else ""
