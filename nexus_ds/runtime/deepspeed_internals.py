"""Every contact with DeepSpeed's internals, read from version 0.19.8. Nothing else in the project
touches a private name.

Not covered: other versions. `check_version` refuses what this file was not read from.
"""

from __future__ import annotations

import collections
import ctypes
import datetime
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

# DeepSpeed builds C++ extensions just in time. Theirs go into this interpreter's own environment: a
# shared folder keeps the lock of every interrupted build, and the next start waits for it for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    compute_split_plan,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import Tensor, nn

from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.launch import local_rank
from nexus_ds.words import nearest

__all__ = [
    "AutoEPMoELayer",
    "TokenChoiceTopKRouter",
    "autoep_spec",
    "buffers_to_device",
    "compute_split_plan",
    "count_tokens_per_expert",
    "device",
    "expert_parallel_ranks",
    "fragments",
    "full_fp32",
    "gathered",
    "mark_replicated",
    "partitioner",
    "permute_by_local_expert",
    "set_optimizer_step",
    "start",
    "unpermute_by_local_expert",
    "weights_from_masters",
]


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every engine does, without compiling it: torch's compiler
    costs a rank seconds of imports."""
    kept, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = kept


_import_muon()
READ_FROM = "0.19."
MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


def check_version() -> None:
    """Raise LayoutError for a DeepSpeed that this file was not read from."""
    if not deepspeed.__version__.startswith(READ_FROM):
        raise LayoutError(
            f"found deepspeed {deepspeed.__version__}, expected {READ_FROM}x; install deepspeed==0.19.8 (requirements.txt)"
        )


def check_zero_section(values: dict[str, Any]) -> None:
    """Raise ConfigError for a `zero_optimization` section that DeepSpeed would refuse, or worse,
    would ignore in part."""
    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key zero_optimization.{key}{nearest(key, known)}")
    try:
        DeepSpeedZeroConfig(**values)
    except ValueError as error:
        raise ConfigError(f"zero_optimization: {error}") from error


def on_cpu() -> bool:
    """Return whether ranks compute on the CPU."""
    return get_accelerator().device_name() == "cpu"


def device() -> torch.device:
    """Return this rank's device."""
    name = "cpu" if on_cpu() else get_accelerator().device_name(local_rank())
    return torch.device(name)


def device_with_room(size: int) -> torch.device:
    """Return this rank's device if another `size` bytes fit on it twice, else the CPU."""
    if not on_cpu() and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 2 * size:
        return torch.device("cpu")
    return device()


def start(timeout_minutes: float) -> None:
    """Join the process group: LOCAL_RANK, RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT from the
    launcher, else one rank.

    On CPU no extension is compiled: the shared-memory collective costs minutes and a compiler at
    the first start and leaves a file in /dev/shm behind; gloo does the same work.
    `__compatible_ops__` is the documented place to say so.
    """
    check_version()
    # torch renamed collectives that DeepSpeed 0.19.8 calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if on_cpu():
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    else:
        get_accelerator().set_device(local_rank())
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu() else None,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


def autoep_spec(experts: int, top_k: int, hidden_size: int, ffn_size: int) -> MoELayerSpec:
    """Describe a Nexus layer to AutoEP: softmax scores, not renormalised, applied after the
    experts, shared weight 1."""
    return MoELayerSpec(
        moe_module_name="mlp",
        model_family="nexus",
        router_name="gate",
        experts_name="experts",
        expert_storage="module_list",
        expert_w1_name="gate_proj",
        expert_w2_name="down_proj",
        expert_w3_name="up_proj",
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_size,
        score_func="softmax",
        score_apply="post",
        route_norm=False,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=True,
        shared_experts_name="shared_expert",
        shared_experts_gate_name="",
    )


def autoep_config(ep_size: int, grouped_mm: bool) -> AutoEPConfig:
    """Return AutoEP's settings for a layer that is built by hand (no `expert_parallel` section in
    the JSON)."""
    return AutoEPConfig(
        enabled=True, autoep_size=ep_size, use_grouped_mm=grouped_mm, load_balance_coeff=None
    )


def mark_replicated(module: nn.Module) -> None:
    """Tell ZeRO that the module's gradients are averaged over all ranks (AutoEP marks only what it
    built itself)."""
    for parameter in module.parameters():
        parameter.allreduce = True  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]


