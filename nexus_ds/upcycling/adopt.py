"""A mixture `adopted` that stock transformers has trained: it can be extended again.

What Trainer, TRL or a merged PEFT adapter saves are the weights. Experts, domains and lineage come
from the checkpoint that the training began from, and each P is fitted to the trained rows
(`model.refit`). The weights stay as they were trained, bit for bit, as far as a Nexus checkpoint
can hold them; what it can't hold is refused by name, or changed where that is asked for.
Shapes: E routed experts, H hidden size.
Not covered: adapters that are not merged, quantised weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.config_json import ConfigJson, read_config, read_generation_config
from nexus_ds.checkpoint.dense import as_stored
from nexus_ds.checkpoint.dense_settings import filled, settings
from nexus_ds.checkpoint.expert_rows import TOLERANCE
from nexus_ds.checkpoint.families.record import PRE_NORMS, DenseSettings
from nexus_ds.checkpoint.forms import QWEN3_NEXT, SOURCE, reordered
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.projection_module import domain_inputs, load_projection, state_of
from nexus_ds.checkpoint.projections import State
from nexus_ds.checkpoint.qwen2_moe import (
    TRAINED_GATE,
    Role,
    Stored,
    gate_name,
    open_moe,
    shared_gate_name,
    shared_name,
    stored,
)
from nexus_ds.checkpoint.qwen3_next_headers import as_dense, head_is_tied
from nexus_ds.checkpoint.records import AdoptStep, portable
from nexus_ds.checkpoint.relation import relation
from nexus_ds.checkpoint.sidecar import Sidecar, rows_of, versions
from nexus_ds.checkpoint.tensors import DTYPES, TensorReader
from nexus_ds.checkpoint.tokenizer import check_tokenizer
from nexus_ds.checkpoint.vocabulary import read_vocabulary
from nexus_ds.errors import CheckpointError, IncompatibleModelsError
from nexus_ds.model.refit import Refit, refit
from nexus_ds.upcycling.compatible import attention_names, check_alike
from nexus_ds.upcycling.new_checkpoint import NewModel, OldModel, as_written, copy_of, open_old
from nexus_ds.upcycling.sources import Source

BEFORE_FFN = ("pre_feedforward_layernorm", PRE_NORMS[1], PRE_NORMS[0])
"""Norms of which the first that a layer has stands before its FFN: Gemma's second is behind its
attention, Cohere 2 has one for both."""
ROUNDS_TO_HALF = {torch.float32: 2.0**-25, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Below this size the sigmoid of a number is exactly 1/2 in a dtype, with half of it to spare."""
# of config.json, what a training may change without changing the mixture
CARRIED = (
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
APPROXIMATE = "--approximate does it all the same; `evaluate` then tells what it costs"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer's router and gate."""

    row_error: float
    """Largest difference of P(D) to the trained rows, relative to their largest entry."""
    moved: float
    """How far the last map of P was moved, relative to its length."""
    rows: str
    """kept: as trained; shifted: by one vector, which softmax does not see; replaced: by P(D)."""
    gate: float
    """How far the shared expert's gate can have been from 1/2, at most; 0 where it did not move."""


@dataclass
class Adopted:
    """A mixture that could be written now, and what was found in each layer."""

    model: NewModel
    layers: list[LayerReport]

    def text(self) -> str:
        """Return what was found, a line a layer."""
        lines = []
        for number, layer in enumerate(self.layers):
            line = (
                f"layer {number}: rows {layer.rows}, P(D) differs from the trained ones by "
                f"{layer.row_error:.1e} of the largest entry; last map of P moved by "
                f"{layer.moved:.1e} of its length"
            )
            if layer.gate:
                line += f"; shared expert's gate set back, it was within {layer.gate:.1e} of 1/2"
            lines.append(line)
        return "\n".join(lines)


# What was trained ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """A mixture as it was trained elsewhere; no weight is in memory."""

    directory: Path
    config: ConfigJson
    """As a Nexus checkpoint would have it."""
    reader: TensorReader

    @property
    def dtype(self) -> str:
        """Of all weights, as safetensors names it: F32 | BF16 | F16."""
        return self.reader.info(gate_name(0)).dtype

    @property
    def sizes(self) -> DenseSettings:
        """What it computes outside of the experts."""
        return settings(self.config)


def _opened(directory: Path, nexus: OldModel) -> _Trained:
    """Open the trained mixture.

    Raises:
        CheckpointError, UnsupportedModelError: no mixture of this form, not whole, or another than
            `nexus`.
    """
    translated = nexus.config["model_type"] == QWEN3_NEXT
    rescaled = translated and not reordered(nexus.config)
    norms_of = nexus.directory if rescaled else None
    _check_alike(directory, read_config(directory), nexus)
    config, reader = open_moe(directory, norms_of)
    # Keys of the training, a balancing loss above all, are not for who serves the model.
    written = dict(nexus.config)
    for key in CARRIED:
        if key in config:
            written[key] = config[key]
    if not translated:
        written["tie_word_embeddings"] = filled(config)["tie_word_embeddings"]
    # what is tied in the family is two matrices in this form, and may have been trained apart
    elif settings(config).tied_embeddings and not _head_is_tied(directory, norms_of):
        written[SOURCE] = written[SOURCE] | {"tie_word_embeddings": False}
        reader = as_dense(Headers(directory), written, norms_of)
    return _Trained(directory, written, TensorReader.of(reader))


def _head_is_tied(directory: Path, norms_of: Path | None) -> bool:
    """Return whether the output layer of a Qwen3-Next holds nothing but its embeddings."""
    if norms_of:
        return head_is_tied(directory, norms_of)
    tied = as_stored({"tie_word_embeddings": True}, Headers(directory))
    return bool(tied["tie_word_embeddings"])


def _check_alike(directory: Path, config: ConfigJson, nexus: OldModel) -> None:
    """Raise CheckpointError or IncompatibleModelsError where config.json tells of another
    mixture."""
    for key in ("model_type", "num_experts", "num_experts_per_tok"):
        if config.get(key) != nexus.config[key]:
            raise CheckpointError(
                f"{directory}: {key} is {config.get(key)!r}, {nexus.directory} has "
                f"{nexus.config[key]!r}: it was not trained from that checkpoint, give --from the "
                "one that it was"
            )
    before = settings(nexus.config)
    found = settings(config, str(directory / "config.json"))
    # tokens may have been added, and a head of its own
    alike = dataclasses.replace(
        found, vocabulary=before.vocabulary, tied_embeddings=before.tied_embeddings
    )
    check_alike({"--from": vars(before), "trained": vars(alike)})


def _check_related(trained: _Trained, nexus: OldModel) -> None:
    found = relation(nexus.reader, trained.reader, attention_names(trained.sizes.layers))
    if found.unrelated:
        raise IncompatibleModelsError(
            f"{trained.directory}: its weights are unrelated to those of {nexus.directory} "
            f"(cosine {found.cosine:.2f} of attention matrices): give --from the checkpoint that "
            "it was trained from"
        )


def _tokenizer_of(trained: _Trained, nexus: OldModel) -> Path:
    """Return the directory whose tokenizer is the trained model's; its own, if it has one."""
    directory = trained.directory
    # a model alone is saved without
    if read_vocabulary(directory) is None:
        directory = nexus.directory
    check_tokenizer(directory, trained.sizes.vocabulary)
    return directory


# What must not move -------------------------------------------------------------------------------


def _gate_distance(reader: TensorReader, layer: int, sizes: DenseSettings) -> float:
    """Return how far the input of a gate's sigmoid can be from 0, whatever the token.

    What it reads has a norm's weights, and 1 more of a centred one, times a vector of length
    sqrt(H), at most. Infinite in families that have no norm there: they norm what comes out of
    attention and FFN instead.
    """
    normed_before = PRE_NORMS[0] in sizes.norms
    if not normed_before:
        return math.inf
    part = next(part for part in BEFORE_FFN if part in sizes.norms)
    norm_H = reader.read(f"model.layers.{layer}.{part}.weight").double() + sizes.centred
    gate_1H = reader.read(shared_gate_name(layer)).double()
    length = float((gate_1H[0] * norm_H).norm())
    return length * math.sqrt(len(norm_H))


def _check_zeros(reader: TensorReader, layer: int) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = shared_name(layer, part)
        if reader.read(name).any():
            raise CheckpointError(
                f"{reader.directory}: {name} was trained, but the mixture has no shared expert: "
                "its zeros stand for that; start from the checkpoint before that"
            )


def _gate(trained: _Trained, layer: int, shared: bool) -> tuple[float, str]:
    """Return how far a shared expert's gate can be from 1/2, and what is wrong with that.

    Args:
        trained: the model.
        layer: whose gate.
        shared: whether the mixture has a shared expert; of none the gate does not matter.
    """
    reader = trained.reader
    # of weights in the file: an adapter that was merged has moved them too
    gate_1H = reader.read(shared_gate_name(layer))
    largest = float(gate_1H.abs().max())
    if not shared:
        _check_zeros(reader, layer)
    if not largest > TRAINED_GATE and not math.isnan(largest):
        return 0.0, ""
    # the sigmoid's slope is 1/4 at most
    distance = _gate_distance(reader, layer, trained.sizes)
    if not shared or distance <= ROUNDS_TO_HALF[DTYPES[trained.dtype]]:
        return min(distance / 4, 0.5), ""
    return min(distance / 4, 0.5), (
        f"layer {layer}: the shared expert's gate was trained, its weights are up to "
        f"{largest:.1e}: it lets through up to {min(distance / 2, 1.0):.1%} more or less than "
        "the half that it is a constant for"
    )


# The router ---------------------------------------------------------------------------------------


def _refit(trained: _Trained, sidecar: Sidecar, layer: int) -> Refit:
    rows_EH = trained.reader.read(gate_name(layer))
    projection = load_projection(sidecar, layer)
    # as upcycling computes them, which torch may round otherwise: the router was frozen
    own_EH = torch.from_numpy(rows_of(sidecar, layer, trained.dtype))
    if torch.equal(own_EH, rows_EH.float()):
        return Refit(projection, rows_EH, 0.0, 0.0, False)
    tolerance = TOLERANCE[trained.dtype]
    return refit(projection, domain_inputs(sidecar), rows_EH, tolerance)


def _rows(trained: _Trained, found: Refit, layer: int) -> tuple[str, str]:
    """Return what becomes of a layer's rows, and what is wrong with that."""
    tolerance = TOLERANCE[trained.dtype]
    if found.error <= tolerance:
        return ("shifted" if found.shifted else "kept"), ""
    return "replaced", (
        f"layer {layer}: no P gives the trained rows: the nearest differs by {found.error:.1e} of "
        f"the largest entry, expected at most {tolerance:.1e}"
    )


@dataclass
class _Layers:
    """What was found, layer by layer."""

    reports: list[LayerReport] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    rows: dict[int, Floats] = dataclasses.field(default_factory=dict)
    """Of layers whose rows are not kept; fp32 numbers that the model's dtype has."""
    projections: list[State] = dataclasses.field(default_factory=list)


def _look(trained: _Trained, sidecar: Sidecar) -> _Layers:
    """Fit each layer's P, and look at each shared expert's gate."""
    found = _Layers()
    for layer in range(trained.sizes.layers):
        gate, said = _gate(trained, layer, sidecar.shared_expert == "seed")
        found.wrong += [said] if said else []
        if sidecar.router.kind != "nexus":
            found.reports.append(LayerReport(0.0, 0.0, "kept", gate))
            continue
        own = _refit(trained, sidecar, layer)
        rows, said = _rows(trained, own, layer)
        found.wrong += [said] if said else []
        # kept rows stay bit for bit: P(D) may differ from them in the last place
        if rows != "kept":
            found.rows[layer] = own.rows_EH.detach().float().numpy()
        found.projections.append(state_of(own.projection.state_dict()))
        report = LayerReport(
            own.error,
            own.moved,
            rows,
            gate,
        )
        found.reports.append(report)
    return found


# All of it ----------------------------------------------------------------------------------------


def adopted(directory: Path, nexus: Path, approximate: bool = False) -> Adopted:
    """Describe a mixture that was trained elsewhere as a Nexus checkpoint; nothing is written.

    All weights are exact copies, but for the shared experts' gates, which become the constant
    again. Each layer's P is changed as little as it takes to give the trained rows. Where the rows
    can be had up to one vector that is added to all, they are shifted by it: softmax does not see
    it. Free rows of a linear router stay as they are.

    Args:
        directory: what the training has saved.
        nexus: the Nexus checkpoint that it began from.
        approximate: set trained gates back, and replace rows that no P gives by the nearest.

    Raises:
        CheckpointError: no mixture, damaged, of another checkpoint, with trained gates of the
            shared experts or rows that no P gives.
        IncompatibleModelsError: it computes what `nexus` does not, or is unrelated to it.
        UnsupportedModelError: weights of several or other dtypes, adapters, code hooks.
            All that is wrong is told at once, in one error of the first one's type.
    """
    old = open_old(Path(nexus))
    trained = _opened(Path(directory), old)
    problems = Problems()
    with problems.collected():
        _check_related(trained, old)
    tokenizer = old.directory
    with problems.collected():
        tokenizer = _tokenizer_of(trained, old)
    problems.refuse()
    found = _look(trained, old.sidecar)
    if found.wrong and not approximate:
        raise CheckpointError(_refusal(trained.directory, found.wrong))
    step = AdoptStep(
        checkpoint=portable(nexus),
        trained=portable(directory),
        row_error=[layer.row_error for layer in found.reports],
        approximate=bool(found.wrong),
    )
    sidecar = dataclasses.replace(
        old.sidecar,
        lineage=[*old.sidecar.lineage, step],
        versions=versions(),
        projections=found.projections,
    )
    target = as_written(trained.config, trained.dtype)
    tensors = _tensors(target, trained, found)
    source = trained.directory
    if read_generation_config(source) is None:
        source = old.directory
    model = NewModel(
        "adopt",
        target,
        trained.dtype,
        tensors,
        sidecar,
        source,
        tokenizer,
    )
    return Adopted(model, found.reports)


def _refusal(directory: Path, wrong: Sequence[str]) -> str:
    return (
        f"{directory}: {'; '.join(wrong)}. Keep shared_expert_gate frozen in the training (peft: "
        f"exclude_modules), and start from the checkpoint before that; {APPROXIMATE}"
    )


def _tensors(target: ConfigJson, trained: _Trained, found: _Layers) -> dict[str, Source]:
    def source(name: str, entry: Stored) -> Source:
        if entry.role is Role.ROUTER and entry.layer in found.rows:
            return found.rows[entry.layer]
        return copy_of(trained.reader, name, entry)

    return {name: source(name, entry) for name, entry in stored(target).items()}
