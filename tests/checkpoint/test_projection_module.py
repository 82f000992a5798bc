"""P of a checkpoint as torch's module: the weights that are stored, and a copy of them."""

import dataclasses

import numpy as np
import pytest
import torch

from nexus_ds.checkpoint.projection_module import (
    domain_inputs,
    expert_embeddings,
    inputs_of,
    load_projection,
    state_of,
)
from nexus_ds.checkpoint.sidecar import read_sidecar, rows_of
from nexus_ds.errors import CheckpointError


def test_the_module_has_the_stored_weights_and_gives_them_back(nexus_dir):
    sidecar = read_sidecar(nexus_dir)
    projection = load_projection(sidecar, 1)
    found = state_of(projection.state_dict())
    assert found.keys() == sidecar.projections[1].keys()
    for name, weight in sidecar.projections[1].items():
        assert np.array_equal(found[name], weight) and found[name].dtype == np.float32
    # copies, both ways
    with torch.no_grad():
        projection.maps[0].weight.zero_()
    assert found["maps.0.weight"].any()


def test_inputs_are_copies_and_conditioned_alike(nexus_dir):
    sidecar = read_sidecar(nexus_dir)
    inputs_EM = domain_inputs(sidecar)
    assert torch.equal(inputs_of(sidecar, torch.from_numpy(sidecar.vectors)), inputs_EM)
    sidecar.router.centre = False
    raw_EM = domain_inputs(sidecar)
    raw_EM.zero_()
    assert sidecar.vectors.any()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_are_those_of_numpy_to_the_last_places(nexus_dir, dtype):
    sidecar = read_sidecar(nexus_dir)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    expected = expert_embeddings(sidecar, 0, kind).float().numpy()
    bound = np.abs(expected).max() * (2.0**-7 if dtype == "BF16" else 2.0**-20)
    np.testing.assert_allclose(rows_of(sidecar, 0, dtype), expected, rtol=0, atol=bound)


def test_weights_of_another_form_are_damaged(nexus_dir):
    sidecar = read_sidecar(nexus_dir)
    deeper = dataclasses.replace(sidecar, router=dataclasses.replace(sidecar.router, depth=3))
    for load in (load_projection, lambda *of: rows_of(*of, "F32")):
        with pytest.raises(CheckpointError, match=r"P of layer 0 has the weights .* is damaged"):
            load(deeper, 0)
