"""The router: shapes, forms, and the facts of paper section 10 about rows."""

import pytest
import torch
from conftest import balanced_projection

from nexus_ds.errors import ConfigError
from nexus_ds.model.router import (
    Projection,
    expert_embeddings_in,
    swiglu,
)

EMBEDDINGS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def balanced(**options):
    return balanced_projection(EMBEDDINGS, 16, **options)


def test_the_papers_projection_has_w1_of_2h_by_m_and_w2_of_h_by_h():
    projection = Projection(12, 16)
    assert [tuple(p.shape) for p in projection.parameters()] == [(32, 12), (16, 16)]
    w1, w2 = (p.detach() for p in projection.parameters())
    a, b = (EMBEDDINGS @ w1.T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(a) * b) @ w2.T
    assert torch.allclose(projection(EMBEDDINGS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"depth": 1}, [(16, 12)]),
        ({"depth": 3, "width": 8}, [(16, 12), (16, 8), (16, 8)]),
        ({"form": "gelu", "width": 4}, [(4, 12), (16, 4)]),
        ({"form": "linear", "depth": 3, "width": 4}, [(16, 12)]),
    ],
)
def test_depth_width_and_form_are_configurable(options, shapes):
    projection = Projection(12, 16, **options)
    assert [tuple(p.shape) for p in projection.parameters()] == shapes
    assert projection(EMBEDDINGS).shape == (5, 16)


def test_an_unknown_form_is_named():
    with pytest.raises(
        ConfigError,
        match=r"router.projection: unknown value 'swish'; known: swiglu, gelu, relu, linear",
    ):
        Projection(12, 16, form="swish")


def test_parameters_do_not_depend_on_the_number_of_experts():
    count = sum(p.numel() for p in Projection(12, 16).parameters())
    assert count == 32 * 12 + 16 * 16
    assert Projection(12, 16)(EMBEDDINGS[:2]).shape == (2, 16)


def test_rows_are_permuted_with_their_domains():
    projection, order = balanced(), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(projection(EMBEDDINGS)[order], projection(EMBEDDINGS[order]))


def test_rows_in_bf16_are_those_of_a_bf16_model_not_rounded_fp32_rows():
    projection = balanced()
    expected = balanced().to(torch.bfloat16)(EMBEDDINGS.to(torch.bfloat16))
    found = expert_embeddings_in(projection, EMBEDDINGS, torch.bfloat16)
    assert torch.equal(found, expected)
    assert not torch.equal(found, projection(EMBEDDINGS).to(torch.bfloat16))
    assert projection.maps[0].weight.dtype == torch.float32


def test_swiglu_gates_the_first_half():
    assert torch.allclose(swiglu(torch.tensor([[0.0, 5.0]])), torch.zeros(1, 1))
    assert float(swiglu(torch.tensor([[5.0, 0.0]]))) == 0.0


def test_fixed_rows_have_one_learned_length():
    projection = balanced(row_norm="fixed")
    rows = projection(EMBEDDINGS)
    assert torch.allclose(rows.norm(dim=1), projection.log_norm.exp().expand(5), atol=1e-5)
    projection.scale_output(3.0)
    assert torch.allclose(projection(EMBEDDINGS), 3 * rows, atol=1e-5)
    white = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    x, plain = (
        torch.randn(7, 16, generator=torch.Generator().manual_seed(2)),
        projection(EMBEDDINGS),
    )
    projection.fold(white)
    assert torch.allclose(x @ projection(EMBEDDINGS).T, (x @ white) @ plain.T, atol=1e-4)
    projection(EMBEDDINGS).square().sum().backward()
    assert projection.log_norm.grad.abs() > 0
    free = balanced()
    plain = free(EMBEDDINGS)
    free.fold(white)
    assert torch.allclose(x @ free(EMBEDDINGS).T, (x @ white) @ plain.T, atol=1e-4)
    before = free(EMBEDDINGS)
    free.scale_output(3.0)
    assert torch.allclose(free(EMBEDDINGS), 3 * before, atol=1e-5)
