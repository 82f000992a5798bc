"""Whether a Nexus checkpoint is what was written, and what it was made of; in numpy, every byte.

Files against their hashes, the router's rows against P(D), the shared experts' gates, and with the
sources at hand the last step that made it: each feed-forward network byte by byte, each average
computed again.
Shapes: H hidden size.
Not covered: weights that were trained since (their hashes tell all there is to tell); rows that
only some models have, where a version that did not record whose they are put them together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.adapters import is_adapter, open_branch
from nexus_ds.checkpoint.cards import ffn_sha256
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense import DenseModel, open_dense
from nexus_ds.checkpoint.expert_rows import check_rows, open_router
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.hashes import differences, recorded
from nexus_ds.checkpoint.headers import Headers, row_slices
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.qwen2_moe import Role, Stored, check_shared_gates, open_moe, stored
from nexus_ds.checkpoint.records import (
    ADOPT,
    CHECKPOINT,
    SEED,
    SIDECAR,
    AdoptStep,
    ExtendStep,
    Manifest,
    ReplaceStep,
    TrainStep,
    UpcycleStep,
    read_manifest,
    start_scale,
)
from nexus_ds.checkpoint.values import read_rows, rounded
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.upcycling.seeds import check_seed

ULP = {"F32": 0.0, "BF16": 2.0**-7, "F16": 2.0**-10}
"""What rounding to a dtype adds to an average's relative difference, at most."""
LEAST = {"F32": 0.0, "BF16": 0.0, "F16": 2.0**-24}
"""What it adds at most where a number is too small for the dtype's relative precision."""
AT_ONCE = 1 << 20
"""Values of a tensor that are in memory at once, of each of its sources in fp64."""
SUMMING = 2.0**-21
"""Largest difference of an fp32 average, relative to the sum of its parts' sizes: summed here in
another order and precision."""


@dataclass
class Verification:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)


def verify(directory: Path) -> Verification:
    """Check a Nexus checkpoint against itself.

    Raises:
        CheckpointError: no Nexus checkpoint.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    found = Verification()
    problems = Problems()
    with problems.collected():
        _verify_files(directory, found)
    with problems.collected():
        config, reader = open_moe(directory)
        found.checked.append("names, shapes and dtypes of all tensors")
        with problems.collected():
            check_shared_gates(reader, config["num_hidden_layers"])
            found.checked.append("the shared experts' gates are the constant")
        _verify_rows(directory, manifest, config, reader, found)
    found.problems += map(str, problems.found)
    return found


def _verify_files(directory: Path, found: Verification) -> None:
    before = recorded(directory)
    if before is None:
        found.notes.append("nexus.json has no hashes: it was written by an older version")
        return
    changed = differences(directory, before)
    found.problems += changed.problems
    found.notes += changed.notes
    found.checked.append(f"hashes of {len(before)} files")


def _verify_rows(
    directory: Path,
    manifest: Manifest,
    config: ConfigJson,
    reader: Headers,
    found: Verification,
) -> None:
    if manifest.router.kind != "nexus":
        found.notes.append("a linear router has free rows: there is no P(D) to compare them with")
        return
    router = open_router(directory, manifest)
    check = check_rows(router, reader, config["num_hidden_layers"], quick=False)
    for layer, difference in check.worst.items():
        found.problems.append(
            f"layer {layer}: the router's rows differ from P(D) by {difference:.1e} of the largest "
            f"entry, expected at most {check.tolerance:.1e}; model and sidecar are not of one "
            f"training; {ADOPT}"
        )
    found.checked.append(f"rows of {len(check.layers)} layers against P(D)")


# Sources ------------------------------------------------------------------------------------------


@dataclass
class Sources:
    """The models that the last step put together."""

    base: Headers
    """The seed's, or the old mixture's tensors."""
    base_names: Mapping[str, str]
    """For each expert that the old mixture had, its number there, as text; of an upcycling none."""
    models: Mapping[str, DenseModel]
    share: float
    """Of the new models in all that is averaged; 1 for an upcycling."""
    upcycled: bool
    """Whether `base` is a seed's."""
    aligned: Mapping[str, Sequence[str]]
    """Rows of embeddings that some of the models alone gave, see `UpcycleStep`."""
    merge: Mapping[str, object]
    """Settings of merging, as the step has them; empty: the plain mean."""
    seed: Headers | None
    """The seed's tensors, where routed experts start further from it than their branches."""


def _place(directory: Path, name: str, source: str, given: Mapping[str, Path]) -> Path:
    """Return where a source is: as given, as recorded, or beside the checkpoint."""
    places = [given[name]] if name in given else [Path(source), directory.parent / source]
    for place in places:
        if place.is_dir():
            return place
    raise CheckpointError(
        f"the source of {name} is not at {places[0]}: give it with --sources {name}=DIR"
    )


