"""A mixture whose form translates weights (`checkpoint.qwen3_next`), slice by slice, in torch.

Not covered: forms whose weights are the family's own, which are put together without torch
(`blend`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nexus_ds.checkpoint.arithmetic import Health
from nexus_ds.checkpoint.assembly import Blocks, Rule, check_health
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.headers import Plan, row_slices, sha256_of_tensors
from nexus_ds.checkpoint.qwen3_next import open_writer
from nexus_ds.checkpoint.tensors import DTYPE_NAMES, DTYPES, TensorReader, TensorWriter, bytes_of
from nexus_ds.errors import CheckpointError
from nexus_ds.progress import Progress
from nexus_ds.upcycling.sources import Blend, Computed, Rows, Source, Stack, source_of


def _see(health: Health, rows: Tensor) -> None:
    """Count values of one slice."""
    health.see(np.frombuffer(bytes_of(rows), np.uint8), DTYPE_NAMES[rows.dtype])


def _blocks(
    blend: Blend,
    health: Sequence[Health],
    start: int,
    stop: int,
) -> tuple[Tensor, Blocks]:
    """Return rows [start, stop) of the last part, and those of all as a rule sees them."""
    blocks = []
    for part, seen in zip(blend.parts, health, strict=True):
        rows = TensorReader.of(part.reader).read_rows(part.name, start, stop)
        _see(seen, rows)
        # copied: rules write into them
        flat = rows.float().flatten().clone()
        blocks.append(flat.numpy())
    return rows, blocks


def _look(blend: Blend, rule: Rule, shape: tuple[int, ...]) -> None:
    """Show a rule the whole tensor as often as it asks for."""
    unseen = [Health() for _ in blend.parts]
    for turn in range(rule.looks):
        for start, stop in row_slices(shape):
            rows, blocks = _blocks(blend, unseen, start, stop)
            width = rows[0].numel()
            rule.look(blocks, start * width, turn)


def _blend_rows(
    blend: Blend,
    health: Sequence[Health],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows [start, stop) of a blend in `dtype`.

    One part's slice is in memory at a time, beside the sum.
    """
    if blend.rule:
        rows, blocks = _blocks(blend, health, start, stop)
        width = rows[0].numel()
        merged = blend.rule(blocks, start * width)
        return torch.from_numpy(merged).reshape(rows.shape).to(dtype)
    first = blend.parts[0]
    total = TensorReader.of(first.reader).read_rows(first.name, start, stop)
    _see(health[0], total)
    if len(blend.parts) == 1 and first.weight == blend.divisor == 1.0:
        # a copy never goes through fp32 and back: it keeps every bit
        return total.mul_(blend.scale).to(dtype)
    # fp32 whatever the parts are: bf16 would round each summand
    total = total.float() * first.weight
    for part, seen in zip(blend.parts[1:], health[1:], strict=True):
        rows = TensorReader.of(part.reader).read_rows(part.name, start, stop)
        _see(seen, rows)
        total += rows.float() * part.weight
    return (total / blend.divisor * blend.scale).to(dtype)


def _write_blend(
    writer: TensorWriter,
    name: str,
    shape: tuple[int, ...],
    blend: Blend,
    dtype: torch.dtype,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Stream rows [first, last) of one tensor, a slice at a time; values are checked on the way."""
    health = [Health() for _ in blend.parts]
    result = Health()
    count = (shape[0] if last is None else last) - first
    if blend.rule:
        _look(blend, blend.rule, shape)
    for start, stop in row_slices((count, *shape[1:])):
        rows = _blend_rows(blend, health, first + start, first + stop, dtype)
        _see(result, rows)
        writer.write_rows(name, first + start, rows)
    for part, seen in zip(blend.parts, health, strict=True):
        check_health(source_of(part), seen)
    # parts that are finite can overflow in the sum, doubled, or in a narrower dtype
    if result.bad:
        who = blend.parts[0].who
        raise CheckpointError(
            f"{name}: {result.bad} values overflow {dtype}; {who} has weights too large"
        )


def _digest(names: Sequence[str], tensors: Mapping[str, Source]) -> str:
    """Return the hash of the first sources of tensors, by reading them."""
    blends = [tensors[name] for name in names]
    parts = [blend.parts[0] for blend in blends if isinstance(blend, Blend)]
    return sha256_of_tensors(parts[0].reader, [part.name for part in parts])


def _write(
    writer: TensorWriter, name: str, made: Source, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Write one tensor, wherever it comes from."""
    match made:
        case Blend():
            _write_blend(writer, name, shape, made, dtype)
        case Stack():
            for start, stop, blend in made.pieces:
                _write_blend(writer, name, shape, blend, dtype, start, stop)
        case Computed() | Rows():
            writer.write(name, torch.from_numpy(made.make()).to(dtype))
        case float():
            writer.write(name, torch.full(shape, made, dtype=dtype))
        case _:
            writer.write(name, torch.from_numpy(made).to(dtype))


def write_translated(
    directory: Path,
    plan: Plan,
    tensors: Mapping[str, Source],
    progress: Progress,
    config: ConfigJson,
    hashed: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """Write the model file(s) of a form that translates weights; see `blend.write_tensors`."""
    # vectors first: a form that translates norms needs them before the matrices behind them
    order = sorted(plan.items(), key=lambda item: len(item[1][1]) > 1)
    with open_writer(directory, plan, config) as writer:
        for name, (dtype, shape) in order:
            # one that is missing is named by the writer, with the others, as it closes
            if name in tensors:
                _write(writer, name, tensors[name], DTYPES[dtype], shape)
            progress.advance()
    return {key: _digest(names, tensors) for key, names in hashed.items()}
