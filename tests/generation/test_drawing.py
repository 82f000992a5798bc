"""Draws: the distribution is that of temperature and top-p, numbers belong to a prompt."""

import pytest
import torch

from nexus_ds.generation.drawing import Drawing, Drawn, numbers, shares

SCORES = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0], [0.0, 0.0, -3.0, 4.0, 3.5]])


def reference(scores_V, temperature, top_p):
    """Probabilities, token by token, in plain words: sort, add up until p is reached, leave the
    rest out."""
    weights = [torch.exp(score / temperature).item() for score in scores_V.double()]
    probabilities = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(weights)), key=lambda token: -probabilities[token])
    kept, total = [], 0.0
    for token in order:
        kept.append(token)
        total += probabilities[token]
        if total >= top_p:
            break
    return [probabilities[t] / total if t in kept else 0.0 for t in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 1.0])
def test_shares_are_those_of_the_reference(temperature, top_p):
    found = shares(SCORES, Drawing(temperature, top_p))
    expected = [reference(row, temperature, top_p) for row in SCORES]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_shares_are_those_of_transformers():
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    scores = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3
    warped = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, scores))
    torch.testing.assert_close(
        shares(scores, Drawing(0.7, 0.8)).float(), warped.softmax(-1), atol=1e-6, rtol=1e-4
    )


def test_draws_have_these_shares():
    """Chi-squared of 20,000 draws: the 1 in 1000 bound of 4 degrees of freedom is 18.5."""
    count, drawing = 20_000, Drawing(1.3, 0.95)
    scores = SCORES[:1].expand(count, -1)
    drawn = Drawn(drawing, numbers(0, count, 1), 7)(torch.zeros(count, 7), scores)
    assert torch.equal(drawn.isfinite().sum(-1), torch.ones(count, dtype=torch.long))
    share = torch.tensor(reference(SCORES[0], 1.3, 0.95))
    seen = torch.bincount(drawn.argmax(-1), minlength=5)
    assert seen[share == 0].sum() == 0 and (share == 0).sum() == 1
    expected = share[share > 0] * count
    assert ((seen[share > 0] - expected) ** 2 / expected).sum() < 18.5


def test_each_step_takes_its_own_number():
    drawing = Drawing(1.0)
    numbers_BN = torch.tensor([[0.0, 0.999999], [0.999999, 0.0]], dtype=torch.float64)
    scores = torch.zeros(2, 3)
    processor = Drawn(drawing, numbers_BN, 4)
    assert processor(torch.zeros(2, 4), scores).argmax(-1).tolist() == [0, 2]
    assert processor(torch.zeros(2, 5), scores).argmax(-1).tolist() == [2, 0]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_no_number_draws_what_has_no_share(number):
    """At either end of [0, 1), beside tokens that were ruled out."""
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    numbers_BN = torch.tensor([[number]], dtype=torch.float64)
    found = Drawn(Drawing(0.7, 0.99), numbers_BN, 0)(torch.zeros(1, 0), scores).argmax(-1)
    assert found.item() in (1, 2)


def test_numbers_belong_to_a_seed():
    many = numbers(5, 3, 40)
    assert many.dtype == torch.float64 and (many >= 0).all() and (many < 1).all()
    assert torch.equal(many[1:2], numbers(6, 1, 40))
    assert torch.equal(many[:, :7], numbers(5, 3, 7)), "as many as are asked for change none"
    assert not torch.equal(many[0], many[1])
    # whatever a user types
    assert numbers(-1, 1, 2).shape == numbers(10**30, 1, 2).shape
