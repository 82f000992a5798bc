"""The one door to DeepSpeed: no other module imports it or names what it does not document.

What is relied upon was read from version 0.19.8: the two classes that a Nexus layer is made of, the
attributes that ZeRO hangs on parameters (`ds_id`, `ds_shape`, ..), where its optimizers keep
masters and moments, its process groups, and the few methods of an engine that `Engine` lists.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
    SplitPlan,
    compute_split_plan,
)
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.moe.layer import MoE
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups, safe_get_full_fp32_param, set_z3_leaf_module
from torch import Tensor, nn

from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.launch import device_number, tell_device_number
from nexus_ds.model.experts import TORCH_PRODUCTS, GroupedProducts
from nexus_ds.runtime import ranks
from nexus_ds.words import nearest

__all__ = [
    "AutoEPMoELayer",
    "count_tokens_per_expert",
]


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every engine does, without compiling it.

    A decorator there asks torch's compiler in, whose imports cost each rank seconds.
    """
    kept = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = kept


_import_muon()
READ_FROM = "0.19."
DeepSpeedConfig = dict[str, Any]
"""What a DeepSpeed JSON holds, in its own keys."""
# Kinds of what an optimizer keeps of a parameter; the moments' are torch's names in Adam's state.
MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed stacks the matrices of a rank's experts: its name of a stack, the expert's of its own.
STACKED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Engine(Protocol):
    """What is used of DeepSpeed's engine."""

    module: nn.Module
    """The transformers model."""
    device: torch.device
    optimizer: Any
    """ZeRO's wrapper of AdamW, of another class for each stage; `fragments` looks into it."""
    global_steps: int
    micro_steps: int
    global_samples: int

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Pass inputs through the model, as it would take them itself."""

    def train(self) -> object:
        """Let the next passes be of training."""

    def eval(self) -> object:
        """Let the next passes be of evaluation."""

    def backward(self, loss: Tensor) -> object:
        """Add the gradients of `loss` / accumulation steps."""

    def step(self) -> object:
        """Count a micro-batch; after the last of a step clip the gradients and update."""

    def get_global_grad_norm(self) -> float | None:
        """Return the norm over all parameters and ranks of the last step, before clipping."""

    def gradient_accumulation_steps(self) -> int:
        """Return micro-batches a step."""

    def train_batch_size(self) -> int:
        """Return sequences a step, over all ranks."""


def check_version() -> None:
    """Raise LayoutError for a DeepSpeed that this file was not read from."""
    if not deepspeed.__version__.startswith(READ_FROM):
        raise LayoutError(
            f"found deepspeed {deepspeed.__version__}, expected {READ_FROM}x; install "
            "deepspeed==0.19.8 (requirements.txt)"
        )


def check_zero_section(values: DeepSpeedConfig) -> None:
    """Raise ConfigError for a `zero_optimization` that DeepSpeed refuses or ignores in part."""
    fields = DeepSpeedZeroConfig.model_fields
    aliases = {field.alias for field in fields.values() if field.alias}
    known = {*fields, *aliases}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key zero_optimization.{key}{nearest(key, known)}")
    try:
        DeepSpeedZeroConfig(**values)
    except ValueError as error:
        said = " ".join(str(error).split())[:300]  # pydantic writes paragraphs
        raise ConfigError(f"zero_optimization: {said}") from error


def on_cpu() -> bool:
    """Return whether ranks compute on the CPU."""
    return get_accelerator().device_name() == "cpu"


def device() -> torch.device:
    """Return this rank's device."""
    if on_cpu():
        return torch.device("cpu")
    number = device_number(get_accelerator().device_count())
    return torch.device(get_accelerator().device_name(number))


def to_device(tensor: Tensor) -> Tensor:
    """Return a tensor of the host on this rank's device; the host does not wait for the copy.

    A device copies by itself out of pinned memory alone. torch keeps that until it has been read.
    """
    if on_cpu():
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


def module_to_device(module: nn.Module) -> None:
    """Move a module to this rank's device; what is there already stays."""
    module.to(device())


def capability() -> tuple[int, int] | None:
    """Return the compute capability of this rank's GPU; None for a CPU or another maker's GPU."""
    if on_cpu() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device())


def has_triton_kernel() -> bool:
    """Return whether DeepSpeed takes its Triton kernel for grouped products on this device."""
    return get_accelerator().prefer_triton_grouped_mm()


def device_with_room(size: int) -> torch.device:
    """Return this rank's device if another `size` bytes fit on it twice, else the CPU."""
    if not on_cpu() and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 2 * size:
        return torch.device("cpu")
    return device()


def empty_cache() -> None:
    """Hand the GPU memory that nothing uses back to the driver, whose numbers count it as taken."""
    get_accelerator().empty_cache()


