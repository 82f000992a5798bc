"""P(D) in numpy against P(D) in torch: every form, depth and dtype; quick checks."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import expert_rows
from nexus_ds.checkpoint.expert_rows import check_rows, open_router, some_columns
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.projection_module import expert_embeddings, new_projection, state_of
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import ROUTER, RouterRecord, read_manifest
from nexus_ds.checkpoint.sidecar import Sidecar, read_sidecar, write_sidecar
from nexus_ds.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def sidecar_of(nexus_dir, hidden=96, **form):
    """Return the sidecar of a checkpoint with a random P of another form."""
    old = read_sidecar(nexus_dir)
    router = dataclasses.replace(old.router, **form)
    torch.manual_seed(3)
    states = []
    for _ in range(2):
        projection = new_projection(router, 8, hidden)
        for parameter in projection.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        states.append(state_of(projection.state_dict()))
    return dataclasses.replace(old, router=router, projections=states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_norm", ["free", "fixed"])
@pytest.mark.parametrize(
    ("projection", "depth", "width"),
    [("swiglu", 2, 0), ("swiglu", 3, 20), ("gelu", 2, 24), ("relu", 3, 0), ("linear", 2, 0)],
)
@pytest.mark.parametrize("centre", [True, False])
def test_rows_are_those_of_torch(
    nexus_dir, tmp_path, dtype, row_norm, projection, depth, width, centre
):
    sidecar: Sidecar = sidecar_of(
        nexus_dir,
        row_norm=row_norm,
        projection=projection,
        depth=depth,
        width=width,
        centre=centre,
    )
    write_sidecar(tmp_path, sidecar)
    router = open_router(tmp_path, read_manifest(tmp_path))
    for layer in range(2):
        expected = expert_embeddings(sidecar, layer, DTYPES[dtype]).float().numpy()
        numbers, found = router.rows(layer, dtype)
        # two units in the last place of the largest: sums run in another order
        bound = np.abs(expected).max() * (2.0**-7 if dtype == "BF16" else 2.0**-20)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
        assert numbers.tolist() == list(range(96))
        some = np.array([0, 1, 2, 50, 94, 95])
        _, part = router.rows(layer, dtype, some)
        np.testing.assert_allclose(part, found[:, some], rtol=0, atol=bound)


@pytest.mark.parametrize("row_norm", ["free", "fixed"])
@pytest.mark.parametrize("form", expert_rows.WIDENING)
def test_shapes_are_those_of_torch(nexus_dir, form, row_norm):
    old = read_sidecar(nexus_dir).router
    for depth, width in ((1, 0), (2, 0), (3, 20)):
        router = dataclasses.replace(
            old, projection=form, depth=depth, width=width, row_norm=row_norm
        )
        state = new_projection(router, 8, 96).state_dict()
        expected = {name: tuple(weight.shape) for name, weight in state.items()}
        found = expert_rows.shapes_of(router, 8, 96)
        # the order is that of files
        assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("quick", [True, False])
def test_rows_that_are_not_p_of_d_are_named_by_layer(nexus_dir, tmp_path, quick):
    shutil.copytree(nexus_dir, tmp_path / "m")
    weights = Headers(tmp_path / "m")
    router = open_router(tmp_path / "m", read_manifest(tmp_path / "m"))
    check = check_rows(router, weights, 2, quick)
    assert check.layers == [0, 1] and check.columns == 16 and not check.worst
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[gate_name(1)][0, 3] += 0.5
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert list(check_rows(router, Headers(tmp_path / "m"), 2, quick).worst) == [1]


def test_a_quick_check_reads_some_layers_and_columns(nexus_dir, monkeypatch):
    router = open_router(nexus_dir, read_manifest(nexus_dir))
    monkeypatch.setattr(expert_rows, "MOST", router.layer_bytes())
    monkeypatch.setattr(expert_rows, "WHOLE", 0)
    monkeypatch.setattr(expert_rows, "PIECES", 2)
    monkeypatch.setattr(expert_rows, "PIECE", 3)
    check = check_rows(router, Headers(nexus_dir), 2, quick=True)
    assert check.columns == 6 and check.layers == [0, 1] and not check.worst
    assert some_columns(16, 64).tolist() == [0, 1, 2, 13, 14, 15]


def test_a_router_of_another_form_is_damaged(nexus_dir, tmp_path):
    shutil.copytree(nexus_dir, tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    router = open_router(tmp_path / "m", manifest)
    router.router = RouterRecord(**vars(manifest.router) | {"depth": 3})
    with pytest.raises(CheckpointError, match=r"P of layer 0 has not .* \(2 maps, not 3\)"):
        router.rows(0, "F32")
    router.router = RouterRecord(**vars(manifest.router) | {"projection": "relu"})
    with pytest.raises(CheckpointError, match=r"P of layer 0 has not the form that nexus.json"):
        router.rows(0, "F32")
    manifest.experts.pop()
    with pytest.raises(CheckpointError, match=r"2 experts but domain embeddings of shape \(3, 8\)"):
        open_router(tmp_path / "m", manifest)


@pytest.mark.parametrize("shape", [(), (16,), (16, 16, 1)])
@pytest.mark.parametrize("name", ["layers.0.maps.0.weight", "layers.0.maps.1.weight"])
@pytest.mark.parametrize("columns", [None, np.array([0, 1])])
def test_a_map_without_two_dimensions_is_damaged(nexus_dir, tmp_path, name, shape, columns):
    shutil.copytree(nexus_dir, tmp_path / "m")
    path = tmp_path / "m" / ROUTER
    save_file(load_file(path) | {name: torch.zeros(shape)}, path)
    router = open_router(tmp_path / "m", read_manifest(tmp_path / "m"))
    message = rf"{name} has the shape {re.escape(str(shape))}, expected two dimensions"
    with pytest.raises(CheckpointError, match=message):
        router.rows(0, "F32", columns)


@pytest.mark.parametrize("shape", [(), (3,), (3, 8)])
def test_a_centre_of_another_shape_is_damaged(nexus_dir, tmp_path, shape):
    shutil.copytree(nexus_dir, tmp_path / "m")
    path = tmp_path / "m" / ROUTER
    save_file(load_file(path) | {"centre": torch.zeros(shape)}, path)
    with pytest.raises(CheckpointError, match=rf"centre of shape {re.escape(str(shape))}, "):
        open_router(tmp_path / "m", read_manifest(tmp_path / "m"))


@pytest.mark.parametrize("rows", [0, 15, 17])
def test_a_last_map_of_other_rows_gives_none_of_the_stored_ones(nexus_dir, tmp_path, rows):
    shutil.copytree(nexus_dir, tmp_path / "m")
    path = tmp_path / "m" / ROUTER
    save_file(load_file(path) | {"layers.0.maps.1.weight": torch.ones(rows, 16)}, path)
    router = open_router(tmp_path / "m", read_manifest(tmp_path / "m"))
    assert 0 in check_rows(router, Headers(tmp_path / "m"), 2, quick=False).worst


def test_numbers_of_another_shape_are_as_far_as_can_be():
    zeros = np.zeros((2, 3), np.float32)
    assert expert_rows.relative_difference(zeros, zeros) == 0
    assert expert_rows.relative_difference(zeros[:1], zeros) == np.inf
    assert expert_rows.relative_difference(zeros[:, :0], zeros[:, :0]) == np.inf
