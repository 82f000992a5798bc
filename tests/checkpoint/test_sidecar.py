"""The sidecar of a Nexus checkpoint, and the rows that it vouches for."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import sidecar as sidecar_module
from nexus_ds.checkpoint.expert_rows import condition
from nexus_ds.checkpoint.projection_module import domain_inputs, expert_embeddings, load_projection
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import SIDECAR, RemoveStep, is_nexus
from nexus_ds.checkpoint.sidecar import (
    ROUTER,
    ROUTER_BEFORE,
    read_sidecar,
    verify_expert_embeddings,
    write_sidecar,
)
from nexus_ds.errors import CheckpointError
from nexus_ds.model.router import Projection, expert_embeddings_in


@pytest.fixture
def copied(nexus_dir, tmp_path):
    return shutil.copytree(nexus_dir, tmp_path / "nexus")


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_round_trip(nexus_dir, copied):
    sidecar = read_sidecar(nexus_dir)
    assert is_nexus(nexus_dir) and not is_nexus(nexus_dir.parent)
    removed = RemoveStep(checkpoint="nexus", experts=["delta"])
    write_sidecar(copied, dataclasses.replace(sidecar, lineage=[*sidecar.lineage, removed]))
    again = read_sidecar(copied)
    assert [e.name for e in again.experts] == ["alpha", "beta", "gamma"]
    assert again.lineage == [*sidecar.lineage, removed]
    assert again.router == sidecar.router and again.encoder == sidecar.encoder
    assert np.array_equal(again.vectors, sidecar.vectors)
    assert np.array_equal(again.centre, sidecar.centre)
    pairs = zip(again.projections, sidecar.projections, strict=True)
    assert all(np.array_equal(a[name], b[name]) for a, b in pairs for name in b)


def test_rows_are_a_function_of_the_embeddings(nexus_dir):
    """Fact 1 and 2: rows are P(D); P's shapes don't depend on the number of experts, d has no
    gradient."""
    sidecar = read_sidecar(nexus_dir)
    state = sidecar.projections[0]
    assert state["maps.0.weight"].shape == (32, 8) and state["maps.1.weight"].shape == (16, 16)
    w1, w2 = (torch.from_numpy(state[f"maps.{index}.weight"]) for index in range(2))
    inputs = torch.from_numpy(condition(sidecar.vectors, sidecar.centre))
    a, b = (inputs @ w1.T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(a) * b) @ w2.T
    torch.testing.assert_close(expert_embeddings(sidecar, 0, torch.float32), expected)
    assert not domain_inputs(sidecar).requires_grad
    order = [2, 0, 1]  # fact 6: permuting experts permutes rows
    permuted = dataclasses.replace(sidecar, vectors=sidecar.vectors[order])
    torch.testing.assert_close(
        expert_embeddings(permuted, 1, torch.float32),
        expert_embeddings(sidecar, 1, torch.float32)[order],
    )
    raw = dataclasses.replace(sidecar, router=dataclasses.replace(sidecar.router, centre=False))
    assert np.array_equal(raw.domain_inputs(), sidecar.vectors)
    assert expert_embeddings(sidecar, 0, torch.bfloat16).dtype == torch.bfloat16


def test_identical_embeddings_give_equal_gates(nexus_dir):
    """Fact 7."""
    sidecar = read_sidecar(nexus_dir)
    same = dataclasses.replace(sidecar, vectors=sidecar.vectors[[0, 0, 0]])
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    gates = (x @ expert_embeddings(same, 0, torch.float32).T).softmax(-1)
    torch.testing.assert_close(gates, torch.full((5, 3), 1 / 3))


def test_rows_round_weights_and_embeddings_first(nexus_dir):
    sidecar = read_sidecar(nexus_dir)
    projection = load_projection(sidecar, 1)
    assert isinstance(projection, Projection)
    expected = expert_embeddings_in(projection, domain_inputs(sidecar), torch.bfloat16)
    assert torch.equal(expert_embeddings(sidecar, 1, torch.bfloat16), expected)


def test_verify_rows(nexus_dir, copied):
    verify_expert_embeddings(nexus_dir)
    edit_tensors(copied / "model.safetensors", lambda t: t[gate_name(1)].mul_(1.01))
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.gate.weight differs from P\(D\).*restore both"
    ):
        verify_expert_embeddings(copied)


def test_rows_that_are_no_numbers(copied):
    edit_tensors(copied / "model.safetensors", lambda t: t[gate_name(1)][2, 3].fill_(torch.nan))
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.gate.weight differs from P\(D\).* by nan"
    ):
        verify_expert_embeddings(copied)


def test_verify_rows_in_bf16(copied):
    sidecar = read_sidecar(copied)

    def cast(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        tensors.update(
            {gate_name(i): expert_embeddings(sidecar, i, torch.bfloat16) for i in range(2)}
        )

    edit_tensors(copied / "model.safetensors", cast)
    verify_expert_embeddings(copied)
    edit_tensors(copied / "model.safetensors", lambda t: t[gate_name(0)].mul_(1.1))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate.weight differs"):
        verify_expert_embeddings(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=3), "format 3, this version reads 2"),
        (lambda v: v.update(format=1), "format 1, this version reads 2"),
        (
            lambda v: v.update(shared_expert="some"),
            "shared_expert is 'some', expected seed or none",
        ),
        (lambda v: v["experts"].pop(), "2 experts but domain embeddings of shape \\(3, 8\\)"),
        (lambda v: v["experts"][0].pop("sha256"), "experts\\[0\\]: found .* expected"),
        (lambda v: v["experts"][0].update(name="beta"), "not all different"),
        (lambda v: v["router"].update(depth="2"), "router.depth: found '2', expected int"),
        (lambda v: v["router"].update(depth=3), "P of layer 0 has the weights"),
        (lambda v: v["router"].update(projection="sine"), "P of layer 0 has the weights"),
        (lambda v: v["router"].update(kind="linear"), "a linear router with 2 projections"),
        (lambda v: v["router"].update(top_k=2), "num_experts_per_tok 1, nexus.json says 2"),
        (lambda v: v["encoder"].update(dimension=9), "encoder of dimension 9"),
        (lambda v: v.update(experts={}), "expected lists of experts and lineage"),
        (lambda v: v.update(lineage=["upcycle"]), "a JSON object for each step of the lineage"),
    ],
)
def test_damaged_sidecars(copied, change, message):
    edit_json(copied / SIDECAR, change)
    with pytest.raises(CheckpointError, match=message):
        read_sidecar(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(vectors=t["vectors"] * torch.nan),
            "vectors holds 24 values that are not finite",
        ),
        (lambda t: t.update(centre=t["centre"][:3].clone()), "centre of shape \\(3,\\)"),
        (lambda t: t.pop("layers.0.maps.1.weight"), "P of layer 0"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.0")],
            "projections of layers \\[1\\]",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1")],
            "num_hidden_layers 2, nexus.json says 1",
        ),
        # Python reads no number of 5,000 digits
        (
            lambda t: t.update({f"layers.{'9' * 5000}.maps.0": t.pop("layers.1.maps.0.weight")}),
            "P of layer 1",
        ),
        (lambda t: t.pop("vectors"), "no tensor 'vectors'"),
    ],
)
def test_damaged_router_files(copied, change, message):
    edit_tensors(copied / ROUTER, change)
    with pytest.raises(CheckpointError, match=message):
        read_sidecar(copied)


def test_missing_parts(copied, dense_dir, nexus_dir):
    with pytest.raises(
        CheckpointError, match=r"has no nexus.json: it is no Nexus checkpoint; make one"
    ):
        read_sidecar(dense_dir)
    (copied / ROUTER).unlink()
    with pytest.raises(CheckpointError, match=r"has no nexus/nexus_router.safetensors"):
        read_sidecar(copied)
    sidecar = read_sidecar(nexus_dir)
    with pytest.raises(CheckpointError, match="3 experts but"):
        write_sidecar(copied, dataclasses.replace(sidecar, vectors=sidecar.vectors[:2]))
    assert not (copied / ROUTER).exists()


def test_no_loader_of_weights_finds_the_routers_file(nexus_dir):
    """vLLM and SGLang load every *.safetensors beside config.json, and enter no folder."""
    assert (nexus_dir / ROUTER).is_file()
    assert [path.name for path in nexus_dir.glob("*.safetensors")] == ["model.safetensors"]


def test_a_router_in_its_old_place_is_read_and_moved_by_the_next_writer(nexus_dir, copied):
    shutil.move(copied / ROUTER, copied / ROUTER_BEFORE)
    (copied / ROUTER).parent.rmdir()
    old, new = read_sidecar(copied), read_sidecar(nexus_dir)
    assert np.array_equal(old.vectors, new.vectors)
    verify_expert_embeddings(copied)
    first = sidecar_module.content_fingerprint(copied)
    edit_tensors(copied / ROUTER_BEFORE, lambda t: t["vectors"].view(-1)[:1].add_(1))
    assert sidecar_module.content_fingerprint(copied) != first
    write_sidecar(copied, new)
    assert (copied / ROUTER).is_file() and not (copied / ROUTER_BEFORE).exists()


def test_two_router_files_are_one_too_many(copied):
    shutil.copy(copied / ROUTER, copied / ROUTER_BEFORE)
    with pytest.raises(CheckpointError, match=r"has both .* and .*; remove the one that is not of"):
        read_sidecar(copied)


def test_a_linear_router_keeps_its_rows_in_the_model(nexus_dir, copied):
    sidecar = read_sidecar(nexus_dir)
    linear = dataclasses.replace(sidecar.router, kind="linear")
    write_sidecar(copied, dataclasses.replace(sidecar, router=linear, projections=[]))
    verify_expert_embeddings(copied)
    with pytest.raises(CheckpointError, match="a linear router has free rows"):
        expert_embeddings(read_sidecar(copied), 0, torch.float32)


def test_the_content_fingerprint_follows_every_part(nexus_dir, copied):
    first = sidecar_module.content_fingerprint(nexus_dir)
    assert sidecar_module.content_fingerprint(copied) == first
    seen = {first}
    flip = "model.layers.1.self_attn.q_proj.weight"
    for name, change in {
        "model.safetensors": lambda path: edit_tensors(
            path, lambda t: t[flip].view(-1)[7:8].mul_(-1)
        ),
        ROUTER: lambda path: edit_tensors(path, lambda t: t["vectors"].view(-1)[:1].add_(1)),
        SIDECAR: lambda path: edit_json(path, lambda v: v["lineage"].append({"verb": "train"})),
        "config.json": lambda path: edit_json(path, lambda v: v.update(rms_norm_eps=1e-4)),
    }.items():
        size = (copied / name).stat().st_size
        change(copied / name)
        assert name != "model.safetensors" or (copied / name).stat().st_size == size
        seen.add(sidecar_module.content_fingerprint(copied))
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")
    last = sidecar_module.content_fingerprint(copied)
    assert len(seen | {last}) == 6
    (copied / "training.yaml").write_text("no part of the model")
    assert sidecar_module.content_fingerprint(copied) == last


def test_versions():
    found = sidecar_module.versions()
    assert found["nexus_ds"] and found["torch"].startswith("2.")