def is_partitioned(parameter: Any) -> bool:
    """Return whether ZeRO-3 holds only a shard of `parameter` here."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameter: Any) -> Iterator[Tensor]:
    """Yield the full data of one parameter; under ZeRO-3 all ranks of its partition group must
    enter together."""
    context = (
        deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
        if is_partitioned(parameter)
        else nullcontext()
    )
    with context:
        yield parameter.data


def partitioner(config: dict[str, Any]) -> Callable[[nn.Module], None]:
    """Return what keeps only this rank's ZeRO-3 shard of a module's parameters. All ranks must call
    it alike.

    Experts are partitioned over the ranks that hold the same ones; DeepSpeed refuses to train them
    otherwise. Building
    the layers inside `zero.Init` would hang: their constructor gathers on some ranks alone.

    Args:
        config: the complete DeepSpeed configuration.
    """
    first: list[Any] = []

    def partition(module: nn.Module) -> None:
        for layer in module.modules():
            if isinstance(layer, AutoEPMoELayer):
                layer.set_deepspeed_parallelism()
                for parameter in layer.experts.parameters():
                    group = groups._get_expert_data_parallel_group(layer.ep_group_name)
                    parameter.ds_zero_partition_process_group = group
        whole = [p for p in module.parameters() if not is_partitioned(p)]
        if first:
            first[0].convert_to_zero_parameters(param_list=whole)
        elif whole:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            first.append(whole[0])
        release_memory()

    return partition


def buffers_to_device(model: nn.Module) -> None:
    """Move every buffer of a model to this rank's device, persistent or not.

    DeepSpeed moves a whole model there, but of one that is partitioned already (ZeRO-3) the
    parameters alone: its buffers would stay where the model was read, on the CPU, and the first
    product with one of them fails.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device())


def release_memory() -> None:
    """Hand freed host memory back: glibc keeps blocks below 32 MiB, most of a layer's matrices,
    between live ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """Return the fp32 master of a replicated parameter on every rank (all ranks must call); its own
    data if it has none."""
    if parameter.dtype == torch.float32:
        with gathered(parameter) as data:
            return data.detach().clone().cpu()
    master = safe_get_full_fp32_param(parameter)
    if master is None:
        with gathered(parameter) as data:
            return data.detach().float().cpu()
    return master.detach().float().cpu()


def expert_parallel_ranks(ep_size: int) -> list[int]:
    """Return the global ranks of rank 0's expert-parallel group, in expert-parallel order."""
    return list(range(ep_size))  # DeepSpeed's groups are consecutive ranks


def expert_parallel_group(layer: AutoEPMoELayer) -> Any:
    """Return the process group over which the layer's experts are spread."""
    return groups._get_expert_parallel_group(layer.ep_group_name)


def all_reduce_max(value: float) -> float:
    """Return the largest `value` over all ranks."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device="cpu" if on_cpu() else device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


# The optimizer's memory ------------------------------------------------------------------------------------------------


class Fragment(NamedTuple):
    """What this rank's optimizer owns of one parameter: elements [start, start + n) of it,
    flattened."""

    parameter: nn.Parameter
    start: int
    values: dict[str, Tensor]
    """fp32 (the master), exp_avg, exp_avg_sq: views [n] into the optimizer's own memory, fp32."""


def _flats(optimizer: Any) -> list[Tensor]:
    """Return the flat fp32 masters that the inner optimizer steps, one a group."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
        return optimizer.single_partition_of_fp32_groups
    raise LayoutError(
        f"{type(optimizer).__name__} keeps no ZeRO partition; use ds_configs/z1.json, z2.json or z3.json"
    )


def _place(optimizer: Any, parameter: Any) -> tuple[int, int, int, int] | None:
    """Return group, offset in the group's flat master, first element and count of a parameter's
    fragment here."""
    if is_partitioned(parameter):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * dist.get_rank(parameter.ds_process_group)
        count = min(size, parameter.ds_numel - start)  # the last partitions are padded
        return (group, offset, start, count) if count > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.get_hp_fragment_address()
    return (
        mapping.param_group_index,
        address.start,
        mapping.lp_fragment_address.start,
        address.numel,
    )


def fragments(engine: Any) -> Iterator[Fragment]:
    """Yield what this rank's optimizer owns, in the order of the model's parameters; no
    communication.

    Every element of every parameter is owned by exactly one rank. Moments are there after the first
    step or after `set_optimizer_step`. (DeepSpeed's own links to the moments are made after the
    first group's step and miss the experts; nothing here uses them.)
    """
    optimizer = engine.optimizer
    get_accelerator().synchronize()
    flats = _flats(optimizer)
    for parameter in engine.module.parameters():
        if place := _place(optimizer, parameter):
            group, offset, start, count = place
            state = optimizer.optimizer.state[flats[group]]
            kept = {MASTER: flats[group], **{name: state[name] for name in MOMENTS}}
            views = {
                name: tensor.detach().narrow(0, offset, count) for name, tensor in kept.items()
            }
            yield Fragment(parameter, start, views)


def optimizer_step(engine: Any) -> int:
    """Return how many updates Adam has counted (0 before the first)."""
    states = (engine.optimizer.optimizer.state[flat] for flat in _flats(engine.optimizer))
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_optimizer_step(engine: Any, step: int) -> None:
    """Set Adam's count in every flat group, each with a tensor of its own; make the moments (zero)
    where they miss."""
    inner = engine.optimizer.optimizer
    for flat in _flats(engine.optimizer):
        state = inner.state[flat]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(flat, requires_grad=False)
        where = flat.device if inner.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=where)


@torch.no_grad()
def weights_from_masters(engine: Any) -> None:
    """Derive the working weights from the fp32 masters, as the end of an optimizer step does. All
    ranks must call."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def set_counters(engine: Any, step: int) -> None:
    """Tell the engine how many optimizer steps lie behind it."""
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