PuttingTogether = UpcycleStep | ExtendStep | ReplaceStep


def _sources(
    directory: Path,
    manifest: Manifest,
    step: PuttingTogether,
    given: Mapping[str, Path],
) -> Sources:
    """Open what the last step was about.

    Raises:
        CheckpointError: a source that is not there or is another than recorded.
    """
    problems = Problems()
    models: dict[str, DenseModel] = {}
    new = [expert.name for expert in manifest.experts]
    if isinstance(step, ExtendStep | ReplaceStep):
        new = step.experts
    for expert in manifest.experts:
        if expert.name in new:
            with problems.collected():
                place = _place(directory, expert.name, expert.source, given)
                model = _open_source(place, directory, manifest, step, given)
                models[expert.name] = _checked_source(model, expert.name, expert.sha256)
    names: dict[str, str] = {}
    base = seed = None
    with problems.collected():
        seed = _seed(directory, manifest, given)
        if isinstance(step, UpcycleStep):
            base = open_dense(_place(directory, "seed", step.seed_model, given)).reader
        else:
            old = _place(directory, "checkpoint", step.checkpoint, given)
            _, base = open_moe(old)
            known = [expert.name for expert in read_manifest(old).experts]
            names = {name: str(number) for number, name in enumerate(known) if name not in new}
    problems.refuse()
    assert base is not None
    share = 1.0 if isinstance(step, UpcycleStep) else step.share
    upcycled = isinstance(step, UpcycleStep)
    merge = step.merge if isinstance(step, UpcycleStep) else {}
    return Sources(base, names, models, share, upcycled, step.aligned, merge, seed)


def _seed(directory: Path, manifest: Manifest, given: Mapping[str, Path]) -> Headers | None:
    """Return the seed's tensors where routed experts are made of them too.

    Raises:
        CheckpointError: it is not there.
        IncompatibleModelsError: it is another model than recorded.
    """
    task = start_scale(manifest.lineage, "task")
    for step in manifest.lineage:
        if isinstance(step, UpcycleStep) and task != 1.0:
            seed = open_dense(_place(directory, "seed", step.seed_model, given))
            # what can't be told by the hash is told by the bytes
            check_seed(manifest.lineage, seed)
            return seed.reader
    return None


def _open_source(
    place: Path,
    directory: Path,
    manifest: Manifest,
    step: PuttingTogether,
    given: Mapping[str, Path],
) -> DenseModel:
    """Open an expert's dense model, or its adapter as the verb has merged it."""
    base = given.get("base")
    seed = None
    if is_adapter(place) and base is None:
        seed = _seed_place(directory, manifest, given)
    option = "--sources base=DIR"
    if isinstance(step, UpcycleStep):
        return open_branch(place, base, seed, option=option)
    # an extension has it as a base only where it was given as the seed
    far = start_scale(manifest.lineage, "task") != 1.0
    return open_branch(place, base, fallback=seed if far else None, option=option)


def _seed_place(directory: Path, manifest: Manifest, given: Mapping[str, Path]) -> Path | None:
    """Return where the seed is; None where nothing says so, or it is gone."""
    for step in manifest.lineage:
        if isinstance(step, UpcycleStep):
            # who needs the seed itself tells that it is gone
            with suppress(CheckpointError):
                return _place(directory, "seed", step.seed_model, given)
    return None


def _checked_source(model: DenseModel, name: str, sha256: str) -> DenseModel:
    """Return an expert's dense model; CheckpointError unless its FFNs are those recorded."""
    found = ffn_sha256(model)
    if found != sha256:
        other = "it is another model, or was trained since"
        if is_adapter(model.directory):
            other += ", or its adapter was merged into another base: give that with --sources "
            other += "base=DIR"
        raise CheckpointError(
            f"expert {name}: {model.directory} has feed-forward networks of sha256 "
            f"{found[:12]}, the checkpoint was made of {sha256[:12]}: {other}"
        )
    return model


