"""transformers 4 in a virtualenv of its own beside the project's, made once.

What needs no other version, torch above all, is the project's: a .pth file puts its packages after
those of transformers4.txt, 15 MB of downloads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nexus_ds.outputs import new_directory

PINS = Path(__file__).with_name("transformers4.txt")


def python():
    """Return the virtualenv's Python; the test is skipped where the packages can't be had."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtualenv, beside which transformers 4 gets another one")
    packages = sysconfig.get_path("purelib")
    wanted = f"{packages}\n{PINS.read_text()}"
    folder = Path(sys.prefix).with_name(".venv-transformers4")
    ready = folder / "ready"
    if not ready.is_file() or ready.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        with new_directory(folder) as temporary:
            _make(temporary, packages)
            (temporary / "ready").write_text(wanted)
    return folder / "bin" / "python"


def _make(folder, packages):
    venv.create(folder, with_pip=False, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "project.pth").write_text(packages + "\n")
    installer = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    made = subprocess.run(
        [*installer, "--quiet", "--no-deps", "-r", PINS], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"transformers 4 can't be installed: {made.stderr.strip().splitlines()[-1]}")


def run(program, *words):
    """Run a program of the tests there."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [python(), program, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
