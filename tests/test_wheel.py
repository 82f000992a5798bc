"""An installed wheel holds what a clone does: the recipes and DeepSpeed's settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ASK = """
from pathlib import Path
import nexus_ds
from nexus_ds.config import load_config
from nexus_ds.command_lines import DS_JSON, next_training
assert Path(nexus_ds.__file__).is_relative_to(Path.cwd()), nexus_ds.__file__
print(load_config("demo", []).stage, DS_JSON.read_text().count("zero_optimization"))
print(next_training(Path("out"), "data", "demo", "moe"))
"""


@pytest.mark.slow
def test_a_wheel_is_enough_without_the_clone(tmp_path):
    for name in ("nexus_ds", "ds_configs"):
        shutil.copytree(
            REPOSITORY / name,
            tmp_path / "clone" / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path / "clone")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    offline = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-compile",
        "--target",
        "site",
    ]
    installed = subprocess.run(
        [*pip, "install", *offline, "./clone"], cwd=tmp_path, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    shutil.rmtree(tmp_path / "clone")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, command = done.stdout.splitlines()
    assert found == "moe 1"
    for word in (word for word in command.split() if word.startswith("/")):
        assert Path(word).is_file() and Path(word).is_relative_to(tmp_path / "site")
    assert command.count(str(tmp_path / "site")) == 2
