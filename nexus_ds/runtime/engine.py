"""The DeepSpeed engine of a run: its configuration, parameter groups and batch arithmetic.

A DeepSpeed JSON is read, checked and completed as a plain dictionary, in DeepSpeed's own keys.

Not covered: pipeline, tensor and sequence parallelism; fp16.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nexus_ds.checkpoint.json_files import parse_json_object
from nexus_ds.errors import CheckpointError, ConfigError, LayoutError
from nexus_ds.model.compiled import compile_layers
from nexus_ds.model.compiler import check_compiler
from nexus_ds.model.head import use_loss_head
from nexus_ds.planning.fitting import offload_of, stage_of
from nexus_ds.planning.layout import expert_parallel, leaf_elements
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.attention import attend_whole_windows
from nexus_ds.runtime.deepspeed_internals import DeepSpeedConfig, Engine, full_shape
from nexus_ds.runtime.nexus_moe import NexusMoE, Placement
from nexus_ds.runtime.ranks import together
from nexus_ds.settings import Config, ParallelConfig, TrainingConfig
from nexus_ds.words import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# DeepSpeed ignores a misspelt key at top level; here it is refused.
KNOWN_KEYS = frozenset(
    [
        "zero_optimization",
        "activation_checkpointing",
        "aio",
        "comms_logger",
        "communication_data_type",
        "compile",
        "flops_profiler",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "torch_autocast",
    ]
)
OWNED_KEYS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "training.clip",
    "optimizer": "training.lr, weight_decay, beta1, beta2",
    "scheduler": "training.schedule, warmup, final_lr",
    "bf16": "model.dtype",
    "fp16": "model.dtype (fp32 or bf16)",
    "expert_parallel": "parallel.expert",
    "data_types": "training.gradient_dtype",
}

# Keys of `zero_optimization` whose other values can't train or can't be saved exactly: the one
# value that can, and why.
REFUSED: dict[str, tuple[bool | int | None, str]] = {
    "round_robin_gradients": (
        False,
        "DeepSpeed then files masters under other parameters than they belong to",
    ),
    "compute_grad_norm": (True, "a batch without a finite gradient is told by the norm"),
    "contiguous_gradients": (True, "DeepSpeed's expert layers need it"),
    "reduce_scatter": (True, "DeepSpeed's expert layers need it"),
    "zero_hpz_partition_size": (
        1,
        "DeepSpeed's expert layers do not run with secondary partitions",
    ),
    "zero_quantized_gradients": (
        False,
        "DeepSpeed's expert layers do not run with quantized gradients",
    ),
    "zero_quantized_weights": (False, "training would no longer be exact"),
    "zenflow": (None, "its optimizer keeps no state that could be saved exactly"),
}


@dataclass(frozen=True)
class Batch:
    """How the sequences of a step are cut over ranks and forward passes."""

    micro: int
    """Sequences of one rank and forward pass."""
    accumulation: int
    """Forward passes of a rank in one optimizer step."""
    checkpointing: str = "none"
    """What the backward pass makes of activations: none | reentrant | non_reentrant."""


def split_batch(training: TrainingConfig, world: int) -> Batch:
    """Cut training.batch_size over ranks and passes, where no memory is known.

    Raises:
        LayoutError: it does not come out even.
    """
    share, rest = divmod(training.batch_size, world)
    if rest:
        raise LayoutError(
            f"training.batch_size {training.batch_size} does not divide over {world} ranks; use a "
            f"multiple of {world}"
        )
    micro = training.micro_batch_size or share
    if share % micro:
        raise LayoutError(
            f"a rank's {share} sequences a step are not a multiple of training.micro_batch_size "
            f"{micro}; change one of them"
        )
    kind = training.activation_checkpointing
    return Batch(micro, share // micro, "none" if kind == "auto" else kind)


def expert_parallel_size(
    parallel: ParallelConfig, experts: int, world: int, local_world: int
) -> int:
    """Return parallel.expert, or for 0 the largest useful size inside one node.

    Raises:
        LayoutError: parallel.expert does not divide the ranks.
    """
    # torchrun may have fewer ranks on another node
    size = expert_parallel(parallel, experts, math.gcd(world, local_world))
    if world % size:
        raise LayoutError(
            f"parallel.expert {size} does not divide {world} ranks; use a divisor of {world}, or 0 "
            "for automatic"
        )
    return size


def placement(
    parallel: ParallelConfig, experts: int, rank: int, world: int, local_world: int
) -> Placement:
    """Return where the routed experts of this rank are."""
    size = expert_parallel_size(parallel, experts, world, local_world)
    return Placement(experts, size, rank % size)


def read_deepspeed_json(path: Path | None, parallel: ParallelConfig) -> DeepSpeedConfig:
    """Read a DeepSpeed JSON; without one, return what the recipe's ZeRO stage asks for.

    Raises:
        ConfigError: no such file, no JSON, or keys that don't belong there.
    """
    if path is None:
        stage = parallel.zero_stage
        return {"zero_optimization": {"stage": stage} if stage else {}}
    if not path.is_file():
        raise ConfigError(f"no DeepSpeed configuration at {path}; the project's are in ds_configs/")
    try:
        values = parse_json_object(path.read_bytes(), str(path))
    except CheckpointError as error:  # of a file that is no checkpoint's
        raise ConfigError(str(error)) from error
    if not isinstance(values.get("zero_optimization", {}), dict):
        raise ConfigError(
            f"{path}: zero_optimization is {str(values['zero_optimization'])[:100]}, expected an "
            "object"
        )
    for key in values:
        if key in OWNED_KEYS:
            raise ConfigError(
                f"{path}: {key} is set by the recipe ({OWNED_KEYS[key]}); remove it from the JSON"
            )
        if key not in KNOWN_KEYS:
            raise ConfigError(f"{path}: unknown key {key}{nearest(key, KNOWN_KEYS)}")
    return values


def check_layout(
    values: DeepSpeedConfig, config: Config, world: int, local_world: int, experts: int
) -> tuple[int, Batch]:
    """Judge a layout before anything is loaded; return its ZeRO stage and how the batch is cut.

    Args:
        values: the DeepSpeed JSON; its `zero_optimization.stage` is filled in.
        config: the run's configuration.
        world: number of ranks.
        local_world: ranks of a node.
        experts: routed experts of the model, 0 for a dense one.

    Raises:
        LayoutError: what DeepSpeed can't do, or can't do exactly.
        ConfigError: keys that DeepSpeed does not know.
    """
    zero = values.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", stage_of(config.parallel))
    internals.check_zero_section(zero)
    # DeepSpeed takes "2" and true for numbers.
    if type(stage) is not int:
        raise ConfigError(f"zero_optimization.stage is {stage!r}, expected 1, 2 or 3")
    if stage == 0:
        raise LayoutError(
            "ZeRO stage 0 clips wrongly with expert layers and keeps no masters; use "
            "ds_configs/z1.json or higher"
        )
    _check_refused(zero)
    _check_offload(zero, stage)
    _check_gradients(zero, stage, config.training)
    if experts:
        expert_parallel_size(config.parallel, experts, world, local_world)
    return stage, split_batch(config.training, world)


def _check_refused(zero: DeepSpeedConfig) -> None:
    """Raise LayoutError for a setting whose value can't train, or can't be saved exactly."""
    for key, (value, why) in REFUSED.items():
        # An explicit null is DeepSpeed's default, which is the value that can.
        if zero.get(key, value) not in (value, None):
            raise LayoutError(
                f"zero_optimization.{key}: {zero[key]!r} is not supported: {why}; remove it from "
                "the JSON"
            )


def _check_offload(zero: DeepSpeedConfig, stage: int) -> None:
    """Raise LayoutError for an offload that DeepSpeed can't do at this ZeRO stage."""
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise LayoutError(f"zero_optimization.{key}.device: nvme is not supported; use cpu")
    parameters = (zero.get("offload_param") or {}).get("device", "none")
    if stage != 3 and parameters != "none":
        raise LayoutError(
            f"zero_optimization.offload_param needs ZeRO stage 3, this is stage {stage}; use "
            "ds_configs/z3_offload.json"
        )


