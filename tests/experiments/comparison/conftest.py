"""Made-up results, as they are and on a page."""

import copy
import json

import pytest
from made_up_results import read, results

from nexus_ds.experiments.comparison.report import write_comparison


@pytest.fixture(scope="session")
def whole():
    return results()


@pytest.fixture
def found(whole):
    """Results that a test may change."""
    return copy.deepcopy(whole)


@pytest.fixture(scope="session")
def written(whole, tmp_path_factory):
    """The folder with the page, the figures and the tables."""
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(read(json.loads(json.dumps(whole))), folder)
    return folder
