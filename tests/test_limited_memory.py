"""A mixture larger than the allowed memory is evaluated, generated from and extended by real
processes, with the numbers that it gives without a limit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_branch, save_tokenizer
from large import make_large

from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.data.domains import DomainEmbeddings, write_domain_embeddings

WORKER = Path(__file__).parent / "limited_worker.py"
ALLOWED = 300_000_000
# A Rust pool of all cores takes stacks of its own. And a real model's matrices are above malloc's
# largest threshold (32 MiB), so they go back to the system when they are freed; these are not.
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
RECIPE = """
training: {steps: 1}
data: {sequence_length: 32, workers: 1}
router: {fit_steps: 5, fit_windows: 4}
"""


@pytest.fixture
def parts(tmp_path, text_folder):
    """A mixture of 368 MB (737 MB in fp32) with experts d0, d1, d2; a branch d3; text of all."""
    mixture = tmp_path / "mixture"
    make_large(mixture, hidden=768, ffn=3072, layers=6, experts=3, vocabulary=31)
    assert sum(file.stat().st_size for file in mixture.glob("*.safetensors")) > 1.2 * ALLOWED
    assert save_tokenizer(mixture) <= 31
    save_branch(mixture, tmp_path / "d3", dtype=torch.bfloat16)
    for index, name in enumerate(("alpha", "beta", "gamma", "alpha")):
        shutil.copytree(text_folder / name, tmp_path / "text" / f"d{index}")
    vector = np.random.default_rng(5).normal(size=(1, 384)).astype(np.float32)
    described = ("tiny", "1" * 64, 16, 4, {"d3": 5}, 0, str(tmp_path / "text"))
    embeddings = DomainEmbeddings(["d3"], vector, *described)
    write_domain_embeddings(tmp_path / "new.safetensors", embeddings)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def command_lines(parts, name):
    """Return the words of the verbs; their results are called after `name`."""
    mixture, text = str(parts / "mixture"), str(parts / "text")
    few = ["--windows", "3"]
    scored = ["--data", text, *few, "--length", "32", "--out", str(parts / f"{name}-scores")]
    extend = ["--expert", f"d3={parts / 'd3'}", "--domains", str(parts / "new.safetensors")]
    extend += ["--config", str(parts / "recipe.yaml"), "--out", str(parts / f"{name}-extended")]
    return [
        ["evaluate", "--checkpoint", mixture, *scored, "--json"],
        ["generate", "--checkpoint", mixture, "tree leaf", "--tokens", "5", "--json"],
        ["extend", "--checkpoint", mixture, *extend, "--verdict", *few, "--json"],
    ]


def run(parts, name, allowed, lines):
    out = parts / f"{name}.json"
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(WORKER), str(allowed), str(out)],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | ENVIRONMENT,
    )
    print(f"{name}: {time.monotonic() - started:.0f} s\n{result.stderr}")
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text()), result.stderr


def without_speed(printed):
    """Return a verb's JSON without what depends on the clock or the name of its output."""
    found = json.loads(printed)
    for key in ("tokens_per_second", "speed", "out", "next", "bytes", "seconds"):
        found.pop(key, None)
    for model in found.get("models", {}).values():
        model.pop("tokens_per_second", None)
    return found


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_mixture_larger_than_memory_is_scored_generated_from_and_extended(parts):
    free, said = run(parts, "free", 0, command_lines(parts, "free"))
    assert "layer by layer" not in said
    # loaded whole last: what is left of a load that failed is garbage until it is collected
    lines = [*command_lines(parts, "limited"), ["whole", str(parts / "mixture")]]
    (*limited, whole), said = run(parts, "limited", ALLOWED, lines)
    assert whole[0] is True, "the limit is not one: the model could be loaded whole"
    assert said.count("it runs layer by layer") == 4  # evaluate, generate, before, after
    assert "memory ran out" not in said
    for found, expected in zip(limited, free, strict=True):
        assert found[0] == expected[0] == 0
        assert without_speed(found[1]) == without_speed(expected[1])
    one, two = (parts / f"{name}-extended" for name in ("free", "limited"))
    readers = TensorReader(one), TensorReader(two)
    assert len({sha256_of_tensors(reader, reader.names()) for reader in readers}) == 1
    assert len(read_sidecar(two).experts) == 4
