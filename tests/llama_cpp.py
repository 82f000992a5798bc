"""llama.cpp as npm has it, and the package gguf, in a folder beside the virtualenv, made once.

node-llama-cpp brings llama.cpp compiled: 30 MB of downloads for this machine's processor."""

import importlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ds.outputs import new_directory

NODE_LLAMA_CPP = "3.22.1"
LLAMA_CPP = "v0.5.0"
GGUF = "gguf==0.19.0"
WORKER = Path(__file__).with_name("llama_cpp_worker.mjs")
PROCESSORS = {"x86_64": "linux-x64", "aarch64": "linux-arm64", "arm64": "mac-arm64-metal"}


def _folder(name, wanted, make):
    """Return a folder beside the virtualenv, made by `make` where it is not what is wanted."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtualenv, beside which packages of its own get a folder")
    folder = Path(sys.prefix).with_name(name)
    ready = folder / "ready"
    if not ready.is_file() or ready.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        with new_directory(folder) as temporary:
            make(temporary)
            (temporary / "ready").write_text(wanted)
    return folder


def _run(words, what):
    """Run an installer; the test is skipped, with what it said, where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{what} can't be installed: {done.stderr.strip().splitlines()[-1]}")


def _install_gguf(folder):
    installer = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    _run([*installer, "--target", folder, GGUF], "the package gguf")


def gguf():
    """Return the package that writes GGUF; what it needs else is the project's."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        sys.path.append(str(_folder(".venv-gguf", GGUF, _install_gguf)))
        importlib.invalidate_caches()
        return importlib.import_module("gguf")


def _install_llama_cpp(folder):
    own = f"@node-llama-cpp/{PROCESSORS.get(platform.machine(), 'linux-x64')}"
    packages = {"node-llama-cpp": NODE_LLAMA_CPP, own: NODE_LLAMA_CPP}
    (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": packages}))
    # what it would compile or download after the installation is not needed
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
    _run(["npm", "install", "--prefix", folder, *quiet], "llama.cpp")
    release = folder / "node_modules/node-llama-cpp/llama/binariesGithubRelease.json"
    assert json.loads(release.read_text())["release"] == LLAMA_CPP


def answers(folder, cases):
    """Return what llama.cpp says of each case: a GGUF file, ids to read, texts to split.

    It computes on one core with a cache in fp32: `probabilities` has for each position those of the
    next token by id, `ids` those of each text."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("needs node and npm, for llama.cpp as node-llama-cpp has it")
    place = _folder(".venv-llama-cpp", NODE_LLAMA_CPP + LLAMA_CPP, _install_llama_cpp)
    (folder / "cases.json").write_text(json.dumps(cases))
    # modules are looked for beside the program
    program = place / WORKER.name
    shutil.copyfile(WORKER, program)
    command = ["node", program, folder / "cases.json", folder / "answers.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return json.loads((folder / "answers.json").read_text())
