"""Whether models can be put together: everything that headers, configurations, tokenizers and a
sample of the weights tell, before a byte is written.

Each check raises one error that names all it found and what to do about each; who asks collects
them (`checkpoint.problems`). What differs without harm is a note on stderr.
No torch here: `inspect` asks the same questions.
Not covered: aligning models of different bases (permutations, vocabularies that did not only grow);
values outside of the sample (they are checked as they are written).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nexus_ds.checkpoint.config_json import ConfigJson, read_generation_config
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import DenseSettings, dense_weights
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.qwen2_moe import Role, stored
from nexus_ds.checkpoint.relation import UNRELATED, Relation, relation
from nexus_ds.checkpoint.values import FLOATS, read_values, sample
from nexus_ds.checkpoint.wrappers import text_config
from nexus_ds.console import in_line
from nexus_ds.errors import CheckpointError, IncompatibleModelsError
from nexus_ds.progress import say

ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
SIZES = (
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn_size",
    "qkv_bias",
    "norms",
    "qk_norm",
    "qk_names",
    "output_gate",
    "centred",
    "linear",
)
TIED, POSITIONS = "tie_word_embeddings", "max_position_embeddings"
SHOWN = 5  # tensors in a message
REMEDIES = {
    "family": "save all models as one family: `model_type` decides how the weights are read",
    **dict.fromkeys(
        SIZES,
        "models of other sizes have no common base: give branches that were trained from the seed",
    ),
    "vocabulary": "where tokens were only added, --align-vocab keeps them all; else resize the "
    "embeddings back (resize_token_embeddings) or train from the seed's vocabulary",
    "rope": "train with the seed's RoPE; where only config.json differs, give it the RoPE that the "
    "model was trained with",
    "rope_positions": "this kind of RoPE depends on max_position_embeddings: set it to the number "
    "that the models were trained with",
    "norm_eps": "rms_norm_eps changes what is computed: set the value that the models were "
    "trained with",
    "tied_embeddings": "save all with a head of their own (tie_word_embeddings false, the "
    "embeddings copied to lm_head.weight), or all tied",
    "sliding_window": "train with the seed's attention; where only config.json differs, give it "
    "the window that the model was trained with",
    "activation": "train with the seed's activation",
    "factors": "train with the seed's numbers; where only config.json differs, give it those that "
    "the model was trained with",
    "turned_layers": "train with RoPE in the seed's layers",
    "layer_types": "train with the seed's attention in each layer",
}
"""What to do where models differ, by the name of a setting (of RoPE's for all of it)."""


@dataclass(frozen=True)
class Waived:
    """Differences that whoever asks wants to live with."""

    unrelated: bool = False
    """Branches of another origin (--allow-unrelated): a note instead of a refusal."""
    vocabulary: bool = False
    """Vocabularies that grew (--align-vocab)."""


NOTHING = Waived()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of verbs that put dense branches together."""
    parser.add_argument(
        "--allow-unrelated",
        action="store_true",
        help="average branches of another origin too: noise until it is trained",
    )
    parser.add_argument(
        "--align-vocab",
        action="store_true",
        help="tokens were added to some models: keep all, each with rows from those that know it",
    )


def waived_by(args: argparse.Namespace) -> Waived:
    """Return what the options of `add_options` say."""
    return Waived(unrelated=args.allow_unrelated, vocabulary=args.align_vocab)


def note(text: str) -> None:
    """Say on stderr what is no mistake, but may surprise."""
    say(f"note: {text}")


# Settings -----------------------------------------------------------------------------------------


def _flat(values: Mapping[str, object]) -> dict[str, str]:
    """Return settings as texts, RoPE one key a line and layer types as one letter a layer."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            for inner, item in sorted(value.items()):
                flat[f"{key}.{inner}"] = str(item)
        elif isinstance(value, tuple):
            flat[key] = "".join(str(item)[0] for item in value)
        else:
            flat[key] = str(value)
    return flat


def traits(model: DenseModel) -> dict[str, object]:
    """Return all that must agree between models that are averaged; a dtype is cast instead."""
    return {"family": model.family, **vars(model.settings)}


def _settings(model: DenseModel) -> dict[str, object]:
    """Return what must agree with a mixture, which is of no family."""
    return vars(model.settings)


def differing(models: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """Return by name of a setting what each model has, where they are not all alike.

    Args:
        models: for each model's name its traits.
    """
    flat = [_flat(values) for values in models.values()]
    # in the order in which models first have them: a dict, not a set
    keys: dict[str, None] = {}
    for one in flat:
        keys |= dict.fromkeys(one)
    rows = {key: [one.get(key, "-") for one in flat] for key in keys}
    return {key: found for key, found in rows.items() if len(set(found)) > 1}


def check_alike(models: Mapping[str, Mapping[str, object]], waived: Waived | None = None) -> None:
    """Raise IncompatibleModelsError with one table of all differences among models, and remedies.

    Args:
        models: for each model's name its traits.
        waived: differences that are no mistake.
    """
    rows = differing(models)
    if waived and waived.vocabulary:
        rows.pop("vocabulary", None)
    if not rows:
        return
    table = [["", *models], *([key, *found] for key, found in rows.items())]
    remedies: dict[str, list[str]] = {}
    for key in rows:
        # all of RoPE has one remedy
        remedy = REMEDIES[key.split(".")[0]]
        remedies.setdefault(remedy, []).append(key)
    lines = [f"{', '.join(keys)}: {remedy}" for remedy, keys in remedies.items()]
    raise IncompatibleModelsError(
        "the models differ where they must agree; use branches of one seed, saved alike:\n"
        + "\n".join([_columns(table), *lines])
    )


def _columns(table: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as lines whose columns stand below each other."""
    grid = [[in_line(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for row in grid:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# Weights ------------------------------------------------------------------------------------------


def attention_names(layers: int) -> list[str]:
    """Return the names of all attention matrices."""
    return [
        f"model.layers.{layer}.self_attn.{part}" for layer in range(layers) for part in ATTENTION
    ]


def check_related(
    origin: str,
    reader: Headers,
    models: Mapping[str, DenseModel],
    waived: Waived | None = None,
) -> None:
    """Refuse models of another origin: of the same sizes and tokenizer, but their average is noise.

    Attention matrices tell: they are averaged, and nothing but a common start makes them similar.
    A few MB of each model are read.

    Args:
        origin: what the models should descend from, for messages.
        reader: its weights, dense or of a mixture.
        models: for each expert's name its dense model.
        waived: `unrelated` makes a note of it.

    Raises:
        IncompatibleModelsError: names each unrelated expert and its cosine.
    """
    unrelated = []
    for name, model in models.items():
        found = relation(reader, model.reader, attention_names(model.settings.layers))
        if found.unrelated:
            unrelated.append(unrelated_text(f"expert {name} ({model.directory})", found))
    if not unrelated:
        return
    said = f"weights that are unrelated to those of {origin}: {'; '.join(unrelated)}"
    if waived and waived.unrelated:
        note(f"{said}: their average is noise until it is trained")
        return
    raise IncompatibleModelsError(
        f"{said} (median over attention matrices; a branch has about 0.9, "
        f"expected at least {UNRELATED}). The average of models of different origin is noise, "
        "even where sizes and tokenizer agree: give branches that were trained from that "
        "model, or the one that these come from; --allow-unrelated averages them all the same"
    )


def note_unchanged(seed: DenseModel, models: Mapping[str, DenseModel]) -> None:
    """Say on stderr whose feed-forward networks are the seed's, by a sample: all that a routed
    expert has of its branch. The seed itself as an expert is meant so.

    Args:
        seed: of the mixture.
        models: for each expert's name its dense model.
    """
    for name, model in models.items():
        # one tensor that differs is enough, mostly the first
        changed = any(
            not np.array_equal(sample(seed.reader, one), sample(model.reader, one))
            for one in model.ffn_names()
        )
        if not changed and model.directory.resolve() != seed.directory.resolve():
            note(
                f"expert {name} ({model.directory}): its feed-forward networks are the seed's, so "
                "a routed expert has nothing of its own; train them (an adapter's target_modules: "
                "gate_proj, up_proj, down_proj), or leave it out"
            )


def unrelated_text(who: str, found: Relation) -> str:
    """Return a model and its cosine, for messages."""
    return f"{who}: cosine {found.cosine:.2f}"


def check_sample(who: str, reader: Headers, names: Iterable[str]) -> None:
    """Look for damaged weights in a sample of each tensor; those found are counted in full.

    Args:
        who: names the model in messages.
        reader: its tensors.
        names: those that are looked at.

    Raises:
        CheckpointError: NaN, infinite or all-zero weights; names each tensor and its count.
    """
    found = []
    for name in names:
        said = ""
        # older files hold integers, which are no weights
        if reader.info(name).dtype in FLOATS:
            said = _damage(reader, name)
        if said:
            found.append(f"tensor {name} {said}")
    if found:
        more = f"; and {len(found) - SHOWN} more tensors" if len(found) > SHOWN else ""
        raise CheckpointError(
            f"{who} ({reader.directory}): {'; '.join(found[:SHOWN])}{more}; "
            "expected finite, trained weights, use a sound state of that model"
        )


def _damage(reader: Headers, name: str) -> str:
    """Return what is wrong with a tensor; empty where its sample is sound."""
    seen = sample(reader, name)
    if not np.isfinite(seen).all():
        bad = np.count_nonzero(~np.isfinite(read_values(reader, name)))
        return f"has {bad} values that are NaN or infinite"
    # A bias of zeros is how Qwen2 starts; a weight of zeros was never trained or never written.
    if seen.any() or not name.endswith(".weight") or read_values(reader, name).any():
        return ""
    return "has only zeros"


# All of them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What branches are put beside: their seed, or the mixture that they are added to."""

    who: str
    """seed | checkpoint."""
    directory: Path
    reader: Headers
    settings: DenseSettings
    family: str | None
    """None of a mixture, which is of none: what it computes stands in the settings."""
    names: Iterable[str]
    """Tensors whose values must be sound."""
    rows: Literal["none", "averaged", "kept"]
    """What its own rows of embeddings are in the new ones: not among them, averaged with those of
    the models, or there as they are, so that the models give those of further tokens alone."""

    def traits(self) -> dict[str, object]:
        """Return what branches must agree with."""
        return ({"family": self.family} if self.family else {}) | vars(self.settings)


def seed_origin(model: DenseModel, kept: bool = False) -> Origin:
    """Return a seed as what its branches are compared with; `kept`: whether its embeddings are."""
    names = dense_weights(model.settings)
    rows: Literal["kept", "none"] = "kept" if kept else "none"
    return Origin("seed", model.directory, model.reader, model.settings, model.family, names, rows)


def mixture_origin(directory: Path, config: ConfigJson, reader: Headers) -> Origin:
    """Return a mixture as what new experts are compared with; its config.json and tensors are as
    `open_moe` has them."""
    # Without a shared expert zeros stand in its place; the constant gate is checked elsewhere,
    # and is zero in fp16, as others save it.
    odd = (Role.SHARED, Role.SHARED_GATE)
    names = [name for name, entry in stored(config).items() if entry.role not in odd]
    return Origin("checkpoint", directory, reader, settings(config), None, names, "averaged")


def check_models(
    origin: Origin,
    models: Mapping[str, DenseModel],
    problems: Problems,
    waived: Waived = NOTHING,
) -> None:
    """Check all but tokenizers of dense models against what they are put beside.

    Args:
        origin: their seed or mixture.
        models: for each expert's name its model.
        problems: collects what is wrong.
        waived: differences that are no mistake.
    """
    of = traits if origin.family else _settings
    found = {name: of(model) for name, model in models.items()}
    # an expert may be of the seed's name
    who = f"the {origin.who}" if origin.who in models else origin.who
    with problems.collected():
        check_alike({who: origin.traits()} | found, waived)
    with problems.collected():
        check_related(f"the {origin.who} {origin.directory}", origin.reader, models, waived)
    with problems.collected():
        check_sample(origin.who, origin.reader, origin.names)
    for name, model in models.items():
        with problems.collected():
            check_sample(f"expert {name}", model.reader, dense_weights(model.settings))
    with problems.collected():
        # only to refuse one that asks for code; who writes reads it again
        read_generation_config(origin.directory)


def difference_notes(origin: Origin, models: Mapping[str, DenseModel]) -> list[str]:
    """Return what differs in configurations and is carried or left behind all the same."""
    texts = []
    own = text_config(read_json_object(origin.directory, "config.json"))
    for name, model in models.items():
        other = model.config
        # an adapter has none of its own
        if (model.directory / "config.json").is_file():
            other = text_config(read_json_object(model.directory, "config.json"))
        # lengths that RoPE depends on are compared with the settings
        if other.get(POSITIONS) != own.get(POSITIONS):
            texts.append(
                f"expert {name}: {POSITIONS} is {other.get(POSITIONS)}, the new checkpoint has "
                f"{own.get(POSITIONS)}, that of {origin.directory}"
            )
        if other.get(TIED) and not model.settings.tied_embeddings:
            texts.append(
                f"expert {name}: config.json ties the embeddings, but {model.directory} has a head "
                "of its own: it is taken, as transformers does; tools that go by config.json "
                "compute something else with that model"
            )
    return texts


# Disk ---------------------------------------------------------------------------------------------


def check_disk(out: Path, needed: int) -> None:
    """Raise CheckpointError where the disk of a new directory has less than `needed` bytes free."""
    # the folder in which it will be made may not be there yet
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{out}: not enough space: need {needed:,} bytes, free {free:,}; make room first, "
            "or give an --out on another disk"
        )
