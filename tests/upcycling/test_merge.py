"""Merging as a setting of upcycling: what becomes of which tensor, what is told and refused."""

import json

import numpy as np
import pytest
import torch
from branches import NAMES, ROWS, make_parts, tensors_of, upcycle

from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.qwen2_moe import open_moe
from nexus_ds.checkpoint.records import UpcycleStep
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import ConfigError
from nexus_ds.settings import Config, ModelConfig
from nexus_ds.upcycling.compatible import Waived
from nexus_ds.upcycling.merge import check_merge, row_weights
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


def some_counts(names, rows):
    """Counts of three texts: the first ends early, and token 3 is in none."""
    generator = np.random.default_rng(0)
    counts = {name: generator.integers(0, 90, rows) for name in names}
    for count in counts.values():
        count[3] = 0
    counts[names[0]] = counts[names[0]][: rows - 5]
    return counts


def by_counts(branches, counts, weights):
    """Rows of embeddings, in plain torch: each branch weighed by the token's share of its text."""
    rows = []
    for row in range(len(branches[0])):
        shares = []
        for count, weight in zip(counts.values(), weights, strict=True):
            found = int(count[row]) if row < len(count) else 0
            shares.append(weight * found / int(count.sum()))
        if not any(shares):
            shares = weights
        vectors = [share * b[row].double() for share, b in zip(shares, branches, strict=True)]
        rows.append(sum(vectors) / sum(shares))
    return torch.stack(rows).float()


@pytest.mark.parametrize("method", ["mean", "seed", "ties"])
def test_rows_of_embeddings_weigh_by_counts(method, parts):
    """Beside any way to merge the rest."""
    counts = some_counts(NAMES, ROWS)
    words = [f"model.merge={method}", "model.merge_rows=counted", "model.merge_density=1.0"]
    upcycle(parts, *words, "model.merge_weights={beta: 0.5}", counts=counts)
    out, base = tensors_of(parts / "out"), tensors_of(parts / "seed")
    branches = [tensors_of(parts / name) for name in NAMES]
    found = by_counts([branch[EMBEDDING] for branch in branches], counts, [1.0, 0.5, 1.0])
    torch.testing.assert_close(out[EMBEDDING], found, rtol=1e-5, atol=1e-6)
    rest = expected(method, base[Q], [branch[Q] for branch in branches])
    torch.testing.assert_close(out[Q], rest, rtol=0, atol=1e-6)
    [step] = read_sidecar(parts / "out").lineage
    assert isinstance(step, UpcycleStep)
    assert step.merge["merge_rows"] == "counted"
    checked = verify_sources(parts / "out", {})
    assert not checked.problems
    assert "rows weighed by counts of tokens are not computed again" in checked.notes


def test_weights_do_not_depend_on_how_long_a_text_is():
    counts = {"a": np.array([30, 10]), "b": np.array([1, 3])}
    found = row_weights(counts, [1.0, 1.0], 3)
    assert found.tolist() == [[0.75, 0.25, 0.5], [0.25, 0.75, 0.5]]


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


def test_counts_weigh_the_rows_of_a_form_that_is_translated(tmp_path, dense_dir):
    """And those of a head of its own."""
    rows = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    names = ("a", "b")
    for seed, name in enumerate(("seed", *names)):
        dense("qwen3", tmp_path / name, seed, rows, dense_dir)
    config = Config()
    config.model.merge_rows = "counted"
    experts = {name: tmp_path / name for name in names}
    counts = some_counts(names, rows)
    new = upcycled(tmp_path / "seed", experts, embeddings(names), config, counts=counts)
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, config.router, 0)
    reader = TensorReader.of(open_moe(tmp_path / "out")[1])
    branches = [TensorReader(tmp_path / name) for name in names]
    for name in (EMBEDDING, HEAD):
        found = by_counts([branch.read(name) for branch in branches], counts, [1.0, 1.0])
        torch.testing.assert_close(reader.read(name), found, rtol=1e-5, atol=1e-6)


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
        (ModelConfig(merge_rows="counted"), True, "model.merge_rows: counted can't merge vocab"),
    ],
)
def test_settings_that_do_not_go_together(model, grown, message):
    with pytest.raises(ConfigError, match=message):
        check_merge(model, NAMES, grown)


def test_upcycling_refuses_them(parts):
    with pytest.raises(ConfigError, match=r"grew; leave --align-vocab out, or set .*=mean or seed"):
        upcycle(parts, "model.merge=ties", waived=Waived(vocabulary=True))
    assert not (parts / "out").exists()
