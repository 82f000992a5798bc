"""Lambda, the checks of new rows, and what an extended mixture consists of."""

import shutil

import numpy as np
import pytest
import torch
from branches import embed, make_parts, upcycle
from conftest import make_nexus, save_branch

from nexus_ds.checkpoint.qwen2_moe import Role, gate_name, stored
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.config import load_config
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.upcycling.extend import check_expert_embeddings, extended, merge_share
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.sources import Blend


def test_shares():
    assert merge_share(4, 1, None) == 0.2 and merge_share(4, 2, None) == pytest.approx(1 / 3)
    assert merge_share(4, 1, 0.0) == 0.0
    with pytest.raises(
        ConfigError, match=r"--lambda 1.5: expected a share in \[0, 1\]; leave it out for 1/5"
    ):
        merge_share(4, 1, 1.5)


@pytest.mark.parametrize("value", [150.0, -150.0, torch.nan, torch.inf])
def test_rows_that_dwarf_the_old_ones(value):
    """P has never learned such input. Rows up to 100 times the largest old one pass."""
    old = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
    with pytest.raises(
        CheckpointError, match=r"layer 1: the rows of the new experts have norms up to .*embed them"
    ):
        check_expert_embeddings(np.concatenate([old, [[0.0, 1.0], [value * 5.0, 0.0]]]), 2, 1)
    check_expert_embeddings(np.concatenate([old, [[0.0, 90.0 * 5.0]]]), 2, 1)


def sources(tensors, config, role):
    """Return (expert, model, weight) of each part of the tensors of a role."""
    found = set()
    for name, entry in stored(config).items():
        if entry.role is role:
            found |= {(entry.expert, part.who, part.weight) for part in tensors[name].parts}
    return found


@pytest.mark.parametrize("make", [extended, replaced])
def test_what_the_default_share_does_to_weights_of_the_seed_is_said(
    tmp_path, dense_dir, text_folder, capsys, make
):
    parts = make_parts(tmp_path, dense_dir, text_folder)
    upcycle(parts, "model.merge=seed")
    embed(parts / "more.safetensors", ("delta", "beta"), "gone", seed=3)
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    experts = {"beta" if make is replaced else "delta": parts / "alpha"}
    config = load_config("demo", [])
    share = "0.333" if make is replaced else "0.25"
    make(parts / "out", experts, embeddings, config)
    said = f"of these weights {share} come from the new branches now (the default of --lambda): -"
    assert said in capsys.readouterr().err
    # by choice
    for chosen in (0.0, 0.25):
        make(parts / "out", experts, embeddings, config, chosen)
    shutil.rmtree(parts / "out")
    upcycle(parts)
    make(parts / "out", experts, embeddings, config)
    assert "--lambda" not in capsys.readouterr().err


@pytest.mark.parametrize("router_input", ["token", "context"])
def test_every_tensor_comes_from_where_its_role_says(tmp_path, router_input):
    checkpoint = make_nexus(tmp_path / "nexus", router_input=router_input)
    save_branch(checkpoint, tmp_path / "delta")
    embed(tmp_path / "domains.safetensors", ["delta"], "nowhere")
    embeddings = read_domain_embeddings(tmp_path / "domains.safetensors")
    new = extended(checkpoint, {"delta": tmp_path / "delta"}, embeddings, load_config("demo", []))
    assert new.tensors.keys() == stored(new.config).keys()
    assert sources(new.tensors, new.config, Role.ROUTED) == {
        (0, "checkpoint", 1.0),
        (1, "checkpoint", 1.0),
        (2, "checkpoint", 1.0),
        (3, "expert delta", 1.0),
    }
    assert sources(new.tensors, new.config, Role.DENSE) == {
        (-1, "checkpoint", 0.75),
        (-1, "expert delta", 0.25),
    }
    copied = (Role.SHARED, Role.CONTEXT_MEAN)
    for name, entry in stored(new.config).items():
        if entry.role is Role.SHARED_GATE:
            assert new.tensors[name] == entry.fill
        if entry.role in copied:
            assert isinstance(new.tensors[name], Blend)
            assert [part.name for part in new.tensors[name].parts] == [name]
    old = TensorReader(checkpoint).read(gate_name(0))
    assert np.array_equal(new.tensors[gate_name(0)][:3], old.float().numpy())
