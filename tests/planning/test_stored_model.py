"""Sizes that come of it, and all refusals: test_sizes.py."""

import json
import shutil

import pytest

from nexus_ds.errors import CheckpointError
from nexus_ds.planning.stored_model import read_model


def test_a_dense_model_has_no_experts_and_no_p(dense_dir):
    model = read_model(dense_dir)
    assert (model.experts, model.top_k, model.projection) == (0, 1, ())
    assert model.shared and not model.context


def test_a_nexus_checkpoint_says_its_input_and_its_sidecar_has_p(context_dir):
    model = read_model(context_dir)
    assert model.context and model.shared
    assert model.experts > 1 and model.projection


def test_a_sidecar_that_contradicts_itself_is_refused(nexus_dir, tmp_path):
    directory = shutil.copytree(nexus_dir, tmp_path / "nexus")
    said = json.loads((directory / "nexus.json").read_text())
    said["router"]["kind"] = "linear"
    (directory / "nexus.json").write_text(json.dumps(said))
    with pytest.raises(
        CheckpointError, match=r"nexus: a linear router with \d maps of P in layer 0"
    ):
        read_model(directory)
