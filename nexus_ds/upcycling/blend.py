"""Putting models together: what all of upcycling shares. Checks first, then one pass of writing.

Every tensor of the output is a `Blend` (a weighted sum of stored tensors, in fp32; a single one is
copied exactly) or is given (expert embeddings). `write_tensors` reads and writes slices of rows, so
memory does not grow with the model.
Not covered: aligning models of different bases (permutations, other vocabularies); which rules
there are (`merge`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import (
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.cards import (
    DomainCard,
    check_card,
    ffn_sha256,
)
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.headers import row_slices, sha256_of_tensors, tensor_bytes, tensor_head
from nexus_ds.checkpoint.model_card import stated_license
from nexus_ds.checkpoint.new_files import Place
from nexus_ds.checkpoint.qwen2_moe import Role, Stored, planned
from nexus_ds.checkpoint.qwen3_next import open_writer
from nexus_ds.checkpoint.records import (
    EncoderRecord,
    ExpertRecord,
    Step,
    portable,
    start_scale,
)
from nexus_ds.checkpoint.tensors import (
    DTYPES,
    TensorReader,
    TensorWriter,
)
from nexus_ds.command_lines import EXPERT_NAME
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.outputs import write_json
from nexus_ds.progress import Progress
from nexus_ds.upcycling.compatible import note


@dataclass(frozen=True)
class Part:
    """One summand of a tensor: `weight` times the tensor `name` of a model."""

    who: str
    """Names the model in messages."""
    reader: TensorReader
    name: str
    weight: float = 1.0
    zeros: bool = False
    """Whether only zeros are right: the shared expert of a mixture without one."""


@dataclass(frozen=True)
class Blend:
    """sum(weight * tensor) / divisor * scale over the parts, in fp32.

    A lone part of weight 1 is copied as it is, or cast; where `scale` is a power of two, scaling it
    loses no bit.
    """

    parts: Sequence[Part]
    divisor: float = 1.0
    scale: float = 1.0
    rule: assembly.Rule | None = None
    """Another way to merge the parts, instead of the sum; see `checkpoint.assembly`."""


@dataclass(frozen=True)
class Stack:
    """Rows of one tensor from several blends, below each other."""

    pieces: tuple[tuple[int, int, Blend], ...]
    """(start, stop, blend): rows [start, stop) come from the blend's rows of these numbers."""


Source = Blend | Stack | Tensor
"""Where a tensor of the output comes from."""


def expert_start(
    part: Part,
    entry: Stored,
    lineage: list[Step],
    seed: TensorReader | None,
) -> Blend:
    """Return an expert's tensor: its dense model's, scaled as it is stored and as it starts.

    Args:
        part: the dense model's tensor.
        entry: the expert's.
        lineage: of the mixture; it says how experts start.
        seed: of the mixture; needed where routed experts go further than their branches.
    """
    scale = entry.scale
    shared = entry.role is Role.SHARED
    # linear in what it multiplies, as gate_proj is not
    if entry.part == "down_proj":
        scale *= start_scale(lineage, "shared" if shared else "routed")
    task = start_scale(lineage, "task")
    if shared or task == 1.0:
        return Blend([part], scale=scale)
    # `extend` has asked for it
    assert seed is not None
    branch = dataclasses.replace(part, weight=task)
    return Blend([branch, Part("seed", seed, entry.dense_name, 1.0 - task)], scale=scale)


def mean_of(parts: Sequence[Part]) -> Blend:
    """Return the arithmetic mean of tensors (paper section 2.1)."""
    return Blend(parts, divisor=float(len(parts)))


def parse_experts(values: Iterable[str]) -> dict[str, Path]:
    """Parse the NAME=DIR of --expert, in the order given.

    Raises:
        ConfigError: another form, a name that is no plain word, or a name given twice.
    """
    experts: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not equals or not directory or not EXPERT_NAME.fullmatch(name):
            raise ConfigError(
                f"--expert {value!r}: expected NAME=DIR, "
                "with a name of letters, digits, '_', '.', '-'"
            )
        if name in experts:
            raise ConfigError(
                f"--expert {name} is given twice; each expert needs a name of its own"
            )
        experts[name] = Path(directory)
    return experts


