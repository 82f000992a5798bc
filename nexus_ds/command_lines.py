"""How each verb is called: the words of a command line, from a recipe's settings.

The pipeline, a comparison, the demo and the commands that are printed for the user all take them
from here.
Not covered: what a verb does with its words (commands/).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nexus_ds.launch import free_port
from nexus_ds.settings import Config, DataConfig

TRAIN = Path(__file__).parent / "train.py"
# a link in a clone, a file in an installed package
DS_JSON = Path(__file__).parent / "ds_configs" / "z3.json"
# Of an expert, so of its domain: it stands before the = of --expert NAME=DIR, in lists with commas,
# and names a folder, beside which others have longer names.
EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
EXPERT_NAMES = "at most 200 letters, digits, '_', '.', '-'"


def program(words: Sequence[str]) -> list[str]:
    """Return the command that runs a verb in a process of its own."""
    # Not the script `nexus-ds`, which another environment on the path may have too.
    return [sys.executable, "-m", "nexus_ds", *words]


def no_bos(data: DataConfig) -> list[str]:
    """Return the option with which `evaluate` and `remove` read text as a run with these settings
    does."""
    return [] if data.bos else ["--no-bos"]


def _reading(data: DataConfig) -> list[str]:
    """Return the options with which `evaluate` reads text as a run with these settings does."""
    return [*no_bos(data), *(["--chat"] if data.chat else [])]


def _options(values: Mapping[str, object]) -> list[str]:
    """Return options with their values, in order."""
    words = []
    for option, value in values.items():
        words += [option, str(value)]
    return words


def embed_words(config: Config, domains: Sequence[str]) -> list[str]:
    """Return the call of `embed` for these domains, all but --out."""
    pipe = config.pipeline
    data = config.data
    # In this order: names of a comparison's outputs follow from the words.
    options = {
        "--data": data.path,
        "--domains": ",".join(domains),
        "--documents": pipe.embedding_documents,
        "--encoder": pipe.encoder,
        "--seed": config.seed,
        "--max-bytes": data.max_bytes,
        "--on-bad-row": data.on_bad_row,
    }
    return ["embed", *_options(options)]


def _expert_words(experts: Mapping[str, Path]) -> list[str]:
    words = []
    for name, path in experts.items():
        words += ["--expert", f"{name}={path}"]
    return words


def upcycle_words(
    seed: Path,
    experts: Mapping[str, Path],
    embeddings: Path,
    data: DataConfig,
) -> list[str]:
    """Return the call of `upcycle`, all but --out and the recipe.

    Args:
        seed: the dense model that becomes the shared expert.
        experts: the dense models that become routed ones, by name.
        embeddings: what `embed` wrote for their domains.
        data: where the router's warm start reads text.
    """
    options = {"--domains": embeddings, "--data": data.path}
    return [
        "upcycle",
        *_options({"--seed": seed}),
        *_expert_words(experts),
        *_options(options),
    ]


def typed_upcycling(seed: str, experts: Mapping[str, Path], embeddings: Path) -> str:
    """Return a call of `upcycle` for a person to complete, quoted for a shell."""
    # The place is a person's to choose.
    options = {"--domains": embeddings, "--out": "DIR"}
    words = ["upcycle", *_options({"--seed": seed}), *_expert_words(experts)]
    return shlex.join(["nexus-ds", *words, *_options(options)])


def extend_words(
    checkpoint: Path,
    experts: Mapping[str, Path],
    embeddings: Path,
    data: DataConfig,
    seed: Path | None = None,
) -> list[str]:
    """Return the call of `extend`, all but --out and the recipe; see `upcycle_words`.

    `seed` is given where routed experts go further from it than their branches.
    """
    options = {"--domains": embeddings, "--data": data.path}
    if seed:
        options["--base"] = seed
    return [
        "extend",
        *_options({"--checkpoint": checkpoint}),
        *_expert_words(experts),
        *_options(options),
    ]


def evaluate_words(
    config: Config,
    models: Mapping[str, Path],
    domains: Sequence[str],
    cache: Path,
) -> list[str]:
    """Return the call of `evaluate`, all but --out, on the windows that training validates on.

    Args:
        config: of a stage of the run, for its text and its windows.
        models: checkpoints by the names of their rows.
        domains: whose text is scored.
        cache: folder of tokenized text.
    """
    data = config.data
    options = {
        "--data": data.path,
        "--domains": ",".join(domains),
        "--windows": config.training.eval_windows,
        "--length": data.sequence_length,
        "--cache": cache,
        "--on-bad-row": data.on_bad_row,
    }
    words = ["evaluate", *_options(options), *_reading(data)]
    for name, path in models.items():
        words += ["--checkpoint", str(path), "--name", name]
    return words


def train_words(recipe: str, overrides: Sequence[str], ds_json: str = "") -> list[str]:
    """Return the words after `train.py`, or after the verb `train`; without `ds_json` no ZeRO."""
    deepspeed = ["--deepspeed", ds_json] if ds_json else []
    return [*deepspeed, "--config", recipe, *overrides]


def train_command(
    recipe: str,
    overrides: Sequence[str],
    ranks: int,
    ds_json: str = "",
) -> list[str]:
    """Return the command that trains one stage on `ranks` ranks of this machine."""
    words = [str(TRAIN), *train_words(recipe, overrides, ds_json)]
    if ranks == 1:
        return [sys.executable, *words]
    # As a module: the `deepspeed` on the path may be that of another environment.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    options = {
        "--num_gpus": ranks,
        "--master_addr": "127.0.0.1",
        # Two runs side by side on one machine would meet at the launcher's default port.
        "--master_port": free_port(),
    }
    return [*launcher, *_options(options), *words]


def _typed(short: str, path: Path) -> str:
    """Return `short` where that is `path`, seen from the working directory, as in a clone; else
    `path` itself."""
    # Another file may have the short name.
    is_it = os.path.exists(short) and os.path.samefile(short, path)
    return short if is_it else str(path)


def typed_training(
    words: Sequence[str], *, launcher: Sequence[str] = ("deepspeed",), ds_json: str = ""
) -> str:
    """Return the command, quoted for a shell, that starts train.py with `words`; without `ds_json`
    it takes the project's z3."""
    script = _typed("nexus_ds/train.py", TRAIN)
    deepspeed = ds_json or _typed("ds_configs/z3.json", DS_JSON)
    return shlex.join([*launcher, script, "--deepspeed", deepspeed, *words])


