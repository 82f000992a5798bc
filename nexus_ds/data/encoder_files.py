"""The files of an encoder: what of them decides its vectors, and what is not to be loaded.

sentence-transformers is told to take safetensors, and hands that on to the transformer alone: a
module behind it, as Dense is one, would be unpickled where there is nothing else. So the files are
looked through before anything is loaded.

Not covered: the configuration and the tokenizer of the transformer itself; prompts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from nexus_ds.errors import ConfigError
from nexus_ds.inputs import read_bounded
from nexus_ds.typed_json import parsed, typed

MODULES, CONFIG = "modules.json", "config.json"
PICKLED, SAFE = "pytorch_model.bin", "model.safetensors"
"""What the library loads of a module: the first where there is no second beside it."""
WEIGHTS = ".safetensors"
OWN = "sentence_transformers."
"""How the library's own types of modules begin."""
AVERAGING = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
"""Modules that have no weights but the transformer's; every embedding is normalised anyway."""
MEAN_KEY = "pooling_mode_mean_tokens"


class Module(TypedDict):
    """What modules.json says of one module."""

    name: str
    path: str
    """Folder in the encoder's directory; empty: that itself."""
    type: str
    """Class, by its full name."""


def _object(path: Path) -> Mapping[str, object]:
    """Return the JSON object in a file; of anything else an empty one, for the library that loads
    it says what is wrong."""
    try:
        return typed(parsed(read_bounded(path, error=ConfigError)), dict[str, object])
    except (ConfigError, OSError, ValueError, TypeError, RecursionError):
        return {}


def is_language_model(directory: Path) -> bool:
    """Return whether this is a language model's directory, and no sentence encoder's."""
    if (directory / MODULES).is_file():
        return False
    names = _object(directory / CONFIG).get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)


def read_modules(directory: Path) -> list[Module]:
    """Return what modules.json says; nothing where there is none, as the library then averages.

    Raises:
        ConfigError: it is damaged.
    """
    path = directory / MODULES
    if not path.is_file():
        return []
    try:
        return typed(parsed(read_bounded(path, error=ConfigError)), list[Module], "modules")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: {error}; expected a list of modules, each with its path and type; "
            "save the encoder with model.save_pretrained(DIR)"
        ) from error


def kind_of(module: Module) -> str:
    """Return the class of a module, of the library's own wherever a version of it has them."""
    name = module["type"]
    return name.rpartition(".")[2] if name.startswith(OWN) else name


def _averages(directory: Path, modules: Sequence[Module]) -> bool:
    """Return whether an embedding is the mean of what the transformer says of each token."""
    if [kind_of(module) for module in modules] not in AVERAGING:
        return False
    pooling = _object(directory / modules[1]["path"] / CONFIG)
    mode = pooling.get("pooling_mode")
    if mode is not None:
        return mode in ("mean", ["mean"])
    # as older versions of the library write it
    modes = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    return modes in ([], [MEAN_KEY])


def _describing(directory: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files that say what is done with a transformer's states; none for their mean.

    So an encoder that averages has the revision that it had when weights alone made it, and what
    was embedded with it stays good.
    """
    modules = read_modules(directory)
    if not (directory / MODULES).is_file() or _averages(directory, modules):
        return []
    folders = [Path(module["path"]) for module in modules if Path(module["path"]).parts]
    named = {MODULES}
    # the transformer's own, which every version of its library writes anew, says nothing of modules
    if any(not Path(one["path"]).parts and kind_of(one) != "Transformer" for one in modules):
        named.add(CONFIG)
    kept = []
    for file in files:
        inner = file.relative_to(directory)
        of_module = inner.suffix == ".json" and any(map(inner.is_relative_to, folders))
        if of_module or str(inner) in named:
            kept.append(file)
    return kept


def files_of(directory: Path) -> list[Path]:
    """Return all files under a directory, sorted, through linked folders as the library reads."""
    found: list[Path] = []
    seen = set()
    for place, folders, names in os.walk(directory, followlinks=True):
        folders.sort()
        real = os.path.realpath(place)
        if real in seen:
            # a link to where it lies would lead round for ever
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names]
    return sorted(file for file in found if file.is_file())


def _refuse_pickles(directory: Path, files: Sequence[Path]) -> None:
    """Raise ConfigError for pickled weights that the library would load."""
    pickled = [
        str(file.relative_to(directory))
        for file in files
        if file.name == PICKLED and not (file.parent / SAFE).is_file()
    ]
    if pickled:
        raise ConfigError(
            f"{directory} holds {', '.join(pickled[:5])} without {SAFE} beside it: pickled weights "
            "are not loaded, since a pickle can run code; save the encoder with "
            "model.save_pretrained(DIR, safe_serialization=True), or remove what no module needs"
        )


def weights_hash(directory: Path) -> str:
    """Return the sha256 over names and bytes of all safetensors files under `directory`.

    Of a language model also over how its states become one vector; of an encoder that does not
    average its transformer's states also over the files that say what it does instead.

    Raises:
        ConfigError: no safetensors weights, pickled ones that would be loaded, damaged modules.
    """
    files = files_of(directory)
    weights = [file for file in files if file.suffix == WEIGHTS]
    if not weights:
        raise ConfigError(
            f"{directory} has no *.safetensors weights; pickled weights are not loaded: save the "
            "encoder with model.save_pretrained(DIR, safe_serialization=True)"
        )
    _refuse_pickles(directory, files)
    digest = hashlib.sha256()
    if is_language_model(directory):
        # the library's own way with the same weights gives other vectors
        digest.update(b"mean\0")
    for file in [*_describing(directory, files), *weights]:
        digest.update(os.fsencode(file.relative_to(directory)) + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