def domain_vectors(embeddings: DomainEmbeddings, names: Iterable[str]) -> Tensor:
    """Return the raw domain embeddings [n, m] fp32 of experts.

    Raises:
        DataError: a domain that was not embedded; names those that were.
    """
    # copies: rows of a file are views into all of it
    vectors = [embeddings.vector(name).copy() for name in names]
    return torch.stack([torch.from_numpy(vector) for vector in vectors])


def encoder_record(embeddings: DomainEmbeddings, names: Iterable[str]) -> EncoderRecord:
    """Return what the sidecar keeps of the encoder."""
    fewest = min(embeddings.documents.get(name, 0) for name in names)
    return EncoderRecord(
        embeddings.encoder,
        embeddings.revision,
        embeddings.dimension,
        fewest,
        True,
    )


def expert_records(
    models: Mapping[str, DenseModel],
    cards: Mapping[str, DomainCard],
    old: Sequence[ExpertRecord] = (),
) -> list[ExpertRecord]:
    """Return what the sidecar keeps of experts; of those whose card names no hash of its weights
    the hash is told by `write_tensors`.

    Args:
        models: by the experts' names.
        cards: that say which domains these are; an expert without one is named by its domain.
        old: experts that stay beside them.

    Raises:
        DataError: a card of other weights.
        CheckpointError: a card whose domain can't be a folder's name.
        ConfigError: a domain that another expert has.
    """
    taken = {expert.domain: expert.name for expert in old}
    records = []
    for name, model in models.items():
        # where nothing is to be compared before, they are hashed as they are copied
        sha256 = ""
        domain = name
        card = cards.get(name)
        if card:
            domain = card.domain
        if card and card.ffn_sha256:
            sha256 = ffn_sha256(model)
            check_card(name, card, sha256)
        # a card comes from elsewhere, and names a folder of text
        if not EXPERT_NAME.fullmatch(domain):
            raise CheckpointError(
                f"expert {name}: the domain {domain[:100]!r} of its card is no name of one; "
                "expected letters, digits, '_', '.', '-'"
            )
        if domain in taken:
            raise ConfigError(
                f"expert {name} is of the domain {domain}, as the expert {taken[domain]} is; "
                "expected a domain of its own: give it another name in the domain card"
            )
        taken[domain] = name
        source = portable(model.directory)
        records.append(ExpertRecord(name, domain, source, sha256, stated_license(model.directory)))
    return records


def note_other_seeds(seed: DenseModel, cards: Mapping[str, DomainCard]) -> None:
    """Say on stderr which cards name another seed than the one that is given.

    Not refused: a seed that was saved in another dtype is another by its hash alone, and
    `check_related` tells those that are others by their weights.
    """
    known = {name: card.seed_sha256 for name, card in cards.items() if card.seed_sha256}
    if not known:
        return
    own = ffn_sha256(seed)
    for name, sha256 in known.items():
        if sha256 != own:
            note(
                f"expert {name}: its card names another seed (FFN sha256 {sha256[:12]}) "
                f"than {seed.directory} ({own[:12]}); their weights are related all the same"
            )


def _check_values(
    part: Part,
    bad: int,
    nonzero: bool,
) -> None:
    where = f"{part.who} ({part.reader.directory}): tensor {part.name}"
    if bad:
        raise CheckpointError(
            f"{where} has {bad} values that are NaN or infinite; "
            "expected finite weights, use a sound state of that model"
        )
    # A bias of zeros is how Qwen2 starts; a weight of zeros was never trained or never written.
    if not nonzero and part.name.endswith(".weight") and not part.zeros:
        raise CheckpointError(
            f"{where} has only zeros; expected trained weights, use a sound state of that model"
        )


class _Health:
    """Counts of what is wrong with one part's values, over all slices."""

    def __init__(self) -> None:
        self.bad, self.nonzero = 0, False

    def see(self, rows: Tensor) -> None:
        """Count values of one slice."""
        finite = int(torch.isfinite(rows).sum())
        self.bad += rows.numel() - finite
        self.nonzero = self.nonzero or bool(rows.any())


def _blocks(
    blend: Blend,
    health: Sequence[_Health],
    start: int,
    stop: int,
) -> tuple[Tensor, assembly.Blocks]:
    """Return rows [start, stop) of the last part, and those of all as a rule sees them."""
    blocks = []
    for part, seen in zip(blend.parts, health, strict=True):
        rows = part.reader.read_rows(part.name, start, stop)
        seen.see(rows)
        # copied: rules write into them
        flat = rows.float().flatten().clone()
        blocks.append(flat.numpy())
    return rows, blocks


