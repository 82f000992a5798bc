"""From a recipe to a comparison: every method and extension under every seed and variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nexus_ds.errors import ConfigError
from nexus_ds.experiments.comparison.case_jobs import CaseJobs
from nexus_ds.experiments.comparison.extension_jobs import extended
from nexus_ds.experiments.comparison.job_graph import Builder, Comparison
from nexus_ds.experiments.comparison.method_jobs import rows
from nexus_ds.experiments.comparison.methods import (
    Extension,
    Method,
    check_settings,
    chosen_extensions,
    chosen_methods,
)
from nexus_ds.experiments.comparison.recipe_reader import Case
from nexus_ds.pipeline import FINETUNE, MOE
from nexus_ds.settings import Config


def additions(config: Config) -> dict[str, list[list[str]]]:
    """Return, for each row of the extension tables, the groups of domains that are added one after
    another."""
    new = config.pipeline.new_domains
    if config.compare.adding == "each" or len(new) < 2:
        return {domain: [[domain]] for domain in new}
    # The rows' names are read again by `report_tables.new_domains`.
    if config.compare.adding == "together":
        return {"+".join(new): [new]}
    return {", then ".join(new): [[domain] for domain in new]}


def _add_method(
    found: Comparison,
    variant: str,
    jobs: CaseJobs,
    method: Method,
) -> None:
    for row, made in rows(jobs, method).items():
        key = (variant, row)
        _, by_seed = found.contenders.setdefault(key, (method, {}))
        by_seed[jobs.case.seed] = made


def _add_extension(
    found: Comparison,
    variant: str,
    jobs: CaseJobs,
    extension: Extension,
) -> None:
    config = jobs.config(FINETUNE)
    for row, groups in additions(config).items():
        key = (variant, extension.name, row)
        _, by_seed = found.extensions.setdefault(key, (extension, {}))
        by_seed[jobs.case.seed] = extended(jobs, extension, groups)


def _refuse_chats(jobs: CaseJobs) -> None:
    # An ensemble weighs its members by all tokens, prompts too; told before days of training.
    if jobs.config(MOE).data.chat:
        raise ConfigError(
            "data.chat=true: a comparison scores plain text alone; give it text, or train by hand "
            "and compare the checkpoints with evaluate --chat"
        )


def build(recipe: str, overrides: Sequence[str], out: Path) -> Comparison:
    """Return the jobs of a recipe's comparison; nothing is written.

    Raises:
        ConfigError: unknown names, no domains, chats.
    """
    builder = Builder(recipe, overrides, out)
    config = builder.reader.config(MOE, Case(0))
    if not config.pipeline.domains:
        raise ConfigError("pipeline.domains is empty; name the domains of the upcycled experts")
    # The recipe as it stands is the variant without a name.
    variants: dict[str, list[str]] = {"": [], **config.compare.variants}
    found = Comparison(builder, {}, {})
    for seed in config.compare.seeds:
        for variant, settings in variants.items():
            case = Case(seed, tuple(settings))
            jobs = CaseJobs(builder, case)
            _refuse_chats(jobs)
            _add_case(found, variant, jobs)
    return found


def _add_case(found: Comparison, variant: str, jobs: CaseJobs) -> None:
    chosen = jobs.config(MOE).compare
    # Before any job is collected: a misspelt name is cheap to find here.
    check_settings(chosen.contender_settings)
    methods = chosen_methods(chosen.contenders)
    extensions = chosen_extensions(chosen.extensions)
    for method in methods:
        _add_method(found, variant, jobs, method)
    for extension in extensions:
        _add_extension(found, variant, jobs, extension)
