"""llama.cpp as npm has it, and the package gguf, each in a folder: `python tests/llama_cpp.py`.

`make test` makes the folders once, ahead of the tests, which themselves ask for no network.
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
WANTED = {".venv-gguf": GGUF, ".venv-llama-cpp": NODE_LLAMA_CPP + LLAMA_CPP}


def _place(name):
    """Return a folder beside the virtualenv, and whether it is what is wanted."""
    folder = Path(sys.prefix).with_name(name)
    ready = folder / "ready"
    return folder, ready.is_file() and ready.read_text() == WANTED[name]


def _ready(name):
    """Return a folder; the test is skipped where it was not made."""
    folder, there = _place(name)
    if not there:
        pytest.skip("needs llama.cpp: python tests/llama_cpp.py, once, with node and a network")
    return folder


def main():
    """Make the folders that are not there; say why where that can't be."""
    if sys.prefix == sys.base_prefix:
        sys.exit("needs a virtualenv, beside which there will be folders")
    makers = {".venv-gguf": _install_gguf, ".venv-llama-cpp": _install_llama_cpp}
    for name, make in makers.items():
        folder, there = _place(name)
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
            with new_directory(folder) as temporary:
                make(temporary)
                (temporary / "ready").write_text(WANTED[name])


def _run(words):
    """Run an installer; end with what it said where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or f"{words[0]} failed").splitlines()[-1]
        sys.exit(f"llama.cpp can't be installed, its tests will be skipped: {why}")


def _install_gguf(folder):
    # what it needs else is the project's
    installer = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    _run([*installer, "--target", folder, GGUF])


def _install_llama_cpp(folder):
    if not shutil.which("npm") or not shutil.which("node"):
        sys.exit("no node and npm, which bring llama.cpp: its tests will be skipped")
    own = f"@node-llama-cpp/{PROCESSORS.get(platform.machine(), 'linux-x64')}"
    packages = {"node-llama-cpp": NODE_LLAMA_CPP, own: NODE_LLAMA_CPP}
    (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": packages}))
    # what it would compile or download after the installation is not needed
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
    _run(["npm", "install", "--prefix", folder, *quiet])
    release = folder / "node_modules/node-llama-cpp/llama/binariesGithubRelease.json"
    assert json.loads(release.read_text())["release"] == LLAMA_CPP


def gguf():
    """Return the package that writes GGUF; the test is skipped without."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        sys.path.append(str(_ready(".venv-gguf")))
        importlib.invalidate_caches()
        return importlib.import_module("gguf")


def answers(folder, cases):
    """Return what llama.cpp says of each case: a GGUF file, ids to read, texts to split.

    It computes on one core with a cache in fp32: `probabilities` has for each position those of the
    next token by id, `ids` those of each text. The test is skipped without it."""
    (folder / "cases.json").write_text(json.dumps(cases))
    # modules are looked for beside the program
    program = _ready(".venv-llama-cpp") / WORKER.name
    shutil.copyfile(WORKER, program)
    command = ["node", program, folder / "cases.json", folder / "answers.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return json.loads((folder / "answers.json").read_text())


if __name__ == "__main__":
    main()
