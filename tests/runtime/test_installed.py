"""Versions that are too old end a training at its start; all that differ are preflight's."""

import pytest

from nexus_ds import train
from nexus_ds.errors import ConfigError
from nexus_ds.runtime import installed


def test_installed_versions_are_compared_with_the_package_s(monkeypatch):
    assert installed.version_problems() == []
    asked = ["torch<1", 'of-an-extra; extra == "gguf"', "no-such-thing>=2"]
    monkeypatch.setattr(installed.importlib.metadata, "requires", lambda name: asked)
    found = installed.version_problems()
    assert found[0].startswith("torch 2.") and "<1 expected; type: make setup" in found[0]
    assert found[1] == "no-such-thing is not installed, expected no-such-thing>=2; type: make setup"
    assert len(found) == 2


def test_a_training_starts_with_newer_versions_and_not_with_older_ones(monkeypatch, capsys):
    installed.refuse_older()
    asked = ["torch>=99,<100", "numpy>=1,<1.1", "deepspeed<0.1", "no-such-thing>=2"]
    monkeypatch.setattr(installed.importlib.metadata, "requires", lambda name: asked)
    with pytest.raises(ConfigError, match=r"^torch 2\.\S+ found, >=99 expected; type: make setup$"):
        installed.refuse_older()
    # before anything that a recipe names is looked for
    assert train.main(["--config", "demo", "model.path=nowhere"]) == 1
    assert capsys.readouterr().err.startswith("train.py: torch 2.")


def test_a_package_that_was_not_installed_asks_for_nothing(monkeypatch):
    def none(name):
        raise installed.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.importlib.metadata, "requires", none)
    installed.refuse_older()
    assert installed.version_problems() == []