def verify_sources(directory: Path, given: Mapping[str, Path]) -> Verification:
    """Check a Nexus checkpoint against the models that its last step put together.

    Args:
        directory: the checkpoint.
        given: directories of sources that are not where nexus.json says: by expert's name, and
            "seed" or "checkpoint"; "base": the model that adapters were merged into, where that is
            neither the one that they name nor the seed.

    Raises:
        ConfigError: a name that is no source's.
        CheckpointError: no Nexus checkpoint.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    known = [*(expert.name for expert in manifest.experts), "seed", "checkpoint", "base"]
    for name in given:
        if name not in known:
            raise ConfigError(f"--sources {name}: expected one of {', '.join(known)}")
    found = Verification()
    last = manifest.lineage[-1] if manifest.lineage else None
    if isinstance(last, TrainStep | AdoptStep):
        found.notes.append("trained since it was put together: its weights are no copies any more")
        return found
    if not isinstance(last, UpcycleStep | ExtendStep | ReplaceStep):
        said = last.verb if last else "none"
        found.notes.append(f"its last step ({said}) put no dense models together: no sources")
        return found
    problems = Problems()
    with problems.collected():
        sources = _sources(directory, manifest, last, given)
        config, reader = open_moe(directory)
        _compare(manifest, config, reader, sources, found)
    found.problems += map(str, problems.found)
    return found


def _compare(
    manifest: Manifest,
    config: ConfigJson,
    reader: Headers,
    sources: Sources,
    found: Verification,
) -> None:
    """Compare each tensor with what it was made of."""
    counts = {"copies": 0, "averages": 0}
    for name, entry in stored(config).items():
        parts = _parts(name, entry, manifest, sources)
        if not parts:
            continue
        copied = len(_weighing(parts)) == 1
        counts["copies" if copied else "averages"] += 1
        if sources.aligned and entry.dense_name in (EMBEDDING, HEAD):
            pieces = list(_by_row(parts, sources.aligned, reader.info(name).shape[0]))
        else:
            rows = min(model.info(part).shape[0] for model, part, _ in parts.values())
            pieces = [(0, rows, _weighing(parts))]
        scale = _scale(entry, manifest, sources)
        said = _difference(reader, name, pieces, scale)
        if said:
            found.problems.append(f"{name} {said}")
    found.checked.append(f"{counts['copies']} tensors that are copies, byte by byte")
    found.checked.append(f"{counts['averages']} averages, computed again")
    method = sources.merge.get("merge", "mean")
    if method not in ("mean", "seed"):
        found.notes.append(f"what was merged by {method} is not computed again")
    if _counted(sources):
        found.notes.append("rows weighed by counts of tokens are not computed again")


def _scale(entry: Stored, manifest: Manifest, sources: Sources) -> float:
    """Return what a copy of a dense model's tensor was multiplied by; 1 for all that is no copy."""
    shared = entry.role is Role.SHARED and sources.upcycled
    routed = entry.role is Role.ROUTED
    routed = routed and manifest.experts[entry.expert].name in sources.models
    if not (shared or routed):
        return 1.0
    kind = "shared" if shared else "routed"
    start = start_scale(manifest.lineage, kind) if entry.part == "down_proj" else 1.0
    return entry.scale * start


Weighted = tuple[Headers, str, float]
"""A model's tensors, the name of one of them, and its weight."""
Parts = dict[str, Weighted]
"""By the name of the source."""
Piece = tuple[int, int, list[Weighted]]
"""Rows [start, stop) of a tensor, and what they were made of."""


def _weighing(parts: Parts) -> list[Weighted]:
    return [part for part in parts.values() if part[2]]


def _parts(
    name: str,
    entry: Stored,
    manifest: Manifest,
    sources: Sources,
) -> Parts:
    """Return the tensors, with weights, that one was made of; none of what is computed."""
    models = sources.models
    if entry.role is Role.ROUTED:
        expert = manifest.experts[entry.expert].name
        if expert in models:
            return _routed_parts(expert, entry, manifest, sources)
        # removing and replacing may have given it another number
        old = name.replace(f".experts.{entry.expert}.", f".experts.{sources.base_names[expert]}.")
        return {CHECKPOINT: (sources.base, old, 1.0)}
    # an extension copies it from the mixture, which has it scaled already
    if entry.role is Role.SHARED:
        if sources.upcycled:
            own = manifest.shared_expert == "seed"
            return {SEED: (sources.base, entry.dense_name, 1.0)} if own else {}
        return {CHECKPOINT: (sources.base, name, 1.0)}
    # rows and gates follow from the sidecar, which `verify` holds them to
    if entry.role is not Role.DENSE:
        return {}
    return _merged_parts(name, entry, sources)


def _merged_parts(name: str, entry: Stored, sources: Sources) -> Parts:
    """Return the tensors, with weights, that one outside of the FFNs was merged of."""
    method = _method(entry, sources)
    own: Parts = {SEED: (sources.base, entry.dense_name, 1.0)}
    of_tokens = entry.dense_name in (EMBEDDING, HEAD)
    if method == "seed" and not (of_tokens and sources.aligned):
        return own
    # what else there is, is noted as not checked
    if method not in ("mean", "seed"):
        return {}
    weights = _weights(sources)
    each = sources.share / sum(weights.values())
    new: Parts = {}
    for key, model in sources.models.items():
        new[key] = model.reader, entry.dense_name, each * weights[key]
    if method == "seed":
        # tokens that the seed lacks come from the branches that have them, the record says which
        return own | new
    if sources.upcycled:
        return new
    return {CHECKPOINT: (sources.base, name, 1.0 - sources.share)} | new


