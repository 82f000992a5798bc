"""The jobs of a comparison: from a recipe to commands, each contender's chain of stages under every
seed and variant.

    tokenizer - seed - branches - embed - upcycle - train - extend - train
Every training writes its validation before and after, so little has to be scored again.
Not covered: running them (`jobs`), reading what came out (`results`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_ds.config import as_dict, dump, load_config
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.comparison.jobs import WORK, Job, identity
from nexus_ds.experiments.comparison.methods import (
    METHODS,
    Extension,
    Method,
    chosen_extensions,
    chosen_methods,
)
from nexus_ds.outputs import new_file, write_text
from nexus_ds.pipeline import HARMLESS
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.planning.traffic import token_flops
from nexus_ds.runtime.schedule import tokens_per_step, total_steps
from nexus_ds.settings import (
    CHUNK_WARM_STARTS,
    CompareConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    RouterConfig,
    TrainingConfig,
)


@dataclass
class Made:
    """Where one contender or extension of one seed and variant is found."""

    start: Path | None = None
    """The checkpoint that was trained; None for models without training of their own."""
    model: Path | None = None
    """The finished checkpoint; None for an ensemble."""
    scores: Path | None = None
    """JSON with its losses, for those whose training did not write them."""
    tasks: Path | None = None
    """Report of its downstream tasks, if they were asked for."""
    members: tuple[Path, ...] = ()
    """Outputs of the jobs that it consists of."""
    experts: tuple[str, ...] = ()
    """Names of added experts."""
    steps: dict[int, int] = field(default_factory=dict)
    """Finetune tokens by optimizer step, for extensions."""


def moe_domains(config: Config) -> list[str]:
    """Return the domains that a mixture is trained on: those of its experts and of the seed."""
    pipe = config.pipeline
    return config.data.domains or list(dict.fromkeys([*pipe.domains, *pipe.seed_domains]))


class Builder:
    """Collects jobs; every method returns the path that its job makes."""

    def __init__(self, recipe: str, overrides: Sequence[str], out: Path) -> None:
        self.recipe, self.overrides, self.out = recipe, tuple(overrides), out
        self.jobs: dict[Path, Job] = {}
        self.configs: dict[Path, Config] = {}
        self._configs: dict[tuple[str, ...], Config] = {}

    # Settings ------------------------------------------------------------------------------------------------------

    def config(self, stage: str, seed: int, more: Iterable[str] = ()) -> Config:
        """Return the recipe's settings for a stage of training."""
        words = (*self.overrides, *more, f"seed={seed}", f"stage={stage}")
        # reading a recipe takes 30 ms, and it is asked for a thousand times
        if words not in self._configs:
            self._configs[words] = load_config(self.recipe, words)
        return self._configs[words]

    def scored(self, config: Config) -> list[str]:
        """Return the domains whose validation text is scored."""
        return list(dict.fromkeys([*moe_domains(config), *config.pipeline.new_domains]))

    def _write_config(self, name: str, config: Config) -> Path:
        path = self.out / "configs" / f"{name}.yaml"
        self.configs[path] = config
        return path

    def write_configs(self) -> None:
        """Write the settings of every job that has a file of its own."""
        for path, config in self.configs.items():
            with new_file(path, overwrite=True) as temporary:
                write_text(temporary, dump(config))

    # Jobs ----------------------------------------------------------------------------------------------------------

    def _place(self, seed: int, name: str, *parts: Any, suffix: str = "") -> Path:
        return (
            self.out / f"seed{seed}" / f"{name}-{identity(*parts, without=f'{self.out}/')}{suffix}"
        )

    def add(self, job: Job) -> Path:
        """Add a job, unless its output is another's already; return its output."""
        self.jobs.setdefault(job.output, job)
        return job.output

    def _piece(
        self,
        seed: int,
        name: str,
        function: str,
        given: dict[str, Any],
        needs: tuple[Path, ...],
        suffix: str = "",
    ) -> Path:
        plain = {key: _plain(value) for key, value in given.items()}
        out = self._place(seed, name, function, plain, suffix=suffix)
        words = (WORK, function, json.dumps({"out": str(out), **plain}))
        return self.add(Job(f"seed {seed} {name}", out, words, needs))

    def tokenizer(self, config: Config) -> Path:
        """Return the tokenizer: the given seed model's own, or one trained on the recipe's text
        (one for all seeds)."""
        if config.model.path:
            return Path(config.model.path)
        pipe, data = config.pipeline, config.data
        given = {
            "data": data.path,
            "domains": pipe.tokenizer_domains or pipe.domains,
            "vocabulary": pipe.vocabulary,
            "max_bytes": data.max_bytes,
            "on_bad_row": data.on_bad_row,
        }
        out = self.out / f"tokenizer-{identity(given)}"
        return self.add(
            Job("tokenizer", out, (WORK, "tokenizer", json.dumps({"out": str(out), **given})))
        )

    def _train(
        self,
        name: str,
        config: Config,
        start: Path | None,
        domains: list[str],
        needs: tuple[Path, ...],
    ) -> Path:
        """Add a training; `config` still has the recipe's own paths."""
        seed_config = self.config("seed", config.seed)
        tokenizer = self.tokenizer(seed_config)
        settled = replace(
            config,
            model=replace(config.model, path=str(start or ""), tokenizer=str(tokenizer)),
            data=replace(
                config.data,
                domains=domains,
                validation_domains=self.scored(config),
                cache=str(self.out / "tokens"),
            ),
            pipeline=PipelineConfig(run=str(self.out / "none")),
            compare=CompareConfig(),
        )
        if config.stage in ("seed", "branch"):
            # A dense model is the same whatever mixture it ends in, so contenders and variants
            # share it.
            dense = replace(settled.model, shared_expert=ModelConfig.shared_expert)
            settled = replace(
                settled, model=dense, router=RouterConfig(), parallel=ParallelConfig()
            )
        out = self._place(config.seed, name, _without_harmless(settled))
        settled = replace(settled, output=str(out), name=f"seed {config.seed} {name}")
        file = self._write_config(f"seed{config.seed}-{out.name}", settled)
        tokens = total_steps(config.training, config.data) * tokens_per_step(
            config.training, config.data
        )
        job = Job(
            f"seed {config.seed} {name}",
            out,
            ("train", "--config", str(file)),
            (tokenizer, *needs),
            tokens * self._flops(config),
            tokens,
        )
        return self.add(job)

    def _flops(self, config: Config) -> float:
        """Return floating-point operations of training on one token; a seed that is given has the
        sizes that count."""
        sizes = sizes_of(replace(config, model=replace(config.model, path="")))
        given = self.config("seed", config.seed).model.path
        if given:
            dense = sizes_of(replace(config, model=replace(config.model, path=given)))
            sizes = replace(dense, experts=sizes.experts, top_k=sizes.top_k)
        return token_flops(sizes, config.data.sequence_length)[0]

    def seed(self, seed: int, more: Iterable[str] = ()) -> Path:
        """Return the seed model: the given one, or a new one."""
        config = self.config("seed", seed, more)
        if config.model.path:
            return Path(config.model.path)
        domains = config.pipeline.seed_domains or config.pipeline.domains
        return self._train("seed", config, None, config.data.domains or domains, ())

    def branch(self, seed: int, domain: str, more: Iterable[str] = ()) -> Path:
        """Return the dense expert of a domain."""
        start = self.seed(seed, more)
        config = self.config("branch", seed, [*more, f"branch={json.dumps(domain)}"])
        return self._train(f"branch-{domain}", config, start, [domain], (start,))

    def union(self, seed: int, more: Iterable[str] = ()) -> Path:
        """Return the dense model that has the whole budget."""
        start, config = self.seed(seed, more), self.config("branch", seed, [*more, 'branch="all"'])
        tokens = round(self.budget(seed, more) / self._flops(config))
        domains = moe_domains(self.config("moe", seed, more))
        mixture = self.config("moe", seed, more).data
        config = replace(
            config,
            training=replace(config.training, tokens=tokens, steps=0),
            data=replace(mixture, domains=domains),
        )
        return self._train("union", config, start, domains, (start,))

    def budget(self, seed: int, more: Iterable[str] = ()) -> float:
        """Return the operations that Nexus and its branches take together, from the seed on."""
        branch, moe = (
            self.config("branch", seed, [*more, "branch=any"]),
            self.config("moe", seed, more),
        )
        work = [(branch, len(branch.pipeline.domains)), (moe, 1)]
        steps = [
            times
            * total_steps(c.training, c.data)
            * tokens_per_step(c.training, c.data)
            * self._flops(c)
            for c, times in work
        ]
        return sum(steps)

    def embeddings(self, seed: int, domains: list[str], more: Iterable[str] = ()) -> Path:
        """Return the file of domain embeddings."""
        config = self.config("moe", seed, more)
        pipe, data = config.pipeline, config.data
        words = (
            "embed",
            "--data",
            data.path,
            "--domains",
            ",".join(domains),
            "--documents",
            str(pipe.embedding_documents),
            "--encoder",
            pipe.encoder,
            "--seed",
            str(seed),
            "--max-bytes",
            str(data.max_bytes),
            "--on-bad-row",
            data.on_bad_row,
        )
        out = self._place(
            seed,
            f"embed-{domains[0] if len(domains) == 1 else len(domains)}",
            words,
            suffix=".safetensors",
        )
        self.add(Job(f"seed {seed} embed {' '.join(domains)}", out, (*words, "--out", str(out))))
        change = config.compare.embedding
        if change == "mean":
            return out
        given = {"source": out, "change": change, "seed": seed}
        return self._piece(seed, f"{out.stem}-{change}", "embedding", given, (out,), ".safetensors")

    # Contenders ----------------------------------------------------------------------------------------------------

    def _experts(
        self, contender: Method, seed: int, more: tuple[str, ...]
    ) -> tuple[Path, dict[str, Path]]:
        """Return what becomes the shared expert, and what becomes the routed ones."""
        config, start = self.config("moe", seed, more), self.seed(seed, more)
        domains = config.pipeline.domains
        if contender.routed == "copies":
            return start, dict.fromkeys(domains, start)
        if contender.routed == "random":
            sizes = replace(self.config("seed", seed, more), compare=CompareConfig())
            file = self._write_config(f"seed{seed}-random-{identity(dump(sizes))}", sizes)
            tokenizer = self.tokenizer(sizes)
            given: dict[str, Any] = {"config": file, "tokenizer": tokenizer}
            models = [
                self._piece(
                    seed, f"random-{n}", "random_dense", {**given, "number": n}, (tokenizer,)
                )
                for n in range(len(domains) + 1)
            ]
            return models[0], dict(zip(domains, models[1:], strict=True))
        experts = {domain: self.branch(seed, domain, more) for domain in domains}
        return start, experts | ({"seed": start} if contender.routed == "branches+seed" else {})

    def _router_config(self, stage: str, seed: int, more: tuple[str, ...]) -> Config:
        """Return the settings that `upcycle` and `extend` read, nothing else in them."""
        config = self.config(stage, seed, more)
        pipe = PipelineConfig(
            merge_weight=config.pipeline.merge_weight if stage == "extend" else None
        )
        data = replace(
            config.data,
            domains=[],
            validation_domains=[],
            new_domains=[],
            cache=str(self.out / "tokens"),
        )
        router = replace(config.router, fit_background=self._background(config))
        training = TrainingConfig(steps=1)
        return replace(
            config,
            training=training,
            compare=CompareConfig(),
            pipeline=pipe,
            data=data,
            router=router,
        )

    @staticmethod
    def _background(config: Config) -> list[str]:
        """Return the seed's domains that never get an expert, where the router's start reads such
        text."""
        if config.router.warm_start not in CHUNK_WARM_STARTS:
            return []
        experts = (*config.pipeline.domains, *config.pipeline.new_domains)
        return config.router.fit_background or [
            d for d in config.pipeline.seed_domains if d not in experts
        ]

    def mixture(self, contender: Method, seed: int, more: tuple[str, ...]) -> Made:
        """Return a trained mixture, and the checkpoint that its training starts from."""
        more = (*more, *contender.settings)
        config, (shared, experts) = (
            self.config("moe", seed, more),
            self._experts(contender, seed, more),
        )
        domains = self.embeddings(seed, config.pipeline.domains, more)
        settings = self._router_config("moe", seed, more)
        parts = [part for name, path in experts.items() for part in ("--expert", f"{name}={path}")]
        words = (
            "upcycle",
            "--seed",
            str(shared),
            *parts,
            "--domains",
            str(domains),
            "--data",
            config.data.path,
        )
        out = self._place(seed, f"{contender.name}-start", words, _without_harmless(settings))
        file = self._write_config(f"seed{seed}-{out.name}", settings)
        needs = tuple(dict.fromkeys([shared, *experts.values(), domains]))
        self.add(
            Job(
                f"seed {seed} upcycle {contender.name}",
                out,
                (*words, "--config", str(file), "--out", str(out)),
                self._ours(needs),
            )
        )
        if contender.matched:
            tokens = round(self.budget(seed, more) / self._flops(config))
            config = replace(config, training=replace(config.training, tokens=tokens, steps=0))
        model = self._train(contender.name, config, out, moe_domains(config), (out,))
        return Made(out, model, members=(model, out, *self._ours(needs)))

    def _ours(self, paths: Iterable[Path]) -> tuple[Path, ...]:
        return tuple(path for path in paths if path in self.jobs)

    def _score(self, name: str, seed: int, models: list[Path], more: tuple[str, ...]) -> Path:
        config = self.config("moe", seed, more)
        given = {
            "models": models,
            "data": config.data.path,
            "domains": self.scored(config),
            "windows": config.training.eval_windows,
            "length": config.data.sequence_length,
            "cache": self.out / "tokens",
            "bos": config.data.bos,
        }
        return self._piece(seed, f"score-{name}", "score", given, self._ours(models), ".json")

    def contender(self, contender: Method, seed: int, more: tuple[str, ...]) -> dict[str, Made]:
        """Return the models of a contender by the name of their row; `branches` has one for each
        domain."""
        name, start = contender.name, self.seed(seed, more)
        domains = self.config("moe", seed, more).pipeline.domains
        if contender.routed:
            return {name: self.mixture(contender, seed, more)}
        if name == "seed":
            scores = None if start in self.jobs else self._score("seed", seed, [start], more)
            return {name: Made(None, start, scores, members=(start,))}
        if name == "union":
            model = self.union(seed, more)
            return {name: Made(start, model, members=(model,))}
        branches = {domain: self.branch(seed, domain, more) for domain in domains}
        if name == "branches":
            return {
                f"branch {d}": Made(None, model, members=(model,)) for d, model in branches.items()
            }
        members = tuple(branches.values())
        if name == "btm":
            return {
                name: Made(
                    None, None, self._score("btm", seed, list(members), more), members=members
                )
            }
        models = [start, *members]
        mean = self._piece(seed, "average", "average", {"models": models}, self._ours(models))
        return {
            name: Made(
                None, mean, self._score("average", seed, [mean], more), members=(mean, *members)
            )
        }

    # Extensions ----------------------------------------------------------------------------------------------------

    def extension(
        self, extension: Extension, seed: int, more: tuple[str, ...], added: list[list[str]]
    ) -> Made:
        """Return a mixture that was extended by each group of domains in turn, and finetuned after
        each."""
        base = next(c for c in METHODS if c.name == extension.starts_from)
        made = self.mixture(base, seed, more)
        members, known = list(made.members), list(self.config("moe", seed, more).pipeline.domains)
        start, model = made.start, made.model
        steps: dict[int, int] = {}
        for group in added:
            start = self._extend(extension, seed, (*more, *extension.settings), model, group)
            known += group
            model, steps = self._finetune(
                extension, seed, (*more, *extension.settings), start, known, group
            )
            members += [start, model, *(self.branch(seed, domain, more) for domain in group)]
        return Made(
            start,
            model,
            members=tuple(members),
            experts=tuple(d for g in added for d in g),
            steps=steps,
        )

    def _extend(
        self,
        extension: Extension,
        seed: int,
        more: tuple[str, ...],
        model: Path | None,
        group: list[str],
    ) -> Path:
        settings, embedded = (
            self._router_config("extend", seed, more),
            self.embeddings(seed, group, more),
        )
        branches = {domain: self.branch(seed, domain, more) for domain in group}
        parts = [part for name, path in branches.items() for part in ("--expert", f"{name}={path}")]
        words = (
            "extend",
            "--checkpoint",
            str(model),
            *parts,
            "--domains",
            str(embedded),
            "--data",
            settings.data.path,
            *extension.options,
        )
        out = self._place(
            seed, f"{extension.name}-{'-'.join(group)}-start", words, _without_harmless(settings)
        )
        file = self._write_config(f"seed{seed}-{out.name}", settings)
        needs = self._ours([p for p in (model, embedded, *branches.values()) if p])
        return self.add(
            Job(
                f"seed {seed} extend {extension.name} {' '.join(group)}",
                out,
                (*words, "--config", str(file), "--out", str(out)),
                needs,
            )
        )

    def _finetune(
        self,
        extension: Extension,
        seed: int,
        more: tuple[str, ...],
        start: Path,
        known: list[str],
        group: list[str],
    ) -> tuple[Path, dict[int, int]]:
        """Return the finetuned model, and after which step each budget is reached."""
        config = self.config("extend", seed, more)
        size = tokens_per_step(config.training, config.data)
        budgets = sorted(config.compare.budgets) or [config.training.tokens]
        steps = [max(1, round(budget / size)) for budget in budgets]
        training = replace(config.training, steps=steps[-1], tokens=0, eval_every=math.gcd(*steps))
        replayed = list(dict.fromkeys([*known, *moe_domains(self.config("moe", seed, more))]))
        data = replace(config.data, new_domains=group)
        config = replace(config, training=training, data=data)
        name = f"{extension.name}-{'-'.join(group)}"
        return self._train(name, config, start, replayed, (start,)), dict(
            zip([0, *steps], [0, *budgets], strict=True)
        )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _without_harmless(config: Config) -> dict[str, Any]:
    """Return the settings on which a result depends."""
    values = as_dict(config)
    for key in HARMLESS:
        section, _, name = key.partition(".")
        values[section].pop(name, None)
    return values