def next_training(
    out: Path,
    data: str,
    recipe: str,
    stage: str,
) -> str:
    """Return the command, quoted for a shell, that trains a checkpoint which `upcycle` or `extend`
    has made."""
    settings = [
        f"stage={stage}",
        f"model.path={out}",
        f"data.path={data}",
        f"output={out}-trained",
    ]
    return typed_training(train_words(recipe, settings))


def next_evaluation(out: Path | str, data: DataConfig) -> str:
    """Return the command, quoted for a shell, that scores a checkpoint as it was trained."""
    read = _options({"--checkpoint": out, "--data": data.path})
    written = _options({"--out": f"{out}-report"})
    return shlex.join(["nexus-ds", "evaluate", *read, *_reading(data), *written])


def next_extension(checkpoint: Path, seed: bool = False, kept: bool = False) -> str:
    """Return a call of `extend` for a person to complete, quoted for a shell.

    Args:
        checkpoint: the mixture.
        seed: whether routed experts go further from it than their branches.
        kept: whether all else is the seed's, and stays so.
    """
    options: dict[str, object] = {"--checkpoint": checkpoint, "--expert": "NAME=DIR"}
    if seed:
        options["--base"] = "SEED"
    if kept:
        options["--lambda"] = 0
    options |= {"--domains": "FILE", "--out": "DIR"}
    return shlex.join(["nexus-ds", "extend", *_options(options)])


def next_words(checkpoint: Path, prompt: str, mixture: bool, bos: bool = True) -> str:
    """Return the command, quoted for a shell, that lets a checkpoint speak, and a mixture show
    which expert each token goes to; `bos`: whether text begins with BOS, as data.bos."""
    words = ["nexus-ds", "generate", "--checkpoint", str(checkpoint), prompt]
    words += ["--show-routing"] if mixture else []
    words += [] if bos else ["--no-bos"]
    return shlex.join(words)
