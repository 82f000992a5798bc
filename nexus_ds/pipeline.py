"""The stages of a whole run, where each one lives, and the command that makes it.

    <run>/tokenizer  seed  branches/<domain>  domains.safetensors  upcycled  nexus
          domains-new.safetensors  extension  extended  report
A stage is done when its output exists. `train.py` asks for what its own stage needs, `demo` for
everything.
Not covered: clusters; the templates in slurm/ submit the same commands as jobs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.records import SIDECAR, is_nexus, last_extension, read_manifest
from nexus_ds.config import as_dict, load_config, parse_yaml
from nexus_ds.errors import CheckpointError, ConfigError, OutputExistsError
from nexus_ds.launch import free_port
from nexus_ds.settings import Config, DataConfig

TRAIN = Path(__file__).parent / "train.py"
# step: train.py's stage
TRAINED = {"seed": "seed", "branch": "branch", "moe": "moe", "extended": "extend"}
HARMLESS = (
    "pipeline.parallel_branches",
    "data.workers",
    "training.log_every",
    "training.keep_last",
)
# a link in a clone, a file in an installed package
DS_JSON = Path(__file__).parent / "ds_configs" / "z3.json"
STARTS = {
    "branch": "the seed",
    "moe": "what nexus-ds upcycle wrote",
    "extend": "what nexus-ds extend wrote",
}
# that train a mixture-of-experts, with DS_JSON unless another is given
WIDE_STAGES = ("moe", "extend")


@dataclass(frozen=True)
class Places:
    """Paths of one run."""

    run: Path

    def __getattr__(self, name: str) -> Path:
        names = {
            "tokenizer": "tokenizer",
            "seed": "seed",
            "domains": "domains.safetensors",
            "new_domains": "domains-new.safetensors",
            "upcycled": "upcycled",
            "nexus": "nexus",
            "extension": "extension",
            "extended": "extended",
            "average": "average",
            "report": "report",
            "tokens": "tokens",
        }
        if name not in names:
            raise AttributeError(name)
        return self.run / names[name]

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
    return Places(Path(config.pipeline.run))


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
    domains = [(expert.name in last, expert.domain) for expert in manifest.experts]
    return [d for is_new, d in domains if not is_new], [d for is_new, d in domains if is_new]


def stage_places(config: Config) -> tuple[Path | None, Path]:
    """Return where the model that a stage starts from (None: a new one) and its output are, unless
    settings say otherwise."""
    where = places(config)
    table = {
        "seed": (None, where.seed),
        "branch": (where.seed, where.branch(config.branch)),
        "moe": (where.upcycled, where.nexus),
        "extend": (where.extension, where.extended),
    }
    return table[config.stage]


def resolve(config: Config) -> Config:
    """Fill in the paths and domains that follow from the stage; settings that are given stay.

    Domains come from the settings, else from the checkpoint that `model.path` names, else from the
    pipeline's.
    """
    where, pipe = places(config), config.pipeline
    old, new = checkpoint_domains(config.model.path)
    if not old:
        old, new = pipe.domains, pipe.new_domains
    path, output = stage_places(config)
    domains = {
        "seed": pipe.seed_domains or old,
        "branch": [config.branch],
        "moe": old + new if config.model.path else old,
        "extend": old + new,
    }[config.stage]
    model = replace(
        config.model,
        path=config.model.path or str(path or ""),
        tokenizer=config.model.tokenizer or str(where.tokenizer),
    )
    if config.stage != "seed" and config.model.path and not config.model.tokenizer:
        model.tokenizer = config.model.path
    data = replace(
        config.data,
        domains=config.data.domains or domains,
        validation_domains=config.data.validation_domains or old + new or domains,
        new_domains=config.data.new_domains or (new if config.stage == "extend" else []),
        cache=config.data.cache or str(where.tokens),
    )
    if not data.domains:
        raise ConfigError(
            "no domains to train on; set pipeline.domains or data.domains to folders of data.path"
        )
    name = config.name or (f"branch {config.branch}" if config.stage == "branch" else config.stage)
    return replace(config, name=name, output=config.output or str(output), model=model, data=data)


def shared_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those of a stage's overrides that hold for the whole run, so that earlier stages get
    them too."""
    shared = (
        "pipeline.",
        "data.path",
        "data.max_bytes",
        "data.sequence_length",
        "data.on_bad_row",
        "data.workers",
        "data.bos",
        "model.",
        "seed",
        "router.",
    )
    own = ("stage", "branch", "output", "name", "model.path", "model.tokenizer")
    return [o for o in overrides if o.startswith(shared) and o.partition("=")[0] not in own]


