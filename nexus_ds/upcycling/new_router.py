"""The router of a new mixture: P freshly drawn, or free rows; in numpy, without torch.

Each layer draws from a generator of its own, so that what it gets does not depend on the others.
Shapes: E routed experts, M width of a domain embedding, H hidden size.
Not covered: warm starts that read text (`warm_start`).
"""

from __future__ import annotations

import math
import mmap

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.expert_rows import rows_in, shapes_of
from nexus_ds.checkpoint.projections import State
from nexus_ds.checkpoint.records import RouterRecord

NORMAL = 0.02  # standard deviation of transformers' default initialisation
GROUP = 16  # numbers that are drawn together
BLOCK = 1 << 15  # numbers whose intermediate results stay in a core's cache


def layer_draws(seed: int, layer: int) -> np.random.RandomState:
    """Return the random generator of one layer's router, a pure function of (seed, layer)."""
    return np.random.RandomState((seed * 1_000_003 + layer) % 2**32)


def normal(draws: np.random.RandomState, shape: tuple[int, ...], deviation: float) -> Floats:
    """Return normal numbers of mean 0, those that torch's CPU generator draws from the same seed.

    The mixtures of earlier versions were drawn by it, and are extended by the same map. The method
    of Box and Muller on the twister's 32 bits; logarithms and angles of two libraries differ in the
    last places. Where there are fewer than a group of numbers, those are the first of it, which
    torch draws otherwise.
    """
    count = math.prod(shape)
    # given back to the system when it is let go, which a heap need not do
    drawn = np.frombuffer(mmap.mmap(-1, max(count, GROUP) * 4), np.float32)
    whole = len(drawn) // GROUP * GROUP
    for start in range(0, whole, BLOCK):
        _draw_groups(draws, drawn[start : min(start + BLOCK, whole)])
    if whole < len(drawn):
        # uniform ones of what is over are drawn, and then a last group that overlaps the one before
        draws.randint(0, 1 << 32, len(drawn) - whole, np.uint32)
        _draw_groups(draws, drawn[-GROUP:])
    drawn *= np.float32(deviation)
    return drawn[:count].reshape(shape)


def _draw_groups(draws: np.random.RandomState, out: Floats) -> None:
    """Fill groups of 16 with standard normal numbers: 8 radii, 8 angles, then their cosines' 8 and
    their sines' 8."""
    bits = draws.randint(0, 1 << 32, len(out), np.uint32)
    bits &= np.uint32(0xFFFFFF)
    pairs = bits.reshape(-1, 2, GROUP // 2)
    # each of its own and in one piece, which numpy's loops are fast for
    radius, angle = pairs[:, 0].astype(np.float32), pairs[:, 1].astype(np.float32)
    radius *= np.float32(-(2.0**-24))
    radius += 1
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle *= np.float32(2.0**-24)
    angle *= np.float32(2 * math.pi)
    halves = out.reshape(pairs.shape)
    np.multiply(radius, np.cos(angle), out=halves[:, 0])
    np.multiply(radius, np.sin(angle), out=halves[:, 1])


def lengths(rows_EH: Floats) -> Floats:
    """Return the norm of each row [E]."""
    found: Floats = np.sqrt(np.square(rows_EH).sum(-1))
    return found


def centred_norm(rows_EH: Floats) -> float:
    """Return the mean distance of expert embeddings from their mean (from zero for a single one).

    The mean itself adds the same to all logits of a token, which softmax does not see.
    """
    if len(rows_EH) > 1:
        rows_EH = rows_EH - rows_EH.mean(0)
    return float(lengths(rows_EH).mean())


def new_state(
    router: RouterRecord,
    inputs_EM: Floats,
    hidden_size: int,
    init: str,
    init_norm: float,
    draws: np.random.RandomState,
) -> State:
    """Return the weights of a freshly drawn P, fp32.

    balanced: every map keeps unit variance, then the expert embeddings are scaled so that centred
    ones have mean norm `init_norm`. Hidden states are RMS-normed, so the spread of the logits over
    experts starts at about `init_norm`: neither saturated nor dead whatever the embedding's width.
    normal: N(0, 0.02) everywhere (the paper names no scale).

    Args:
        router: the form of P.
        inputs_EM: conditioned domain embeddings.
        hidden_size: H.
        init: balanced | normal.
        init_norm: see above.
        draws: of this layer.
    """
    length = float(lengths(inputs_EM).mean())
    length = length if length > 1e-6 else 1.0
    state: State = {}
    for name, shape in shapes_of(router, inputs_EM.shape[1], hidden_size).items():
        if name == "log_norm":
            state[name] = np.zeros(shape, np.float32)
        elif name == "out.weight":
            state[name] = np.eye(hidden_size, dtype=np.float32)
        else:
            # Norm of the map's input: as given for the first, of unit variance for the others.
            scale = length if name == "maps.0.weight" else math.sqrt(shape[1])
            state[name] = normal(draws, shape, NORMAL if init == "normal" else 1 / scale)
    if init == "balanced":
        norm = centred_norm(rows_in(router, state, inputs_EM, "F32"))
        if norm > 0:
            _scale_output(state, init_norm / norm)
    return state


def _scale_output(state: State, factor: float) -> None:
    """Make every expert embedding `factor` times as long, in place."""
    if "log_norm" in state:
        state["log_norm"] += np.float32(math.log(factor))
        return
    *_, last = state.values()
    last *= np.float32(factor)


def free_rows(
    experts: int, hidden_size: int, init: str, init_norm: float, draws: np.random.RandomState
) -> Floats:
    """Return free expert embeddings [E, H] of a linear router.

    normal: N(0, 0.02); balanced: scaled as a balanced projection's.
    """
    rows_EH = normal(draws, (experts, hidden_size), NORMAL)
    if init == "normal":
        return rows_EH
    return rows_EH * np.float32(init_norm / centred_norm(rows_EH))


def domain_rows(inputs_EM: Floats, hidden_size: int, layer: int, norm: float) -> Floats:
    """Return free expert embeddings [E, H] that are the domain embeddings (FlexOlmo's way).

    Where M is not H, a random matrix puts them to that width: the same one at every extension of a
    layer, so it follows from M and the layer alone.

    Args:
        inputs_EM: conditioned domain embeddings.
        hidden_size: H.
        layer: number of the layer.
        norm: mean norm of the result.
    """
    width = inputs_EM.shape[1]
    rows_EH = inputs_EM
    if width != hidden_size:
        rows_EH = inputs_EM @ normal(layer_draws(width, layer), (width, hidden_size), 1.0)
    return rows_EH * np.float32(norm / lengths(rows_EH).mean())
