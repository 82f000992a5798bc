"""Branches are opened and checked together; what can't be opened does not hide the rest."""

import pytest
from branches import NAMES, edit_config, make_parts

from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.errors import CheckpointError
from nexus_ds.upcycling.branches import check_branches, open_all
from nexus_ds.upcycling.compatible import NOTHING, seed_origin


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def test_those_that_open_are_compared(parts):
    problems = Problems()
    edit_config(parts / "beta", rms_norm_eps=1e-3)
    (parts / "gamma" / "config.json").unlink()
    models = open_all({name: parts / name for name in NAMES}, problems)
    assert list(models) == ["alpha", "beta"]
    check_branches(seed_origin(open_dense(parts / "seed")), models, NOTHING, problems)
    first, second = map(str, problems.found)
    assert "gamma has no config.json" in first and "norm_eps" in second
    with pytest.raises(CheckpointError, match=r"^2 things to mend"):
        problems.refuse()


def test_an_expert_may_be_called_seed(parts):
    problems = Problems()
    edit_config(parts / "beta", rms_norm_eps=1e-3)
    models = open_all({"seed": parts / "beta"}, problems)
    check_branches(seed_origin(open_dense(parts / "seed")), models, NOTHING, problems)
    [error] = problems.found
    assert str(error).splitlines()[1].split() == ["the", "seed", "seed"]