def no_bos(data: DataConfig) -> list[str]:
    """Return the option with which `evaluate` and `remove` read text as a run with these settings
    does."""
    return [] if data.bos else ["--no-bos"]


def check_domains(config: Config) -> None:
    """Raise ConfigError for a domain that can't be the name of a folder or stand in a list of
    them."""
    for domain in [*config.pipeline.domains, *config.pipeline.new_domains]:
        # what --expert NAME=DIR takes too
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", domain):
            raise ConfigError(
                f"pipeline.domains: {domain!r} can't be the name of an expert; expected letters, digits, '_', '.', '-'"
            )


def train_command(
    recipe: str, overrides: Sequence[str], ranks: int, ds_config: str = ""
) -> list[str]:
    """Return the command that trains one stage on `ranks` ranks of this machine."""
    tail = [
        str(TRAIN),
        *(["--deepspeed", ds_config] if ds_config else []),
        "--config",
        recipe,
        *overrides,
    ]
    if ranks == 1:
        return [sys.executable, *tail]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), *tail]


def _typed(short: str, path: Path) -> str:
    """Return `short` where that is `path`, seen from the working directory, as in a clone; else
    `path` itself."""
    return short if os.path.exists(short) and os.path.samefile(short, path) else str(path)


def typed_training(
    words: Sequence[str], *, launcher: Sequence[str] = ("deepspeed",), ds_json: str = ""
) -> str:
    """Return the command, quoted for a shell, that starts train.py with `words`; without `ds_json`
    it takes the project's z3."""
    files = [
        _typed("nexus_ds/train.py", TRAIN),
        "--deepspeed",
        ds_json or _typed("ds_configs/z3.json", DS_JSON),
    ]
    return shlex.join([*launcher, *files, *words])


def next_training(out: Path, data: str, recipe: str, stage: str) -> str:
    """Return the command, quoted for a shell, that trains a checkpoint which `upcycle` or `extend`
    has made."""
    settings = [f"stage={stage}", f"model.path={out}", f"data.path={data}", f"output={out}-trained"]
    return typed_training(["--config", recipe, *settings])


def next_evaluation(out: Path | str, data: DataConfig) -> str:
    """Return the command, quoted for a shell, that scores a checkpoint as it was trained."""
    words = ["--checkpoint", str(out), "--data", data.path, *no_bos(data), "--out", f"{out}-report"]
    return shlex.join(["nexus-ds", "evaluate", *words])


def next_words(checkpoint: Path) -> str:
    """Return the command, quoted for a shell, that lets a checkpoint speak."""
    return shlex.join(["nexus-ds", "generate", "--checkpoint", str(checkpoint), "The first thing"])


