"""A model in as many pieces as memory asks for: whole, in smaller batches, or layer by layer.

`planned_way` decides by sizes before anything is loaded; `in_pieces` goes on in smaller pieces
where memory runs out all the same. Both say on stderr what they do.

Not covered: what the sizes are (`needs`), memory of other processes that grows meanwhile.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from nexus_ds.checkpoint.config_json import ConfigJson, read_config
from nexus_ds.checkpoint.dense import as_stored
from nexus_ds.checkpoint.families.record import ATTENTION_CAP, EMBEDDING, HEAD, LINEAR
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import NATIVE
from nexus_ds.checkpoint.loading import computed_dtype, load_model, verified
from nexus_ds.checkpoint.needs import DISK_SPEED, MARGIN, Need, Way, per_token, way
from nexus_ds.checkpoint.room import host_room, is_out_of_memory, room_on
from nexus_ds.checkpoint.streaming import LAYERS, streamed_model
from nexus_ds.checkpoint.tensors import DTYPES, TensorReader
from nexus_ds.errors import InsufficientMemoryError, LoadingMemoryError, one_line
from nexus_ds.progress import duration, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")

ROUTER = ".mlp.gate.weight"
LONG = 120.0
"""Seconds of slow work above which the time is said before it starts."""


def need_of(directory: Path, precision: str, place: torch.device) -> Need:
    """Return what a checkpoint takes on a device; headers and config.json are read, and of tied
    embeddings whether they are.

    Raises:
        CheckpointError, UnsupportedModelError: damaged files.
    """
    reader = TensorReader(directory)
    config = as_stored(read_config(directory), reader)
    # tied, the output layer may stand in the file once more, and is no other
    again = {HEAD} if config.get("tie_word_embeddings") and EMBEDDING in reader else set()
    chosen = computed_dtype(precision, place)
    elements: dict[str, int] = {}
    sizes: dict[str, float] = {}
    stored = 0
    for name in reader.names():
        if name in again:
            continue
        info = reader.info(name)
        count = torch.Size(info.shape).numel()
        # model.layers.7.mlp...: the first three parts name the layer
        part = ".".join(name.split(".")[:3]) if name.startswith(LAYERS) else ""
        elements[part] = elements.get(part, 0) + count
        width = (chosen or DTYPES[info.dtype]).itemsize
        sizes[part] = sizes.get(part, 0.0) + count * width
        stored += info.end - info.start
    width = (chosen or DTYPES[reader.info(reader.names()[0]).dtype]).itemsize
    layers = [size for part, size in sizes.items() if part]
    embedding = torch.Size(reader.info(EMBEDDING).shape).numel() if EMBEDDING in reader else 0
    # A tied one is multiplied with, and then there are two of it where the layers compute on a GPU.
    lookup = embedding if HEAD in reader and not again else 0
    resident = sizes.get("", 0.0) - (lookup * width if place.type != "cpu" else 0)
    # A Qwen2-MoE of another form has dense layers in between.
    mixed = sum(name.endswith(ROUTER) for name in reader.names())
    return Need(
        weights=sum(sizes.values()),
        layer=max(layers, default=0.0),
        outside=sizes.get("", 0.0),
        resident=resident,
        active=sum(elements.values()) - lookup - mixed * _idle(config),
        stored=stored,
        vocabulary=_number(config, "vocab_size"),
        **_per_token(config, width, mixed),
    )


def _number(config: ConfigJson, *names: str) -> int:
    """Return the first of these settings that is a number, else 0."""
    found = [config[name] for name in names if type(config.get(name)) is int]
    return found[0] if found else 0


def _idle(config: ConfigJson) -> int:
    """Return the parameters of routed experts that a token does not visit in a layer."""
    expert = 3 * _number(config, "hidden_size") * _number(config, "moe_intermediate_size")
    unvisited = _number(config, "num_experts") - _number(config, "num_experts_per_tok")
    return max(0, unvisited) * expert


def _per_token(config: ConfigJson, width: int, mixed: int) -> dict[str, float]:
    """Return the fields of `Need` that are of a token; `mixed` layers have experts."""
    heads = _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    layers = _number(config, "num_hidden_layers")
    visited = _number(config, "num_experts_per_tok") * _number(config, "moe_intermediate_size")
    visited += _number(config, "shared_expert_intermediate_size")
    dense = _number(config, "intermediate_size")
    inner = max(visited if mixed else 0, dense if mixed < layers else 0)
    keys = _number(config, "head_dim") or hidden // max(1, heads)
    keys *= _number(config, "num_key_value_heads") or heads
    # a state of linear attention does not grow with the text
    attending = layers - list(config.get("layer_types") or ()).count(LINEAR)
    family = FAMILIES.get(str(config.get("model_type")).removeprefix(NATIVE))
    scored = 0
    if family and ATTENTION_CAP in family.caps:
        scored = _number(config, "num_attention_heads")
    return per_token(
        width=width, hidden=hidden, keys=keys, inner=inner, layers=attending, scored=scored
    )


# The way -----------------------------------------------------------------------------------------


def planned_way(
    need: Need, places: Sequence[torch.device], rows: int, length: int, label: str
) -> Way:
    """Return the way that is planned on each of some devices; say it if it isn't the one asked for.

    Args:
        need: of the model.
        places: devices, each of which gets all of it.
        rows, length: sequences at once that were asked for, and their tokens.
        label: of the work.
    """
    room = min(room_on(place) for place in places)
    if places[0].type == "cpu":
        room //= len(places)
    host = host_room()
    chosen = way(need, rows, length, room, host)
    if chosen != Way(streamed=False, rows=rows):
        takes, where, free = need.whole(rows, length), str(places[0]), room
        # Smaller batches would do on the device, but weights come through main memory.
        if chosen.streamed and need.whole(1, length) <= MARGIN * room:
            takes, where, free = need.loading, "the CPU, through which weights come,", host
        say(
            f"{label}: whole it takes {takes / 1e9:.2f} GB, free on {where} are "
            f"{free / 1e9:.2f} GB; it runs {chosen}"
        )
    return chosen


def open_way(directory: Path, precision: str, place: torch.device, chosen: Way) -> PreTrainedModel:
    """Return a checkpoint's model as a way asks for it, in eval mode.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: as `load_model`.
        LoadingMemoryError: whole, the weights are too much.
    """
    if not chosen.streamed:
        try:
            return load_model(directory, precision, place)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise LoadingMemoryError(
                f"{directory}: memory ran out while the weights were loaded ({one_line(error)}); "
                "run it layer by layer, or where there is more memory"
            ) from error
    verified(directory)
    return streamed_model(directory, computed_dtype(precision, place), place, chosen.rows)


def in_pieces(label: str, chosen: Way, work: Callable[[Way], Result]) -> Result:
    """Return what `work` returns; where memory runs out, let it begin anew in smaller pieces.

    Weights that could not be loaded are not loaded whole again, whatever the batch. Layer by layer,
    the batch is the first one again: the weights that it had no room beside are gone.

    Raises:
        InsufficientMemoryError: one sequence through one layer is too much.
    """
    rows = chosen.rows
    while True:
        try:
            return work(chosen)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            too_heavy = isinstance(error, LoadingMemoryError)
            said = one_line(error)
        # Out of the handler: there, the error's traceback still holds what has to be freed.
        smaller = chosen.smaller()
        if smaller is None:
            raise InsufficientMemoryError(
                f"{label}: memory ran out with one layer and one sequence at a time ({said}); "
                "give shorter sequences, or run it where there is more memory"
            )
        if too_heavy or smaller.streamed > chosen.streamed:
            smaller = Way(streamed=True, rows=rows)
        say(f"{label}: memory ran out ({chosen}); it goes on {smaller}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        chosen = smaller


# The time ----------------------------------------------------------------------------------------


def cpu_speed() -> float:
    """Return floating-point operations a second of this process's threads, by a short product."""
    a = torch.ones(512, 512)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * 512**3 / max(best, 1e-9)


def warn_of_time(label: str, need: Need, tokens: int, place: torch.device, reads: int = 0) -> bool:
    """Say how long work will take that is slow by its kind, where that is minutes.

    That is computing on a CPU, and reading a checkpoint again and again.

    Args:
        label: of the work.
        need: of the model.
        tokens: that go through it.
        place: where it computes.
        reads: times that the checkpoint is read, layer by layer.

    Returns:
        Whether it was said.
    """
    reading = reads * need.stored / DISK_SPEED
    computing = need.flops(tokens) / cpu_speed() if place.type == "cpu" else 0.0
    seconds = computing + reading
    if seconds <= LONG:
        return False
    size = f"{need.active / 1e9:.1f}B active parameters and {tokens:,} tokens"
    if place.type == "cpu":
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads"
        said = f"no GPU; {size} take about {duration(seconds)} on {threads}"
    else:
        said = (
            f"layer by layer; {reads:,} times {need.stored / 1e9:.1f} GB are read, which takes "
            f"about {duration(seconds)}"
        )
    say(f"{label}: {said}")
    return True
