"""The router's file beside the model's: the same bytes as of a sidecar that is written alone."""

import dataclasses
import weakref

import numpy as np
import pytest

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.checkpoint.projections import Projections
from nexus_ds.checkpoint.sidecar import ROUTER, read_sidecar, rows_of
from nexus_ds.checkpoint.values import read_values
from nexus_ds.errors import CheckpointError
from nexus_ds.upcycling.router_file import RouterFile
from nexus_ds.upcycling.sources import Rows


def write(out, sidecar):
    """Write the router's file, and the rows of all layers as a model's file."""
    rows = rows_of(sidecar, 0, "F32")
    layers = range(len(sidecar.projections))
    plan = {str(layer): ("F32", rows.shape) for layer in layers}
    with NewFiles(out, plan) as files:
        with RouterFile(out, sidecar, rows.shape[1], files.frontier) as router:
            places = {
                layer: (Rows(sidecar, layer, "F32"), files.place(str(layer))) for layer in layers
            }
            assembly.assemble([router.job(places)])
        for name in plan:
            files.wrote(name)


def test_it_is_the_file_of_the_sidecar_and_each_p_is_made_once(nexus_dir, tmp_path):
    old = read_sidecar(nexus_dir)
    states = list(old.projections)
    made, alive = [], []

    def make(layer):
        # all of the one before was let go
        assert not [weight for weight in alive if weight() is not None]
        made.append(layer)
        state = {name: weight.copy() for name, weight in states[layer].items()}
        alive.extend(weakref.ref(weight) for weight in state.values())
        return state

    sidecar = dataclasses.replace(old, projections=Projections(len(states), make))
    write(tmp_path, sidecar)
    # layer 0 once more by the test itself
    assert made == [0, *range(len(states))]
    assert (tmp_path / ROUTER).read_bytes() == (nexus_dir / ROUTER).read_bytes()
    found = Headers(tmp_path)
    for layer in range(len(states)):
        np.testing.assert_array_equal(read_values(found, str(layer)), rows_of(old, layer, "F32"))


def test_numbers_that_are_not_finite_are_refused(nexus_dir, tmp_path):
    old = read_sidecar(nexus_dir)
    sidecar = dataclasses.replace(old, projections=list(old.projections))
    [*_, last] = sidecar.projections[1].values()
    last[0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"layers.1.* holds 1 values that are not finite"):
        write(tmp_path, sidecar)


def test_parts_that_contradict_each_other_are_refused(nexus_dir, tmp_path):
    old = read_sidecar(nexus_dir)
    sidecar = dataclasses.replace(old, vectors=old.vectors[:2])
    with pytest.raises(CheckpointError, match="experts but domain embeddings of shape"):
        write(tmp_path, sidecar)
