"""The finished checkpoint out of a running engine.

It is gathered layer by layer, written by rank 0, read back and compared (`export_check`).

Shapes: E routed experts, H hidden size, F inner width.
Not covered: consolidating a training state without an engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_ds.checkpoint.cards import has_card, read_card
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import both_ropes
from nexus_ds.checkpoint.families.record import FFN_PARTS, HEAD
from nexus_ds.checkpoint.forms import SOURCE
from nexus_ds.checkpoint.hashes import record_hashes
from nexus_ds.checkpoint.model_card import (
    ModelCard,
    dense_card,
    nexus_card,
    stated_license,
    write_model_card,
)
from nexus_ds.checkpoint.projection_module import expert_embeddings, state_of
from nexus_ds.checkpoint.qwen2_moe import (
    Stored,
    expert_name,
    gate_name,
    mean_name,
    planned,
    shared_gate_name,
    shared_name,
    stored,
)
from nexus_ds.checkpoint.qwen3_next import open_writer
from nexus_ds.checkpoint.records import TrainStep, portable
from nexus_ds.checkpoint.sidecar import (
    Sidecar,
    read_sidecar,
    versions,
    write_sidecar,
)
from nexus_ds.checkpoint.tensors import DTYPES
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.config import dump
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import copy_file, naming, new_directory, write_text
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import watchdog
from nexus_ds.runtime.deepspeed_internals import Engine
from nexus_ds.runtime.domain_card import place_card, wants_card
from nexus_ds.runtime.engine import full_shape, moe_layers
from nexus_ds.runtime.export_check import (
    Agreement,
    Seen,
    check_computes,
    check_written,
    held_hashes,
    observe,
)
from nexus_ds.runtime.nexus_moe import NexusMoE
from nexus_ds.runtime.portable_state import STACKED
from nexus_ds.runtime.ranks import on_rank_0, together
from nexus_ds.settings import Config

Found = dict[str, Any]
"""The fields of an `Agreement`."""
Write = Callable[[str, Tensor], None]
Plan = dict[str, tuple[str, tuple[int, ...]]]
"""dtype, as safetensors names it, and shape of each tensor by name."""
TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _dense_part(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters outside Nexus layers, under their names on disk (tied weights once)."""
    inside: set[int] = set()
    for layer in moe_layers(model):
        inside |= {id(parameter) for parameter in layer.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def _own_config(model: Any) -> ConfigJson:
    """Return the complete config.json of a model in memory."""
    return json.loads(model.config.to_json_string(use_diff=False))


def _table(model: nn.Module) -> dict[str, Stored]:
    """Return what the checkpoint of a Nexus model stores; an empty table for a dense model."""
    # nn.Module's own type knows no such attribute
    return stored(getattr(model, "config_json", {})) if moe_layers(model) else {}


def _plan(model: nn.Module, dtype: torch.dtype) -> Plan:
    """Return dtype and shape of every tensor of the checkpoint."""
    kind = TYPE_NAMES[dtype]
    if moe_layers(model):
        return planned(getattr(model, "config_json", {}), kind)
    return {name: (kind, full_shape(p)) for name, p in _dense_part(model).items()}


def _write_experts(index: int, layer: NexusMoE, write: Write) -> None:
    """Send one expert matrix at a time from its owner to rank 0.

    It travels within rank 0's expert-parallel group; the other groups hold the same experts.
    """
    place = layer.placement
    rank = dist.get_rank()
    for stacked, part in STACKED:
        with internals.gathered(getattr(layer.experts, stacked)) as local:
            # a replica of rank 0's group: it only took part in gathering
            if rank >= place.ep_size:
                continue
            for expert in range(place.experts):
                owner, slot = divmod(place.slot(expert), place.local_slots)
                if place.ep_rank == owner:
                    matrix = local[slot].contiguous()
                else:
                    matrix = torch.empty_like(local[0])
                if place.ep_size > 1:
                    dist.broadcast(matrix, src=owner, group=internals.expert_parallel_group(layer))
                write(expert_name(index, expert, part), matrix)
        # NCCL's broadcasts return before they are done: the others would be told all of the model
        # ahead of rank 0, which writes, and the first to wait for longer than the limit ends all.
        internals.wait_for_device()


def _write_shared(index: int, layer: NexusMoE, table: dict[str, Stored], write: Write) -> None:
    """Write one layer's shared expert and the constant that stands for its gate."""
    for part in FFN_PARTS:
        weight: nn.Parameter = getattr(layer.shared_experts, part).weight
        name = shared_name(index, part)
        with internals.gathered(weight) as data:
            write(name, data * table[name].scale)
    gate = table[shared_gate_name(index)]
    assert gate.fill is not None
    write(shared_gate_name(index), torch.full(gate.shape, gate.fill))


def _write_router(
    index: int, layer: NexusMoE, sidecar: Sidecar, dtype: torch.dtype, write: Write
) -> None:
    """Write one layer's router; a projection's fp32 weights also go into `sidecar`."""
    if layer.router.mean is not None:
        with internals.gathered(layer.router.mean) as data:
            write(mean_name(index), data)
    if layer.router.projection is None:
        with internals.gathered(layer.router.gate.weight) as data:
            write(gate_name(index), data)
    else:
        named = list(layer.router.projection.named_parameters())
        # the optimizer's fp32 masters, not the working weights: readers compute rows from these
        sidecar.projections[index] = state_of(
            {name: internals.full_fp32(parameter) for name, parameter in named}
        )
        write(gate_name(index), expert_embeddings(sidecar, index, dtype))


class _Sink:
    """Writes tensors on the rank that has a directory.

    A failure is kept until the walk is over: the other ranks gather along, and would wait for this
    one for ever.
    """

    def __init__(
        self,
        directory: Path | None,
        plan: Plan,
        config: ConfigJson,
    ) -> None:
        self.plan = plan
        self.failure: Exception | None = None
        self.writer = self._try(lambda: open_writer(directory, plan, config)) if directory else None

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, CheckpointError) as error:
            self.failure = self.failure or error
            return None

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor in the dtype that is planned."""
        writer = self.writer
        if writer is None or self.failure:
            return
        dtype, _ = self.plan[name]
        on_cpu = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        self._try(lambda: writer.write(name, on_cpu))

    def close(self) -> None:
        """Close the files; raise what went wrong on the way."""
        if self.writer and not self.failure:
            self._try(self.writer.close)
        if self.failure:
            raise self.failure


def _write_tensors(
    model: nn.Module, sidecar: Sidecar | None, dtype: torch.dtype, directory: Path | None
) -> None:
    """Walk the model on all ranks, one parameter whole at a time.

    The rank with a `directory` writes; a projection's weights go into `sidecar` on all.
    """
    sink = _Sink(directory, _plan(model, dtype), getattr(model, "config_json", {}))
    # vectors first: a form that translates norms needs them before the matrices behind them
    parts = sorted(_dense_part(model).items(), key=lambda item: len(full_shape(item[1])) > 1)

    def write_dense() -> None:
        for name, parameter in parts:
            watchdog.at(f"the writing of {name}", minutes=watchdog.LAYER)
            with internals.gathered(parameter) as data:
                sink.write(name, data)
        if directory is None:
            watchdog.at("waiting for rank 0 to write", minutes=watchdog.WAITING)

    # Not only the rank that writes: the others would wait for it in a collective of the experts,
    # whose patience is shorter.
    together(write_dense)
    table = _table(model)
    for index, layer in enumerate(moe_layers(model)):
        assert sidecar is not None
        watchdog.at_layer("the writing of experts", index)
        _write_shared(index, layer, table, sink.write)
        _write_router(index, layer, sidecar, dtype, sink.write)
        _write_experts(index, layer, sink.write)
    sink.close()


def _write_config(model: Any, source: Path | None, dtype: torch.dtype, directory: Path) -> None:
    """Write config.json: the source's with the working dtype, or a new dense model's own."""
    name = str(dtype).removeprefix("torch.")
    if source and (source / "config.json").is_file():
        values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    else:
        values = _own_config(model) | {"architectures": [type(model).__name__]}
    # as the model in memory does it: the source may say "tied" beside a head of its own
    tied = {"tie_word_embeddings": HEAD not in _dense_part(model)}
    if SOURCE in values:
        values[SOURCE] = values[SOURCE] | tied
    else:
        values |= tied
    values["dtype"] = name
    # the key of transformers before 5 would contradict
    values.pop("torch_dtype", None)
    values = both_ropes(values)
    write_text(directory / "config.json", json.dumps(values, indent=2) + "\n")
    if source and (source / "generation_config.json").is_file():
        copy_file(source / "generation_config.json", directory / "generation_config.json")


def export(
    engine: Engine,
    config: Config,
    dtype: torch.dtype,
    out: Path,
    probe_BS: Tensor,
    step: TrainStep,
) -> Agreement:
    """Write the trained model to `out` (rank 0) as a dense or Nexus checkpoint and verify it. All
    ranks must call.

    Args:
        engine: the DeepSpeed engine.
        config: its configuration; `model.path` is where tokenizer, config and sidecar come from.
        dtype: working dtype, also on disk.
        out: new directory.
        probe_BS: token ids, of which the first are computed once more; the same on all ranks.
        step: what this run was, for the sidecar's lineage.

    Returns:
        How near the written model is to the engine's, the same on all ranks.

    Raises:
        CheckpointError: a tensor on disk is not the engine's, the reloaded model computes something
            else, or it could not be written. `out` is not made; all ranks raise.
    """
    made: list[Path] = []
    with ExitStack() as stack:
        # First: nobody computes for a directory that can't be made. Entered and left while all
        # meet, since rank 0 can fail at both.
        on_rank_0(lambda: made.append(stack.enter_context(new_directory(out))))
        engine.module.eval()
        seen = observe(engine, probe_BS)
        directory = made[0] if made else None
        found = _write_and_verify(engine.module, config, dtype, directory, step, seen)
        on_rank_0(stack.close)
    return Agreement(**found)


def _write_and_verify(
    model: Any,
    config: Config,
    dtype: torch.dtype,
    directory: Path | None,
    step: TrainStep,
    seen: Seen,
) -> Found:
    """Write on the rank with a `directory` and verify there; the others gather along."""

    def write() -> None:
        # a full disk is told with its folder, before all ranks are told
        with naming(directory, full_alone=True) if directory else nullcontext():
            _write(model, config, dtype, directory, step)

    # Each phase ends together: who goes on alone after a failure leaves the others waiting.
    together(write)
    hashes = together(lambda: held_hashes(model, _table(model), dtype))

    def verify() -> Found:
        if directory is None:
            watchdog.at("waiting for rank 0 to check", minutes=watchdog.WAITING)
            return {}
        held = {name: value for own in hashes for name, value in own.items()}
        check_written(directory, dtype, held)
        # as plain values: ranks tell each other in JSON
        return asdict(check_computes(directory, dtype, seen))

    return together(verify)[0]


def _write(
    model: Any, config: Config, dtype: torch.dtype, directory: Path | None, step: TrainStep
) -> None:
    """Gather on all ranks and write the whole checkpoint on the one with a `directory`."""
    source = Path(config.model.path) if config.model.path else None
    sidecar = read_sidecar(source) if moe_layers(model) and source else None
    _write_tensors(model, sidecar, dtype, directory)
    if directory is None:
        watchdog.at("waiting for rank 0 to write", minutes=watchdog.WAITING)
        return
    watchdog.at("the export's other files, and hashes", minutes=watchdog.SAVING)
    _write_config(model, source, dtype, directory)
    if sidecar:
        lineage = [*sidecar.lineage, step]
        sidecar = replace(sidecar, lineage=lineage, versions=versions())
        write_sidecar(directory, sidecar)
    copy_tokenizer(Path(config.model.tokenizer or config.model.path), directory)
    write_text(directory / "training.yaml", dump(config))
    if wants_card(config):
        place_card(config, directory)
    write_model_card(directory, _model_card(config, sidecar, directory, step))
    if sidecar:
        # last: it is of all that stands there
        record_hashes(directory)


def _model_card(
    config: Config, sidecar: Sidecar | None, directory: Path, step: TrainStep
) -> ModelCard:
    """Return the model card of what was written into `directory`."""
    if sidecar:
        return nexus_card(sidecar, config.model.license)
    domain = read_card(directory) if has_card(directory) else None
    start = config.model.path
    license_name = config.model.license or (stated_license(Path(start)) if start else "")
    return dense_card(portable(start) if start else "", license_name, domain, step)
