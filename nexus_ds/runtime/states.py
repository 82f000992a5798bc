"""Training states: portable files under a manifest, committed by rename, verified before reading.

    states/step_12/    a file of each rank that saved, and manifest.json (step, layout,
                       configuration, parameters, size and sha256 of each file, and its own hash)
    states/latest      the name of the newest state, replaced in one step; for people, nothing
                       follows it
    states/partial_12_*/  a state that is being saved, or whose saving was interrupted; each saving
                       has a name of its own, since a node of a network file system may go on for a
                       while with the folder that it knows by a name

Everything is safetensors and JSON: reading a state runs no code. A state says nothing of ranks, so
any layout reads it. `NEXUS_FAULT=kill:rank0:before_rename:12` kills rank 0 with SIGKILL at that
point of saving step 12: for tests only. The points are those of `_fault` below.
Not covered: an attacker who can write to the folder (the hashes detect damage).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, cast

import torch.distributed as dist

from nexus_ds.errors import CheckpointError, OutputBusyError
from nexus_ds.outputs import (
    held,
    new_file,
    numbered,
    sync,
    write_text,
)
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import portable_state
from nexus_ds.runtime.deepspeed_internals import Engine
from nexus_ds.runtime.portable_state import FileEntry
from nexus_ds.runtime.ranks import on_rank_0, together
from nexus_ds.sealed import read_sealed, seal
from nexus_ds.typed_json import typed

MANIFEST = "manifest.json"
FORMAT = 2  # 1 had no hash of itself
FINGERPRINTS = "data fingerprint"  # of a configuration: a hash for each domain
MADE_FROM = "data made from"  # of a configuration: hashes of what that hash covers; for messages
BYTES = 12  # of a parameter in a state: fp32 and two moments


class Description(TypedDict):
    """What a state tells of its run."""

    layout: str
    """In words; a state of another is read all the same."""
    config: dict[str, Any]
    """Settings and fingerprints on which the course depends, as JSON; compared on resume."""


class Manifest(Description):
    """What manifest.json holds."""

    format: int
    step: int
    """Optimizer steps done."""
    optimizer_step: int
    """Adam's own count of updates."""
    parameters: dict[str, list[int]]
    """Shape of each parameter in portable form."""
    files: dict[str, FileEntry]


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05}.safetensors"


def _fault(point: str, step: int) -> None:
    """Die here if the test asks for it."""
    if os.environ.get("NEXUS_FAULT") == f"kill:rank{dist.get_rank()}:{point}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)


