"""BTM's ensemble against the sums written out token by token, and what must hold of any
posterior."""

import numpy as np
import torch

from nexus_ds.evaluation.perplexity import score
from nexus_ds.experiments.comparison.ensemble import ensemble_losses, posterior_loss, window_losses


def by_hand(losses):
    """The mixture of `losses` [N, T], weighted by Bayes' rule one token after the other."""
    p = (-losses.double()).exp()
    weights = torch.full((len(p),), 1 / len(p), dtype=torch.float64)
    found = []
    for token in p.T:
        found.append(-(weights * token).sum().log())
        weights = weights * token / (weights * token).sum()
    return torch.stack(found)


def test_the_posterior_is_bayes_rule():
    losses = torch.rand(3, 2, 7, generator=torch.Generator().manual_seed(0)) * 4
    mixed = posterior_loss(losses)
    for window in range(2):
        assert torch.allclose(mixed[window], by_hand(losses[:, window]), atol=1e-12)


def test_it_is_causal_and_follows_the_best_member():
    losses = torch.rand(3, 1, 9, generator=torch.Generator().manual_seed(1))
    changed = losses.clone()
    changed[0, 0, 5] += 2
    assert torch.equal(posterior_loss(losses)[0, :5], posterior_loss(changed)[0, :5])
    good = torch.stack([torch.full((1, 50), 1.0), torch.full((1, 50), 3.0)])
    assert float(posterior_loss(good)[0, -1]) < 1.001
    # never worse than the best member by more than the price of finding it, log N over the whole
    # window
    assert float(posterior_loss(losses).sum()) <= float(losses.sum(-1).min()) + np.log(3) + 1e-9


def test_one_member_is_that_model(dense_dir):
    windows = {"a": np.arange(40).reshape(4, 10) % 30, "b": np.arange(30).reshape(3, 10) % 7}
    alone, scored = ensemble_losses([dense_dir], windows), score(dense_dir, windows).loss
    assert alone.keys() == scored.keys()
    assert all(abs(alone[d] - scored[d]) < 1e-5 for d in alone)
    assert window_losses(dense_dir, windows["a"]).shape == (4, 9)
