"""Train a dense branch, an upcycled or an extended model: one loop over the DeepSpeed engine.

    deepspeed nexus_ds/train.py --deepspeed ds_configs/z3.json \\
        [--config RECIPE.yaml] [section.key=value ...]

Also under torchrun, srun (one task a rank) and plain python (one rank). Without --config it runs
the demo recipe and makes whatever its stage needs. An interrupted run goes on from its last
training state when it is started again. A training state resumes with any number of ranks,
expert-parallel size and ZeRO stage.
Not covered: fp16, pipeline and tensor parallelism.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

# As a file, this folder comes first on sys.path and would shadow packages of the same names
# (evaluate, ...).
_HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
    sys.path.insert(0, os.path.dirname(_HERE))

# Before what takes seconds to import.
from nexus_ds.children import tie_to_parent, tie_to_runner
from nexus_ds.console import (
    BROKEN_PIPE,
    INTERRUPTED,
    answering_ctrl_c,
    print_text,
    speak_any_encoding,
    tell,
    unwinding,
)
from nexus_ds.launch import (
    EXIT_BAD_BATCHES,
    EXIT_STOPPED,
    Position,
    adopt_launcher,
    end,
    first_rank,
    has_launcher,
    let_memory_grow,
    rank_name,
)

_early = ExitStack()
if __name__ == "__main__":
    # One rank says it for all.
    _early.enter_context(answering_ctrl_c("train.py" if first_rank() else ""))

import argparse
import traceback
from pathlib import Path

from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.command_lines import next_evaluation
from nexus_ds.config import dump, load_config
from nexus_ds.data.preparation import make_tokenizer
from nexus_ds.errors import BadBatchesError, CheckpointError, NexusError, OutputExistsError
from nexus_ds.local_runner import run_steps
from nexus_ds.outputs import Ended, exit_on_signals, held, refuse_existing
from nexus_ds.pipeline import (
    SEED,
    check_domains,
    check_start,
    needed_for,
    places,
    resolve,
    shared_overrides,
    steps,
    trained_step,
)
from nexus_ds.runtime.installed import refuse_older
from nexus_ds.settings import Config
from nexus_ds.words import Parser, parse_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--deepspeed", metavar="JSON", default="", help="DeepSpeed configuration (ZeRO, offload)"
    )
    parser.add_argument(
        "--config", metavar="RECIPE", default="demo", help="recipe file or name (default: demo)"
    )
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the recipe"
    )


def _prepare(config: Config, args: argparse.Namespace) -> None:
    """On rank 0: make what this stage starts from, if it is missing and the run makes it."""
    start = Path(config.model.path)
    make_tokenizer(config)
    if config.stage == SEED:
        return
    # A model elsewhere is the user's; that it is missing is told when it is read.
    if start.exists() or start.parent.absolute() != places(config).run.absolute():
        return
    overrides = shared_overrides(args.overrides)
    plan = steps(config, args.config, overrides, ranks=1, ds_config=args.deepspeed)
    run_steps(needed_for(plan, trained_step(config)), config.pipeline.parallel_branches)


def _check_dense(path: Path) -> None:
    """Refuse a dense model that can't become an expert, as `upcycle` would after all the training.

    Families that scale or cap their logits would besides be trained with another loss than theirs.
    """
    # not at the top: it imports torch, for which `train --help` doesn't wait
    from nexus_ds.checkpoint.dense import open_dense
    from nexus_ds.checkpoint.wrappers import refuse_wrapper

    if path.is_dir() and not is_nexus(path):
        refuse_wrapper(path)
        open_dense(path)


def _finished(config: Config) -> bool:
    """Return whether this very run is done.

    Raises:
        OutputExistsError: something else is in its place, or nothing can take it.
        OSError: nobody may write there.
    """
    out = Path(config.output)
    if not out.exists():
        refuse_existing(out)
        return False
    saved = out / "training.yaml"
    if saved.is_file() and saved.read_bytes() == dump(config).encode():
        return True
    raise OutputExistsError(
        f"{out} exists already and is not the result of this configuration; give output=DIR"
    )


def _tell_finished(config: Config, here: Position) -> int:
    """Say on rank 0 that the run is done, and what comes next; return the exit code."""
    if here.rank == 0:
        following = next_evaluation(config.output, config.data)
        print_text(f"{config.output} is finished already; next: {following}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Train one stage; return the exit code.

    A signal ends it at once until the first step, from then on at the next (runtime/signals).
    """
    try:
        with exit_on_signals():
            return _train(args)
    except Ended as ended:
        if first_rank():
            again = "start the same command again to go on"
            tell(f"train.py: {ended} before the first step of this start; {again}")
        return EXIT_STOPPED


def _train(args: argparse.Namespace) -> int:
    """Train one stage; return the exit code, Ended after a signal before the first step."""
    let_memory_grow()
    given = load_config(args.config, args.overrides)
    refuse_older()
    if given.model.path and not Path(given.model.path).is_dir():
        raise CheckpointError(
            f"no checkpoint at {given.model.path}; expected a directory that holds a model"
        )
    check_domains(given)
    check_start(given, args.config, args.overrides)
    config = resolve(given)
    if config.model.path:
        _check_dense(Path(config.model.path))
    here = adopt_launcher()
    if _finished(config):
        return _tell_finished(config, here)
    # Not at the top: it imports torch, and what is wrong above is told without it.
    from nexus_ds.runtime import ranks, watchdog

    with ExitStack() as stack:
        stack.enter_context(watchdog.watched(here, config.parallel.timeout_minutes))
        work = Path(config.output + ".training")
        ranks.on_rank_0(lambda: stack.enter_context(held(work)))
        # Another start may have finished it, and given the lock back, since the look above; all
        # ranks learn it from one, for each might see something else.
        if ranks.on_rank_0(lambda: _finished(config)):
            return _tell_finished(config, here)
        watchdog.at("making what this stage starts from", minutes=watchdog.PREPARING)
        ranks.on_rank_0(lambda: _prepare(config, args))
        # Here, since it imports DeepSpeed: what is wrong with the inputs is told without it.
        from nexus_ds.runtime.loop import train

        return train(config, args.deepspeed, here)


def main(argv: list[str] | None = None) -> int:
    """Run as a file under a launcher; a user's mistake is one line, which names a rank above 0."""
    parser = Parser(prog="train.py", description=__doc__.split("\n", 1)[0])
    add_arguments(parser)
    speak_any_encoding()
    if has_launcher():
        # One that is killed would leave its ranks behind, at work.
        tie_to_parent()
        tie_to_runner()
    args = parse_words(parser, argv)
    try:
        with unwinding():
            return run(args)
    except BrokenPipeError:
        return BROKEN_PIPE
    except (NexusError, OSError) as error:
        speaker = "" if first_rank() else f"rank {rank_name()}: "
        tell(f"train.py: {speaker}{error}")
        return EXIT_BAD_BATCHES if isinstance(error, BadBatchesError) else 1
    except KeyboardInterrupt:
        # A training that has begun saves its state instead (runtime/signals).
        if first_rank():
            tell("train.py: interrupted")
        return INTERRUPTED
    except Exception:
        # Not left to the interpreter, whose teardown waits for the threads of lost collectives.
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    with _early:
        end(main())