def _check_gradients(zero: DeepSpeedConfig, stage: int, training: TrainingConfig) -> None:
    """Raise LayoutError for fp32 gradients where no ZeRO optimizer of ours sums them."""
    if training.gradient_dtype != "fp32":
        return
    if stage == 1:
        # DeepSpeed then takes its BF16_Optimizer, whose states `fragments` does not know.
        raise LayoutError(
            "training.gradient_dtype fp32 needs ZeRO stage 2 or 3, this is stage 1; use "
            "ds_configs/z2.json, or training.gradient_dtype=model"
        )
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise LayoutError(
            "training.gradient_dtype fp32 is not supported with zero_optimization."
            "offload_optimizer; remove one of them"
        )


def deepspeed_config(values: DeepSpeedConfig, config: Config, batch: Batch) -> DeepSpeedConfig:
    """Complete a DeepSpeed JSON that `check_layout` accepted with what the recipe decides."""
    training = config.training
    offload = offload_of(values["zero_optimization"]) != "none"
    adam = {
        "lr": training.lr,
        "betas": [training.beta1, training.beta2],
        "eps": 1e-8,
        "weight_decay": training.weight_decay,
        # DeepSpeed's own AdamW builds a C++ or CUDA extension at the first start.
        "torch_adam": True,
    }
    if offload:
        # DeepSpeed refuses an offloaded optimizer that is not its own, unless told to take it.
        values.setdefault("zero_force_ds_cpu_optimizer", False)
    if offload or not internals.on_cpu():
        # On the host, too: one pass over memory instead of a dozen (tests/adam_speed.py).
        adam["fused"] = True
    return values | {
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        # Always explicit: without it DeepSpeed clips at 1.0.
        "gradient_clipping": training.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": config.model.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": _gradient_dtype(config)},
        # The run has a log of its own.
        "steps_per_print": values.get("steps_per_print", 10**9),
    }


