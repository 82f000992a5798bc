"""Packages that the project does without in virtualenvs of their own beside its own, made once.

What needs no other version, torch above all, is the project's: a .pth file puts its packages after
those of NAME.txt. `transformers4` is 15 MB of downloads, `finetuning` 3 MB."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nexus_ds.outputs import new_directory


def python(name="transformers4"):
    """Return the virtualenv's Python; the test is skipped where the packages can't be had."""
    if sys.prefix == sys.base_prefix:
        pytest.skip(f"needs a virtualenv, beside which {name} gets another one")
    packages = sysconfig.get_path("purelib")
    pins = Path(__file__).with_name(f"{name}.txt")
    wanted = f"{packages}\n{pins.read_text()}"
    folder = Path(sys.prefix).with_name(f".venv-{name}")
    ready = folder / "ready"
    if not ready.is_file() or ready.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        with new_directory(folder) as temporary:
            _make(temporary, packages, pins)
            (temporary / "ready").write_text(wanted)
    return folder / "bin" / "python"


def _make(folder, packages, pins):
    venv.create(folder, with_pip=False, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "project.pth").write_text(packages + "\n")
    installer = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    made = subprocess.run(
        [*installer, "--quiet", "--no-deps", "-r", pins], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"{pins.stem} can't be installed: {made.stderr.strip().splitlines()[-1]}")


def run(program, *words):
    """Run a program of the tests there."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [python(), program, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
