"""The jobs of a case that methods share: tokenizer, seed, branches, domain embeddings, scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_ds.command_lines import embed_words
from nexus_ds.experiments.comparison.job_graph import Builder, moe_domains, scored_domains
from nexus_ds.experiments.comparison.jobs import WORK, Job, identity
from nexus_ds.experiments.comparison.recipe_reader import Case
from nexus_ds.pipeline import BRANCH, MOE, SEED
from nexus_ds.settings import (
    CompareConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    RouterConfig,
)

UPCYCLING = (
    "shared_expert",
    "shared_scale",
    "routed_scale",
    "task_scale",
    "merge",
    "merge_weights",
    "merge_density",
    "merge_rows",
)
"""Settings in `model` of how dense models are put together; none of them reads these itself."""


def _without_mixture(config: Config) -> Config:
    """Return a dense model's settings, the same whatever mixture it ends in: methods share it."""
    plain = ModelConfig()
    upcycling = {name: getattr(plain, name) for name in UPCYCLING}
    model = replace(config.model, **upcycling)
    # a variant that makes experts of more domains scores the same ones in another order
    scored = sorted(config.data.validation_domains)
    return replace(
        config,
        model=model,
        data=replace(config.data, validation_domains=scored),
        router=RouterConfig(),
        parallel=ParallelConfig(),
    )


FIRST = 0
"""The seed of the seed model that all share."""


@dataclass(frozen=True)
class CaseJobs:
    """Adds the jobs of one case; every method returns the path that its job makes."""

    builder: Builder
    case: Case

    def with_settings(self, settings: Iterable[str]) -> CaseJobs:
        """Return the jobs of the case with further overrides."""
        return CaseJobs(self.builder, self.case.with_settings(settings))

    def of(self, contender: str) -> CaseJobs:
        """Return the jobs of the case under the settings that a contender has of its own.

        They are part of the recipe as it stands, so that a variant's win over them.
        """
        own = self.config(MOE).compare.contender_settings.get(contender, ())
        case = Case(self.case.seed, (*own, *self.case.settings))
        return CaseJobs(self.builder, case)

    def config(self, stage: str, *more: str) -> Config:
        """Return the recipe's settings for a stage of training."""
        return self.builder.reader.config(stage, self.case, *more)

    def work(
        self,
        name: str,
        function: str,
        given: Mapping[str, object],
        needs: tuple[Path, ...],
        suffix: str = "",
    ) -> Path:
        """Add a call of a function in `work`."""
        return self.builder.add_work(self.case.seed, name, function, given, needs, suffix)

    def tokenizer(self, config: Config) -> Path:
        """Return the tokenizer: the given seed model's own, or one that is trained for all seeds.

        Args:
            config: of the seed.
        """
        if config.model.path:
            return self.builder.given_model(config.model.path)
        given = {
            "data": config.data.path,
            "domains": config.pipeline.tokenizer_domains or config.pipeline.domains,
            "vocabulary": config.pipeline.vocabulary,
            "max_bytes": config.data.max_bytes,
            "on_bad_row": config.data.on_bad_row,
        }
        out = self.builder.out / f"tokenizer-{identity(given)}"
        arguments = json.dumps({"out": str(out), **given})
        words = (WORK, "tokenizer", arguments)
        return self.builder.add(Job("tokenizer", out, words))

    def train(
        self,
        name: str,
        config: Config,
        start: Path | None,
        domains: list[str],
    ) -> Path:
        """Add a training on `domains`; `config` still has the recipe's own paths."""
        # The recipe's own seed: whatever a variant changes, its models share their words.
        recipe_seed = self.builder.reader.config(SEED, Case(self.case.seed))
        words = self.tokenizer(recipe_seed)
        model = replace(
            config.model,
            path=str(start or ""),
            tokenizer=str(words),
        )
        data = replace(
            config.data,
            domains=domains,
            validation_domains=scored_domains(config),
            cache=str(self.builder.cache),
        )
        # What a training does not read must not change its name; no run has these paths.
        pipeline = PipelineConfig(run=str(self.builder.out / "none"), card=False)
        settled = replace(
            config,
            model=model,
            data=data,
            pipeline=pipeline,
            compare=CompareConfig(),
        )
        if config.stage in (SEED, BRANCH):
            settled = _without_mixture(settled)
        needs = (words,) if start is None else (words, start)
        # Of the recipe's own settings, which say how many experts there are.
        flops = self.builder.reader.flops_per_token(config)
        return self.builder.add_training(name, settled, needs, flops)

    def seed_model(self) -> Path:
        """Return the seed model: the given one, or a new one."""
        config = self.config(SEED)
        if config.model.path:
            return self.builder.given_model(config.model.path)
        # the others would train the very same, for hours
        if config.compare.one_seed_model and self.case.seed != FIRST:
            return CaseJobs(self.builder, replace(self.case, seed=FIRST)).seed_model()
        pipe = config.pipeline
        domains = config.data.domains or pipe.seed_domains or pipe.domains
        return self.train("seed", config, None, domains)

    def branch(self, domain: str) -> Path:
        """Return the dense expert of a domain."""
        start = self.seed_model()
        # As JSON: a domain may be called 2024 or yes, and overrides are YAML.
        config = self.config(BRANCH, f"branch={json.dumps(domain)}")
        return self.train(f"branch-{domain}", config, start, [domain])

    def branches(self, domains: list[str]) -> dict[str, Path]:
        """Return the dense experts of several domains by name."""
        return {domain: self.branch(domain) for domain in domains}

    def union(self) -> Path:
        """Return the dense model that is trained on the mixture's text with the whole budget."""
        own = self.of("union")
        start = own.seed_model()
        mixture = own.config(MOE)
        config = own.config(BRANCH, 'branch="all"')
        domains = moe_domains(mixture)
        config = self.builder.reader.with_whole_budget(config, self.case)
        config = replace(config, data=replace(mixture.data, domains=domains))
        return own.train("union", config, start, domains)

    def embeddings(self, domains: list[str]) -> Path:
        """Return the file of domain embeddings, worse ones if `compare.embedding` says so."""
        config = self.config(MOE)
        words = embed_words(config, domains)
        seed = self.case.seed
        # Many domains would make a name too long for a file.
        name = domains[0] if len(domains) == 1 else str(len(domains))
        out = self.builder.path(seed, f"embed-{name}", words, suffix=".safetensors")
        label = f"seed {seed} embed {' '.join(domains)}"
        call = (*words, "--out", str(out))
        self.builder.add(Job(label, out, call))
        change = config.compare.embedding
        if change == "mean":  # of a domain's documents, as `embed` writes it
            return out
        given = {"source": out, "change": change, "seed": seed}
        name = f"{out.stem}-{change}"
        return self.work(name, "embedding", given, (out,), ".safetensors")

    def score(self, name: str, models: list[Path]) -> Path:
        """Return a file with the losses of one model, or of several as an ensemble."""
        config = self.config(MOE)
        given = {
            "models": models,
            "data": config.data.path,
            "domains": scored_domains(config),
            "windows": config.training.eval_windows,
            "length": config.data.sequence_length,
            "cache": self.builder.cache,
            "bos": config.data.bos,
        }
        needs = self.builder.ours(models)
        return self.work(f"score-{name}", "score", given, needs, ".json")
