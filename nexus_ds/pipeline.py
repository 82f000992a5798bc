"""The stages of a whole run, where each one lives, and the command that makes it.

    <run>/tokenizer  tokens.json  seed  branches/<domain>  domains.safetensors  upcycled  nexus
          domains-new.safetensors  extension  extended  report
A stage is done when its output exists. `train.py` asks for what its own stage needs, `demo` for
everything.
Not covered: clusters; the templates in slurm/ submit the same commands as jobs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.records import SIDECAR, is_nexus, last_extension, read_manifest
from nexus_ds.command_lines import (
    EXPERT_NAME,
    EXPERT_NAMES,
    embed_words,
    extend_words,
    program,
    train_command,
    train_words,
    typed_training,
    upcycle_words,
)
from nexus_ds.config import as_dict, load_config, read_yaml
from nexus_ds.errors import CheckpointError, ConfigError, OutputExistsError
from nexus_ds.settings import (
    SETTINGS,
    STAGES,
    Config,
    DataConfig,
    ModelConfig,
    that_change,
)

# What train.py calls its stages, in the order of a run. A recipe says `extend` for the finetune of
# an extended model; here that is the word for appending the expert.
SEED, BRANCH, MOE, FINETUNE = STAGES
# Kinds of steps that train, with their stage. `nexus-ds stage` and its kin call these by name.
TRAINED = {"seed": SEED, "branch": BRANCH, "moe": MOE, "extended": FINETUNE}
# Steps that a verb of their own makes.
MADE_BY_VERBS = ("embed", "upcycle", "extend", "evaluate")
# The step that tokenises the text of all steps that train, and needs no GPU.
TOKENS = "tokens"
# Kinds of steps: what `stage` makes and `preflight` checks; a branch is named by its domain.
STEP_KINDS = (TOKENS, *TRAINED, *MADE_BY_VERBS)
# That train a mixture-of-experts, on all devices and with DS_JSON unless another is given.
WIDE_STAGES = (MOE, FINETUNE)
STARTS = {
    BRANCH: "the seed",
    MOE: "what nexus-ds upcycle wrote",
    FINETUNE: "what nexus-ds extend wrote",
}


@dataclass(frozen=True)
class Places:
    """Paths of one run."""

    run: Path
    tokenizer: Path
    tokens: Path
    """Tokenized text, shared by all stages."""
    tokenised: Path
    """The list of it, there when all of it is."""
    seed: Path
    domains: Path
    """Domain embeddings of the upcycled experts."""
    upcycled: Path
    nexus: Path
    """The upcycled model, trained."""
    new_domains: Path
    """Domain embeddings of the experts that are added."""
    extension: Path
    """The model with its experts added, before the finetune."""
    extended: Path
    average: Path
    """The plain mean of the seed and its branches."""
    report: Path

    def branch(self, domain: str) -> Path:
        """Return the dense expert of a domain."""
        return self.run / "branches" / domain


@dataclass(frozen=True)
class Step:
    """One stage: its name, what it makes, what it needs, how it is made."""

    name: str
    output: Path
    command: list[str]
    needs: tuple[str, ...] = field(default=())
    wide: bool = False
    """Whether it takes all devices."""
    quiet: bool = False
    """Whether its tables are left out of the log."""


def places(config: Config) -> Places:
    """Return the paths of the run that `config` belongs to."""
    run = Path(config.pipeline.run)
    return Places(
        run=run,
        tokenizer=run / "tokenizer",
        tokens=run / "tokens",
        tokenised=run / "tokens.json",
        seed=run / "seed",
        domains=run / "domains.safetensors",
        upcycled=run / "upcycled",
        nexus=run / "nexus",
        new_domains=run / "domains-new.safetensors",
        extension=run / "extension",
        extended=run / "extended",
        average=run / "average",
        report=run / "report",
    )


def checkpoint_domains(path: str) -> tuple[list[str], list[str]]:
    """Return the domains of a Nexus checkpoint's older experts and of those of its last extension;
    ([], []) for others."""
    directory = Path(path)
    if not path or not is_nexus(directory):
        return [], []
    try:
        manifest = read_manifest(directory)
        last = last_extension(manifest.lineage)
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory / SIDECAR} is damaged ({error}); restore it from where it came"
        ) from error
    old: list[str] = []
    new: list[str] = []
    for expert in manifest.experts:
        group = new if expert.name in last else old
        group.append(expert.domain)
    return old, new


def stage_places(config: Config) -> tuple[Path | None, Path]:
    """Return where a stage finds its model and writes its output, unless settings say otherwise.

    The model is None for a seed, which is a new one.
    """
    where = places(config)
    table = {
        SEED: (None, where.seed),
        BRANCH: (where.seed, where.branch(config.branch)),
        MOE: (where.upcycled, where.nexus),
        FINETUNE: (where.extension, where.extended),
    }
    return table[config.stage]


def resolve(config: Config) -> Config:
    """Fill in the paths and domains that follow from the stage; settings that are given stay.

    Domains come from the settings, else from the checkpoint that `model.path` names, else from the
    pipeline's.
    """
    path, output = stage_places(config)
    data = _resolved_data(config)
    if not data.domains:
        raise ConfigError(
            "no domains to train on; set pipeline.domains or data.domains to folders of data.path"
        )
    name = f"branch {config.branch}" if config.stage == BRANCH else config.stage
    return replace(
        config,
        name=config.name or name,
        output=config.output or str(output),
        model=_resolved_model(config, path),
        data=data,
    )


def _resolved_model(config: Config, start: Path | None) -> ModelConfig:
    """Return where a stage finds its model and its tokenizer."""
    given = config.model
    tokenizer = given.tokenizer or str(places(config).tokenizer)
    # A given checkpoint brings its own.
    if config.stage != SEED and given.path and not given.tokenizer:
        tokenizer = given.path
    path = given.path or str(start or "")
    return replace(given, path=path, tokenizer=tokenizer)


def _resolved_data(config: Config) -> DataConfig:
    """Return what a stage reads, with its domains and its cache."""
    pipe = config.pipeline
    given = config.data
    old, new = checkpoint_domains(config.model.path)
    if not old:
        old, new = pipe.domains, pipe.new_domains
    # Without a given checkpoint the mixture is what upcycle makes, before anything is added.
    by_stage = {
        SEED: pipe.seed_domains or old,
        BRANCH: [config.branch],
        MOE: old + new if config.model.path else old,
        FINETUNE: old + new,
    }
    domains = by_stage[config.stage]
    # Only a finetune replays: elsewhere a domain that was added later is one like the others.
    added = new if config.stage == FINETUNE else []
    return replace(
        given,
        domains=given.domains or domains,
        validation_domains=given.validation_domains or old + new or domains,
        new_domains=given.new_domains or added,
        cache=given.cache or str(places(config).tokens),
    )


def shared_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those of a stage's overrides that hold for the whole run, or for a stage that they
    name, so that earlier stages get them too."""
    shared = {key for key, rule in SETTINGS.items() if rule.scope == "run"}
    return [
        override
        for override in overrides
        if override.startswith("stages.") or override.partition("=")[0] in shared
    ]