def start(timeout_minutes: float) -> None:
    """Join the process group of the launcher's variables, and the store where its ranks meet.

    The variables are LOCAL_RANK, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The limit is that
    of every collective, and of the ranks' coming where they have not met before.
    On CPU no extension is compiled: the shared-memory collective costs minutes and a compiler at
    the first start and leaves a file in /dev/shm behind; gloo does the same work.
    `__compatible_ops__` is the documented place to say so.
    """
    check_version()
    ranks.join(60 * timeout_minutes)
    # torch renamed collectives that DeepSpeed 0.19.8 calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if on_cpu():
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    else:
        accelerator = get_accelerator()
        accelerator.set_device(tell_device_number(accelerator.device_count()))
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu() else None,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


def initialize(model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any]) -> Engine:
    """Wrap a model in a DeepSpeed engine.

    Args:
        model: in the working dtype; its buffers on this rank's device.
        groups: the optimizer's parameter groups, each with a `name`.
        config: the complete DeepSpeed configuration.
    """
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine


# The layer ----------------------------------------------------------------------------------------


def _moe_spec(slots: int, top_k: int, hidden_size: int, ffn_size: int) -> MoELayerSpec:
    """Describe a Nexus layer: softmax scores, not renormalised, applied after the experts."""
    return MoELayerSpec(
        moe_module_name="mlp",
        model_family="nexus",
        router_name="gate",
        experts_name="experts",
        expert_storage="module_list",
        expert_w1_name=STACKED["w1"],
        expert_w2_name=STACKED["w2"],
        expert_w3_name=STACKED["w3"],
        num_experts=slots,
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
        # Without a gate of its own the shared expert is always on, with weight 1.
        shared_experts_gate_name="",
    )


class DeepSpeedRouter(TokenChoiceTopKRouter):
    """What a Nexus router takes over from DeepSpeed's: its place in the layer and these numbers.

    Args:
        hidden_size: width H of a token.
        slots: places for experts over all ranks, vacant ones included.
        top_k: chosen experts a token.
    """

    num_experts: int
    """Slots."""
    top_k: int

    def __init__(self, *, hidden_size: int, slots: int, top_k: int) -> None:
        # On the meta device, since the parent's own free rows are dropped at once.
        with torch.device("meta"):
            super().__init__(
                dim=hidden_size,
                num_experts=slots,
                num_expert_groups=None,
                num_limited_groups=None,
                top_k=top_k,
                score_func="softmax",
                route_norm=False,
                route_scale=1.0,
                gate_bias=False,
            )
        del self.gate


class DeepSpeedMoE(AutoEPMoELayer):
    """What a Nexus layer takes over from DeepSpeed's expert-parallel one, dropless and exact.

    The engine knows its expert layers by `isinstance(module, AutoEPMoELayer)` and joins their
    process groups by `set_deepspeed_parallelism`. The layer is built by hand, with no
    `expert_parallel` section in the JSON: DeepSpeed's own replacement of layers would copy the
    router into an `nn.Linear`, without the projection.

    Args:
        source: block that weights are copied from: `gate`, `experts` (a list over all slots; those
            of other ranks on the meta device) and `shared_expert`.
        slots: places for experts over all ranks; a multiple of `ep_size`.
        top_k: chosen experts a token.
        hidden_size: H.
        ffn_size: F.
        ep_size: ranks over which the experts are spread.
        ep_rank: this rank among them.
        grouped_mm: grouped matrix products instead of a loop over experts.
    """

    ep_size: int
    ep_group: dist.ProcessGroup | None
    """Ranks over which the experts are spread; None until the engine has started."""
    ep_group_name: str
    num_experts: int
    """Slots of all ranks."""
    num_local_experts: int
    """Slots of this rank."""
    router: nn.Module
    experts: Any
    """This rank's experts, a module of parameters: w1, w3 [slots, F, H] and w2 [slots, H, F]."""
    shared_experts: nn.Module

    def __init__(
        self,
        source: nn.Module,
        *,
        slots: int,
        top_k: int,
        hidden_size: int,
        ffn_size: int,
        ep_size: int,
        ep_rank: int,
        grouped_mm: bool,
    ) -> None:
        # DeepSpeed's balancing by a bias would be a second one beside the load-balancing loss.
        config = AutoEPConfig(
            enabled=True, autoep_size=ep_size, use_grouped_mm=grouped_mm, load_balance_coeff=None
        )
        super().__init__(
            spec=_moe_spec(slots, top_k, hidden_size, ffn_size),
            source_module=source,
            ep_size=ep_size,
            ep_rank=ep_rank,
            config=config,
        )

    def split_plan(self, rows_NH: Tensor, counts_E: Tensor) -> SplitPlan:
        """Return how many rows go to and come from each rank, given rows for each slot [slots].

        All ranks of the group must call: they tell each other.
        """
        return compute_split_plan(
            selected_experts=rows_NH,  # looked at for its number alone, and in one process alone
            num_experts=self.num_experts,
            ep_size=self.ep_size,
            num_local_experts=self.num_local_experts,
            ep_group=self.ep_group,
            num_tokens_per_expert=counts_E,
        )


