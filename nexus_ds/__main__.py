"""The command line: one line a verb, in the order of the pipeline."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

from nexus_ds.console import (
    BROKEN_PIPE,
    INTERRUPTED,
    answering_ctrl_c,
    drop_output,
    flush,
    speak_any_encoding,
    tell,
    unwinding,
)
from nexus_ds.errors import BadBatchesError, NexusError
from nexus_ds.launch import EXIT_BAD_BATCHES
from nexus_ds.outputs import Ended, exit_on_signals
from nexus_ds.words import Parser, parse_words


class Verb(NamedTuple):
    """A command: the module under nexus_ds/ that declares and runs it, and what it does."""

    module: str
    help: str


# The help texts stand here, not in their modules, so that `--help` imports none of the others.
VERBS = {
    "demo": Verb(
        "commands.demo",
        "seed, branches, upcycling, training, one more expert, evaluation: "
        "the whole pipeline on a small scale",
    ),
    "discover": Verb(
        "commands.discover", "cluster text without labels into domains for the pipeline"
    ),
    "embed": Verb("commands.embed", "embed each domain's training text with a sentence encoder"),
    "card": Verb(
        "commands.card", "make the domain card of a dense model, with which it can become an expert"
    ),
    "upcycle": Verb(
        "commands.upcycle", "make one mixture-of-experts out of a seed and its dense branches"
    ),
    "train": Verb(
        "train", "train one stage with DeepSpeed (dense branch, upcycled or extended model)"
    ),
    "extend": Verb("commands.extend", "add one or several dense branches as experts to a mixture"),
    "remove": Verb("commands.remove", "take routed experts out of a mixture"),
    "adopt": Verb(
        "commands.adopt", "make a mixture that Trainer, TRL or PEFT trained extendable again"
    ),
    "evaluate": Verb(
        "commands.evaluate", "score checkpoints by domain, with routing, figures and one page"
    ),
    "compare": Verb(
        "commands.compare",
        "a fair comparison with the alternatives: same data, tokens and seeds, compute beside it",
    ),
    "inspect": Verb("commands.inspect_model", "show what a checkpoint is, or how several differ"),
    "verify": Verb(
        "commands.verify", "check a checkpoint's bytes, its router and what it was made of"
    ),
    "export": Verb(
        "commands.export",
        "write a mixture for another program (transformers 4, vLLM, SGLang, llama.cpp, Ollama, "
        "the hub), checked",
    ),
    "plan": Verb(
        "commands.plan",
        "estimate memory, traffic and time of every layout, "
        "and write the DeepSpeed JSON of the best",
    ),
    "bench": Verb(
        "commands.bench",
        "measure training speed (train), cost as the model grows (growth), slow links (links), "
        "tokenising (data), putting models together (assemble), all that only a GPU shows (gpu)",
    ),
    "generate": Verb("commands.generate", "continue a prompt with a checkpoint"),
    "preflight": Verb(
        "commands.preflight",
        "check nodes, versions, devices, disk and network before a stage (every rank runs it)",
    ),
    "stage": Verb(
        "commands.stage", "make one stage of a recipe's run (what the templates in slurm/ call)"
    ),
    "status": Verb(
        "commands.status",
        "show each stage of a run: pending, running (step, loss, ETA), finished, "
        "failed with the last error line",
    ),
}


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"nexus_ds.{VERBS[verb].module}")


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Return the parser; the chosen verb alone is imported and declares its options."""
    parser = Parser(
        prog="nexus-ds",
        description="One mixture-of-experts out of several dense models, and more experts later.",
    )
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, entry in VERBS.items():
        command = commands.add_parser(name, help=entry.help, description=entry.help)
        if name == verb:
            _module(name).add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a user's mistake is one line on stderr and exit code 1, several bad batches in
    a row EXIT_BAD_BATCHES.

    SIGTERM and its like end a verb in order, with 128 + their number; `train` saves its state
    instead (runtime/signals).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    words = sys.argv[1:] if argv is None else argv
    verb = next((word for word in words if not word.startswith("-")), None)
    name = f"nexus-ds {verb}" if verb in VERBS else "nexus-ds"
    speak_any_encoding()
    with answering_ctrl_c(name):
        args = parse_words(build_parser(verb), words)
        code = _run(args, name)
    return code


def _run(args: argparse.Namespace, name: str) -> int:
    """Run the verb; say in one line what ended it."""
    try:
        # A training saves its state instead of ending in the middle.
        with unwinding(), nullcontext() if args.verb == "train" else exit_on_signals():
            code = int(_module(args.verb).run(args))
        flush()
        return code
    except BrokenPipeError:
        # As `head` does when it has seen enough.
        drop_output()
        return BROKEN_PIPE
    except (NexusError, OSError) as error:  # of the operating system: a path, permissions, space
        tell(f"{name}: {error}")
        return EXIT_BAD_BATCHES if isinstance(error, BadBatchesError) else 1
    except Ended as ended:
        tell(f"{name}: ended by {ended.signal}")
        return int(ended.code or 0)
    except KeyboardInterrupt:
        tell(f"{name}: interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