@dataclass
class Comparison:
    """All jobs, and which of them make which row: by (variant, row, seed)."""

    builder: Builder
    contenders: dict[tuple[str, str], tuple[Method, dict[int, Made]]]
    extensions: dict[tuple[str, str, str], tuple[Extension, dict[int, Made]]]


def additions(config: Config) -> dict[str, list[list[str]]]:
    """Return, for each row of the extension tables, the groups of domains that are added one after
    another."""
    new = config.pipeline.new_domains
    if config.compare.adding == "each" or len(new) < 2:
        return {domain: [[domain]] for domain in new}
    if config.compare.adding == "together":
        return {"+".join(new): [new]}
    return {", then ".join(new): [[domain] for domain in new]}


def build(recipe: str, overrides: Sequence[str], out: Path) -> Comparison:
    """Return the jobs of a recipe's comparison; nothing is written.

    Raises:
        ConfigError: unknown names, no domains.
    """
    builder = Builder(recipe, overrides, out)
    config = builder.config("moe", 0)
    if not config.pipeline.domains:
        raise ConfigError("pipeline.domains is empty; name the domains of the upcycled experts")
    found = Comparison(builder, {}, {})
    contenders, extensions = (
        chosen_methods(config.compare.contenders),
        chosen_extensions(config.compare.extensions),
    )
    for seed in config.compare.seeds:
        for variant, words in {"": [], **config.compare.variants}.items():
            for contender in contenders:
                for row, made in builder.contender(contender, seed, tuple(words)).items():
                    found.contenders.setdefault((variant, row), (contender, {}))[1][seed] = made
            for extension in extensions:
                for row, groups in additions(builder.config("extend", seed, words)).items():
                    made = builder.extension(extension, seed, tuple(words), groups)
                    found.extensions.setdefault((variant, extension.name, row), (extension, {}))[1][
                        seed
                    ] = made
    return found
