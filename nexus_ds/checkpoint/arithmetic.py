"""Stored numbers as numpy's: widened to fp32, narrowed once, looked over for what is no number.

numpy knows no bf16, so bits are moved by hand: a bf16 is the upper half of an fp32. All of it is
done to blocks that fit into a processor's cache, into memory that the caller keeps.
Not covered: arithmetic with 8-bit floats and integers, which `widen` refuses by name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nexus_ds.checkpoint.headers import ITEM_BYTES
from nexus_ds.errors import UnsupportedModelError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Bits(NamedTuple):
    """How a kind of floating-point number looks to an integer unit."""

    signed: type[np.signedinteger]
    unsigned: type[np.unsignedinteger]
    infinity: int
    """Bits of the positive one; above it stand the NaNs."""


FLOATS = {
    "F64": Bits(np.int64, np.uint64, 0x7FF0 << 48),
    "F32": Bits(np.int32, np.uint32, 0x7F80 << 16),
    "BF16": Bits(np.int16, np.uint16, 0x7F80),
    "F16": Bits(np.int16, np.uint16, 0x7C00),
}
NUMPYS = {"F64": np.float64, "F16": np.float16}
"""Kinds that numpy converts by itself."""


class Health:
    """Counts what is wrong with a tensor's values, over all its blocks."""

    def __init__(self) -> None:
        self.bad = 0
        """Values that are NaN or infinite."""
        self.nonzero = False

    def see(self, raw: Bytes, dtype: str) -> None:
        """Count values of one block; of kinds that are not in FLOATS every one is a number."""
        bits = FLOATS.get(dtype)
        if bits is None:
            self.nonzero = self.nonzero or bool(raw.any())
            return
        sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
        # Read as integers, positive numbers are in order, and so are negative ones behind the sign:
        # two maxima are several times faster than asking each number whether it is finite.
        positive = int(raw.view(bits.signed).max(initial=-1))
        negative = int(raw.view(bits.unsigned).max(initial=0))
        if positive >= bits.infinity or negative >= sign + bits.infinity:
            magnitudes = raw.view(bits.unsigned) & bits.unsigned(sign - 1)
            self.bad += int(np.count_nonzero(magnitudes >= bits.infinity))
        # minus zero is zero
        self.nonzero = self.nonzero or positive > 0 or negative > sign


def widen(
    raw: Bytes,
    dtype: str,
    out: Floats,
) -> None:
    """Convert stored numbers of a kind in FLOATS to fp32, exactly (but for F64, which is rounded).

    Raises:
        UnsupportedModelError: numbers of another kind.
    """
    if dtype == "F32":
        out.view(np.uint8)[...] = raw
    elif dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = raw.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    elif dtype in NUMPYS:
        np.copyto(out, raw.view(NUMPYS[dtype]), casting="same_kind")
    else:
        raise UnsupportedModelError(
            f"weights of type {dtype} can't be averaged or cast; "
            f"save the model in one of {', '.join(FLOATS)} first"
        )


# in silence, as for bf16: whoever narrows looks for what is infinite
@np.errstate(over="ignore")
def narrow(
    values: Floats,
    dtype: str,
    out: Bytes,
    spare: NDArray[np.uint32],
) -> None:
    """Round fp32 numbers, ties to even, to a kind in FLOATS.

    Args:
        values: a NaN may be lost, unless it is one that arithmetic makes.
        dtype: what they become.
        out: memory for them.
        spare: of at least as many elements; overwritten.
    """
    if dtype == "F32":
        out[...] = values.view(np.uint8)
    elif dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = spare[: len(bits)]
        # Half of the last place, less one where the bit before is even: ties go there. What is
        # more carries over, at the top into infinity.
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        np.copyto(out.view(np.uint16), rounded, casting="unsafe")
    else:
        np.copyto(out.view(NUMPYS[dtype]), values, casting="same_kind")