def check_domains(config: Config) -> None:
    """Raise ConfigError for a domain that can't be the name of an expert, or is named twice."""
    domains = [*config.pipeline.domains, *config.pipeline.new_domains]
    if len(set(domains)) != len(domains):
        raise ConfigError(
            f"pipeline.domains and new_domains name a domain twice: {', '.join(domains)}; "
            "name each once"
        )
    for domain in domains:
        if not EXPERT_NAME.fullmatch(domain):
            raise ConfigError(
                f"pipeline.domains: {domain[:300]!r} can't be the name of an expert; expected "
                f"{EXPERT_NAMES}"
            )


def check_start(config: Config, recipe: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError, with the whole command, if a stage has no model to start from and the
    recipe makes none."""
    pipe = config.pipeline
    start, output = stage_places(config)
    made_for = {
        BRANCH: config.branch in [*pipe.domains, *pipe.new_domains],
        MOE: bool(pipe.domains),
        FINETUNE: bool(pipe.domains and pipe.new_domains),
    }
    there = start is None or start.exists()
    if config.model.path or there or made_for[config.stage]:
        return
    # a finished run, or one in the way: that is to be said
    if Path(config.output or output).exists():
        return
    given = {text.partition("=")[0] for text in overrides}
    needed = {
        "model.path": "DIR",
        "data.path": "DIR",
        "output": f"models/{config.branch}" if config.branch else "DIR",
    }
    missing = {key: value for key, value in needed.items() if key not in given}
    settings = [*overrides, *(f"{key}={value}" for key, value in missing.items())]
    raise ConfigError(
        f"stage={config.stage} starts from {STARTS[config.stage]}; there is none at {start}, and "
        f"the recipe {recipe} makes none {_lack(config)}. Missing: {', '.join(missing)}; type: "
        f"{typed_training(train_words(recipe, settings))}"
    )


def _lack(config: Config) -> str:
    """Return for which domains the recipe makes models."""
    old = ", ".join(config.pipeline.domains) or "none"
    new = ", ".join(config.pipeline.new_domains) or "none"
    names = f"(pipeline.domains: {old}; pipeline.new_domains: {new})"
    return f"for {config.branch} {names}" if config.stage == BRANCH else names


def branch_step(domain: str) -> str:
    """Return the name of the step that trains a domain's dense expert."""
    return f"branch:{domain}"


def trained_step(config: Config) -> str:
    """Return the name of the step that is `config.stage`."""
    if config.stage == BRANCH:
        return branch_step(config.branch)
    return next(name for name, stage in TRAINED.items() if stage == config.stage)


@dataclass(frozen=True)
class _Steps:
    """Makes the steps of one run."""

    config: Config
    recipe: str
    overrides: tuple[str, ...]
    ranks: int
    ds_config: str

    def _train(self, stage: str, *settings: str) -> list[str]:
        # After those of the user, who may have named the stage that is asked for in the end.
        overrides = [*self.overrides, f"stage={stage}", *settings]
        if stage in WIDE_STAGES:
            return train_command(self.recipe, overrides, self.ranks, self.ds_config)
        return train_command(self.recipe, overrides, 1)

    def _verb(self, words: list[str], out: Path) -> list[str]:
        return program([*words, "--out", str(out)])

    def _verb_with_recipe(self, words: list[str], out: Path) -> list[str]:
        return [*self._verb(words, out), "--config", self.recipe, *self.overrides]

    def tokens(self) -> Step:
        words = ["stage", f"--config={self.recipe}", TOKENS, *self.overrides]
        return Step(TOKENS, places(self.config).tokenised, program(words))

    def seed(self) -> Step:
        return Step("seed", places(self.config).seed, self._train(SEED), (TOKENS,))

    def branches(self, domains: list[str]) -> list[Step]:
        found = []
        for domain in domains:
            # As JSON: a domain may be called 2024 or yes, and overrides are YAML.
            command = self._train(BRANCH, f"branch={json.dumps(domain)}")
            output = places(self.config).branch(domain)
            found.append(Step(branch_step(domain), output, command, ("seed",)))
        return found

    def embed(self, name: str, domains: list[str], out: Path) -> Step:
        return Step(name, out, self._verb(embed_words(self.config, domains), out))

    def upcycle(self) -> Step:
        where = places(self.config)
        domains = self.config.pipeline.domains
        experts = {domain: where.branch(domain) for domain in domains}
        words = upcycle_words(where.seed, experts, where.domains, self.config.data)
        command = self._verb_with_recipe(words, where.upcycled)
        needs = ("seed", "embed", *map(branch_step, domains))
        return Step("upcycle", where.upcycled, command, needs)

    def extend(self) -> Step:
        where = places(self.config)
        domains = self.config.pipeline.new_domains
        experts = {domain: where.branch(domain) for domain in domains}
        seed = where.seed if self.config.model.task_scale != 1.0 else None
        words = extend_words(where.nexus, experts, where.new_domains, self.config.data, seed)
        share = self.config.pipeline.merge_weight
        # Unset, `extend` takes the paper's 1/(n+1), and it alone knows n.
        if share is not None:
            words += ["--lambda", str(share)]
        command = self._verb_with_recipe(words, where.extension)
        needs = ("moe", "embed:new", *map(branch_step, domains))
        return Step("extend", where.extension, command, needs)

    def trained_mixture(self, name: str, out: Path, needs: str) -> Step:
        return Step(name, out, self._train(TRAINED[name]), (needs,), wide=True)


def steps(
    config: Config,
    recipe: str,
    overrides: Sequence[str],
    ranks: int,
    ds_config: str = "",
) -> list[Step]:
    """Return the stages of the run in order.

    Args:
        config: of any stage of the run.
        recipe, overrides: handed on to each command.
        ranks: of the two stages that train a mixture-of-experts.
        ds_config: their DeepSpeed JSON.
    """
    where = places(config)
    pipe = config.pipeline
    make = _Steps(config, recipe, tuple(overrides), ranks, ds_config)
    # Before the branches, whose cards take from there what is there.
    embeds = [make.embed("embed", pipe.domains, where.domains)]
    if pipe.new_domains:
        embeds.append(make.embed("embed:new", pipe.new_domains, where.new_domains))
    plan = [
        make.tokens(),
        make.seed(),
        *embeds,
        *make.branches([*pipe.domains, *pipe.new_domains]),
        make.upcycle(),
        make.trained_mixture("moe", where.nexus, "upcycle"),
    ]
    if pipe.new_domains:
        plan += [
            make.extend(),
            make.trained_mixture("extended", where.extended, "extend"),
        ]
    return plan


def evaluation_step(config: Config, plan: list[Step], command: list[str]) -> Step:
    """Return the step that comes after the last of `plan`: all models are scored."""
    return Step("evaluate", places(config).report, command, (plan[-1].name,))


def _differences(
    then: dict[str, Any], now: dict[str, Any], usual: dict[str, Any], prefix: str = ""
) -> list[str]:
    """Return the settings that differ; those that `then` lacks were as usual: they are newer."""
    found = []
    # Settings that only the older file has are gone from the program: nothing reads them.
    for key, here in now.items():
        name = f"{prefix}{key}"
        there = then.get(key, usual.get(key))
        if isinstance(here, dict) and isinstance(there, dict):
            found += _differences(there, here, usual.get(key) or {}, f"{name}.")
        elif there != here and name not in that_change("nothing"):
            found.append(f"{name}: {there!r} there, {here!r} here")
    return found


def trained_config(step: Step, recipe: str, overrides: Sequence[str]) -> Config:
    """Return the settings, with all paths, of a step that trains."""
    kind, _, domain = step.name.partition(":")
    words = [*overrides, f"stage={TRAINED[kind]}"]
    if domain:
        words.append(f"branch={json.dumps(domain)}")
    return resolve(load_config(recipe, words))


def check_made(plan: list[Step], recipe: str, overrides: Sequence[str]) -> None:
    """Raise OutputExistsError for a trained stage that is there and would now be another.

    The settings it was trained with stand beside it (`training.yaml`).
    """
    for step in plan:
        saved = step.output / "training.yaml"
        if not saved.is_file():
            continue
        now = as_dict(trained_config(step, recipe, overrides))
        # what is no text differs in everything, or is told as no YAML
        then = read_yaml(saved)
        # An empty file differs in everything: the stage is not taken for this one.
        known = then if isinstance(then, dict) else {}
        different = _differences(known, now, as_dict(Config()) if known else {})
        if different:
            raise OutputExistsError(
                f"{step.output} was made with other settings ({'; '.join(different[:4])}); give "
                "another pipeline.run (--out of the demo), or remove it"
            )


def needed_for(plan: list[Step], name: str) -> list[Step]:
    """Return what `name` needs, directly or not, and is not there yet; in order, without `name`."""
    by_name = {step.name: step for step in plan}
    wanted: set[str] = set()

    # What is there is not looked behind: its own needs may have been removed since.
    def visit(current: str) -> None:
        for other in by_name[current].needs:
            if other not in wanted and not by_name[other].output.exists():
                wanted.add(other)
                visit(other)

    visit(name)
    return [step for step in plan if step.name in wanted]
