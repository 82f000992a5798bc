"""P(D) in numpy: router rows of a new checkpoint, and whether stored ones fit the sidecar.

The same function as `model.router.Projection`, for whoever does not train. P and D are rounded to
the model's dtype and so is each step's result, as in training; sums run in another order than
torch's, so results agree to a unit in the last place or two, far below TOLERANCE.
Shapes: E routed experts, M width of a domain embedding, H hidden size, C columns that are checked.
Not covered: linear routers, whose rows are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.projections import State
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import Manifest, RouterRecord, router_name
from nexus_ds.checkpoint.values import read_rows, read_values, rounded
from nexus_ds.errors import CheckpointError

TOLERANCE = {"F32": 1e-4, "BF16": 2.0**-6, "F16": 2.0**-9}
"""Largest difference of stored and recomputed rows, relative to the largest entry, by dtype."""
WHOLE = 1 << 22
"""Bytes of a last map that a quick check reads in full; of a larger one it reads PIECES."""
PIECES, PIECE = 4, 64  # evenly spaced runs of rows of the last map, and rows of each
MOST = 1 << 27
"""Bytes of P that a quick check reads: layers are left out, evenly, until they are fewer."""
WIDENING = {"swiglu": 2, "gelu": 1, "relu": 1, "linear": 1}
"""For each form of P the width of its activation's input relative to that of its output."""
FEW = 8
"""Experts whose rows are computed without a library's threads: these take longer to meet."""
AT_ONCE = 1 << 16
"""Weights that are rounded and multiplied at once: they stay in a core's cache."""
Round = Callable[[np.ndarray], np.ndarray]
Shapes = dict[str, tuple[int, ...]]

_erf = np.vectorize(math.erf, otypes=[np.float32])


def unit(x: np.ndarray) -> np.ndarray:
    """Return vectors [..., M] scaled to length one; zeros stay zeros."""
    length = np.sqrt(np.square(x).sum(-1, keepdims=True))
    return x / np.maximum(length, np.float32(1e-12))


def centre_of(vectors_EM: Floats) -> Floats:
    """Return the mean [M] of the unit vectors of the upcycled domains.

    It is stored, and subtracted from every later domain too: else an extension would change what P
    reads of the old ones. Zeros for a single vector: it would be its own mean, and nothing would be
    left of it.
    """
    mean_M: Floats = unit(vectors_EM).mean(0)
    return mean_M if len(vectors_EM) > 1 else np.zeros_like(mean_M)


def condition(vectors_EM: Floats, centre_M: Floats) -> Floats:
    """Return what P reads: normalised, centred, normalised again; fp32 [E, M]."""
    found: Floats = unit(unit(vectors_EM) - centre_M)
    return found


def _silu(x: np.ndarray) -> np.ndarray:
    # exp of a large number is infinite, and the quotient zero, which is right
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def _activated(x: np.ndarray, form: str, at: Round) -> np.ndarray:
    """Return what stands between two maps, of inputs [E, width]."""
    match form:
        case "swiglu":
            a, b = np.split(x, 2, axis=-1)
            return at(at(_silu(a)) * b)
        case "gelu":
            return at(x * (1 + _erf(x / np.float32(math.sqrt(2)))) / 2)
        case "relu":
            return np.maximum(x, 0)
    return x


