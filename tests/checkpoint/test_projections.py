"""P of each layer is made when it is asked for, and let go."""

import dataclasses
import shutil
import weakref

import numpy as np
import pytest
import torch

from nexus_ds.checkpoint.projection_module import expert_embeddings, load_projection
from nexus_ds.checkpoint.projections import Projections
from nexus_ds.checkpoint.sidecar import ROUTER, read_sidecar, write_sidecar


def test_a_layer_is_made_when_it_is_asked_for():
    made = []

    def make(layer):
        made.append(layer)
        return {"maps.0.weight": np.full(1, float(layer))}

    found = Projections(3, make)
    assert len(found) == 3 and bool(found) and not made
    assert [state["maps.0.weight"].tolist() for state in found] == [[0], [1], [2]]
    found[1] = {}
    assert found[1] == {} and made == [0, 1, 2]
    assert found[0].keys() == {"maps.0.weight"} and made == [0, 1, 2, 0]
    for layer in (-1, 3):
        with pytest.raises(IndexError, match=f"layer {layer} of 3"):
            found[layer]
    assert not Projections(0, make)


def test_one_layer_is_in_memory_at_a_time(nexus_dir, tmp_path):
    """Checked, written and computed with; the file is the one that all at once would give."""
    copied = shutil.copytree(nexus_dir, tmp_path / "nexus")
    old = read_sidecar(copied)
    states = list(old.projections)
    made = []
    most = [0]

    def make(layer):
        state = {name: weight.copy() for name, weight in states[layer].items()}
        made.extend(weakref.ref(weight) for weight in state.values())
        most[0] = max(most[0], sum(weight() is not None for weight in made))
        return state

    lazy = dataclasses.replace(old, projections=Projections(len(states), make))
    before = (copied / ROUTER).read_bytes()
    write_sidecar(copied, lazy)
    for layer in range(len(states)):
        expert_embeddings(lazy, layer, torch.float32)
    assert (copied / ROUTER).read_bytes() == before
    # the one before is let go when the next one is there
    assert 0 < most[0] <= 2 * len(states[0])


def test_a_module_that_is_changed_leaves_the_sidecar_as_it_is(nexus_dir):
    sidecar = read_sidecar(nexus_dir)
    sidecar.projections = list(sidecar.projections)
    before = expert_embeddings(sidecar, 0, torch.float32)
    load_projection(sidecar, 0).scale_output(2.0)
    assert torch.equal(expert_embeddings(sidecar, 0, torch.float32), before)
