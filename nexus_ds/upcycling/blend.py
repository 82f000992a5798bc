"""Putting models together: what all of upcycling shares. Checks first, then one pass of writing.

Every tensor of the output is a `Blend` (a weighted sum of stored tensors, in fp32; a single one is
copied exactly) or is given (expert embeddings). `write_tensors` reads and writes blocks, so memory
does not grow with the model; without torch, but for forms that translate weights (`translated`).
Not covered: aligning models of different bases (permutations, other vocabularies); which rules
there are (`merge`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import (
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.cards import (
    DomainCard,
    check_card,
    ffn_sha256,
)
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.file_layout import in_files, repeated
from nexus_ds.checkpoint.forms import translated
from nexus_ds.checkpoint.headers import Headers, tensor_bytes, tensor_head
from nexus_ds.checkpoint.model_card import stated_license
from nexus_ds.checkpoint.new_files import NewFiles, Place
from nexus_ds.checkpoint.qwen2_moe import Role, Stored, planned
from nexus_ds.checkpoint.records import (
    EncoderRecord,
    ExpertRecord,
    Step,
    portable,
    start_scale,
)
from nexus_ds.checkpoint.sidecar import Sidecar
from nexus_ds.checkpoint.values import encoded
from nexus_ds.command_lines import EXPERT_NAME
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.outputs import write_json
from nexus_ds.progress import Progress
from nexus_ds.upcycling.compatible import note
from nexus_ds.upcycling.router_file import RouterFile
from nexus_ds.upcycling.sources import Blend, Computed, Part, Rows, Source, Stack, source_of

_COMPUTING = threading.Lock()


def expert_start(
    part: Part,
    entry: Stored,
    lineage: list[Step],
    seed: Headers | None,
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


def domain_vectors(embeddings: DomainEmbeddings, names: Iterable[str]) -> Floats:
    """Return the raw domain embeddings [n, m] fp32 of experts.

    Raises:
        DataError: a domain that was not embedded; names those that were.
    """
    return np.stack([embeddings.vector(name) for name in names]).astype(np.float32)


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


def _piece(
    name: str,
    blend: Blend,
    place: Place,
    rows: tuple[int, int] | None = None,
) -> assembly.Piece:
    """Return how a tensor, or some of its rows, is made of stored ones."""
    sources = [source_of(part, rows) for part in blend.parts]
    weights = [part.weight for part in blend.parts]
    as_it_is = blend.rule is None and weights == [blend.divisor] == [blend.scale] == [1.0]
    # a copy never goes through fp32 and back: it keeps every bit
    if as_it_is and sources[0].dtype == place.dtype:
        return assembly.Copy(place, sources[0])
    rule = blend.rule or assembly.Mean(weights, blend.divisor, blend.scale)
    return assembly.Merge(place, sources, rule, name, blend.parts[0].who)


def _pieces(
    name: str,
    made: Source,
    files: NewFiles,
) -> list[assembly.Piece]:
    """Return the pieces of one tensor, in the order of the file."""
    place = files.place(name)
    if isinstance(made, Blend):
        return [_piece(name, made, place)]
    if isinstance(made, float):
        return [assembly.Fill(place, made)]
    dtype, shape = files.plan[name]
    if not isinstance(made, Stack):
        return [assembly.Fill(place, partial(_bytes_of, name, made, dtype, shape))]
    row = tensor_bytes(dtype, shape[1:])
    return [
        _piece(name, blend, place.part(start * row, stop * row), (start, stop))
        for start, stop, blend in made.pieces
    ]


def _bytes_of(
    name: str, given: Computed | Rows | Floats, dtype: str, shape: tuple[int, ...]
) -> memoryview:
    # one at a time: a layer's P is in memory meanwhile
    with _COMPUTING:
        values = given if isinstance(given, np.ndarray) else given.make()
    if values.shape != tuple(shape):
        raise CheckpointError(
            f"tensor {name!r} has shape {values.shape}, planned was {tuple(shape)}"
        )
    return encoded(values, dtype).data


def _hashed_job(
    names: Sequence[str], tensors: Mapping[str, Source], files: NewFiles
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
    files: NewFiles,
    tensors: Mapping[str, Source],
    hashed: Mapping[str, Sequence[str]],
    progress: Progress,
    router: RouterFile | None,
) -> dict[str, str]:
    """Write what is made of stored tensors by several threads; return the hashes asked for."""
    # large jobs first, and then in the order of the files, whose readers follow
    jobs = [_hashed_job(names, tensors, files) for names in hashed.values()]
    elsewhere = {name for names in hashed.values() for name in names}
    if router:
        gates = {name: each for name, each in tensors.items() if isinstance(each, Rows)}
        places = {each.layer: (each, files.place(name)) for name, each in gates.items()}
        jobs.append(router.job(places))
        elsewhere |= gates.keys()
    for name, each in tensors.items():
        if name not in elsewhere:
            jobs.append(assembly.Job(_pieces(name, each, files)))

    # a tensor is done with its last rows
    ends = {(place.file, place.end) for place in map(files.place, tensors)}

    def done(piece: assembly.Piece) -> None:
        for place in piece.targets:
            files.frontier.landed(place)
        if any((place.file, place.end) in ends for place in piece.targets):
            progress.advance()

    digests = assembly.assemble(jobs, done)
    for name in tensors:
        files.wrote(name)
    # those of the hashed ones stand first
    return dict(zip(hashed, digests, strict=False))


@dataclass(frozen=True)
class Beside:
    """What is done while the tensors of a checkpoint are written."""

    sidecar: Sidecar | None = None
    """Its own, whose router's file is written meanwhile where it has a P."""
    follow: Callable[[NewFiles], object] = bool
    """Called with files that are about to be written, to be read on behind their writers."""


