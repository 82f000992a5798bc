"""Training states: DeepSpeed's shards under our own manifest, committed by rename, verified before anything is unpickled.

    states/step_12/            DeepSpeed's files and manifest.json (step, layout, configuration, sizes, sha256)
    states/latest              the name of the newest state, replaced in one step

DeepSpeed's shards are pickles: only a state whose every file matches its manifest is loaded. A hash in the same folder
detects damage, not an attacker: states are for the one who wrote them.
Not covered: resuming in another layout (refused with a sentence).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nexus_ds.errors import CheckpointError, LayoutError
from nexus_ds.outputs import new_file

MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    found = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(directory)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in found}


def damage(directory: Path) -> str:
    """Return what is wrong with a state, '' if every file is there with the size and hash of the manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    for name, entry in expected.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink() or not path.is_file():
            return f"{name}: not there"
        if path.stat().st_size != entry["size"]:
            return f"{name}: found {path.stat().st_size} bytes, expected {entry['size']}"
        if (found := _sha256(path)) != entry["sha256"]:
            return f"{name}: found sha256 {found[:12]}, expected {entry['sha256'][:12]}"
    return ""


def steps_saved(states: Path) -> list[int]:
    """Return the steps of all committed states, oldest first."""
    names = [p.name.removeprefix("step_") for p in states.glob("step_*") if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def newest_good(states: Path) -> tuple[int, list[str]]:
    """Return the newest undamaged step (0 when no state was ever saved) and what is wrong with newer ones.

    Raises:
        CheckpointError: there are states, and all are damaged.
    """
    problems: list[str] = []
    for step in reversed(steps_saved(states)):
        problem = damage(states / f"step_{step}")
        if not problem:
            return step, problems
        problems.append(f"{states / f'step_{step}'} is damaged ({problem})")
    if problems:
        raise CheckpointError(
            "no training state can be used: " + "; ".join(problems) + "; remove the folder to start over"
        )
    return 0, []


def save(engine: Any, states: Path, step: int, description: dict[str, Any], keep_last: int) -> None:
    """Save a training state. All ranks must call; it counts once the folder carries its final name.

    Args:
        engine: the DeepSpeed engine.
        states: folder of this run's states, on storage that all ranks share.
        step: optimizer steps done.
        description: layout and configuration, compared on resume.
        keep_last: newest states that stay.
    """
    name, partial = f"step_{step}", states / "partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=name, client_state={"step": step}, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        files = _files(partial / name)
        manifest = {"step": step, **description, "files": files}
        with new_file(partial / name / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(states / name, ignore_errors=True)
        os.replace(partial / name, states / name)
        with new_file(states / "latest", overwrite=True) as temporary:
            temporary.write_text(name, encoding="utf-8")
        for old in steps_saved(states)[:-keep_last]:
            shutil.rmtree(states / f"step_{old}")
    dist.barrier()


def _compare(manifest: dict[str, Any], description: dict[str, Any]) -> None:
    """Refuse a state of another layout or configuration, with one sentence that is the same on all ranks."""
    layout, here = manifest["layout"], description["layout"]
    if layout != here:
        raise LayoutError(
            f"the training state at step {manifest['step']} was saved by {layout}, this run is {here}; "
            "resume with the same layout, or start again from a finished checkpoint with model.path"
        )
    saved, now = manifest["config"], description["config"]
    different = [
        f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now" for key in now if saved.get(key) != now.get(key)
    ]
    if different:
        raise CheckpointError(
            f"the training state at step {manifest['step']} belongs to another configuration ({'; '.join(different[:5])}); "
            "restore these settings, or give another output"
        )


def resume(engine: Any, states: Path, description: dict[str, Any]) -> tuple[int, list[str]]:
    """Load the newest good state into the engine; return its step (0: nothing saved) and messages about damaged ones.

    All ranks must call. Rank 0 verifies; every rank loads what rank 0 chose.

    Raises:
        LayoutError: the state was saved by another number of ranks, expert-parallel size or ZeRO stage.
        CheckpointError: all states are damaged, or the state belongs to another configuration.
    """
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [newest_good(states)]
        except CheckpointError as error:
            choice = [error]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], CheckpointError):
        raise choice[0]
    step, problems = choice[0]
    if step:
        manifest = json.loads((states / f"step_{step}" / MANIFEST).read_text(encoding="utf-8"))
        _compare(manifest, description)
        engine.load_checkpoint(str(states), tag=f"step_{step}")
    return step, [f"{problem} - using step {step}" for problem in problems]
