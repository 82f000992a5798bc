"""What is checked before models are put together, and while their tensors are written."""

import json
import os
import subprocess
import sys

import pytest
import torch
from branches import (
    edit_tensors,
    left_over,
    make_parts,
    tensors_of,
    upcycle,
)
from safetensors.torch import save_file

from nexus_ds.errors import CheckpointError, IncompatibleModelsError


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def test_other_tokenizer(parts):
    path = parts / "gamma" / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["sail"], vocabulary["ship"] = vocabulary["ship"], vocabulary["sail"]
    path.write_text(json.dumps(value))
    with pytest.raises(
        IncompatibleModelsError,
        match=r"tokenizer of expert gamma .* 2 of \d+ tokens differ.*'sail'",
    ):
        upcycle(parts)
    assert not left_over(parts)


def test_missing_tensor(parts):
    edit_tensors(parts / "beta", lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"beta: .*1 missing: model.layers.1.self_attn.k_proj.weight"
    ):
        upcycle(parts)
    assert not left_over(parts)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda t: t.view(-1)[:3].fill_(torch.nan),
            "has 3 values that are NaN",
        ),
        (
            "model.norm.weight",
            lambda t: t[:1].fill_(torch.inf),
            "has 1 values that are NaN or infinite",
        ),
        ("model.layers.0.self_attn.q_proj.weight", lambda t: t.zero_(), "has only zeros"),
    ],
)
def test_bad_values_name_model_tensor_and_count(parts, name, change, message):
    edit_tensors(parts / "beta", lambda tensors: change(tensors[name]))
    with pytest.raises(CheckpointError, match=rf"expert beta \(.*beta\): tensor {name} {message}"):
        upcycle(parts)
    assert not left_over(parts)


@pytest.mark.parametrize(
    ("dtype", "kind", "large"), [(torch.bfloat16, "BF16", 3.4e38), (torch.float16, "F16", 7e4)]
)
def test_a_cast_that_overflows(parts, dtype, kind, large):
    for name in ("seed", "alpha", "gamma"):
        tensors = {n: t.to(dtype) for n, t in tensors_of(parts / name).items()}
        save_file(tensors, parts / name / "model.safetensors", metadata={"format": "pt"})
    edit_tensors(
        parts / "beta", lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[:2].fill_(large)
    )
    with pytest.raises(
        CheckpointError,
        match=rf"experts.1.up_proj.weight: 2 values overflow {kind}; expert beta",
    ):
        upcycle(parts)
    assert not left_over(parts)


def test_a_doubled_shared_expert_that_overflows(parts):
    edit_tensors(
        parts / "seed", lambda t: t["model.layers.0.mlp.down_proj.weight"].view(-1)[:2].fill_(3e38)
    )
    with pytest.raises(
        CheckpointError, match=r"shared_expert.down_proj.weight: 2 values overflow .* seed"
    ):
        upcycle(parts)
    assert not left_over(parts)


MEMORY = """
import re, sys
from pathlib import Path
from safetensors.torch import save_file
import torch
from nexus_ds.upcycling.sources import Part, mean_of
from nexus_ds.upcycling.translated import _write_blend
from nexus_ds.checkpoint.tensors import TensorReader, TensorWriter
shape, root = (24_000, 1024), Path(sys.argv[1])
readers = []
for index in range(3):
    (root / str(index)).mkdir()
    with TensorWriter(root / str(index), {"w": ("F32", shape)}) as writer:
        for start in range(0, shape[0], 1000):
            writer.write_rows("w", start, torch.full((1000, shape[1]), float(index + 1)))
    readers.append(TensorReader(root / str(index)))
(root / "out").mkdir()
def peak():
    # not ru_maxrss, in which the process that started this one counts
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
with TensorWriter(root / "out", {"w": ("F32", shape)}) as writer:
    mean = mean_of([Part("m", reader, "w") for reader in readers])
    _write_blend(writer, "w", shape, mean, torch.float32)
print((peak() - before) // 1024)
assert float(TensorReader(root / "out").read_rows("w", 100, 101).mean()) == 2.0
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """The mean of three tensors of 94 MiB is written with less than one of them in memory."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        # what is freed goes back to the system at once: what is counted is in use
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 90, f"{result.stdout} MiB"