def write_tensors(
    directory: Path,
    plan: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Mapping[str, Source],
    label: str,
    config: ConfigJson,
    hashed: Mapping[str, Sequence[str]] | None = None,
    beside: Beside | None = None,
) -> dict[str, str]:
    """Write the model file(s) of a checkpoint, one slice of one tensor in memory at a time.

    Args:
        directory: empty, not yet renamed.
        plan: dtype, as safetensors names it, and shape of each tensor, in file order.
        tensors: where each comes from.
        label: name in the progress line.
        config: config.json of the checkpoint, whose form decides how tensors lie in the file.
        hashed: by any name, tensors whose first sources are hashed together.
        beside: what else is done meanwhile; nothing of a form that translates weights.

    Returns:
        For each name of `hashed` the `sha256_of_tensors` of the sources.

    Raises:
        CheckpointError: NaN, infinite or all-zero weights (names model, tensor and count), no
            space, a tensor that `tensors` lacks.
    """
    hashed, beside = hashed or {}, beside or Beside()
    with Progress(label, len(plan), "tensors") as progress:
        if translated(config):
            # it imports torch, for which nobody else waits
            from nexus_ds.upcycling.translated import write_translated

            return write_translated(directory, plan, tensors, progress, config, hashed)
        with ExitStack() as stack:
            planned_files = in_files(plan, config)
            files = stack.enter_context(NewFiles(directory, planned_files, copies=repeated(config)))
            beside.follow(files)
            router = None
            if beside.sidecar and beside.sidecar.projections:
                router = stack.enter_context(
                    RouterFile(directory, beside.sidecar, config["hidden_size"], files.frontier)
                )
                beside.follow(router.files)
            # one that is missing is named by the files, with the others, as they close
            return _assembled(files, tensors, hashed, progress, router)


def write_model(
    directory: Path,
    config: ConfigJson,
    dtype: str,
    tensors: Mapping[str, Source],
    label: str,
    hashed: Mapping[str, Sequence[str]],
    beside: Beside,
) -> dict[str, str]:
    """Write config.json and the model file(s) of a Nexus checkpoint.

    Args:
        config: config.json of the output.
        dtype: of its weights (`planned`), as safetensors names it.

    `directory`, `tensors`, `label`, `hashed`, `beside`, result and errors: `write_tensors`.
    """
    write_json(directory / "config.json", config)
    plan = planned(config, dtype)
    return write_tensors(directory, plan, tensors, label, config, hashed, beside)