def grouped_products(experts: nn.Module) -> GroupedProducts:
    """Return the products of DeepSpeed's Triton kernel where its experts chose it, else torch's."""
    if not experts.use_triton_grouped_mm:
        return TORCH_PRODUCTS
    # by its path: the package has a function of the module's name
    kernel = importlib.import_module("deepspeed.ops.triton_ops.group_gemm_triton")

    def by_rows(rows_NX: Tensor, rows_NY: Tensor, ends_E: Tensor) -> Tensor:
        return kernel._grouped_dw(rows_NX, rows_NY, ends_E, len(ends_E))

    return GroupedProducts(kernel._group_gemm, by_rows)


def looped_experts(stacked: nn.Module) -> nn.Module:
    """Return DeepSpeed's own loop over stacked weights w1, w2, w3, for comparisons of speed."""
    count, ffn_size, hidden_size = stacked.get_parameter("w1").shape
    with torch.device("meta"):
        experts = GroupedExperts(hidden_size, ffn_size, count, use_grouped_mm=False)
    for name in STACKED:
        setattr(experts, name, getattr(stacked, name))
    return experts


def capacity_moe(
    experts: Sequence[nn.Module], expert_embeddings_EH: Tensor, *, top_k: int, drop_tokens: bool
) -> nn.Module:
    """Return DeepSpeed's older layer (deepspeed.moe), for comparisons of speed.

    Its forward pass returns the routed output, the load-balancing loss and the counts.

    Args:
        experts: all of them; none is copied.
        expert_embeddings_EH: rows of its router.
        top_k: chosen experts a token.
        drop_tokens: whether tokens beyond an expert's capacity are dropped.
    """
    count, hidden_size = expert_embeddings_EH.shape
    layer = MoE(hidden_size, experts[0], count, k=top_k, drop_tokens=drop_tokens)
    # The constructor deep-copies one expert.
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(experts)
    layer.deepspeed_moe.gate.wg.weight = nn.Parameter(expert_embeddings_EH)
    return layer


# Parameters ---------------------------------------------------------------------------------------


def mark_replicated(module: nn.Module) -> None:
    """Tell ZeRO that a module is the same on all ranks, so that all average its gradients.

    The layer's constructor marks only what it has built itself.
    """
    for parameter in module.parameters():
        parameter.allreduce = True  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 holds only a shard of `parameter` here."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also under ZeRO-3."""
    # A shard's own shape is (0,) until it is gathered.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """Yield the full data of one parameter.

    Under ZeRO-3 all ranks of its partition group must enter together.
    """
    whole: AbstractContextManager[object] = nullcontext()
    if is_partitioned(parameter):
        whole = deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
    with whole:
        yield parameter.data


def partitioner(config: DeepSpeedConfig) -> Callable[[nn.Module], None]:
    """Return what keeps only this rank's ZeRO-3 shard of a module's parameters.

    All ranks must call it with the same modules in the same order.
    Experts are partitioned over the ranks that hold the same ones; DeepSpeed refuses to train them
    otherwise. Building the layers inside `zero.Init` would hang: their constructor gathers on some
    ranks alone.

    Args:
        config: the complete DeepSpeed configuration.
    """
    # `zero.Init` partitions one module and leaves the means to go on at its parameters.
    converter: list[nn.Parameter] = []

    def partition(module: nn.Module) -> None:
        for layer in module.modules():
            if isinstance(layer, AutoEPMoELayer):
                _spread_experts(layer)
        whole = [p for p in module.parameters() if not is_partitioned(p)]
        if converter:
            converter[0].convert_to_zero_parameters(param_list=whole)  # type: ignore[attr-defined]
        elif whole:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            converter.append(whole[0])
        release_memory()

    return partition


def _spread_experts(layer: AutoEPMoELayer) -> None:
    """Tell ZeRO-3 over which ranks a layer's experts are partitioned."""
    layer.set_deepspeed_parallelism()
    group = groups._get_expert_data_parallel_group(layer.ep_group_name)
    for parameter in layer.experts.parameters():
        parameter.ds_zero_partition_process_group = group