# Reading ------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    """Return a state's manifest.

    Raises:
        CheckpointError: it is missing, damaged or not of this kind.
    """
    try:
        value = read_sealed(directory / MANIFEST)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST}: {error!r}") from error
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: found format {value.get('format')!r}, expected format {FORMAT} of a "
            "training state"
        )
    try:
        # whoever computes the hash anew may have written other types
        manifest = typed(value, Manifest)
    except TypeError as error:
        raise CheckpointError(f"{MANIFEST}: {error}") from error
    if directory.name != f"step_{manifest['step']}":
        raise CheckpointError(f"{MANIFEST}: found that of step {manifest['step']}")
    for name in manifest["files"]:
        # A name with a folder in it would lead out of the state's own.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{MANIFEST}: {name!r} is not the name of a rank's file")
    return manifest


def _size_problem(directory: Path, name: str, entry: FileEntry) -> str:
    path = directory / name
    if path.is_symlink() or not path.is_file():
        return f"{name}: not there"
    if (found := path.stat().st_size) != entry["size"]:
        return f"{name}: found {found} bytes, expected {entry['size']}"
    return ""


def _hash_problem(directory: Path, name: str, entry: FileEntry) -> str:
    with (directory / name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == entry["sha256"]:
        return ""
    return f"{name}: found sha256 {found[:12]}, expected {entry['sha256'][:12]}"


def damage(directory: Path, share: int = 0, of: int = 1) -> str:
    """Return what is wrong with a state, '' if every file has the size and hash of the manifest.

    Args:
        directory: of the state.
        share: which files are hashed here: `of` ranks share the work, each takes every `of`-th. 0
            of 0: sizes only.
        of: number of ranks that share the work.
    """
    try:
        files = read_manifest(directory)["files"]
        # Sizes first: they cost nothing, and tell most of what a full disk or a kill leaves.
        problems = [_size_problem(directory, name, entry) for name, entry in files.items()]
        if not any(problems) and of:
            mine = sorted(files)[share::of]
            problems = [_hash_problem(directory, name, files[name]) for name in mine]
    except (OSError, CheckpointError) as error:
        return str(error)
    return next((problem for problem in problems if problem), "")


def steps_saved(states: Path) -> list[int]:
    """Return the steps of all committed states, oldest first."""
    return numbered(states, "step_")


def newest_good(states: Path) -> tuple[int, list[str]]:
    """Return the step of the newest undamaged state, and what is wrong with newer ones.

    Step 0 says that no state was ever saved. All ranks must call: they share the hashing, and get
    the same answer.

    Raises:
        CheckpointError: there are or were states, and none can be used. Nothing is deleted.
    """
    steps = on_rank_0(lambda: steps_saved(states))
    problems: list[str] = []
    for step in reversed(steps):
        directory = states / f"step_{step}"
        problem = _damage_together(directory)
        if not problem:
            return step, problems
        problems.append(f"{directory} is damaged ({problem})")
    # The folders of all states may be gone: to start over silently would hide the loss.
    if not problems and on_rank_0((states / "latest").exists):
        problems = [f"{states / 'latest'} is there, but no state that it could name"]
    if problems:
        raise CheckpointError(
            f"no training state can be used: {'; '.join(problems)}; remove {states} to start over "
            "from the beginning"
        )
    return 0, []


def _damage_together(directory: Path) -> str:
    """Return what `damage` finds, each rank hashing its share of the files."""
    found = together(lambda: damage(directory, dist.get_rank(), dist.get_world_size()))
    return next((problem for problem in found if problem), "")


def _compare(manifest: Manifest, description: Description, shapes: dict[str, list[int]]) -> None:
    """Refuse a state of another configuration or model, in the same sentence on all ranks.

    The order of a mapping counts, as that of the domains does for the samples; what an older state
    does not say does not.
    """
    saved = manifest["config"]
    now = description["config"]
    which = f"the training state at step {manifest['step']} belongs to another"
    different = [
        told
        for key in now
        # as text, since equal dictionaries may have another order
        if key in saved and key != MADE_FROM and json.dumps(saved[key]) != json.dumps(now[key])
        for told in _differences(key, saved, now)
    ]
    if different:
        raise CheckpointError(
            f"{which} configuration ({'; '.join(different[:5])}); restore these settings, or give "
            "another output"
        )
    parameters = manifest["parameters"]
    names = parameters | shapes  # a dictionary, for the order
    other = [name for name in names if parameters.get(name) != shapes.get(name)]
    if other:
        name = other[0]
        raise CheckpointError(
            f"{which} model: {len(other)} parameters differ, the first is {name}: found "
            f"{parameters.get(name)}, expected {shapes.get(name)}; give another output"
        )


def _differences(key: str, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return what differs in a setting or fingerprint, in words, entry by entry of a mapping."""
    then, now = saved[key], current[key]
    if not isinstance(then, dict) or not isinstance(now, dict) or then.keys() != now.keys():
        return [f"{key}: {then!r} then, {now!r} now"]
    entries = [name for name in now if then[name] != now[name]]
    if not entries:
        return [f"{key}: in the order {', '.join(then)} then, {', '.join(now)} now"]
    if key == FINGERPRINTS:
        return [_other_data(name, saved.get(MADE_FROM), current.get(MADE_FROM)) for name in entries]
    return [f"{key}.{name}: {then[name]!r} then, {now[name]!r} now" for name in entries]


def _other_data(domain: str, saved: object, current: object) -> str:
    """Return which of the things that make a domain's tokens is another."""
    then, now = (
        all_of.get(domain) if isinstance(all_of, dict) else None for all_of in (saved, current)
    )
    # states of before don't tell them apart
    if not isinstance(then, dict) or not isinstance(now, dict):
        return f"the text of {domain}, its tokenizer or data.* are not what they were"
    words = {
        "text": f"the text of {domain}",
        "tokenizer": f"the tokenizer of {domain}, data.bos or data.chat",
    }
    other = [told for part, told in words.items() if then.get(part) != now.get(part)]
    if not other:
        return f"data.max_bytes, data.on_bad_row or the form of token files differs for {domain}"
    return f"not what it was: {' and '.join(other)}"


def resume(engine: Engine, states: Path, description: Description) -> tuple[int, list[str]]:
    """Load the newest good state into a fresh engine; return its step and messages.

    Step 0 says that nothing was saved. All ranks must call; the ranks, expert-parallel size and
    ZeRO stage of the state don't matter.

    Raises:
        CheckpointError: all states are damaged, or the state belongs to another configuration or
            model.
    """
    on_rank_0(lambda: _remove_left(states))
    step, problems = newest_good(states)
    messages = [f"{problem} - using step {step}" for problem in problems]
    if not step:
        return 0, messages
    directory = states / f"step_{step}"
    manifest = read_manifest(directory)
    _compare(manifest, description, portable_state.shapes(engine.module))
    # A random generator's state belongs to one rank of one number of ranks.
    same_ranks = len(manifest["files"]) == dist.get_world_size()
    own = _rank_file(dist.get_rank()) if same_ranks else ""
    files = portable_state.StateFiles(directory, sorted(manifest["files"]))
    portable_state.read_rank(engine, files, manifest["optimizer_step"], own)
    internals.set_counters(engine, step)
    if manifest["layout"] != description["layout"]:
        messages.append(
            f"the state of step {step} was saved by {manifest['layout']}; "
            f"now {description['layout']}"
        )
    return step, messages


# Saving -------------------------------------------------------------------------------------------


def _remove_partial(states: Path) -> None:
    """Remove states whose saving was interrupted: as large as a state, and of use to nobody."""
    for path in [*states.glob("partial_*"), states / "partial"]:  # the latter of older versions
        shutil.rmtree(path, ignore_errors=True)


