"""P that gives trained rows: exact where it can be, the smallest change, and a shift that softmax
does not see."""

import pytest
import torch
from conftest import balanced_projection

from nexus_ds.checkpoint.expert_rows import centre_of, condition
from nexus_ds.model.refit import refit
from nexus_ds.model.router import expert_embeddings_in

GENERATOR = torch.Generator().manual_seed(0)
VECTORS = torch.randn(5, 12, generator=GENERATOR)
INPUTS = torch.from_numpy(condition(VECTORS.numpy(), centre_of(VECTORS.numpy())))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
FORMS = [
    {},
    {"depth": 1, "form": "gelu"},
    {"depth": 3, "width": 8},
    {"form": "relu"},
    {"row_norm": "fixed"},
]


def trained(dtype=torch.float32, **form):
    """Return P, and rows that a training has moved by a fifth of their length."""
    projection = balanced_projection(INPUTS, 16, **form)
    rows = expert_embeddings_in(projection, INPUTS, torch.float32)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    return projection, (rows + 0.2 * rows.norm() / noise.norm() * noise).to(dtype)


@pytest.mark.parametrize("form", [form for form in FORMS if form.get("depth") != 1])
def test_rows_come_out_exactly(form):
    projection, rows = trained(**form)
    before = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    found = refit(projection, INPUTS, rows, 1e-4)
    assert not found.shifted and found.error <= 1e-6
    assert torch.allclose(found.projection(INPUTS), rows, atol=1e-5)
    changed = [
        name
        for name, t in found.projection.state_dict().items()
        if not torch.equal(t, before[name])
    ]
    last = list(before)[-1]
    assert changed == [last]
    # the old one is as it was
    assert all(torch.equal(t, before[name]) for name, t in projection.state_dict().items())


def test_the_change_is_the_smallest_of_all_that_give_the_rows():
    """Against the solution of the Lagrangian: the change lies in the span of what the map reads."""
    projection, rows = trained()
    found = refit(projection, INPUTS, rows, 1e-4)
    read = projection.maps[0](INPUTS).detach()
    a, b = read.chunk(2, dim=-1)
    read = (torch.nn.functional.silu(a) * b).double()
    old = projection.maps[1].weight.detach().double()
    missing = rows.double() - read @ old.T
    expected = old + (read.T @ torch.linalg.solve(read @ read.T, missing)).T
    new = found.projection.maps[1].weight.detach().double()
    assert torch.allclose(new, expected, atol=1e-6)
    assert found.moved == pytest.approx(float((expected - old).norm() / old.norm()), rel=1e-4)


@pytest.mark.parametrize("form", [{"form": "linear"}, {"depth": 1}])
def test_a_linear_map_of_centred_vectors_gives_rows_that_softmax_takes_for_the_trained(form):
    projection, rows = trained(**form)
    found = refit(projection, INPUTS, rows, 1e-4)
    assert found.shifted and found.error <= 1e-6
    added = found.rows_EH - rows
    assert float(added.norm()) > 0.1 and torch.allclose(added, added[:1].expand(5, -1), atol=1e-5)
    tokens = torch.randn(50, 16, generator=GENERATOR)
    own, expected = ((tokens @ r.T).softmax(-1) for r in (found.rows_EH, rows))
    assert float((own - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("form", [{}, {"row_norm": "fixed"}, {"form": "linear"}])
def test_bf16_rows_come_out_as_well_as_bf16_can(form):
    projection, rows = trained(torch.bfloat16, **form)
    found = refit(projection, INPUTS, rows, TOLERANCE[torch.bfloat16])
    assert found.error <= 2.0**-6 and found.rows_EH.dtype is torch.bfloat16
    assert found.shifted == (form.get("form") == "linear")


def test_a_router_that_was_frozen_keeps_every_bit_of_its_projection():
    projection, _ = trained()
    rows = expert_embeddings_in(projection, INPUTS, torch.bfloat16)
    found = refit(projection, INPUTS, rows, 0.0)
    assert (found.error, found.moved, found.shifted) == (0.0, 0.0, False)
    assert found.projection is projection


def test_more_experts_than_numbers_in_a_vector_leave_a_rest_that_is_told():
    vectors = torch.randn(9, 4, generator=GENERATOR)
    projection = balanced_projection(vectors, 16, form="linear")
    rows = torch.randn(9, 16, generator=GENERATOR)
    found = refit(projection, vectors, rows, 1e-4)
    assert found.error > 0.1
    own = found.rows_EH - found.rows_EH.mean(0)
    centred = rows - rows.mean(0)
    read = vectors - vectors.mean(0)
    nearest = read @ torch.linalg.lstsq(read, centred).solution
    assert torch.allclose(own, nearest, atol=1e-5)


def test_one_expert():
    projection, rows = trained()
    found = refit(projection, INPUTS[:1], rows[:1], 1e-4)
    assert not found.shifted and found.error <= 1e-6
