"""Packages that the project does without, in other virtualenvs: `python tests/transformers4.py`.

`make test` makes them once, ahead of the tests, which themselves ask for no network.
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

NAMES = ("transformers4", "finetuning")


def _pins(name):
    return Path(__file__).with_name(f"{name}.txt")


def _place(name):
    """Return the virtualenv's folder, the project's packages and what is to be in `ready`."""
    packages = sysconfig.get_path("purelib")
    wanted = f"{packages}\n{_pins(name).read_text()}"
    return Path(sys.prefix).with_name(f".venv-{name}"), packages, wanted


def _is_ready(folder, wanted):
    ready = folder / "ready"
    return ready.is_file() and ready.read_text() == wanted


def python(name="transformers4"):
    """Return the virtualenv's Python; the test is skipped where it was not made."""
    folder, _, wanted = _place(name)
    if not _is_ready(folder, wanted):
        pytest.skip(f"needs {name}: python tests/transformers4.py, once, with a network")
    return folder / "bin" / "python"


def main():
    """Make the virtualenvs that are not there; say why where that can't be."""
    if sys.prefix == sys.base_prefix:
        sys.exit("needs a virtualenv, beside which there will be others")
    for name in NAMES:
        folder, packages, wanted = _place(name)
        if not _is_ready(folder, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            with new_directory(folder) as temporary:
                _make(temporary, packages, name)
                (temporary / "ready").write_text(wanted)


def _make(folder, packages, name):
    venv.create(folder, with_pip=False, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "project.pth").write_text(packages + "\n")
    installer = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    made = subprocess.run(
        [*installer, "--quiet", "--no-deps", "-r", _pins(name)], capture_output=True, text=True
    )
    if made.returncode:
        why = (made.stderr.strip() or "pip failed").splitlines()[-1]
        sys.exit(f"{name} can't be installed, its tests will be skipped: {why}")


def run(program, *words):
    """Run a program of the tests with transformers 4."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    command = [python(), program, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr


if __name__ == "__main__":
    main()
