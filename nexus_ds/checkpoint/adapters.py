"""LoRA adapters as PEFT saves them, merged into their base while it is read.

An adapter directory (`adapter_config.json`, `adapter_model.safetensors`) becomes a `DenseModel` as
any other. Its reader yields W + scale * B A for the weights that the adapter changes, a block of
rows at a time, with scale = alpha / r, or alpha / sqrt(r) with `use_rslora` (Hu et al., arXiv
2106.09685; Kalajdzievski, arXiv 2312.03732). Weights that the adapter holds whole, as
`modules_to_save` and biases are, take the place of the base's. The sum is in float64 and rounded to
fp32, then to the base's dtype; no merged model is written anywhere.

Shapes: R rank, I inputs and O outputs of a linear map, V tokens, H hidden size.
Not covered: kinds of adapters that are no sum of matrices (DoRA, IA3, prompts), those that changed
their base when they began (PiSSA, OLoRA), several adapters on one base: refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.config_json import ADAPTER, ConfigJson
from nexus_ds.checkpoint.dense import DenseModel, open_dense
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.headers import INDEX, SINGLE, Headers, TensorInfo, read_by_rows, row_slices
from nexus_ds.checkpoint.json_files import read_json_object, require_directory
from nexus_ds.checkpoint.values import FLOATS, encoded, read_rows, read_values
from nexus_ds.checkpoint.views import ViewReader, seen_as, underlying
from nexus_ds.errors import CheckpointError, UnsupportedModelError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# base_model.model.model.layers.0.mlp.up_proj.lora_A.weight; older versions name the adapter last
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")
EMBEDDED = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.\w+)?")
INNER = (".base_layer", ".modules_to_save")  # where PEFT keeps whole weights inside a module

# Keys of adapter_config.json that say nothing of the merged weights: who made it, what it was
# trained with, or which modules it has, which its tensors tell.
IRRELEVANT = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
)
REASONS = {
    "use_dora": "DoRA scales the merged rows anew",
    "lora_bias": "it has biases of its own",
    "fan_in_fan_out": "its base stores weights transposed, as GPT-2 does",
    "layer_replication": "it repeats layers of its base",
    "trainable_token_indices": "it has embeddings of single tokens",
    "target_parameters": "it adapts stacks of weights",
    "alora_invocation_tokens": "it is at work after certain tokens alone",
    "use_qalora": "it adapts a quantised base",
    "loftq_config": "it adapts a quantised base",
}
MOST_PATTERNS = 2048  # the largest models have a thousand matrices that adapters change
_NAME = r"(?:[\w.]|\\[.d]|\[[\w-]*\]){0,200}"
PLAIN_PATTERN = re.compile(rf"\^?{_NAME}[*+]?{_NAME}\$?", re.ASCII)
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that left the base as it was."""


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one weight of its base."""

    scale: float
    """Of the product; 0: `inner` holds the whole weight."""
    outer: str
    """Tensor of the adapter whose rows are multiplied: lora_B [O, R]; of an embedding lora_A
    [R, V], whose columns are."""
    inner: str
    """lora_A [R, I]; of an embedding lora_B [H, R]."""
    embedding: bool = False


class AdapterWeights:
    """The tensors of an adapter, and the rows that they stand for; without torch.

    Any range of rows of any changed weight may be asked for, in any order.
    """

    def __init__(self, headers: Headers, changes: Mapping[str, Change]) -> None:
        self.headers = headers
        self.changes = changes
        # of the weight that was asked for last: its blocks follow each other
        self._last: tuple[str, np.ndarray] | None = None

    def _whole(self, name: str) -> np.ndarray:
        last = self._last
        if last is None or last[0] != name:
            last = name, read_values(self.headers, name).astype(np.float64)
            self._last = last
        return last[1]

    def replaces(self, name: str) -> bool:
        """Return whether `rows` are the weight itself, not what is added to it."""
        return self.changes[name].scale == 0.0

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of what is added to the base's weight `name`, or of what takes
        its place (`replaces`); float64."""
        change = self.changes[name]
        if self.replaces(name):
            return read_rows(self.headers, change.inner, start, stop).astype(np.float64)
        if change.embedding:
            outer_VR = self._whole(change.outer).T
            return change.scale * (outer_VR[start:stop] @ self._inner_of(change).T)
        outer_OR = read_rows(self.headers, change.outer, start, stop).astype(np.float64)
        return change.scale * (outer_OR @ self._whole(change.inner))

    def _inner_of(self, change: Change) -> np.ndarray:
        return read_values(self.headers, change.inner).astype(np.float64)