def check_start(config: Config, recipe: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError, with the whole command, if a stage has no model to start from and the
    recipe makes none."""
    pipe = config.pipeline
    start, output = stage_places(config)
    made_for = {
        "branch": config.branch in [*pipe.domains, *pipe.new_domains],
        "moe": bool(pipe.domains),
        "extend": bool(pipe.domains and pipe.new_domains),
    }
    if config.model.path or start is None or start.exists() or made_for[config.stage]:
        return
    # a finished run, or one in the way: that is to be said
    if Path(config.output or output).exists():
        return
    given = {text.partition("=")[0] for text in overrides}
    missing = {
        "model.path": "DIR",
        "data.path": "DIR",
        "output": f"models/{config.branch}" if config.branch else "DIR",
    }
    words = [*overrides, *(f"{key}={value}" for key, value in missing.items() if key not in given)]
    raise ConfigError(
        f"stage={config.stage} starts from {STARTS[config.stage]}; there is none at {start}, and the recipe {recipe} makes "
        f"none {_lack(config)}. Missing: {', '.join(key for key in missing if key not in given)}; type: "
        f"{typed_training(['--config', recipe, *words])}"
    )


def _lack(config: Config) -> str:
    """Return for which domains the recipe makes models."""
    old, new = config.pipeline.domains, config.pipeline.new_domains
    names = f"pipeline.domains: {', '.join(old) or 'none'}; pipeline.new_domains: {', '.join(new) or 'none'}"
    return f"for {config.branch} ({names})" if config.stage == "branch" else f"({names})"


def _verb(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nexus_ds", *arguments]


def steps(
    config: Config, recipe: str, overrides: Sequence[str], ranks: int, ds_config: str = ""
) -> list[Step]:
    """Return the stages of the run in order.

    Args:
        config: of any stage of the run.
        recipe, overrides: handed on to each command.
        ranks: of the two stages that train a mixture-of-experts.
        ds_config: their DeepSpeed JSON.
    """
    where, pipe, data = places(config), config.pipeline, config.data.path
    common = list(overrides)

    def train(stage: str, *more: str, wide: bool = False) -> list[str]:
        settings = [*common, f"stage={stage}", *more]
        return train_command(recipe, settings, ranks if wide else 1, ds_config if wide else "")

    def embed(domains: list[str], out: Path) -> list[str]:
        amount = str(pipe.embedding_documents)
        return _verb(
            "embed",
            "--data",
            data,
            "--domains",
            ",".join(domains),
            "--documents",
            amount,
            "--encoder",
            pipe.encoder,
            "--seed",
            str(config.seed),
            "--max-bytes",
            str(config.data.max_bytes),
            "--on-bad-row",
            config.data.on_bad_row,
            "--out",
            str(out),
        )

    def experts(domains: list[str]) -> list[str]:
        return [part for d in domains for part in ("--expert", f"{d}={where.branch(d)}")]

    branches = tuple(f"branch:{d}" for d in pipe.domains)
    new_branches = tuple(f"branch:{d}" for d in pipe.new_domains)
    all_domains = [*pipe.domains, *pipe.new_domains]
    share = [] if pipe.merge_weight is None else ["--lambda", str(pipe.merge_weight)]
    settings = ["--config", recipe, *common]
    plan = [Step("seed", where.seed, train("seed"))]
    for domain in all_domains:
        plan.append(
            Step(
                f"branch:{domain}",
                where.branch(domain),
                train("branch", f"branch={json.dumps(domain)}"),
                ("seed",),
            )
        )
    plan += [
        Step("embed", where.domains, embed(pipe.domains, where.domains)),
        Step(
            "upcycle",
            where.upcycled,
            _verb(
                "upcycle",
                "--seed",
                str(where.seed),
                *experts(pipe.domains),
                "--domains",
                str(where.domains),
                "--data",
                data,
                "--out",
                str(where.upcycled),
                *settings,
            ),
            ("seed", "embed", *branches),
        ),
        Step("moe", where.nexus, train("moe", wide=True), ("upcycle",), wide=True),
    ]
    if pipe.new_domains:
        plan += [
            Step("embed:new", where.new_domains, embed(pipe.new_domains, where.new_domains)),
            Step(
                "extend",
                where.extension,
                _verb(
                    "extend",
                    "--checkpoint",
                    str(where.nexus),
                    *experts(pipe.new_domains),
                    "--domains",
                    str(where.new_domains),
                    "--data",
                    data,
                    *share,
                    "--out",
                    str(where.extension),
                    *settings,
                ),
                ("moe", "embed:new", *new_branches),
            ),
            Step("extended", where.extended, train("extend", wide=True), ("extend",), wide=True),
        ]
    return plan


def _differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in now:
        name, a, b = f"{prefix}{key}", then.get(key), now[key]
        if isinstance(b, dict) and isinstance(a, dict):
            found += _differences(a, b, f"{name}.")
        elif a != b and name not in HARMLESS:
            found.append(f"{name}: {a!r} there, {b!r} here")
    return found


def check_made(plan: list[Step], recipe: str, overrides: Sequence[str]) -> None:
    """Raise OutputExistsError if a trained stage that is there was trained with other settings than
    it would be now."""
    for step in plan:
        saved = step.output / "training.yaml"
        if not saved.is_file():
            continue
        kind, _, domain = step.name.partition(":")
        words = [
            *overrides,
            f"stage={TRAINED[kind]}",
            *([f"branch={json.dumps(domain)}"] if domain else []),
        ]
        now = as_dict(resolve(load_config(recipe, words)))
        then = parse_yaml(saved.read_text(encoding="utf-8"), str(saved))
        different = _differences(then if isinstance(then, dict) else {}, now)
        if different:
            raise OutputExistsError(
                f"{step.output} was made with other settings ({'; '.join(different[:4])}); give another pipeline.run "
                "(--out of the demo), or remove it"
            )


def needed_for(plan: list[Step], name: str) -> list[Step]:
    """Return the stages whose outputs `name` needs, directly or not, that are not there yet; in
    order, without `name`."""
    by_name = {step.name: step for step in plan}
    wanted: set[str] = set()

    def visit(current: str) -> None:
        for other in by_name[current].needs:
            if other not in wanted and not by_name[other].output.exists():
                wanted.add(other)
                visit(other)

    visit(name)
    return [step for step in plan if step.name in wanted]
