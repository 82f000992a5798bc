"""Every mistake of a user is reported as one line, whatever its kind; a fault of ours is not."""

import inspect

import pytest

from nexus_ds import errors
from nexus_ds.__main__ import main
from nexus_ds.commands import status
from nexus_ds.launch import EXIT_BAD_BATCHES

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_reported_without_a_traceback(kind, monkeypatch, capsys):
    def run(args):
        raise kind("3 found, 4 expected; give 4")

    monkeypatch.setattr(status, "run", run)
    # by which a job that a batch ended is told from others
    expected = EXIT_BAD_BATCHES if kind is errors.BadBatchesError else 1
    assert main(["status", "run"]) == expected
    assert capsys.readouterr().err == "nexus-ds status: 3 found, 4 expected; give 4\n"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def run(args):
        raise RuntimeError("never expected")

    monkeypatch.setattr(status, "run", run)
    with pytest.raises(RuntimeError, match="never expected"):
        main(["status", "run"])


def test_no_kind_of_mistake_is_caught_as_another():
    """A handler of one kind must not swallow another: all are siblings."""
    assert errors.NexusError in KINDS and len(KINDS) > 5
    for kind in KINDS:
        expected = Exception if kind is errors.NexusError else errors.NexusError
        assert kind.__bases__ == (expected,)