def _remove_left(states: Path) -> None:
    """Remove all that an interrupted saving left, a `latest` that was being written included."""
    _remove_partial(states)
    if states.is_dir():
        # a disk that can't be written is told where a state is saved
        with suppress(OutputBusyError, OSError), held(states / "latest"):
            pass


def _start(states: Path, step: int, needed: int) -> str:
    """Make an empty folder for a state of `needed` bytes; return its name, which none had before.

    Raises:
        CheckpointError: there is no room.
    """
    _remove_partial(states)
    states.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(states).free
    if needed > free:
        raise CheckpointError(
            f"{states}: not enough space for a training state: need {needed:,} bytes, free "
            f"{free:,}; make room, or lower training.keep_last; what was saved before is kept"
        )
    partial = states / f"partial_{step}_{secrets.token_hex(4)}"
    partial.mkdir()
    return partial.name


def _commit(states: Path, partial: Path, manifest: Manifest) -> None:
    """Give a whole state its manifest and its name.

    The rename is what makes it count. All that it stands for is on the disk before, and the rename
    itself before `latest` tells of it, so that a loss of power leaves the old state or the new one.

    Raises:
        CheckpointError: a rank's file is not there, or not whole.
    """
    step = manifest["step"]
    for name, entry in manifest["files"].items():
        # What a rank has written may lie elsewhere, or be seen by its own node alone.
        if problem := _size_problem(partial, name, entry):
            raise CheckpointError(
                f"{partial}: {problem}; the state of step {step} does not count, what was saved "
                f"before is kept; expected storage on which all ranks see each other's files"
            )
    text = seal(cast(dict[str, object], manifest))
    final = states / f"step_{step}"
    _fault("before_manifest", step)
    write_text(partial / MANIFEST, text)
    sync(partial / MANIFEST)
    sync(partial)
    _fault("before_rename", step)
    shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
    os.rename(partial, final)
    sync(states)
    _fault("after_rename", step)
    with new_file(states / "latest", overwrite=True) as temporary:
        write_text(temporary, final.name + "\n")
    _fault("after_latest", step)


def _retain(states: Path, step: int, keep_last: int) -> None:
    """Delete all but the newest states up to `step`, which was just saved.

    Nothing goes while one of those that stay is not whole: it could be the last good one. Newer
    ones are damaged, for the run fell back behind them; they would take the places of good ones.
    """
    folders = [states / f"step_{number}" for number in steps_saved(states) if number <= step]
    if any(damage(folder, share=0, of=0) for folder in folders[-keep_last:]):
        return
    for folder in folders[:-keep_last]:
        # Half a deleted state is no state.
        (folder / MANIFEST).unlink(missing_ok=True)
        _fault("during_retention", step)
        shutil.rmtree(folder)


def save(engine: Engine, states: Path, step: int, description: Description, keep_last: int) -> None:
    """Save a training state. All ranks must call; it counts once the folder carries its final name.

    Args:
        engine: the DeepSpeed engine, between two optimizer steps.
        states: folder of this run's states, on storage that all ranks share.
        step: optimizer steps done.
        description: layout and configuration; the configuration is compared on resume.
        keep_last: newest states that stay.

    Raises:
        CheckpointError: no room, or a rank could not write; what was saved before is kept.
    """
    if on_rank_0(lambda: _is_saved(states, step)):
        return  # this run came here before and fell back further; the same state again
    shapes = portable_state.shapes(engine.module)
    partial, entries = _write_files(engine, states, step, shapes)
    manifest: Manifest = {
        "format": FORMAT,
        "step": step,
        "optimizer_step": internals.optimizer_step(engine),
        **description,
        "parameters": shapes,
        "files": {_rank_file(rank): entry for rank, entry in enumerate(entries)},
    }

    def commit() -> None:
        try:
            _commit(states, partial, manifest)
        finally:
            # Gone by its rename, or as large as a state on a disk that may be full.
            _remove_partial(states)
        _retain(states, step, keep_last)

    on_rank_0(commit)


def _is_saved(states: Path, step: int) -> bool:
    return step in steps_saved(states) and not damage(states / f"step_{step}")


def _write_files(
    engine: Engine, states: Path, step: int, shapes: dict[str, list[int]]
) -> tuple[Path, list[FileEntry]]:
    """Write each rank's file into a new folder; return it and the entries of all, by rank."""
    needed = BYTES * sum(math.prod(shape) for shape in shapes.values())
    _fault("before_files", step)
    partial = states / on_rank_0(lambda: _start(states, step, needed))
    path = partial / _rank_file(dist.get_rank())
    try:
        entries = together(
            lambda: portable_state.write_rank(engine, path, lambda: _fault("during_file", step))
        )
    except CheckpointError:
        on_rank_0(lambda: _remove_partial(states))
        raise
    _fault("after_file", step)
    return partial, entries


def remove(states: Path) -> None:
    """Remove all states of a run that needs them no more. All ranks must call."""
    on_rank_0(lambda: shutil.rmtree(states, ignore_errors=True))
