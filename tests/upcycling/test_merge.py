"""Merging as a setting of upcycling: what becomes of which tensor, what is told and refused."""

import json

import pytest
import torch
from branches import NAMES, make_parts, tensors_of, upcycle

from nexus_ds.checkpoint.qwen2_moe import open_moe
from nexus_ds.checkpoint.records import UpcycleStep
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import ConfigError
from nexus_ds.settings import Config, ModelConfig
from nexus_ds.upcycling.compatible import Waived
from nexus_ds.upcycling.merge import check_merge
from nexus_ds.upcycling.upcycle import upcycled
from nexus_ds.upcycling.verification import verify_sources
from tests.checkpoint.test_dense import dense, embeddings
from tests.checkpoint.test_merging import elected

Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def expected(method, base, branches):
    """What a tensor becomes, in plain torch; weights 1, 0.5 and 1, whole changes."""
    weights = [1.0, 0.5, 1.0]
    if method == "seed":
        return base
    if method == "mean":
        return sum(w * b for w, b in zip(weights, branches, strict=True)) / 2.5
    if method == "dare_ties":
        weights = [w / 2.5 for w in weights]
    agreeing = elected([branch - base for branch in branches], weights)
    total = agreeing.sum(0)
    if method == "ties":
        total = total / ((agreeing != 0) * torch.tensor(weights)[:, None, None]).sum(0)
    return base + total


@pytest.mark.parametrize("method", ["mean", "seed", "ties", "dare_ties"])
def test_all_but_ffns_are_merged_by_the_setting(method, parts):
    words = [f"model.merge={method}", "model.merge_density=1.0", "model.merge_weights={beta: 0.5}"]
    upcycle(parts, *words)
    out, base = tensors_of(parts / "out"), tensors_of(parts / "seed")
    branches = [tensors_of(parts / name) for name in NAMES]
    found = expected(method, base[Q], [branch[Q] for branch in branches])
    torch.testing.assert_close(out[Q], found, rtol=0, atol=1e-6)
    assert torch.equal(out[UP], branches[2]["model.layers.1.mlp.up_proj.weight"])
    [step] = read_sidecar(parts / "out").lineage
    assert isinstance(step, UpcycleStep)
    assert step.merge == {
        "merge": method,
        "merge_weights": {"beta": 0.5},
        "merge_density": 1.0,
    }
    checked = verify_sources(parts / "out", {})
    assert not checked.problems
    told = f"what was merged by {method} is not computed again"
    assert (told in checked.notes) == (method in ("ties", "dare_ties"))


def test_the_plain_mean_leaves_no_word_in_the_sidecar(parts):
    upcycle(parts)
    [step] = json.loads((parts / "out" / "nexus.json").read_text())["lineage"]
    assert "merge" not in step


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_form_that_is_translated_has_the_same_values(method, tmp_path, dense_dir):
    """Qwen3 is written row by row, by torch, and not by the engine."""
    rows = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    names = ("a", "b")
    for seed, name in enumerate(("seed", *names)):
        dense("qwen3", tmp_path / name, seed, rows, dense_dir)
    config = Config()
    config.model.merge, config.model.merge_density = method, 1.0
    experts = {name: tmp_path / name for name in names}
    new = upcycled(tmp_path / "seed", experts, embeddings(names), config)
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, config.router, 0)
    reader = TensorReader.of(open_moe(tmp_path / "out")[1])
    base, *branches = (TensorReader(tmp_path / name).read(Q) for name in ("seed", *names))
    agreeing = elected([branch - base for branch in branches], [0.5, 0.5])
    total = agreeing.sum(0)
    if method == "ties":
        total = total / (0.5 * (agreeing != 0)).sum(0).clamp_min(1e-30)
    torch.testing.assert_close(reader.read(Q), base + total, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "grown", "message"),
    [
        (ModelConfig(merge_weights={"delta": 2.0}), False, "delta is none of the experts alpha"),
        (ModelConfig(merge_weights={"beta": -1.0}), False, "expected numbers of at least 0, not"),
        (
            ModelConfig(merge_weights=dict.fromkeys(NAMES, 0.0)),
            False,
            "the branches weigh 0.0, 0.0, 0.0; expected numbers of at least 0, not all of them 0",
        ),
        (ModelConfig(merge="ties"), True, "model.merge: ties can't merge vocabularies that grew"),
    ],
)
def test_settings_that_do_not_go_together(model, grown, message):
    with pytest.raises(ConfigError, match=message):
        check_merge(model, NAMES, grown)


def test_upcycling_refuses_them(parts):
    with pytest.raises(ConfigError, match="seed can't merge vocabularies that grew"):
        upcycle(parts, "model.merge=seed", waived=Waived(vocabulary=True))
    assert not (parts / "out").exists()