def buffers_to_device(model: nn.Module) -> None:
    """Move every buffer of a model to this rank's device, persistent or not.

    DeepSpeed moves a whole model there, but of one that is partitioned already (ZeRO-3) the
    parameters alone: its buffers would stay where the model was read, on the CPU, and the first
    product with one of them fails.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device())


def gather_at_once(module: nn.Module) -> None:
    """Let ZeRO-3 gather a module's parameters, its parts' among them, in front of the module.

    Its parts then have no hooks of their own, which cost the host more than a small layer's pass.
    """
    set_z3_leaf_module(module, True)


def release_memory() -> None:
    """Hand freed host memory back to the system.

    glibc keeps freed blocks below 32 MiB, most of a layer's matrices, between live ones.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """Return the fp32 master of a replicated parameter, on the CPU of every rank (all must call).

    A parameter without a master is returned as it is.
    """
    # An fp32 parameter is its own master.
    master = None if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
    if master is not None:
        return master.detach().float().cpu()
    with gathered(parameter) as data:
        return data.detach().to("cpu", torch.float32, copy=True)


def wait_for_device() -> None:
    """Wait until the device has done all that it was told; at once on CPUs."""
    get_accelerator().synchronize()


def expert_parallel_group(layer: AutoEPMoELayer) -> dist.ProcessGroup:
    """Return the process group over which the layer's experts are spread."""
    return groups._get_expert_parallel_group(layer.ep_group_name)


def all_reduce_max(value: float) -> float:
    """Return the largest `value` over all ranks."""
    if not dist.is_initialized():
        return value
    # Filled where it is: a number that is copied there would be waited for.
    tensor = torch.full((1,), value, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


# The optimizer's memory ---------------------------------------------------------------------------


class Fragment(NamedTuple):
    """What this rank's optimizer owns of one parameter, flattened: elements [start, start + n)."""

    parameter: nn.Parameter
    start: int
    values: dict[str, Tensor]
    """fp32 (the master), exp_avg, exp_avg_sq: views [n] into the optimizer's own memory, fp32."""


class _Position(NamedTuple):
    """Where a parameter's fragment lies here."""

    group: int
    offset: int
    """Of its first element in the group's flat master."""
    start: int
    """Of its first element in the parameter, flattened."""
    size: int
    """Elements."""


def _flats(optimizer: Any) -> list[Tensor]:
    """Return the flat fp32 masters that the inner optimizer steps, one a group."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
        return optimizer.single_partition_of_fp32_groups
    raise LayoutError(
        f"{type(optimizer).__name__} keeps no ZeRO partition; use ds_configs/z1.json, z2.json or "
        "z3.json"
    )


def _position(optimizer: Any, parameter: Any) -> _Position | None:
    """Return where a parameter's fragment lies; None if this rank owns nothing of it."""
    if is_partitioned(parameter):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * dist.get_rank(parameter.ds_process_group)
        # The last partitions are padded to the size of the others.
        size = min(size, parameter.ds_numel - start)
        return _Position(group, offset, start, size) if size > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    master = mapping.get_hp_fragment_address()
    start = mapping.lp_fragment_address.start
    return _Position(mapping.param_group_index, master.start, start, master.numel)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield what this rank's optimizer owns, in the order of the model's parameters.

    Nothing is communicated; every element of every parameter is owned by exactly one rank. Moments
    are there after the first step or after `set_optimizer_step`. (DeepSpeed's own links to the
    moments are made after the first group's step and miss the experts; nothing here uses them.)
    """
    optimizer = engine.optimizer
    # Streams of DeepSpeed's own may still be at work on what is handed out here.
    get_accelerator().synchronize()
    flats = _flats(optimizer)
    for parameter in engine.module.parameters():
        position = _position(optimizer, parameter)
        if position is None:
            continue
        flat = flats[position.group]
        state = optimizer.optimizer.state[flat]
        kept = {MASTER: flat} | {name: state[name] for name in MOMENTS}
        views = {
            kind: tensor.detach().narrow(0, position.offset, position.size)
            for kind, tensor in kept.items()
        }
        yield Fragment(parameter, position.start, views)


def optimizer_step(engine: Engine) -> int:
    """Return how many updates Adam has counted (0 before the first)."""
    states = (engine.optimizer.optimizer.state[flat] for flat in _flats(engine.optimizer))
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_optimizer_step(engine: Engine, step: int) -> None:
    """Set Adam's count in every flat group; make the moments (zero) where they miss.

    Each group gets a tensor of its own: a shared one would count once a group at every step.
    """
    inner = engine.optimizer.optimizer
    for flat in _flats(engine.optimizer):
        state = inner.state[flat]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(flat, requires_grad=False)
        # Where torch's AdamW keeps it: only the fused one reads it on the device.
        where = flat.device if inner.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=where)


@torch.no_grad()
def weights_from_masters(engine: Engine) -> None:
    """Derive the working weights from the fp32 masters, as the end of an optimizer step does.

    All ranks must call.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
        return
    # What stayed whole after the last pass would keep its old values.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def set_counters(engine: Engine, step: int) -> None:
    """Tell the engine how many optimizer steps lie behind it."""
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
