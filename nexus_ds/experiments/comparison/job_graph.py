"""The jobs of a comparison, collected: what is made where, under a name that follows from how it
is made.

    tokenizer - seed - branches - embed - upcycle - train - extend - train
Every training writes its validation before and after, so little has to be scored again.
Not covered: which jobs a method needs (`method_jobs`, `extension_jobs`), running them (`jobs`),
reading what came out (`results`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_ds.config import as_dict, dump
from nexus_ds.experiments.comparison.jobs import WORK, Job, content_of, identity
from nexus_ds.experiments.comparison.methods import Extension, Method
from nexus_ds.experiments.comparison.recipe_reader import RecipeReader, training_tokens
from nexus_ds.outputs import new_file, write_text
from nexus_ds.settings import (
    Config,
    that_change,
)


@dataclass
class Made:
    """Where one method or extension of one seed and variant is found."""

    start: Path | None = None
    """The checkpoint that was trained; None for models without training of their own."""
    model: Path | None = None
    """The finished checkpoint; None for an ensemble."""
    scores: Path | None = None
    """JSON with its losses, for those whose training did not write them."""
    tasks: Path | None = None
    """Report of its downstream tasks, if they were asked for."""
    measures: Path | None = None
    """Report of its measures over held-out documents, if they were asked for."""
    members: tuple[Path, ...] = ()
    """Outputs of the jobs that it consists of."""
    experts: tuple[str, ...] = ()
    """Names of added experts."""
    steps: dict[int, int] = field(default_factory=dict)
    """Finetune tokens by optimizer step, for extensions."""
    turns: dict[str, Path] = field(default_factory=dict)
    """The finetuned checkpoint after each addition, by what was added, in order."""


def moe_domains(config: Config) -> list[str]:
    """Return the domains that a mixture is trained on: those of its experts and of the seed."""
    pipe = config.pipeline
    trained_on = [*pipe.domains, *pipe.seed_domains]
    return config.data.domains or list(dict.fromkeys(trained_on))


def scored_domains(config: Config) -> list[str]:
    """Return the domains whose validation text is scored."""
    domains = [*moe_domains(config), *config.pipeline.new_domains]
    return list(dict.fromkeys(domains))


class Builder:
    """Collects jobs; what adds one returns the path that it makes.

    The same call twice is one job, since its path follows from it: methods share what they have in
    common without knowing of each other.
    """

    def __init__(self, recipe: str, overrides: Sequence[str], out: Path) -> None:
        self.reader = RecipeReader(recipe, overrides)
        self.recipe = recipe
        self.overrides = tuple(overrides)
        self.out = out
        self.cache = out / "tokens"
        """Tokenized text, shared by all jobs."""
        self.jobs: dict[Path, Job] = {}
        """By output."""
        self.configs: dict[Path, Config] = {}
        """Settings of jobs that read them from a file, by that file."""
        self.given: dict[str, str] = {}
        """Content of models that no job makes, by their path."""

    def write_configs(self) -> None:
        """Write the settings of every job that has a file of its own."""
        for path, config in self.configs.items():
            with new_file(path, overwrite=True) as temporary:
                write_text(temporary, dump(config))

    def config_file(self, name: str, config: Config) -> Path:
        """Return where `write_configs` will write these settings."""
        path = self.out / "configs" / f"{name}.yaml"
        self.configs[path] = config
        return path

    def path(self, seed: int, name: str, *parts: object, suffix: str = "") -> Path:
        """Return where a job's output goes; `parts` are all that it depends on."""
        # Without the comparison's own folder, which may be moved, as may a given model.
        digits = identity(*parts, without=f"{self.out}/", names=self.given)
        return self.out / f"seed{seed}" / f"{name}-{digits}{suffix}"

    def given_model(self, path: str) -> Path:
        """Return the path of a model that is there: what is made of it is named by its content."""
        if path not in self.given:
            self.given[path] = content_of(Path(path))
        return Path(path)

    def ours(self, paths: Iterable[Path]) -> tuple[Path, ...]:
        """Return those of the paths that a job makes; a given seed model is there already."""
        return tuple(path for path in paths if path in self.jobs)

    def add(self, job: Job) -> Path:
        """Add a job, unless its output is another's already; return its output."""
        self.jobs.setdefault(job.output, job)
        return job.output

    def add_work(
        self,
        seed: int,
        name: str,
        function: str,
        given: Mapping[str, object],
        needs: tuple[Path, ...],
        suffix: str = "",
    ) -> Path:
        """Add a call of a function in `work`; paths among what is given become text."""
        plain = {key: _plain(value) for key, value in given.items()}
        out = self.path(seed, name, function, plain, suffix=suffix)
        arguments = json.dumps({"out": str(out), **plain})
        words = (WORK, function, arguments)
        return self.add(Job(f"seed {seed} {name}", out, words, needs))

    def add_training(
        self,
        name: str,
        config: Config,
        needs: tuple[Path, ...],
        flops_per_token: float,
    ) -> Path:
        """Add a training with settings that say everything but its name and output."""
        seed = config.seed
        out = self.path(seed, name, _without_harmless(config))
        label = f"seed {seed} {name}"
        file = self.config_file(
            f"seed{seed}-{out.name}", replace(config, output=str(out), name=label)
        )
        tokens = training_tokens(config)
        words = ("train", "--config", str(file))
        flops = tokens * flops_per_token
        return self.add(Job(label, out, words, needs, flops, tokens))

    def add_mixture(
        self,
        name: str,
        label: str,
        words: Sequence[str],
        settings: Config,
        needs: Iterable[Path],
    ) -> Path:
        """Add a call of `upcycle` or `extend`, of which `words` lack --config and --out."""
        seed = settings.seed
        out = self.path(seed, f"{name}-start", words, _without_harmless(settings))
        file = self.config_file(f"seed{seed}-{out.name}", settings)
        call = (*words, "--config", str(file), "--out", str(out))
        made_here = self.ours(needs)
        return self.add(Job(f"seed {seed} {label}", out, call, made_here))


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _without_harmless(config: Config) -> dict[str, Any]:
    """Return the settings on which a result depends."""
    values = as_dict(config)
    for key in that_change("nothing"):
        section, _, name = key.partition(".")
        values[section].pop(name, None)
    return values


@dataclass
class Comparison:
    """All jobs, and which of them make which row: by (variant, row, seed)."""

    builder: Builder
    contenders: dict[tuple[str, str], tuple[Method, dict[int, Made]]]
    extensions: dict[tuple[str, str, str], tuple[Extension, dict[int, Made]]]