def _look(blend: Blend, rule: assembly.Rule, shape: tuple[int, ...]) -> None:
    """Show a rule the whole tensor as often as it asks for."""
    unseen = [_Health() for _ in blend.parts]
    for turn in range(rule.looks):
        for start, stop in row_slices(shape):
            rows, blocks = _blocks(blend, unseen, start, stop)
            width = rows[0].numel()
            rule.look(blocks, start * width, turn)


def _blend_rows(
    blend: Blend,
    health: Sequence[_Health],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows [start, stop) of a blend in `dtype`.

    One part's slice is in memory at a time, beside the sum.
    """
    if blend.rule:
        rows, blocks = _blocks(blend, health, start, stop)
        width = rows[0].numel()
        merged = blend.rule(blocks, start * width)
        return torch.from_numpy(merged).reshape(rows.shape).to(dtype)
    first = blend.parts[0]
    total = first.reader.read_rows(first.name, start, stop)
    health[0].see(total)
    if len(blend.parts) == 1 and first.weight == blend.divisor == 1.0:
        # a copy never goes through fp32 and back: it keeps every bit
        return total.mul_(blend.scale).to(dtype)
    # fp32 whatever the parts are: bf16 would round each summand
    total = total.float() * first.weight
    for part, seen in zip(blend.parts[1:], health[1:], strict=True):
        rows = part.reader.read_rows(part.name, start, stop)
        seen.see(rows)
        total += rows.float() * part.weight
    return (total / blend.divisor * blend.scale).to(dtype)


def _write_blend(
    writer: TensorWriter,
    name: str,
    shape: tuple[int, ...],
    blend: Blend,
    dtype: torch.dtype,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Stream rows [first, last) of one tensor, a slice at a time; values are checked on the way."""
    health = [_Health() for _ in blend.parts]
    result = _Health()
    count = (shape[0] if last is None else last) - first
    if blend.rule:
        _look(blend, blend.rule, shape)
    for start, stop in row_slices((count, *shape[1:])):
        rows = _blend_rows(blend, health, first + start, first + stop, dtype)
        result.see(rows)
        writer.write_rows(name, first + start, rows)
    for part, seen in zip(blend.parts, health, strict=True):
        _check_values(part, seen.bad, seen.nonzero)
    # parts that are finite can overflow in the sum, doubled, or in a narrower dtype
    if result.bad:
        who = blend.parts[0].who
        raise CheckpointError(
            f"{name}: {result.bad} values overflow {dtype}; {who} has weights too large"
        )


def _source(part: Part, rows: tuple[int, int] | None) -> assembly.Source:
    """Return a summand as the engine reads it, whole or some of its rows."""
    # A bias of zeros is how Qwen2 starts; a weight of zeros was never trained or never written.
    zeros = part.zeros or not part.name.endswith(".weight")
    label = f"{part.who} ({part.reader.directory}): tensor {part.name}"
    whole = assembly.stored(part.reader, part.name, label, zeros)
    if rows is None:
        return whole
    row = whole.size // part.reader.info(part.name).shape[0]
    return whole.part(rows[0] * row, rows[1] * row)


def _piece(
    name: str,
    blend: Blend,
    place: Place,
    rows: tuple[int, int] | None = None,
) -> assembly.Piece:
    """Return how a tensor, or some of its rows, is made of stored ones."""
    sources = [_source(part, rows) for part in blend.parts]
    weights = [part.weight for part in blend.parts]
    as_it_is = blend.rule is None and weights == [blend.divisor] == [blend.scale] == [1.0]
    # a copy never goes through fp32 and back: it keeps every bit
    if as_it_is and sources[0].dtype == place.dtype:
        return assembly.Copy(place, sources[0])
    rule = blend.rule or assembly.Mean(weights, blend.divisor, blend.scale)
    return assembly.Merge(place, sources, rule, name, blend.parts[0].who)


def _pieces(
    name: str,
    made: Blend | Stack,
    files: TensorWriter,
) -> list[assembly.Piece]:
    """Return the pieces of one tensor."""
    place = files.place(name)
    if isinstance(made, Blend):
        return [_piece(name, made, place)]
    dtype, shape = files.plan[name]
    row = tensor_bytes(dtype, shape[1:])
    return [
        _piece(name, blend, place.part(start * row, stop * row), (start, stop))
        for start, stop, blend in made.pieces
    ]


def _hashed_job(
    names: Sequence[str], tensors: Mapping[str, Source], files: TensorWriter
) -> assembly.Job:
    """Return the making of tensors, whose first sources are hashed as `sha256_of_tensors`."""
    pieces, heads = [], []
    for name in names:
        blend = tensors[name]
        assert isinstance(blend, Blend)
        part = blend.parts[0]
        pieces.append(_piece(name, blend, files.place(name)))
        heads.append(tensor_head(part.name, part.reader.info(part.name)))
    return assembly.Job(pieces, heads)


def _assembled(
    files: TensorWriter,
    tensors: Mapping[str, Source],
    hashed: Mapping[str, Sequence[str]],
    progress: Progress,
) -> dict[str, str]:
    """Write what is made of stored tensors by several threads; return the hashes asked for."""
    jobs = [_hashed_job(names, tensors, files) for names in hashed.values()]
    grouped = {name for names in hashed.values() for name in names}
    made = {name: each for name, each in tensors.items() if not isinstance(each, Tensor)}
    for name, each in made.items():
        if name not in grouped:
            jobs.append(assembly.Job(_pieces(name, each, files)))
    digests = assembly.assemble(jobs, progress.advance)
    for name in made:
        files.wrote(name)
    # those of the hashed ones stand first
    return dict(zip(hashed, digests, strict=False))


def _digest(names: Sequence[str], tensors: Mapping[str, Source]) -> str:
    """Return the hash of the first sources of tensors, by reading them."""
    blends = [tensors[name] for name in names]
    parts = [blend.parts[0] for blend in blends if isinstance(blend, Blend)]
    return sha256_of_tensors(parts[0].reader, [part.name for part in parts])


def write_tensors(
    directory: Path,
    plan: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Mapping[str, Source],
    label: str,
    config: ConfigJson,
    hashed: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Write the model file(s) of a checkpoint, one slice of one tensor in memory at a time.

    Args:
        directory: empty, not yet renamed.
        plan: dtype, as safetensors names it, and shape of each tensor, in file order.
        tensors: where each comes from.
        label: name in the progress line.
        config: config.json of the checkpoint, whose form decides how tensors lie in the file.
        hashed: by any name, tensors whose first sources are hashed together.

    Returns:
        For each name of `hashed` the `sha256_of_tensors` of the sources.

    Raises:
        CheckpointError: NaN, infinite or all-zero weights (names model, tensor and count), no
            space, a tensor that `tensors` lacks.
    """
    # vectors first: a form that translates norms needs them before the matrices behind them
    order = sorted(plan.items(), key=lambda item: len(item[1][1]) > 1)
    hashed = hashed or {}
    with (
        open_writer(directory, plan, config) as writer,
        Progress(label, len(plan), "tensors") as progress,
    ):
        # a form that translates what it is given streams by itself
        assembling = type(writer) is TensorWriter
        if assembling:
            digests = _assembled(writer, tensors, hashed, progress)
            order = [item for item in order if isinstance(tensors.get(item[0]), Tensor)]
        for name, (dtype, shape) in order:
            tensor = tensors.get(name)
            if isinstance(tensor, Blend):
                _write_blend(writer, name, shape, tensor, DTYPES[dtype])
            elif isinstance(tensor, Stack):
                for start, stop, blend in tensor.pieces:
                    _write_blend(writer, name, shape, blend, DTYPES[dtype], start, stop)
            elif tensor is not None:
                writer.write(name, tensor.to(DTYPES[dtype]))
            # one that is missing is named by the writer, with the others, as it closes
            progress.advance()
    if not assembling:
        digests = {key: _digest(names, tensors) for key, names in hashed.items()}
    return digests


def write_model(
    directory: Path,
    config: ConfigJson,
    dtype: str,
    tensors: Mapping[str, Source],
    label: str,
    hashed: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """Write config.json and the model file(s) of a Nexus checkpoint.

    Args:
        config: config.json of the output.
        dtype: of its weights (`planned`), as safetensors names it.

    `directory`, `tensors`, `label`, `hashed`, result and errors: `write_tensors`.
    """
    write_json(directory / "config.json", config)
    plan = planned(config, dtype)
    return write_tensors(directory, plan, tensors, label, config, hashed)