class MergedReader(Headers):
    """The tensors of a base as an adapter changes them.

    A changed tensor lies in no file as it is: `info` tells its dtype and shape, and no place. Who
    copies ranges of files asks `read_range` instead, or takes the base's (`base`) and adds
    `adapter.rows`.
    """

    def __init__(self, base: Headers, directory: Path, adapter: AdapterWeights) -> None:
        self.directory = directory
        self.base = base
        self.adapter = adapter

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return self.base.names()

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; of a changed one, which lies nowhere, from -1 to -1."""
        found = self.base.info(name)
        if name not in self.adapter.changes:
            return found
        # so that nobody takes the base's bytes for the merged ones
        return found._replace(file=self.directory / ADAPTER_WEIGHTS, start=-1, end=-1)

    def files(self) -> list[Path]:
        """Return the files that the tensors come from."""
        return [*self.base.files(), self.directory / ADAPTER_WEIGHTS]

    def read_range(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` (bytes) with a tensor's bytes from its byte `start` on, as the file of a
        merged model would have them."""
        if name not in self.adapter.changes:
            self.base.read_range(name, start, view)
            return
        read_by_rows(self.info(name), start, view, lambda *rows: self._merged(name, *rows).data)

    def _merged(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the bytes of rows [start, stop) of a changed tensor."""
        rows = self.adapter.rows(name, start, stop)
        if not self.adapter.replaces(name):
            rows = rows + read_rows(self.base, name, start, stop)
        return encoded(rows.astype(np.float32), self.info(name).dtype)


# Reading an adapter -------------------------------------------------------------------------------


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter and no model beside it."""
    names = ("config.json", SINGLE, INDEX)
    whole = any((Path(directory) / name).is_file() for name in names)
    return (Path(directory) / ADAPTER).is_file() and not whole


def _refuse(directory: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{directory / ADAPTER}: {what}. Such an adapter can't be merged here: merge it with peft "
        "(AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)) "
        "if that can, and give OUT"
    )


def _check_config(directory: Path, config: ConfigJson) -> None:
    """Raise UnsupportedModelError for what is no sum of the base and products of two matrices."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refuse(directory, f"peft_type is {str(kind)[:100]!r}, expected LORA")
    for key, value in config.items():
        # by value: what a later version adds is off unless it says something
        if key in IRRELEVANT or not value:
            continue
        reason = REASONS.get(key, "this version does not know what it does to the weights")
        raise _refuse(directory, f"{key} is {str(value)[:100]!r}: {reason}")
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise _refuse(
            directory,
            f"init_lora_weights is {str(start)[:100]!r}, which may have changed the base's own "
            "weights",
        )


@functools.lru_cache(maxsize=MOST_PATTERNS)
def _pattern(text: str, where: str) -> re.Pattern[str]:
    """Return how PEFT compares a module's name with a key of `rank_pattern` or `alpha_pattern`."""
    # a stranger's: alternatives and more repetitions can take longer than anybody waits
    if not PLAIN_PATTERN.fullmatch(text):
        raise UnsupportedModelError(
            f"{where}: the pattern {text[:100]!r} is more than a module's name with one "
            "repetition; write the modules out, or merge the adapter with peft"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except re.error as error:
        raise CheckpointError(
            f"{where}: the pattern {text[:100]!r} is none ({error}); save the adapter again"
        ) from error


def _pattern_value(given: object, module: str, default: object, where: str) -> float:
    """Return what a module's name finds in `rank_pattern` or `alpha_pattern`, else the default."""
    patterns = given if isinstance(given, dict) else {}
    if len(patterns) > MOST_PATTERNS:
        raise UnsupportedModelError(
            f"{where}: it has {len(patterns):,} patterns of modules, expected at most "
            f"{MOST_PATTERNS:,}; merge the adapter with peft"
        )
    found = default
    for text, value in patterns.items():
        if _pattern(text, where).match(module):
            found = value
            break
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise CheckpointError(
            f"{where}: r or lora_alpha of {module} is {found!r}, expected a number above 0"
        )
    return found


def _scale(config: ConfigJson, module: str, rank: int, where: str) -> float:
    """Return alpha / r of a module, alpha / sqrt(r) with rank stabilisation."""
    stated = _pattern_value(config.get("rank_pattern"), module, config.get("r"), where)
    if stated != rank:
        raise CheckpointError(
            f"{where}: r is {stated} for {module}, its matrices have rank {rank}; "
            "file and configuration are not of one adapter"
        )
    alpha = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha"), where)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _sorted_names(headers: Headers, where: Path) -> tuple[dict[str, Change], dict[str, str]]:
    """Return the changes of each base weight, not yet scaled, and the whole weights, by name."""
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in headers.names():
        own = name.removeprefix(PREFIX)
        matrix = MATRIX.fullmatch(own)
        embedded = EMBEDDED.fullmatch(own)
        found = matrix or embedded
        if found:
            sides.setdefault((found["module"], not matrix), {})[found["side"]] = name
            continue
        for inner in INNER:
            own = re.sub(rf"{re.escape(inner)}(\.default)?(?=\.\w+$)", "", own)
        whole[own] = name
    changes = {}
    for (module, embedding), pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(
                f"{where}: the adapter has lora_{next(iter(pair))} of {module} without its other "
                "matrix and can't be merged; expected lora_A and lora_B, save it again"
            )
        outer, inner = ("A", "B") if embedding else ("B", "A")
        changes[f"{module}.weight"] = Change(1.0, pair[outer], pair[inner], embedding)
    return changes, whole


def _scaled(
    headers: Headers, base: DenseModel, name: str, change: Change, config: ConfigJson
) -> Change:
    """Return a change with its scale; CheckpointError unless it is one of this base's weights."""
    where = str(headers.directory / ADAPTER_WEIGHTS)
    if name not in base.reader:
        raise CheckpointError(
            f"{where}: it adapts {name}, which {base.directory} does not have; "
            "is that the adapter's base?"
        )
    shape = base.reader.info(name).shape
    outer, inner = (headers.info(tensor).shape for tensor in (change.outer, change.inner))
    if change.embedding:
        outer, inner = outer[::-1], inner[::-1]
    fits = len(outer) == len(inner) == 2 and outer[1:] == inner[:1]
    if not fits or (*outer[:1], *inner[1:]) != shape:
        raise CheckpointError(
            f"{where}: matrices {outer} and {inner} for {name} of shape {shape} of "
            f"{base.directory}; is that the adapter's base?"
        )
    module = name.removesuffix(".weight")
    return dataclasses.replace(change, scale=_scale(config, module, inner[0], where))


def _replaced(headers: Headers, base: DenseModel, name: str, tensor: str) -> Change | None:
    """Return what puts a whole weight in the place of the base's; None if they are equal."""
    where = headers.directory / ADAPTER_WEIGHTS
    # a head that repeats tied embeddings
    own = EMBEDDING if name == HEAD and base.settings.tied_embeddings else name
    shape = base.reader.info(own).shape if own in base.reader else None
    found = headers.info(tensor).shape
    if shape != found:
        raise CheckpointError(
            f"{where}: it holds {tensor} of shape {found}, {base.directory} has "
            f"{shape or 'none of this name'}; is that the adapter's base, and were tokens added?"
        )
    # a slice of rows at a time: whole, both may be larger than memory
    equal = all(
        np.array_equal(read_rows(headers, tensor, *rows), read_rows(base.reader, own, *rows))
        for rows in row_slices(found)
    )
    return None if equal else Change(0.0, "", tensor)


def _changes(headers: Headers, base: DenseModel, config: ConfigJson) -> dict[str, Change]:
    """Return what the adapter makes of each weight of its base."""
    where = headers.directory / ADAPTER_WEIGHTS
    odd = [name for name in headers.names() if headers.info(name).dtype not in FLOATS]
    if odd:
        raise UnsupportedModelError(
            f"{where}: {odd[0]} is {headers.info(odd[0]).dtype}, expected floating-point numbers"
        )
    scaled = {}
    whole_changes = {}
    added, whole = _sorted_names(headers, where)
    for name, tensor in whole.items():
        change = _replaced(headers, base, name, tensor)
        if change:
            whole_changes[name] = change
    both = sorted(set(added) & set(whole_changes))
    if both:
        raise CheckpointError(
            f"{where}: it holds {both[0]} whole, another than the base's, and adds to it; "
            f"is {base.directory} the adapter's base?"
        )
    tied = sorted({EMBEDDING, HEAD} & {*added, *whole_changes})
    if tied and base.settings.tied_embeddings:
        raise _refuse(
            headers.directory,
            f"it changes {tied[0]}, but {base.directory} ties its head to its embeddings: merged, "
            "the two would differ",
        )
    for name, change in added.items():
        scaled[name] = _scaled(headers, base, name, change, config)
    if not scaled and not whole_changes:
        raise CheckpointError(f"{where}: the adapter holds nothing to merge; save it again")
    return scaled | whole_changes


def _adapted(headers: Headers, whole: DenseModel) -> DenseModel:
    """Return the base with its tensors under the names that the adapter speaks of.

    They are mostly those of the file, which a view may show split and in another order. An adapter
    that was trained on the model with its projections split (a Phi-4 saved as a Llama) speaks of
    those that the view shows.
    """
    if not isinstance(whole.reader, ViewReader):
        return whole
    own = whole.in_file()
    added, replaced = _sorted_names(headers, headers.directory / ADAPTER_WEIGHTS)
    names = sorted({*added, *replaced})
    split = [name for name in names if name in whole.reader and name not in own.reader]
    if not split:
        return own
    for name in names:
        if name not in whole.reader:
            what = f"it adapts {name} as well as {split[0]}, which is part of such a tensor"
            raise _refuse(headers.directory, what)
        if not whole.reader.origins[name].as_it_is:
            what = (
                f"it adapts {split[0]} apart from what {whole.directory} holds with it, and "
                f"{name}, whose rows a Qwen2-MoE has in another order"
            )
            raise _refuse(headers.directory, what)
    return whole


def _base_of(
    directory: Path,
    config: ConfigJson,
    base: Path | None,
    seed: Path | None,
    fallback: Path | None,
    option: str,
) -> Path:
    """Return the directory of an adapter's base; see `open_branch`."""
    if base is not None:
        return base
    named = str(config.get("base_model_name_or_path") or "")
    # with a fallback a folder that is no model is none of the adapter's
    wanted = os.path.join(named, "config.json") if fallback else named
    # unlike pathlib's, it says no of a name that is too long for a file's
    if named and os.path.exists(wanted) and os.path.isdir(named):
        return Path(named)
    if fallback is not None:
        return fallback
    if seed is not None and named and Path(named).name == seed.resolve().name:
        return seed
    raise CheckpointError(
        f"{directory} holds an adapter of {named[:200] or 'an unnamed model'!r}, which is no "
        "directory here" + (f" and not the name of {seed}" if seed else "") + f": give {option}, "
        "the model that it is to be merged into"
    )


def open_branch(
    directory: Path,
    base: Path | None = None,
    seed: Path | None = None,
    fallback: Path | None = None,
    option: str = "--base DIR",
) -> DenseModel:
    """Open a dense model, or an adapter as the model that it makes of its base.

    Args:
        directory: of either.
        base: of adapters; None: the directory that the adapter names, or `seed` if that has the
            name of the adapter's base.
        seed: model that branches come from.
        fallback: base of adapters that name no model here, whatever they call it.
        option: with which `base` can be given, for messages.

    Raises:
        CheckpointError: an adapter that is damaged, or not of this base; see `open_dense`, too.
        UnsupportedModelError: an adapter that can't be merged, by name.
    """
    directory = Path(directory)
    if not is_adapter(directory):
        return open_dense(directory)
    config = read_json_object(require_directory(directory), ADAPTER)
    _check_config(directory, config)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{directory} holds an adapter without {ADAPTER_WEIGHTS}, so there is nothing to "
            "merge; pickled ones are not read: save it with safetensors"
        )
    whole = open_dense(_base_of(directory, config, base, seed, fallback, option))
    headers = Headers.of_file(directory, ADAPTER_WEIGHTS)
    own = _adapted(headers, whole)
    adapter = AdapterWeights(headers, _changes(headers, own, config))
    reader: Headers = MergedReader(own.reader, directory, adapter)
    if own is not whole:
        reader = seen_as(whole.reader, reader)
    return dataclasses.replace(whole, directory=directory, reader=reader)


def describe_merge(model: DenseModel) -> str:
    """Return what is merged into what, for people; empty for a model that is no adapter."""
    reader = underlying(model.reader)
    if not isinstance(reader, MergedReader):
        return ""
    changed = reader.adapter.changes
    line = f"LoRA adapter {model.directory} merged into {reader.base.directory}: "
    line += f"{len(changed)} weights"
    if not any(".mlp." in name for name in changed):
        line += ", none of the FFN, so that the expert's is the base's own"
    return line


def tokenizer_home(model: DenseModel) -> Path:
    """Return the directory with a model's tokenizer: of an adapter without one that of its base."""
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    reader = underlying(model.reader)
    own = any((model.directory / name).is_file() for name in files)
    if isinstance(reader, MergedReader) and not own:
        return reader.base.directory
    return model.directory