def _gradient_dtype(config: Config) -> str | None:
    """Return DeepSpeed's name of the dtype that gradients are summed in; None: the weights'."""
    return "fp32" if config.training.gradient_dtype == "fp32" else None


def parameter_groups(
    model: nn.Module, training: TrainingConfig, router_lr_scale: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices (decayed), vectors, and the router with a rate of its own.

    For a projection Adam moves `W1 d` by up to lr * |d|_1 a step, many times what it moves a free
    expert embedding: at the model's learning rate the embeddings blow up and the gate saturates.
    Each group has a name, which DeepSpeed needs with MoE layers; what learns at another rate than
    the model's has its part in the name (`matrices of backbone`).
    """
    parts = _parts(model)
    lr_scales = {
        "router": router_lr_scale,
        "backbone": training.backbone_lr_scale,
        "shared": training.shared_lr_scale,
        "ffn": 1.0,
    }
    undecayed = {"router"}
    if training.freeze_old_experts:
        # they share their tensors with those that learn
        undecayed.add("ffn")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = parts.get(name, "backbone")
        decayed = part not in undecayed and len(full_shape(parameter)) > 1
        # with 1 it stays in the group that it always had: states go on as they were
        scale = lr_scales[part]
        kind = _group_name(part, decayed, scale)
        group = {"name": kind, "weight_decay": 0.0, "lr_scale": scale, "params": []}
        if decayed:
            group["weight_decay"] = training.weight_decay
        groups.setdefault(kind, group)["params"].append(parameter)
    # in one order whatever the model begins with
    order = ("matrices", "vectors", "router")
    return sorted(groups.values(), key=lambda group: order.index(group["name"].split()[0]))


def _group_name(part: str, decayed: bool, lr_scale: float) -> str:
    if part == "router":
        return part
    kind = "matrices" if decayed else "vectors"
    return kind if lr_scale == 1.0 else f"{kind} of {part}"


def _parts(model: nn.Module) -> dict[str, str]:
    """Return which part of the model a parameter belongs to, by its name: router, shared (expert),
    or ffn (routed experts, a dense model's own); what is missing is the backbone."""
    parts = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, NexusMoE):
            for name, _ in layer.named_parameters(prefix=layer_name):
                inner = name.removeprefix(f"{layer_name}.").split(".")[0]
                parts[name] = {"router": "router", "shared_experts": "shared"}.get(inner, "ffn")
        # a dense model, or a dense layer
        elif layer_name.endswith(".mlp"):
            for name, _ in layer.named_parameters(prefix=layer_name):
                parts[name] = "ffn"
    return parts


def moe_layers(model: nn.Module) -> list[NexusMoE]:
    """Return the Nexus layers of a model in order; an empty list for a dense model."""
    return [module for module in model.modules() if isinstance(module, NexusMoE)]


def start_engine(
    model: PreTrainedModel, values: DeepSpeedConfig, config: Config, batch: Batch
) -> Engine:
    """Wrap a model for training.

    Args:
        model: dense or Nexus, in the working dtype.
        values: the DeepSpeed JSON.
        config: the run's configuration.
        batch: how the batch is cut.

    Returns:
        The DeepSpeed engine; its optimizer's groups carry `lr_scale`.
    """
    if batch.checkpointing != "none":
        _checkpoint_activations(model, batch.checkpointing == "reentrant")
    layers = moe_layers(model)
    for layer in layers:
        layer.router.loss_scale = 1.0 / batch.accumulation
    linear = bool(layers) and layers[0].router.projection is None
    use_loss_head(model, config.training.loss_kernel)
    attend_whole_windows(model)
    stage = values["zero_optimization"]["stage"]
    width = model.config.hidden_size
    if wants_compiled(config.training.layer_kernels, stage, internals.device(), width):
        compile_layers(model)
    groups = parameter_groups(model, config.training, 1.0 if linear else config.router.lr_scale)
    if stage == 3:
        _gather_layers_at_once(model)
    internals.buffers_to_device(model)
    engine = internals.initialize(model, groups, deepspeed_config(values, config, batch))
    internals.release_memory()  # what DeepSpeed copied on the way to its partitions
    return engine


COMPILED_FROM = 2048
"""Hidden size from which `auto` compiles: it takes a quarter of a minute at the start, and an H100
was no faster with it at 1024, where the host is the bound."""


def wants_compiled(kernels: str, stage: int, device: torch.device, hidden_size: int) -> bool:
    """Return whether layers are compiled; a warning says why not where `auto` would have it. All
    ranks must call.

    Args:
        kernels: training.layer_kernels.
        stage: of ZeRO.
        device: where the model computes.
        hidden_size: of the model; a narrow one is bound by the host, and its runs are short.

    Raises:
        ConfigError: compiled, but the compiler fails.
        LayoutError: compiled under ZeRO-3.
    """
    name = "training.layer_kernels"
    if kernels == "compiled" and stage == 3:
        raise LayoutError(
            f"{name}: found compiled and ZeRO stage 3; expected stage 1 or 2, or {name}=eager"
        )
    worthwhile = device.type != "cpu" and stage < 3 and hidden_size >= COMPILED_FROM
    if kernels == "eager" or (kernels == "auto" and not worthwhile):
        return False
    # all ranks or none: compiled layers round otherwise
    failures = [said for said in together(lambda: _compiler_failure(device, name)) if said]
    if not failures:
        return True
    if kernels == "compiled":
        raise ConfigError(failures[0])
    warnings.warn(f"{failures[0]}; until then a step is slower", stacklevel=2)
    return False


def _compiler_failure(device: torch.device, setting: str) -> str:
    """Return why this rank can't compile; '' if it can."""
    try:
        check_compiler(device, setting)
    except ConfigError as error:
        return str(error)
    return ""


def _gather_layers_at_once(model: PreTrainedModel) -> None:
    """Give ZeRO-3 one hook a decoder layer, where a layer is small enough to be whole at once."""
    for layer in model.get_submodule("model.layers").children():
        elements = sum(math.prod(full_shape(p)) for p in layer.parameters())
        if elements <= leaf_elements():
            internals.gather_at_once(layer)


def _checkpoint_activations(model: PreTrainedModel, reentrant: bool) -> None:
    """Let the backward pass compute each layer's activations once more."""
    # Renamed in transformers 5.2x; the old name works in all supported versions.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set every group's learning rate to `lr` times its scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
