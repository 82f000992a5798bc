"""A run whose states several files of tests start from."""

import pytest
from conftest import make_nexus
from saved_states import launch


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Nexus checkpoint of three experts: on expert parallel 2 one slot is vacant."""
    return make_nexus(tmp_path_factory.mktemp("states") / "nexus", names=["a", "b", "c"])


@pytest.fixture(scope="session")
def source(tmp_path_factory, checkpoint):
    """States after steps 2, 4 and 6 of an uninterrupted run, and its losses.

    ZeRO-3, three experts on expert parallel 2.
    """
    folder = tmp_path_factory.mktemp("source") / "states"
    words = ("stage=3", "parallel.expert=2", "router.load_balance=0", "save=2,4,6", "until=6")
    result = launch(checkpoint, folder, 2, *words)
    return folder, result["losses"]
