"""What tests of training states share: ranks that save, and what is in a state (not a test)."""

import json
import math
import shutil
from pathlib import Path

import torch
from launch import finish, fork_ranks

from nexus_ds.runtime.portable_state import StateFiles
from nexus_ds.runtime.states import read_manifest

WORKER = Path(__file__).parent / "state_worker.py"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
RANK_0 = "rank_00000.safetensors"
RANK_1 = "rank_00001.safetensors"


def launch(checkpoint, folder, world, *words, out="out", code=0):
    """Run the worker on `world` ranks; return what it wrote."""
    path = folder.parent / out
    finish(
        fork_ranks([WORKER, checkpoint, folder, path, "training.batch_size=8", *words], world), code
    )
    return json.loads(Path(f"{path}.json").read_text())


def content(directory):
    """Return a state's values in full: per (kind, parameter) a flat tensor."""
    manifest = read_manifest(directory)
    files, found = StateFiles(directory, sorted(manifest["files"])), {}
    for name, shape in manifest["parameters"].items():
        for kind in KINDS:
            found[kind, name] = torch.empty(math.prod(shape))
            files.fill(kind, name, 0, found[kind, name])
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copy_step(source, target, step):
    shutil.copytree(source / f"step_{step}", target / f"step_{step}")


def flip(path):
    """Change a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
