"""Every contact with DeepSpeed's internals, read from version 0.19.8. Nothing else in the project touches a private name.

Not covered: other versions. `check_version` refuses what this file was not read from.
"""

from __future__ import annotations

import collections
import datetime
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# DeepSpeed builds C++ extensions just in time. Theirs go into this interpreter's own environment: a shared folder
# keeps the lock of every interrupted build, and the next start waits for it for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import Tensor, nn

from nexus_ds.errors import LayoutError

__all__ = [
    "AutoEPMoELayer",
    "TokenChoiceTopKRouter",
    "autoep_spec",
    "count_tokens_per_expert",
    "device",
    "expert_parallel_ranks",
    "full_fp32",
    "gathered",
    "mark_replicated",
    "start",
]

READ_FROM = "0.19."


def check_version() -> None:
    """Raise LayoutError for a DeepSpeed that this file was not read from."""
    if not deepspeed.__version__.startswith(READ_FROM):
        raise LayoutError(
            f"found deepspeed {deepspeed.__version__}, expected {READ_FROM}x; install deepspeed==0.19.8 (requirements.txt)"
        )


def on_cpu() -> bool:
    """Return whether ranks compute on the CPU."""
    return get_accelerator().device_name() == "cpu"


def device() -> torch.device:
    """Return this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cpu") if on_cpu() else torch.device(get_accelerator().device_name(local))


def start(timeout_minutes: float) -> None:
    """Join the process group: LOCAL_RANK, RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT from the launcher, else one rank.

    On CPU no extension is compiled: the shared-memory collective costs minutes and a compiler at the first start and
    leaves a file in /dev/shm behind; gloo does the same work. `__compatible_ops__` is the documented place to say so.
    """
    check_version()
    # torch renamed collectives that DeepSpeed 0.19.8 calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if on_cpu():
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu() else None,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


def autoep_spec(experts: int, top_k: int, hidden_size: int, ffn_size: int) -> MoELayerSpec:
    """Describe a Nexus layer to AutoEP: softmax scores, not renormalised, applied after the experts, shared weight 1."""
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
    """Return AutoEP's settings for a layer that is built by hand (no `expert_parallel` section in the JSON)."""
    return AutoEPConfig(enabled=True, autoep_size=ep_size, use_grouped_mm=grouped_mm, load_balance_coeff=None)


def mark_replicated(module: nn.Module) -> None:
    """Tell ZeRO that the module's gradients are averaged over all ranks (AutoEP marks only what it built itself)."""
    for parameter in module.parameters():
        parameter.allreduce = True  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]


def is_partitioned(parameter: Any) -> bool:
    """Return whether ZeRO-3 holds only a shard of `parameter` here."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameter: Any) -> Iterator[Tensor]:
    """Yield the full data of one parameter; under ZeRO-3 all ranks of its partition group must enter together."""
    context = (
        deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
        if is_partitioned(parameter)
        else nullcontext()
    )
    with context:
        yield parameter.data


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """Return the fp32 master of a replicated parameter on every rank (all ranks must call); its own data if it has none."""
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
