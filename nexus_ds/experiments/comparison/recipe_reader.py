"""What a recipe says to each stage of each case of a comparison, and what that costs.

A case is one seed under the settings of a variant, and of a method where it has some of its own.
Not covered: which jobs follow from it (`job_graph`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_ds.config import load_config
from nexus_ds.pipeline import BRANCH, FINETUNE, MOE, SEED
from nexus_ds.planning.sizes import Sizes, sizes_of
from nexus_ds.planning.traffic import token_flops
from nexus_ds.runtime.schedule import tokens_per_step, total_steps
from nexus_ds.settings import (
    CHUNK_WARM_STARTS,
    CompareConfig,
    Config,
    PipelineConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class Case:
    """One seed, and the overrides in which it differs from the recipe."""

    seed: int
    settings: tuple[str, ...] = ()

    def with_settings(self, settings: Iterable[str]) -> Case:
        """Return the case with further overrides, which win over its own."""
        return Case(self.seed, (*self.settings, *settings))


def training_tokens(config: Config) -> int:
    """Return the tokens that a training sees: whole steps."""
    steps = total_steps(config.training, config.data)
    return steps * tokens_per_step(config.training, config.data)


def router_settings(config: Config, cache: Path) -> Config:
    """Return the settings that `upcycle` and `extend` read, nothing else in them.

    So that a checkpoint's name, which follows from its settings, is the same for all that share it.
    """
    merge_weight = config.pipeline.merge_weight if config.stage == FINETUNE else None
    data = replace(
        config.data,
        domains=[],
        validation_domains=[],
        new_domains=[],
        cache=str(cache),
    )
    return replace(
        config,
        training=TrainingConfig(steps=1),
        compare=CompareConfig(),
        pipeline=PipelineConfig(merge_weight=merge_weight),
        data=data,
        router=replace(config.router, fit_background=_background(config)),
    )


def _background(config: Config) -> list[str]:
    """Return the seed's domains that never get an expert, where the warm start reads such text."""
    if config.router.warm_start not in CHUNK_WARM_STARTS:
        return []
    pipe = config.pipeline
    # New domains get theirs later.
    experts = (*pipe.domains, *pipe.new_domains)
    without_expert = [domain for domain in pipe.seed_domains if domain not in experts]
    return config.router.fit_background or without_expert


def _sizes(config: Config, path: str) -> Sizes:
    """Return the sizes of the model that starts from `path`."""
    model = replace(config.model, path=path)
    return sizes_of(replace(config, model=model))


class RecipeReader:
    """Reads a recipe for every stage and case."""

    def __init__(self, recipe: str, overrides: Sequence[str]) -> None:
        self.recipe = recipe
        self.overrides = tuple(overrides)
        self._read: dict[tuple[str, ...], Config] = {}

    def config(self, stage: str, case: Case, *more: str) -> Config:
        """Return the settings of a stage of training; `more` overrides win over the case's."""
        own = (f"seed={case.seed}", f"stage={stage}")
        words = (*self.overrides, *case.settings, *more, *own)
        # Reading a recipe takes 30 ms, and it is asked for a thousand times.
        if words not in self._read:
            self._read[words] = load_config(self.recipe, words)
        return self._read[words]

    def flops_per_token(self, config: Config) -> float:
        """Return the floating-point operations of training on one token."""
        sizes = _sizes(config, path="")
        given = self.config(SEED, Case(config.seed)).model.path
        if given:
            # Its sizes count, not those that the recipe would give a new seed.
            dense = _sizes(config, path=given)
            sizes = replace(dense, experts=sizes.experts, top_k=sizes.top_k)
        return token_flops(sizes, config.data.sequence_length)[0]

    def budget(self, case: Case) -> float:
        """Return the operations that Nexus and its branches take together, from the seed on."""
        # All branches have one size and one budget, so any name will do.
        branch = self.config(BRANCH, case, "branch=any")
        moe = self.config(MOE, case)
        work = [(branch, len(branch.pipeline.domains)), (moe, 1)]
        total = 0.0
        for config, times in work:
            tokens = times * training_tokens(config)
            total += tokens * self.flops_per_token(config)
        return total

    def with_whole_budget(self, config: Config, case: Case) -> Config:
        """Return the settings with as many tokens as the whole budget pays for."""
        tokens = round(self.budget(case) / self.flops_per_token(config))
        training = replace(config.training, tokens=tokens, steps=0)
        return replace(config, training=training)
