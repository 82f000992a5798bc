"""The table before and after: which text it reads, and that both sides score the same windows."""

import numpy as np
import pytest
from conftest import DOMAINS, make_nexus

from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.evaluation.before_after import BeforeAfter, chosen
from nexus_ds.evaluation.perplexity import score


def test_both_sides_score_the_same_windows(nexus_dir, text_folder, tmp_path):
    changed = make_nexus(tmp_path / "changed", seed=5)
    trial = BeforeAfter(nexus_dir, str(text_folder), ["gamma", "alpha"], 4)
    assert list(trial.windows) == ["gamma", "alpha"]
    assert {len(tokens) for tokens in trial.windows.values()} == {4}
    for losses, checkpoint in ((trial.before, nexus_dir), (trial.after(changed), changed)):
        expected = score(checkpoint, trial.windows).window_loss
        assert list(losses) == ["gamma", "alpha"]
        for domain, loss_W in losses.items():
            assert np.array_equal(loss_W, expected[domain])


def test_the_domains_are_the_experts_and_the_new_ones_unless_named(nexus_dir):
    assert chosen("", nexus_dir, ["delta", "beta"]) == [*DOMAINS, "delta"]
    assert chosen(" gamma, alpha,", nexus_dir, ["delta"]) == ["gamma", "alpha"]
    with pytest.raises(ConfigError, match="--scored names a domain twice: beta, beta; name each"):
        chosen("beta,beta", nexus_dir, [])


def test_what_cannot_be_scored_is_said(nexus_dir, dense_dir, text_folder):
    with pytest.raises(ConfigError, match="--windows: expected a number of at least 1, found 0"):
        BeforeAfter(nexus_dir, str(text_folder), ["alpha"], 0)
    message = r"no domain web; .*\n.*validation text of alpha, web .*or name those .* --scored A,B"
    with pytest.raises(DataError, match=message):
        BeforeAfter(nexus_dir, str(text_folder), ["alpha", "web"], 4)
    with pytest.raises(CheckpointError, match=r"has no nexus.json"):
        chosen("", dense_dir, [])
