"""Ways to merge against plain torch on whole tensors; blocks of any length give the same."""

import numpy as np
import pytest
import torch

from nexus_ds.checkpoint.merging import ByRow, DareTies, Threshold, Ties

SIZE = 5000
WEIGHTS = (1.0, 2.0, 0.5)


def tensors(count=3, seed=0):
    """A seed and its branches, which differ from it by little, some values not at all."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SIZE, generator=generator)
    found = [base]
    for _ in range(count):
        change = 0.01 * torch.randn(SIZE, generator=generator) ** 3
        change[torch.rand(SIZE, generator=generator) < 0.1] = 0
        found.append(base + change)
    return found


def by_blocks(rule, values, step):
    """Merge as `assembly` does: looks first, blocks that may be written into."""

    def blocks(start):
        return [tensor[start : start + step].numpy().copy() for tensor in values]

    for turn in range(rule.looks):
        for start in range(0, SIZE, step):
            rule.look(blocks(start), start, turn)
    merged = [rule(blocks(start), start).copy() for start in range(0, SIZE, step)]
    return torch.from_numpy(np.concatenate(merged))


def elected(changes, weights):
    """The weighted changes that have the sign of their sum, zeros elsewhere."""
    weighted = torch.stack([w * c for w, c in zip(weights, changes, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    return torch.where(weighted.sign() == sign, weighted, torch.zeros(()))


def ties(values, weights, density):
    """TIES on whole tensors, by the paper's three steps."""
    base, *branches = values
    changes = []
    for branch in branches:
        change = branch - base
        kept = max(1, round(density * SIZE))
        least = change.abs().topk(kept).values.min()
        changes.append(torch.where(change.abs() >= least, change, torch.zeros(())))
    agreeing = elected(changes, weights)
    weight = (agreeing != 0) * torch.tensor(weights)[:, None]
    return base + agreeing.sum(0) / weight.sum(0).clamp_min(1e-30)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("step", [SIZE, 137])
def test_ties_is_that_of_whole_tensors(density, step):
    values = tensors()
    found = by_blocks(Ties(WEIGHTS, density), values, step)
    torch.testing.assert_close(found, ties(values, WEIGHTS, density), rtol=0, atol=1e-7)
    assert not torch.equal(found, values[0])
    # what is merged lies within what the branches have
    changes = torch.stack([branch - values[0] for branch in values[1:]])
    assert ((found - values[0]).abs() <= changes.abs().amax(0) + 1e-6).all()


def test_ties_of_one_whole_branch_is_that_branch():
    base, branch = tensors(1)
    found = by_blocks(Ties([3.0], 1.0), [base, branch], 500)
    torch.testing.assert_close(found, branch, rtol=0, atol=1e-7)


@pytest.mark.parametrize("share", [1e-9, 0.001, 0.3, 0.9, 1.0])
def test_a_threshold_is_exactly_the_value_that_a_share_reaches(share):
    values = tensors()[1]
    values[:7] = 0.25
    found = Threshold(share)
    for turn in range(2):
        for block in values.split(777):
            found.see(block.numpy(), turn)
    found.settle()
    kept = max(1, round(share * SIZE))
    assert float(found.value) == float(values.abs().topk(kept).values.min())


def test_dare_loses_the_same_values_in_blocks_of_any_length_and_keeps_the_mean():
    values = tensors(2)
    weights = [1.0, 3.0]
    whole = by_blocks(DareTies(weights, 0.25, (0, 7)), values, SIZE)
    assert torch.equal(by_blocks(DareTies(weights, 0.25, (0, 7)), values, 137), whole)
    assert not torch.equal(by_blocks(DareTies(weights, 0.25, (1, 7)), values, SIZE), whole)
    base, *branches = values
    changes = []
    for number, branch in enumerate(branches):
        drawn = torch.from_numpy(np.random.default_rng([0, 7, number]).random(SIZE, np.float32))
        changes.append(torch.where(drawn < 0.25, (branch - base) / 0.25, torch.zeros(())))
    expected = base + elected(changes, [0.25, 0.75]).sum(0)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-7)
    # nothing is lost on average: one branch, many draws
    total = torch.zeros(SIZE)
    for seed in range(300):
        total += by_blocks(DareTies([1.0], 0.5, (seed,)), values[:2], SIZE) - base
    change = branches[0] - base
    assert float((total / 300 - change).norm() / change.norm()) < 0.1


def test_dare_that_loses_nothing_adds_what_has_the_elected_sign():
    base, first, second = tensors(2)
    found = by_blocks(DareTies([1.0, 1.0], 1.0, (0,)), [base, first, second], SIZE)
    expected = base + elected([first - base, second - base], [0.5, 0.5]).sum(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [SIZE, 137])
def test_rows_are_regmeans_of_one_hot_inputs(step):
    """W = (sum G_i)^-1 sum G_i W_i of RegMean, with the Gram matrices of an embedding's inputs."""
    width = 8
    rows = SIZE // width
    _, *branches = tensors()
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 50, (len(branches), rows), generator=generator).double()
    grams = [torch.diag(count) for count in counts]
    weighed = [
        g @ branch.double().view(rows, width) for g, branch in zip(grams, branches, strict=True)
    ]
    expected = torch.linalg.solve(sum(grams), sum(weighed)).float().flatten()
    shares = (counts / counts.sum(0)).float().numpy()
    found = by_blocks(ByRow(shares, width), branches, step)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
