"""A new mixture's router: what is drawn, what it is scaled to, what P reads of domains."""

import math

import numpy as np
import pytest
import torch
from conftest import balanced_projection

from nexus_ds.checkpoint.expert_rows import centre_of, condition, rows_in
from nexus_ds.checkpoint.records import RouterRecord
from nexus_ds.upcycling.new_router import (
    BLOCK,
    centred_norm,
    domain_rows,
    free_rows,
    layer_draws,
    lengths,
    new_state,
    normal,
)

EMBEDDINGS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).numpy()
PAPERS = RouterRecord("nexus", 2, 0, "swiglu", "free", "token", True, 1)


def state_of(inputs=EMBEDDINGS, seed=0, layer=0, init="balanced", router=PAPERS):
    return new_state(router, inputs, 16, init, 0.5, layer_draws(seed, layer))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (50, 5), (7, 9), (2 * BLOCK + 5,)])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_normal_numbers_are_those_of_torch_but_for_the_last_places(shape, seed):
    """Older mixtures were drawn by torch, and are extended by the same map."""
    generator = torch.Generator().manual_seed(seed)
    expected = torch.empty(shape).normal_(0.0, 0.5, generator=generator).numpy()
    found = normal(np.random.RandomState(seed), shape, 0.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    # an earlier version's generator of a layer
    before = torch.Generator().manual_seed((seed * 1_000_003 + 3) % 2**63)
    drawn = torch.empty(16).normal_(generator=before).numpy()
    np.testing.assert_allclose(normal(layer_draws(seed, 3), (16,), 1.0), drawn, rtol=0, atol=2e-6)


def test_fewer_numbers_than_a_group_are_its_first():
    whole = normal(layer_draws(1, 2), (16,), 1.0)
    assert np.array_equal(normal(layer_draws(1, 2), (3, 2), 1.0).ravel(), whole[:6])


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("row_norm", ["free", "fixed"])
def test_balanced_rows_have_the_asked_spread_whatever_the_embeddings_length(scale, row_norm):
    router = RouterRecord(**vars(PAPERS) | {"row_norm": row_norm})
    inputs = EMBEDDINGS * np.float32(scale)
    rows = rows_in(router, state_of(inputs, router=router), inputs, "F32")
    assert centred_norm(rows) == pytest.approx(0.5, rel=1e-4)


def test_balanced_maps_keep_unit_variance_and_normal_ones_are_small():
    wide = np.concatenate([EMBEDDINGS] * 40, axis=1)
    router = RouterRecord(**vars(PAPERS) | {"depth": 3, "width": 200, "projection": "relu"})
    state = state_of(wide, router=router)
    length = float(lengths(wide).mean())
    assert float(state["maps.0.weight"].std()) == pytest.approx(1 / length, rel=0.02)
    assert float(state["maps.1.weight"].std()) == pytest.approx(1 / math.sqrt(200), rel=0.02)
    small = state_of(wide, init="normal", router=router)
    for weight in small.values():
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)


def test_what_is_drawn_is_a_function_of_seed_and_layer():
    first = state_of(seed=1)["maps.0.weight"]
    assert np.array_equal(first, state_of(seed=1)["maps.0.weight"])
    assert not np.array_equal(first, state_of(seed=2)["maps.0.weight"])
    assert not np.array_equal(first, state_of(seed=1, layer=1)["maps.0.weight"])


def test_free_rows_are_normal_or_balanced():
    rows = free_rows(4000, 16, "normal", 0.5, layer_draws(0, 0))
    assert float(rows.std()) == pytest.approx(0.02, rel=0.02)
    balanced = free_rows(4, 16, "balanced", 0.5, layer_draws(0, 0))
    assert centred_norm(balanced) == pytest.approx(0.5, rel=1e-5)


def test_conditioned_embeddings_are_unit_and_centred_first():
    centre = centre_of(EMBEDDINGS)
    unit = EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)
    np.testing.assert_allclose(centre, unit.mean(0), atol=1e-6)
    found = condition(EMBEDDINGS, centre)
    assert found.dtype == np.float32
    expected = unit - unit.mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_single_domain_is_not_centred_away():
    one = EMBEDDINGS[:1]
    centre = centre_of(one)
    assert not centre.any()
    found = condition(one, centre)
    np.testing.assert_allclose(found, one / np.linalg.norm(one), atol=1e-6)
    rows = rows_in(PAPERS, state_of(found), condition(EMBEDDINGS, centre), "F32")
    assert lengths(rows).max() < 5


def test_torchs_module_computes_the_same_rows():
    inputs = torch.from_numpy(EMBEDDINGS)
    rows = balanced_projection(inputs, 16)(inputs).detach().numpy()
    np.testing.assert_allclose(rows_in(PAPERS, state_of(), EMBEDDINGS, "F32"), rows, atol=1e-6)


def test_domain_rows_are_the_embeddings_or_one_random_map_of_them():
    rows = domain_rows(EMBEDDINGS, 12, 0, 0.5)
    assert float(lengths(rows).mean()) == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(rows / rows[0, 0], EMBEDDINGS / EMBEDDINGS[0, 0], rtol=1e-4)
    wide = domain_rows(EMBEDDINGS, 16, 1, 1.0)
    assert wide.shape == (5, 16) and not np.allclose(wide, domain_rows(EMBEDDINGS, 16, 2, 1.0))
    # A later domain goes through the same map: its row is a combination of the others as its
    # embedding is.
    joined = EMBEDDINGS[:1] + EMBEDDINGS[1:2]
    later = domain_rows(np.concatenate([EMBEDDINGS, joined]), 16, 1, 1.0)
    np.testing.assert_allclose(later[5], later[0] + later[1], atol=1e-5)
