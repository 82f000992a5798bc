"""The jobs of each extension: a trained mixture gets experts, once or several times."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from nexus_ds.command_lines import extend_words
from nexus_ds.experiments.comparison.case_jobs import CaseJobs
from nexus_ds.experiments.comparison.job_graph import Made, moe_domains
from nexus_ds.experiments.comparison.method_jobs import mixture
from nexus_ds.experiments.comparison.methods import METHODS, Extension
from nexus_ds.experiments.comparison.recipe_reader import router_settings
from nexus_ds.pipeline import FINETUNE, MOE
from nexus_ds.runtime.schedule import tokens_per_step
from nexus_ds.settings import Config


def extended(jobs: CaseJobs, extension: Extension, added: list[list[str]]) -> Made:
    """Return a mixture that was extended by each group of domains in turn, and finetuned after
    each."""
    methods = {method.name: method for method in METHODS}
    base = methods[extension.starts_from]
    # The mixture that is extended is the method's own, whatever the extension changes.
    made = mixture(jobs, base)
    own = jobs.of(base.name).with_settings(extension.settings)
    known = list(jobs.config(MOE).pipeline.domains)
    turns = {}
    for group in added:
        known += group
        made = _extended_once(own, extension, made, group, known)
        assert made.model is not None, "an extended mixture is one checkpoint"
        turns["+".join(group)] = made.model
    experts = tuple(itertools.chain.from_iterable(added))
    return replace(made, experts=experts, turns=turns)


def _extended_once(
    jobs: CaseJobs,
    extension: Extension,
    old: Made,
    group: list[str],
    known: list[str],
) -> Made:
    assert old.model is not None, "a mixture is one checkpoint"
    name = f"{extension.name}-{'-'.join(group)}"
    embedded = jobs.embeddings(group)
    experts = jobs.branches(group)
    config = jobs.config(FINETUNE)
    seed = jobs.seed_model() if config.model.task_scale != 1.0 else None
    words = extend_words(old.model, experts, embedded, config.data, seed)
    start = jobs.builder.add_mixture(
        name,
        f"extend {extension.name} {' '.join(group)}",
        (*words, *extension.options),
        router_settings(config, jobs.builder.cache),
        (old.model, embedded, *experts.values()),
    )
    # Old text is replayed, else the older experts' domains are forgotten.
    mixed = moe_domains(jobs.config(MOE))
    replayed = list(dict.fromkeys([*known, *mixed]))
    finetune, steps = _finetune(config, group)
    model = jobs.train(name, finetune, start, replayed)
    members = (*old.members, start, model, *experts.values())
    return Made(start, model, members=members, steps=steps)


def _finetune(config: Config, group: list[str]) -> tuple[Config, dict[int, int]]:
    """Return the settings of a finetune, and the tokens of each budget by the step that ends it."""
    size = tokens_per_step(config.training, config.data)
    budgets = sorted(config.compare.budgets) or [config.training.tokens]
    # Whole steps, at least one: a budget may be smaller than a batch.
    steps = [max(1, round(budget / size)) for budget in budgets]
    training = replace(
        config.training,
        steps=steps[-1],
        tokens=0,
        # The end of every budget is validated.
        eval_every=math.gcd(*steps),
    )
    data = replace(config.data, new_domains=group)
    # Before the first step it has only been appended.
    reached = {0: 0}
    reached |= zip(steps, budgets, strict=True)
    return replace(config, training=training, data=data), reached
