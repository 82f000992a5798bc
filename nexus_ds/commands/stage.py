"""The verb `stage`: make one stage of a recipe's run by name; what the templates in slurm/ call in
every job.

Names and domains of a recipe stay inside python: a template passes the recipe's path, the stage's
name and the user's settings on as they came, and a task of an array finds its domain here.
Not covered: launching several ranks (srun does), submitting and requeueing (slurm/).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from nexus_ds.command_lines import DS_JSON, TRAIN, program
from nexus_ds.config import dump, load_config
from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.launch import EXIT_STOPPED, array_task, first_rank
from nexus_ds.local_runner import run_steps
from nexus_ds.outputs import (
    Ended,
    exit_on_signals,
    new_file,
    numbered,
    remove_left,
    write_json,
    write_text,
)
from nexus_ds.pipeline import (
    BRANCH,
    MOE,
    STEP_KINDS,
    TOKENS,
    TRAINED,
    WIDE_STAGES,
    Step,
    branch_step,
    check_domains,
    evaluation_step,
    needed_for,
    places,
    shared_overrides,
    steps,
    trained_config,
)
from nexus_ds.progress import say
from nexus_ds.settings import Config
from nexus_ds.words import add_stage_arguments

LOOK_SECONDS = 2.0
SHOWN = ("logs", "output", "progress", "branches", "extension")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_stage_arguments(parser, STEP_KINDS, " | ".join(STEP_KINDS))
    parser.add_argument(
        "--show", choices=SHOWN, help="print one fact for a job script and do nothing else"
    )


def _domains(config: Config) -> list[str]:
    """Return the domains whose branches a run trains, in the order of an array's tasks.

    Raises:
        ConfigError: there are none.
    """
    if not config.pipeline.domains:
        raise ConfigError(
            "pipeline.domains is empty: a run trains a branch for each; give "
            "pipeline.domains=[A,B,..], folders of data.path"
        )
    return [*config.pipeline.domains, *config.pipeline.new_domains]


def branch_domain(config: Config) -> str:
    """Return the domain of this array task: SLURM_ARRAY_TASK_ID counts domains, then new domains,
    from 0.

    Raises:
        ConfigError: no index, or one beyond the recipe's branches.
    """
    if config.branch:
        return config.branch
    domains = _domains(config)
    text = array_task()
    if not text:
        raise ConfigError(
            f"which branch? submit with --array=0-{len(domains) - 1}, or give branch=DOMAIN"
        )
    if int(text) >= len(domains):
        raise ConfigError(
            f"array task {text}: the recipe has {len(domains)} branches ({', '.join(domains)}); "
            f"submit with --array=0-{len(domains) - 1}"
        )
    return domains[int(text)]


def _config(args: argparse.Namespace) -> Config:
    """Load the recipe for the chosen stage; the branch stage gets its domain later."""
    stage = TRAINED.get(args.name, MOE)
    # Without a domain a branch can't be loaded; what is read here is the same in every stage.
    stage = MOE if stage == BRANCH else stage
    config = load_config(args.config, [*args.overrides, f"stage={stage}"])
    check_domains(config)
    if args.name != "seed":  # whose text may stand in data.domains
        _domains(config)
    return config


def plan(config: Config, args: argparse.Namespace) -> list[Step]:
    """Return the stages of the run, the evaluation last."""
    overrides = shared_overrides(args.overrides)
    ds_json = args.deepspeed or (str(DS_JSON) if DS_JSON.is_file() else "")
    found = steps(config, args.config, overrides, ranks=1, ds_config=ds_json)
    # The demo makes whatever is missing, which is nothing here, and then scores and reports.
    demo = program(["demo", f"--config={args.config}", *overrides])
    return [*found, evaluation_step(config, found, demo)]


def names_of(name: str, config: Config) -> list[str]:
    """Return the names in the plan that a stage of the command line stands for."""
    if name == "branch":
        return [branch_step(branch_domain(config))]
    if name == "embed" and config.pipeline.new_domains:
        return ["embed", "embed:new"]
    return [name]


def chosen(found: list[Step], names: list[str]) -> list[Step]:
    """Return the steps of these names; ConfigError for one that the recipe does not have."""
    by_name = {step.name: step for step in found}
    for name in names:
        if name in by_name:
            continue
        kind, _, domain = name.partition(":")
        if kind != BRANCH:
            raise ConfigError(
                f"the recipe adds no expert, so it has no stage {name}; give "
                "pipeline.new_domains=[E]"
            )
        branches = [other for other in by_name if other.startswith(branch_step(""))]
        known = ", ".join(other.removeprefix(branch_step("")) for other in branches)
        raise ConfigError(
            f"branch={domain} is none of the recipe's domains ({known or 'none'}); give "
            "pipeline.domains=[A,B,..]"
        )
    return [by_name[name] for name in names]


def missing(config: Config, found: list[Step], names: list[str]) -> list[Step]:
    """Return the steps of these names that are not done, behind what has to be made before them.

    A given checkpoint needs no earlier stage. A training tokenises its own text, which is less than
    that of the run.
    """
    trained = names[0].partition(":")[0] in TRAINED
    before = [] if trained and config.model.path else needed_for(found, names[0])
    needed = [step for step in before if not (trained and step.name == TOKENS)]
    return needed + [step for step in chosen(found, names) if not step.output.exists()]


def _reached(step: Step, config: Config) -> int:
    """Return the optimizer step of the newest saved state, or how many token files are made."""
    if step.name == TOKENS:
        cache = Path(config.data.cache or places(config).tokens)
        return len(list(cache.glob("*.json")))
    return max(numbered(Path(f"{step.output}.training/states"), "step_"), default=0)


def show(what: str, config: Config, args: argparse.Namespace) -> str:
    """Return one fact as one line: `logs` (made if missing), `output`, `progress` (names of what is
    missing and how far each is), `branches`, `extension`."""
    run = places(config).run.absolute()
    if what == "logs":
        (run / "logs").mkdir(parents=True, exist_ok=True)
        # For `status`, which knows a run by its folder.
        with new_file(run / "logs" / "recipe.yaml", overwrite=True) as temporary:
            write_text(temporary, dump(config))
        line = str(run / "logs")
    elif what == "output":
        targets = chosen(plan(config, args), names_of(args.name, config))
        line = str(targets[-1].output.absolute())
    elif what == "progress":
        steps_left = missing(config, plan(config, args), names_of(args.name, config))
        line = " ".join(f"{step.name} {_reached(step, config)}" for step in steps_left)
    elif what == "branches":
        line = str(len(_domains(config)))
    else:
        line = "yes" if config.pipeline.new_domains else "no"
    # A job script reads one line, and would take the rest for another answer.
    if any(ord(character) < 32 for character in line):
        raise ConfigError(f"pipeline.run {str(run)!r} has a control character; choose another path")
    return line


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock that the jobs of a run share.

    Tasks of an array that all miss the seed make it once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise NexusError(
                f"{path}: this file system has no locks ({error}); train the seed first: "
                "sbatch slurm/seed.sh"
            ) from error
        yield


def make(todo: list[str], found: list[Step], config: Config) -> int:
    """Run stages and what they need, if missing; return 0, or EXIT_STOPPED after a signal."""

    def all_of_them() -> None:
        for name in todo:
            step = next(s for s in found if s.name == name)
            if not step.output.exists():
                run_steps([*needed_for(found, name), step], config.pipeline.parallel_branches)

    return _until_a_signal(all_of_them)


def _until_a_signal(work: Callable[[], None]) -> int:
    """Do `work`; return 0, or EXIT_STOPPED after a signal."""
    try:
        with exit_on_signals():
            work()
    except Ended:
        # What ran has saved its state or removed what was unfinished; one rank says it for all.
        if first_rank():
            say("nexus-ds stage: stopped by a signal; start the same command again to go on")
        return EXIT_STOPPED
    return 0


def make_tokens(step: Step, found: list[Step], args: argparse.Namespace) -> int:
    """Tokenise what the steps that are not done yet will train on, in this process.

    Done are the domains whose files are there: after a signal the others are made.

    Returns:
        0, or EXIT_STOPPED after a signal.
    """
    # not at the top: it imports numpy, for which a job script's question does not wait
    from nexus_ds.data.preparation import tokenise

    overrides = shared_overrides(args.overrides)
    trained = [s for s in found if s.name.partition(":")[0] in TRAINED and not s.output.exists()]
    configs = [trained_config(other, args.config, overrides) for other in trained]
    return _until_a_signal(lambda: write_json(step.output, tokenise(configs)))


def train(config: Config, args: argparse.Namespace) -> NoReturn:
    """Become train.py for this stage, with the same process id: signals reach the training loop."""
    stage = TRAINED[args.name]
    settings = [*args.overrides, f"stage={stage}"]
    if stage == BRANCH:
        # Quoted: a domain may be called 2024 or yes.
        settings.append(f"branch={json.dumps(branch_domain(config), ensure_ascii=False)}")
    # With = : a recipe's name may begin with a dash.
    command = [sys.executable, "-u", str(TRAIN), f"--config={args.config}"]
    if stage in WIDE_STAGES and (args.deepspeed or DS_JSON.is_file()):
        command.append(f"--deepspeed={args.deepspeed or DS_JSON}")
    # What is in Python's buffers would be lost.
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*command, *settings])


def run(args: argparse.Namespace) -> int:
    """Make the stage; a finished one is left alone."""
    config = _config(args)
    if args.show:
        print_text(show(args.show, config, args))
        return 0
    run_folder = places(config).run
    for folder in (run_folder, run_folder / "branches"):
        # A stage that is finished writes nothing by which it would go.
        remove_left(folder)
    found = plan(config, args)
    names = names_of(args.name, config)
    targets = chosen(found, names)
    if args.name not in TRAINED:
        if args.name == TOKENS and not targets[0].output.exists():
            code = make_tokens(targets[0], found, args)
        else:
            code = make(names, found, config)
        if code == 0:
            print_text(f"finished: {', '.join(str(step.output) for step in targets)}")
        return code
    # Not in train.py, whose ranks wait for each other within a limit, and where the watch of rank 0
    # can't begin before this: here is a process without torch, which hands its id to train.py
    # afterwards, and a thread would not outlive that. Each training that is made here watches
    # itself, and a job's limit ends the rest.
    needed = _needed(config, found, names)
    if needed and first_rank():
        with _only_one(places(config).run / "logs" / ".making"):
            code = make(needed, found, config)
    else:
        code = _until_a_signal(lambda: _wait_for_rank_0(config, found, names))
    if code:
        return code
    train(config, args)


def _needed(config: Config, found: list[Step], names: list[str]) -> list[str]:
    """Return the names of what is missing before a training; of nothing where that is finished."""
    targets = chosen(found, names)
    if targets[0].output.exists():
        return []
    return [step.name for step in missing(config, found, names) if step not in targets]


def _wait_for_rank_0(config: Config, found: list[Step], names: list[str]) -> None:
    """Wait until all is there that rank 0 makes. Should it fail, the launcher ends this rank."""
    while _needed(config, found, names):
        time.sleep(LOOK_SECONDS)
