"""What a recipe says to a case: which override wins, and what a checkpoint's name depends on."""

from pathlib import Path

import pytest

from nexus_ds.config import load_config
from nexus_ds.experiments.comparison.recipe_reader import (
    Case,
    RecipeReader,
    router_settings,
    training_tokens,
)


def test_the_narrower_override_wins():
    reader = RecipeReader("compare-tiny", ["router.top_k=2", "seed=9", "training.lr=1.0"])
    variant = Case(3, ("training.lr=2.0",))
    assert reader.config("moe", variant).training.lr == 2.0
    method = variant.with_settings(["training.lr=3.0"])
    config = reader.config("moe", method)
    assert (config.seed, config.router.top_k, config.training.lr) == (3, 2, 3.0)
    assert reader.config("moe", method, "training.lr=4.0").training.lr == 4.0
    assert reader.config("moe", method) is config  # and is read once


def test_a_training_sees_whole_steps():
    config = load_config("compare-tiny", ["training.steps=0", "training.tokens=2049"])
    step = config.training.batch_size * config.data.sequence_length
    assert training_tokens(config) == 2 * step == 2048


@pytest.mark.parametrize(("stage", "kept"), [("moe", None), ("extend", 0.2)])
def test_what_a_new_mixture_does_not_read_is_not_in_its_settings(stage, kept):
    words = [f"stage={stage}", "pipeline.merge_weight=0.2", "training.lr=1.0"]
    settings = router_settings(load_config("compare-tiny", words), Path("tokens"))
    assert settings.pipeline.merge_weight == kept and settings.pipeline.domains == []
    other = load_config("compare-tiny", [*words, "training.lr=2.0", "data.domains=[docs]"])
    assert router_settings(other, Path("tokens")) == settings
