"""Dense families whose weights are Llama's in another place or order, read under Llama's names.

    qkv_proj, gate_up_proj  rows of one tensor; shown as three and two
    interleaved RoPE        turns channels 2i and 2i+1 of a head; rows of q and k are re-ordered, so
                            that channels i and i + half of the head turn. Scores stay as they are:
                            a query and a key are re-ordered alike
    RoPE of part of a head  the same, the channels that stand still behind those that turn in both
                            halves; `families.rotary` has the frequencies. A factor that the
                            channels that turn have (Phi-4-mini: 1.19) is multiplied into q_proj
    multipliers             Granite's residual stream divided by its residual multiplier r, which
                            norms do not see (their epsilon is divided by r^2): embeddings times
                            e / r, the head divided by the logits' divisor, q_proj times what the
                            scores' multiplier is of 1/sqrt(head_dim). A power of two is exact,
                            other factors round once

Only reading, without torch: what is made of the tensors is a Qwen2-MoE, with Llama's names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import family_of, filled, rotary
from nexus_ds.checkpoint.families.record import (
    EMBEDDING,
    FUSED,
    HEAD,
    DenseSettings,
    Family,
    dense_weights,
)
from nexus_ds.checkpoint.headers import Headers, TensorInfo, read_by_rows, tensor_bytes
from nexus_ds.checkpoint.values import encoded, read_rows
from nexus_ds.errors import CheckpointError


class Origin(NamedTuple):
    """Where a weight of `dense_weights` lies in a family's own file, and what is done to it."""

    name: str
    start: int = 0
    """Its first row there."""
    order: tuple[int, ...] = ()
    """For each row of a head the row of that head in the file; empty: the same."""
    scale: float = 1.0
    turns: float = 1.0
    """Factor, beside `scale`, of rows that RoPE turns: the first of a head in the file."""
    turned: int = 0
    """How many these are; 0 where the factor is 1."""

    @property
    def as_it_is(self) -> bool:
        """Whether the weight is a range of rows of the file."""
        return not self.order and self.scale == 1.0


def head_order(turned: int, width: int, interleaved: bool) -> tuple[int, ...]:
    """Return, for each channel of a head whose halves turn with each other, the family's own.

    Args:
        turned: channels that RoPE turns; the family has them first.
        width: channels of a head, D.
        interleaved: whether the family turns 2i with 2i+1, and not i with i + turned/2.

    Returns:
        Length D.
    """
    pairs, half = turned // 2, width // 2
    first, second = range(pairs), range(pairs, turned)
    if interleaved:
        first, second = range(0, turned, 2), range(1, turned, 2)
    still = half - pairs
    return (*first, *range(turned, turned + still), *second, *range(turned + still, width))


def origins(config: ConfigJson, settings: DenseSettings) -> dict[str, Origin]:
    """Return the place of every weight of `dense_weights` in the file of a dense model.

    Args:
        config: its config.json.
        settings: what that says.
    """
    family, values = family_of(config), filled(config)
    turned, factor = rotary(config)
    order = head_order(turned, settings.head_dim, family.interleaved)
    if order == tuple(range(settings.head_dim)):
        order = ()
    scales = _scales(values, settings) if family.multipliers else {}
    shared_head = family.multipliers and values["tie_word_embeddings"]
    found = {}
    for name, start, whole in _in_file(family, settings):
        module = name.split(".")[-2]
        own = EMBEDDING if name == HEAD and shared_head else whole
        origin = Origin(own, start, scale=scales.get(module, 1.0))
        if module in ("q_proj", "k_proj"):
            origin = origin._replace(order=order)
        if module == "q_proj" and factor != 1.0:
            # of keys, too, but one matrix less is rounded
            origin = origin._replace(turns=factor**2, turned=turned)
        found[name] = origin
    return found


def _in_file(family: Family, settings: DenseSettings) -> Iterator[tuple[str, int, str]]:
    """Yield each weight's name, its first row in the file, and the name there."""
    whole_of = {part: whole for whole in family.fused for part in FUSED[whole]}
    filled_rows: dict[str, int] = {}
    for name, weight in dense_weights(settings).items():
        module = name.split(".")[-2]
        if module not in whole_of:
            yield name, 0, name
            continue
        whole = name.replace(module, whole_of[module])
        # parts are listed in the order of their rows
        start = filled_rows.get(whole, 0)
        filled_rows[whole] = start + weight.shape[0]
        yield name, start, whole


