"""The jobs of each method: from the models that become experts to the rows of its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_ds.command_lines import upcycle_words
from nexus_ds.config import dump
from nexus_ds.experiments.comparison.case_jobs import CaseJobs
from nexus_ds.experiments.comparison.job_graph import Made, moe_domains
from nexus_ds.experiments.comparison.jobs import identity
from nexus_ds.experiments.comparison.methods import Method
from nexus_ds.experiments.comparison.recipe_reader import router_settings
from nexus_ds.pipeline import MOE, SEED
from nexus_ds.settings import CompareConfig


def rows(jobs: CaseJobs, method: Method) -> dict[str, Made]:
    """Return a method's models by the name of their row; `branches` has a row for each domain."""
    if method.routed:
        return {method.name: mixture(jobs, method)}
    # matched to a budget, which its own settings leave as it is
    own = jobs if method.matched else jobs.of(method.name)
    return DENSE[method.name](own)


# Dense ------------------------------------------------------------------------------------------


def _seed_row(jobs: CaseJobs) -> dict[str, Made]:
    model = jobs.seed_model()
    # One that is trained here writes its losses; a given one has to be scored.
    made = Made(model=model, members=(model,))
    if model not in jobs.builder.jobs:
        made.scores = jobs.score("seed", [model])
    return {"seed": made}


def _union_row(jobs: CaseJobs) -> dict[str, Made]:
    model = jobs.union()
    made = Made(
        start=jobs.seed_model(),
        model=model,
        members=(model,),
    )
    return {"union": made}


def _all_branches(jobs: CaseJobs) -> dict[str, Path]:
    return jobs.branches(jobs.config(MOE).pipeline.domains)


def _branch_rows(jobs: CaseJobs) -> dict[str, Made]:
    found = {}
    for domain, model in _all_branches(jobs).items():
        found[f"branch {domain}"] = Made(model=model, members=(model,))
    return found


def _ensemble_row(jobs: CaseJobs) -> dict[str, Made]:
    members = tuple(_all_branches(jobs).values())
    scores = jobs.score("btm", list(members))
    return {"btm": Made(scores=scores, members=members)}


def _average_row(jobs: CaseJobs) -> dict[str, Made]:
    members = tuple(_all_branches(jobs).values())
    models = [jobs.seed_model(), *members]
    needs = jobs.builder.ours(models)
    mean = jobs.work("average", "average", {"models": models}, needs)
    # Nothing is trained, so no log has its losses.
    scores = jobs.score("average", [mean])
    made = Made(
        model=mean,
        scores=scores,
        members=(mean, *members),
    )
    return {"average": made}


# By the method's name.
DENSE: dict[str, Callable[[CaseJobs], dict[str, Made]]] = {
    "seed": _seed_row,
    "union": _union_row,
    "branches": _branch_rows,
    "btm": _ensemble_row,
    "average": _average_row,
}


# Mixtures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The dense models that a mixture is put together from."""

    shared: Path
    """What becomes the shared expert."""
    routed: dict[str, Path]
    """What becomes the routed ones, by name."""


def _from_branches(jobs: CaseJobs) -> _Parts:
    start = jobs.seed_model()
    return _Parts(start, _all_branches(jobs))


def _from_branches_and_seed(jobs: CaseJobs) -> _Parts:
    parts = _from_branches(jobs)
    return _Parts(parts.shared, parts.routed | {"seed": parts.shared})


def _from_copies(jobs: CaseJobs) -> _Parts:
    start = jobs.seed_model()
    domains = jobs.config(MOE).pipeline.domains
    return _Parts(start, dict.fromkeys(domains, start))


def _from_nothing(jobs: CaseJobs) -> _Parts:
    # The file's name follows from its text: what says nothing of sizes would change it.
    sizes = replace(jobs.config(SEED), compare=CompareConfig())
    name = f"seed{jobs.case.seed}-random-{identity(dump(sizes))}"
    file = jobs.builder.config_file(name, sizes)
    words = jobs.tokenizer(sizes)

    def random_model(number: int) -> Path:
        given = {"config": file, "tokenizer": words, "number": number}
        return jobs.work(f"random-{number}", "random_dense", given, (words,))

    # Each has a number of its own, or equal experts would have to part in training first.
    shared = random_model(0)
    routed = {}
    domains = jobs.config(MOE).pipeline.domains
    for number, domain in enumerate(domains, start=1):
        routed[domain] = random_model(number)
    return _Parts(shared, routed)


# By what becomes routed experts.
PARTS: dict[str, Callable[[CaseJobs], _Parts]] = {
    "branches": _from_branches,
    "branches+seed": _from_branches_and_seed,
    "copies": _from_copies,
    "random": _from_nothing,
}


def mixture(jobs: CaseJobs, method: Method) -> Made:
    """Return a trained mixture, and the checkpoint that its training starts from."""
    case = jobs.case
    jobs = jobs.of(method.name).with_settings(method.settings)
    config = jobs.config(MOE)
    parts = PARTS[method.routed](jobs)
    embedded = jobs.embeddings(config.pipeline.domains)
    # A seed may be several of them.
    read = [parts.shared, *parts.routed.values(), embedded]
    needs = tuple(dict.fromkeys(read))
    words = upcycle_words(parts.shared, parts.routed, embedded, config.data)
    start = jobs.builder.add_mixture(
        method.name,
        f"upcycle {method.name}",
        words,
        router_settings(config, jobs.builder.cache),
        needs,
    )
    if method.matched:
        config = jobs.builder.reader.with_whole_budget(config, case)
    model = jobs.train(method.name, config, start, moe_domains(config))
    members = (model, start, *jobs.builder.ours(needs))
    return Made(start, model, members=members)