def _routed_parts(
    expert: str,
    entry: Stored,
    manifest: Manifest,
    sources: Sources,
) -> Parts:
    """Return what a dense model that became a routed expert was put in as."""
    task = start_scale(manifest.lineage, "task")
    parts: Parts = {expert: (sources.models[expert].reader, entry.dense_name, task)}
    if sources.seed:
        parts[SEED] = (sources.seed, entry.dense_name, 1.0 - task)
    return parts


def _by_row(
    parts: Parts,
    aligned: Mapping[str, Sequence[str]],
    rows: int,
) -> Iterator[Piece]:
    """Yield the pieces of embeddings that have `rows` rows, some of which not all models gave.

    Raises:
        CheckpointError: a record of other rows or models.
    """
    done = 0
    for text, names in aligned.items():
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
        start, stop = map(int, found.groups()) if found else (-1, -1)
        if "checkpoint" not in parts:
            # as older versions have it
            names = [CHECKPOINT if name == "checkpoint" else name for name in names]
        inside = done <= start < stop <= rows
        known = set(names) <= set(parts)
        if not inside or not names or not known:
            raise CheckpointError(
                f"{SIDECAR}: the rows {text!r} of {str(names)[:100]} under 'aligned' are none of "
                f"embeddings of {rows} rows out of {', '.join(parts)}; the sidecar is damaged"
            )
        # rows between two records come from all models
        if done < start:
            yield done, start, _weighing(parts)
        yield start, stop, _divided([parts[name] for name in names])
        done = stop
    if done < rows:
        yield done, rows, _weighing(parts)


def _divided(some: Sequence[Weighted]) -> list[Weighted]:
    """Return parts whose weights add up to 1: no row is scaled down because some lack it."""
    total = sum(weight for _, _, weight in some)
    # lambda may be 0: then none of them had a weight
    if not total:
        return [(model, name, 1.0 / len(some)) for model, name, _ in some]
    return [(model, name, weight / total) for model, name, weight in some]


def _slices(
    pieces: Sequence[Piece],
    shape: Sequence[int],
) -> Iterator[Piece]:
    """Yield pieces small enough to be in memory."""
    for first, last, parts in pieces:
        for start, stop in row_slices((last - first, *shape[1:]), AT_ONCE):
            yield first + start, first + stop, parts


def _counted(sources: Sources) -> bool:
    """Return whether embeddings were merged by how often texts have a token."""
    return sources.merge.get("merge_rows") == "counted"


def _method(entry: Stored, sources: Sources) -> object:
    """Return how a tensor was merged."""
    # the text that was counted is not at hand
    if _counted(sources) and entry.dense_name in (EMBEDDING, HEAD):
        return "counted"
    return sources.merge.get("merge", "mean")


def _weights(sources: Sources) -> dict[str, float]:
    """Return the weight of each new model in what is averaged."""
    stated = sources.merge.get("merge_weights")
    weights = dict.fromkeys(sources.models, 1.0)
    return weights | stated if isinstance(stated, dict) else weights


def _difference(
    reader: Headers,
    name: str,
    pieces: Sequence[Piece],
    scale: float,
) -> str:
    """Return what is wrong with a tensor; empty where it is what its pieces make."""
    info = reader.info(name)
    exact = all(len(parts) == 1 for _, _, parts in pieces)
    wrong, worst = 0, 0.0
    for start, stop, parts in _slices(pieces, info.shape):
        rows_of = [read_rows(one, part, start, stop).astype(np.float64) for one, part, _ in parts]
        values = [weight * x for x, (_, _, weight) in zip(rows_of, parts, strict=True)]
        total = np.sum(values, axis=0) * scale
        expected = rounded(total.astype(np.float32), info.dtype)
        off = np.abs(read_rows(reader, name, start, stop) - expected)
        # parts may cancel: the error grows with them, not with their sum
        sizes = np.sum(np.abs(values), axis=0)
        copied = len(parts) == 1
        summed = ULP[info.dtype] * np.abs(expected) + LEAST[info.dtype] + SUMMING * sizes
        bound = 0.0 if copied else summed
        # not `off > bound`, which a NaN would pass
        wrong += int(np.count_nonzero(~(off <= bound)))
        worst = max(worst, float(off.max(initial=0)))
    kind = "the bytes of its source" if exact else "the average of its sources"
    return f"is not {kind}: {wrong} values differ, by up to {worst:.1e}" if wrong else ""