def _scales(values: ConfigJson, settings: DenseSettings) -> dict[str, float]:
    """Return by what Granite's modules are multiplied."""
    return {
        "embed_tokens": values["embedding_multiplier"] / values["residual_multiplier"],
        "lm_head": 1 / values["logits_scaling"],
        "q_proj": values["attention_multiplier"] * math.sqrt(settings.head_dim),
    }


def file_shapes(found: Mapping[str, Origin], settings: DenseSettings) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a family's own file has, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in dense_weights(settings).items():
        origin = found[name]
        rows = origin.start + weight.shape[0]
        # the last of the parts ends where the whole does
        shapes[origin.name] = (rows, *weight.shape[1:])
    return shapes


class ViewReader(Headers):
    """The tensors of a dense model under the names of `dense_weights`.

    A tensor that is re-ordered or scaled lies in no file as it is: `info` tells its dtype and
    shape, and no place.
    """

    def __init__(self, base: Headers, found: Mapping[str, Origin], settings: DenseSettings) -> None:
        self.directory = base.directory
        self.base = base
        self.origins = found
        self.settings = settings
        self.shapes = {name: weight.shape for name, weight in dense_weights(settings).items()}

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self.origins)

    def __contains__(self, name: object) -> bool:
        return name in self.origins

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; of one that lies nowhere as it is, from -1 to -1."""
        if name not in self.origins:
            raise CheckpointError(
                f"{self.directory}: no tensor {name!r} among its {len(self.origins)}; "
                "the model is incomplete"
            )
        origin, shape = self.origins[name], self.shapes[name]
        found = self.base.info(origin.name)
        if not origin.as_it_is or found.start < 0:
            return found._replace(shape=shape, start=-1, end=-1)
        first = found.start + tensor_bytes(found.dtype, (origin.start, *shape[1:]))
        last = first + tensor_bytes(found.dtype, shape)
        return found._replace(shape=shape, start=first, end=last)

    def files(self) -> list[Path]:
        """Return the files that the tensors come from."""
        return self.base.files()

    def read_range(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` (bytes) with a tensor's bytes from its byte `start` on, as a file of Llama's
        names would have them."""
        info, origin = self.info(name), self.origins[name]
        if origin.as_it_is:
            first = tensor_bytes(info.dtype, (origin.start, *info.shape[1:]))
            self.base.read_range(origin.name, first + start, view)
            return
        read_by_rows(info, start, view, lambda *rows: self._rows(name, *rows).data)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the bytes of rows [start, stop) of a tensor that lies nowhere as it is."""
        origin, dtype = self.origins[name], self.info(name).dtype
        head = len(origin.order) or 1
        # whole heads: their rows lie anywhere among them
        first, last = start // head * head, -(-stop // head) * head
        rows = read_rows(self.base, origin.name, origin.start + first, origin.start + last)
        numbers = np.arange(start, stop)
        if origin.order:
            within = np.array(origin.order)[numbers % head]
            rows = rows[numbers - numbers % head + within - first]
        if origin.scale == 1.0 and not origin.turned:
            return encoded(rows, dtype)
        scales = np.full(len(rows), origin.scale)
        if origin.turned:
            scales[within < origin.turned] *= origin.turns
        scaled = rows.astype(np.float64) * scales.reshape(-1, *[1] * (rows.ndim - 1))
        return encoded(scaled.astype(np.float32), dtype)


def viewed(base: Headers, found: Mapping[str, Origin], settings: DenseSettings) -> Headers:
    """Return a file's tensors under the names of `dense_weights`: themselves, where they have them
    and are as they are."""
    if all(origin == Origin(name) for name, origin in found.items()):
        return base
    return ViewReader(base, found, settings)


def underlying(reader: Headers) -> Headers:
    """Return the tensors as they lie in the file, where a view hides them."""
    return reader.base if isinstance(reader, ViewReader) else reader


def seen_as(like: Headers, base: Headers) -> Headers:
    """Return a reader of another file laid out alike, through the view that `like` is, if any."""
    if not isinstance(like, ViewReader):
        return base
    return ViewReader(base, like.origins, like.settings)