def _product(x_EK: np.ndarray, weight_HK: np.ndarray, at: Round) -> np.ndarray:
    """Return x W^T [E, H] with rounded weights, some rows of W at a time.

    Of few experts in numpy's own loop, which no threads wait for.
    """
    step = max(1, AT_ONCE // max(1, weight_HK.shape[1]))
    found_EH = np.empty((len(x_EK), len(weight_HK)), np.float32)
    for first in range(0, len(weight_HK), step):
        part_hK = at(weight_HK[first : first + step])
        out_Eh = found_EH[:, first : first + step]
        if len(x_EK) <= FEW:
            np.einsum("ek,hk->eh", x_EK, part_hK, out=out_Eh)
        else:
            out_Eh[...] = x_EK @ part_hK.T
    return found_EH


def maps_of(router: RouterRecord) -> int:
    """Return how many matrices P has, but for the one behind rows of a fixed length."""
    return 1 if router.projection == "linear" else router.depth


def last_map(router: RouterRecord) -> str:
    """Return the name of the last matrix that is no such one; its rows are those of P(D)."""
    return f"maps.{maps_of(router) - 1}.weight"


def shapes_of(router: RouterRecord, embedding_size: int, hidden_size: int) -> Shapes:
    """Return the shapes of P's weights, by name; KeyError for a form that there is not."""
    widening = WIDENING[router.projection]
    inner = [router.width or hidden_size] * (maps_of(router) - 1)
    sizes_in = [embedding_size, *inner]
    sizes_out = [widening * size for size in inner] + [hidden_size]
    fixed = router.row_norm == "fixed"
    shapes: Shapes = {"log_norm": (1,)} if fixed else {}
    for index, sizes in enumerate(zip(sizes_out, sizes_in, strict=True)):
        shapes[f"maps.{index}.weight"] = sizes
    if fixed:
        shapes["out.weight"] = hidden_size, hidden_size
    return shapes


def projected(
    router: RouterRecord,
    weight_of: Callable[[str], np.ndarray],
    inputs_EM: np.ndarray,
    at: Round,
) -> tuple[np.ndarray, str]:
    """Return what the last matrix of P reads [E, width], and that matrix's name.

    Args:
        router: the form of P.
        weight_of: returns a weight by its name.
        inputs_EM: conditioned domain embeddings.
        at: rounds to the model's dtype.
    """
    maps = maps_of(router)
    fixed = router.row_norm == "fixed"
    x = at(inputs_EM)
    for index in range(maps):
        if index > 0:
            x = _activated(x, router.projection, at)
        # the last one may be read in part
        if index < maps - 1 or fixed:
            x = at(_product(x, weight_of(f"maps.{index}.weight"), at))
    if not fixed:
        return x, last_map(router)
    # in fp32: bf16 knows lengths to less than one per cent only
    length = np.exp(at(weight_of("log_norm")))
    return at(unit(x) * length), "out.weight"


def rows_in(router: RouterRecord, state: State, inputs_EM: np.ndarray, dtype: str) -> Floats:
    """Return P(D) [E, H] of weights in memory, as a model of `dtype` (F32 | BF16 | F16)
    computes it."""

    def at(x: np.ndarray) -> np.ndarray:
        return rounded(x, dtype)

    x, last = projected(router, state.__getitem__, inputs_EM, at)
    return at(_product(x, state[last], at))


@dataclass
class RouterFile:
    """The projections and domain embeddings of a Nexus checkpoint, on disk."""

    router: RouterRecord
    reader: Headers
    vectors_EM: np.ndarray
    """Raw domain embeddings."""
    inputs_EM: np.ndarray
    """What P reads of them."""

    def layer_bytes(self) -> int:
        """Return the bytes of one layer's P; 0 of a linear router."""
        names = [name for name in self.reader.names() if name.startswith("layers.0.")]
        infos = [self.reader.info(name) for name in names]
        return sum(info.end - info.start for info in infos)

    def rows(
        self, layer: int, dtype: str, columns: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return columns of P(D) of one layer, as a model of `dtype` computes them.

        Args:
            layer: number of the layer.
            dtype: F32 | BF16 | F16.
            columns: numbers [C] of those that are computed, ascending; None: all.

        Returns:
            The numbers [C], and the rows' values [E, C].

        Raises:
            CheckpointError: weights that are missing or of another form than nexus.json says.
        """
        try:
            return self._rows(layer, lambda x: rounded(x, dtype), columns)
        # numpy's own word for shapes that don't fit
        except ValueError as error:
            raise CheckpointError(
                f"{self.reader.directory}: P of layer {layer} has not the form that nexus.json "
                f"says ({error}); the sidecar is damaged"
            ) from error

    def _rows(
        self, layer: int, at: Round, columns: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        # Before a name is made for each: nexus.json may say any number.
        there = sum(name.startswith(f"layers.{layer}.maps.") for name in self.reader.names())
        expected = maps_of(self.router)
        if there != expected or not there:
            raise ValueError(f"{there} maps, not {expected}")
        lead = f"layers.{layer}."

        def weight_of(name: str) -> np.ndarray:
            if name != "log_norm":
                self._check_map(lead + name)
            return read_values(self.reader, lead + name)

        x, last = projected(self.router, weight_of, self.inputs_EM, at)
        numbers, weight = self._columns(lead + last, columns)
        return numbers, at(_product(x, weight, at))

    def _check_map(self, name: str) -> None:
        shape = self.reader.info(name).shape
        if len(shape) != 2:
            raise ValueError(f"{name} has the shape {shape}, expected two dimensions")

    def _columns(self, name: str, columns: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of a map [H, width]: each gives one column of P(D)."""
        self._check_map(name)
        if columns is None:
            weight = read_values(self.reader, name)
            return np.arange(len(weight)), weight
        # runs of neighbours are read at once
        runs = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)
        parts = [read_rows(self.reader, name, int(run[0]), int(run[-1]) + 1) for run in runs]
        return columns, np.concatenate(parts)


def open_router(directory: Path, manifest: Manifest) -> RouterFile:
    """Open the router's file of a Nexus checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of other experts than nexus.json's.
    """
    reader = Headers.of_file(directory, router_name(Path(directory)))
    vectors_EM = read_values(reader, "vectors")
    experts = len(manifest.experts)
    if vectors_EM.ndim != 2 or len(vectors_EM) != experts:
        raise CheckpointError(
            f"{directory}: {experts} experts but domain embeddings of shape {vectors_EM.shape}; "
            "the sidecar is damaged or of another model, restore it from where it came"
        )
    inputs_EM = vectors_EM
    if manifest.router.centre:
        centre_M = read_values(reader, "centre")
        if centre_M.shape != vectors_EM.shape[1:]:
            raise CheckpointError(
                f"{directory}: centre of shape {centre_M.shape}, domain embeddings of shape "
                f"{vectors_EM.shape}; the sidecar is damaged, restore it from where it came"
            )
        inputs_EM = condition(vectors_EM, centre_M)
    return RouterFile(manifest.router, reader, vectors_EM, inputs_EM)


def some_columns(width: int, row_bytes: int) -> np.ndarray | None:
    """Return the columns [C] that a quick check computes; None: all.

    Args:
        width: of the rows, H.
        row_bytes: of one row of the last map.
    """
    if width * row_bytes <= WHOLE or width <= PIECES * PIECE:
        return None
    starts = [(width - PIECE) * index // (PIECES - 1) for index in range(PIECES)]
    return np.concatenate([np.arange(start, start + PIECE) for start in starts])


@dataclass
class RowsCheck:
    """How far stored rows are from P(D)."""

    layers: list[int]
    """Those that were checked."""
    columns: int
    """Of each row that were."""
    worst: dict[int, float]
    """For each layer that differs too much, by how much of its largest entry."""
    tolerance: float


def check_rows(router: RouterFile, weights: Headers, layers: int, quick: bool) -> RowsCheck:
    """Compare the rows that a model stores with P(D).

    Args:
        router: its sidecar's.
        weights: the model's tensors.
        layers: of the model.
        quick: some layers and columns, read in a second at any size; else all of all.

    Raises:
        CheckpointError: tensors that are missing or of another shape.
    """
    picked = list(range(layers))
    if quick:
        most = max(2, MOST // max(router.layer_bytes(), 1))
        picked = sorted({int(x) for x in np.linspace(0, layers - 1, min(layers, most))})
    info = weights.info(gate_name(0))
    columns = some_columns(info.shape[1], 4 * info.shape[1]) if quick else None
    check = RowsCheck(picked, info.shape[1], {}, TOLERANCE.get(info.dtype, 0.0))
    for layer in picked:
        numbers, expected = router.rows(layer, info.dtype, columns)
        # the same for all layers
        check.columns = len(numbers)
        difference = _difference(read_values(weights, gate_name(layer)), numbers, expected)
        # "not <=" is true of NaN as well
        if not difference <= check.tolerance:
            check.worst[layer] = difference
    return check


def _difference(stored_EH: np.ndarray, numbers: np.ndarray, expected_EC: np.ndarray) -> float:
    """Return the largest difference of some columns, relative to the largest entry expected."""
    if (numbers >= stored_EH.shape[1]).any():
        return math.inf
    return relative_difference(stored_EH[:, numbers], expected_EC)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of numbers, relative to the largest that was expected; infinite
    where there are others, or none."""
    if found.shape != expected.shape or not expected.size:
        return math.inf
    # rows of zeros, as a P of zeros gives them, have no relative error
    scale = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(found - expected).max()) / scale
