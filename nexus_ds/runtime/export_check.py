"""What a written checkpoint has to be: bit by bit what the engine holds, and the same model.

The first half finds, for every name on disk, what the engine holds under it, on ways of its own:
the table of `checkpoint/qwen2_moe` and each rank's list of its experts, not the walk that wrote.
Hashes travel, not tensors.
The second half lets stock transformers compute a few tokens out of the written files, a layer in
memory at a time. Each layer is given what the engine's layer was given, and has to return what that
one returned. So rounding counts for one layer and never adds up: the bounds know no depth. Routing
is the reason: compared at the end alone, a mixture of 18 layers differs by more than many a mistake
does, since a token near a tie takes another expert and is another token from there on. Beside it
goes the checkpoint's own way, whose mean loss and logits are judged by wider bounds.

Shapes: S tokens of the probe, K chosen experts a token, E routed experts, H hidden size, V
vocabulary. A pair of rows, 2: the engine's states and those of the checkpoint's own way.
Not covered: replicas in other expert-parallel groups (training keeps them equal).
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.checkpoint.config_json import read_config
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import repeated
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.loading import LOAD_ERRORS
from nexus_ds.checkpoint.needs import PROBE_TOKENS
from nexus_ds.checkpoint.projection_module import domain_inputs, expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import Role, Stored, gate_name
from nexus_ds.checkpoint.qwen3_next import open_reader
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.sidecar import Sidecar, read_sidecar
from nexus_ds.checkpoint.streaming import LAYERS, streamed_model
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import watchdog
from nexus_ds.runtime.deepspeed_internals import Engine
from nexus_ds.runtime.engine import moe_layers
from nexus_ds.runtime.nexus_moe import NexusMoE
from nexus_ds.runtime.portable_state import STACKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Hook = Callable[..., object]
"""What torch calls before or after a module."""
KEPT = "nothing was exported, the training state is kept"
INPUTS = "domain embeddings of the sidecar"


# Bit by bit --------------------------------------------------------------------------------------


def _hash(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return a sha256 of a tensor in `dtype`: of its shape and bytes."""
    on_cpu = tensor.detach().to("cpu", dtype).contiguous()
    digest = hashlib.sha256(f"{tuple(on_cpu.shape)}".encode())
    # numpy has no bf16, but bytes are bytes
    digest.update(on_cpu.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _projection_name(layer: int, part: str) -> str:
    return f"{part} of the sidecar's projection of layer {layer}"


class _Held:
    """Hashes of what the engine holds, by the names on disk.

    All ranks walk alike, since ZeRO-3 gathers each parameter on all; what a rank holds for rank 0's
    checkpoint is in its `hashes`.
    """

    def __init__(self, model: Any, table: Mapping[str, Stored], dtype: torch.dtype) -> None:
        # by place in the model: the walk that wrote went by class
        self.blocks: list[Any] = [layer.mlp for layer in model.model.layers]
        self.parameters = dict(model.named_parameters())
        self.table = table
        self.copies = repeated(model.config_json) if table else {}
        self.dtype = dtype
        self.hashes: dict[str, str] = {}

    def _keep(self, name: str, parameter: Tensor, scale: float = 1.0) -> None:
        watchdog.at(f"the hash of {name}", minutes=watchdog.LAYER)
        with internals.gathered(parameter) as data:
            if dist.get_rank() == 0:
                self.hashes[name] = _hash(data * scale, self.dtype)

    def dense(self) -> None:
        """Hash a model without experts."""
        for name, parameter in self.parameters.items():
            self._keep(name, parameter)

    def mixture(self) -> None:
        """Hash a mixture: each entry of the table once."""
        for name, entry in self.table.items():
            # any block for what stands outside of the layers: none is asked
            block = self.blocks[entry.layer]
            if entry.role is Role.DENSE:
                # an output layer that is tied stands under the embedding's name alone
                self._keep(name, self.parameters[name])
            elif entry.role is Role.SHARED:
                weight = getattr(block.shared_experts, entry.part).weight
                self._keep(name, weight, entry.scale)
            elif entry.role is Role.SHARED_GATE:
                assert entry.fill is not None
                self._keep(name, torch.full(entry.shape, entry.fill))
            elif entry.role is Role.CONTEXT_MEAN:
                self._keep(name, block.router.mean)
            elif entry.role is Role.ROUTER:
                self._router(name, entry.layer)
        for name, source in self.copies.items():
            if source in self.hashes:
                self.hashes[name] = self.hashes[source]
        # stack by stack: under ZeRO-3 an expert alone can't be gathered
        for layer, block in enumerate(self.blocks):
            self._experts(layer, block)

    def _router(self, name: str, layer: int) -> None:
        """Hash free rows, or what rows are made of: P and what it reads."""
        router = self.blocks[layer].router
        if router.projection is None:
            self._keep(name, router.gate.weight)
            return
        # rows are computed of the sidecar that was written: that one has to be right
        for part, parameter in router.projection.named_parameters():
            self._keep(_projection_name(layer, part), parameter)
        self._keep(f"{INPUTS}, layer {layer}", router.domain_inputs)

    def _experts(self, layer: int, block: NexusMoE) -> None:
        """Hash this rank's experts, if it is in rank 0's expert-parallel group."""
        names = {
            (entry.expert, entry.part): name
            for name, entry in self.table.items()
            if entry.role is Role.ROUTED and entry.layer == layer
        }
        for stacked, part in STACKED:
            watchdog.at_layer("the hashes of experts", layer)
            with internals.gathered(getattr(block.experts, stacked)) as local:
                # a replica of rank 0's group: it only took part in gathering
                if dist.get_rank() >= block.placement.ep_size:
                    continue
                for slot, expert in enumerate(block.placement.local_experts()):
                    if expert is not None:
                        self.hashes[names[expert, part]] = _hash(local[slot], self.dtype)


def held_hashes(model: Any, table: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, str]:
    """Return a hash of all that this rank holds of the checkpoint, by its name there.

    All ranks must call. One parameter is whole at a time.

    Args:
        model: the engine's.
        table: what a mixture's checkpoint stores; empty for a dense model.
        dtype: on disk.
    """
    held = _Held(model, table, dtype)
    if table:
        held.mixture()
    else:
        held.dense()
    return held.hashes


def _sidecar_hashes(sidecar: Sidecar, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Yield hashes of what routers are made of, as a model of `dtype` reads it."""
    for layer, projection in enumerate(sidecar.projections):
        for part, weight in projection.items():
            yield _projection_name(layer, part), _hash(torch.from_numpy(weight), dtype)
        yield f"{INPUTS}, layer {layer}", _hash(domain_inputs(sidecar), dtype)


def check_written(directory: Path, dtype: torch.dtype, held: Mapping[str, str]) -> None:
    """Read a written checkpoint back and compare it with what the ranks hold, bit by bit.

    Rows of a router with P are compared with P(D) of the sidecar, and the sidecar with the engine.

    Args:
        directory: of the checkpoint.
        dtype: on disk.
        held: of all ranks together, see `held_hashes`.

    Raises:
        CheckpointError: with the first tensor that is another, and whose it is.
    """
    reader = open_reader(Headers(directory), read_config(directory))
    found = {}
    for name in reader.names():
        watchdog.at(f"the reading of {name}", minutes=watchdog.LAYER)
        found[name] = _hash(reader.read(name), dtype)
    expected = dict(held)
    if is_nexus(directory):
        sidecar = read_sidecar(directory)
        found |= _sidecar_hashes(sidecar, dtype)
        for layer in range(len(sidecar.projections)):
            rows_EH = expert_embeddings(sidecar, layer, dtype)
            expected[gate_name(layer)] = _hash(rows_EH, dtype)
    _compare(expected, found)


def _compare(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise CheckpointError unless all hashes are the same."""
    # of both: a tensor too many is as wrong as one that is missing
    names = sorted(expected.keys() | found.keys())
    wrong = [name for name in names if expected.get(name) != found.get(name)]
    if not wrong:
        return
    first = wrong[0]
    holds = "something else"
    if first not in found:
        holds = "nothing"
    for name, own in expected.items():
        if own == found.get(first):
            holds = f"what belongs under {name!r}"
    raise CheckpointError(
        f"{len(wrong)} of {len(names)} tensors on disk are not what was trained; the first, "
        f"{first!r}, holds {holds}, expected the engine's bits; {KEPT}: start the same command "
        "again, and if it fails again, look for damaged memory or disks"
    )


# A pass of few tokens ----------------------------------------------------------------------------

MOST_FLIPS = 0.5
"""Share of a layer's tokens that may take another expert, each of them near a tie: where rounding
decides for more, the layer's experts would not have been compared."""


@dataclass(frozen=True)
class Bounds:
    """How far the checkpoint may be from the engine for reasons of rounding."""

    layer: float
    """L2 norm of a token's difference after one layer, over what that layer adds to the token."""
    rounding: float
    """Beside it: share of the token's own norm, since the sum is rounded once more."""
    tie: float
    """Difference of two router logits that rounding may turn round, over their root mean square."""
    head: float
    """Largest difference of a logit by the last norm and output layer, over the largest logit."""
    logits: float
    """The same by the whole model, of tokens whose routes agree in every layer."""
    judged: float
    """Quantile of these tokens that has to be within `logits`."""
    loss: float
    """Difference of the mean loss by the whole model, nats."""


BOUNDS = {
    torch.float32: Bounds(1e-4, 2.0**-22, 1e-4, 1e-5, 1e-5, 1.0, 1e-5),
    # About a dozen roundings of 2^-9 in a row are 0.7%, two sets of kernels showed up to 1.2%;
    # a wrong expert, a wrong norm or half a shared expert are tens of per cent.
    torch.bfloat16: Bounds(2.0**-4, 2.0**-8, 2.0**-3, 2e-2, 5e-2, 0.5, 0.05),
}


@dataclass(frozen=True)
class Seen:
    """The engine's pass of the probe, as its layers saw it."""

    tokens_1S: Tensor
    states: list[Tensor]
    """[S, H] that each layer was given, and the last norm."""
    choices: list[Tensor]
    """[S, K] of each layer; empty for a dense model."""
    logits_SV: Tensor
    """fp32."""


@dataclass
class Agreement:
    """How near the written checkpoint came to the engine."""

    logits: float = 0.0
    """Largest difference, over the largest logit, of tokens whose routes agree in every layer."""
    loss: float = 0.0
    """Difference of the mean loss, nats."""
    layer: float = 0.0
    """Largest difference after one layer over what is allowed."""
    flips: int = 0
    """Tokens that took another expert in some layer."""
    tokens: int = 0
    device: str = ""
    """Where the checkpoint was computed."""

    def describe(self) -> str:
        """Return one line for the log."""
        return (
            f"all tensors are the engine's bit by bit; {self.tokens} tokens on {self.device}: "
            f"mean loss off by {self.loss:.1e}, {self.flips} near a tie took another expert, a "
            f"layer used {self.layer:.0%} of what rounding is allowed"
        )


@torch.no_grad()
def observe(engine: Engine, probe_BS: Tensor) -> Seen:
    """Pass the first tokens of a probe through the engine. All ranks must call, with the same."""
    tokens_1S = probe_BS[:1, :PROBE_TOKENS]
    model: Any = engine.module
    states: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0][0])

    # what leaves the last layer is what the norm is given
    stations = (*model.model.layers, model.model.norm)
    hooks = [station.register_forward_pre_hook(keep) for station in stations]
    try:
        logits_1SV = engine(input_ids=tokens_1S, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    choices = []
    for layer in moe_layers(model):
        assert layer.router.latest is not None
        choices.append(layer.router.latest.selected_TK)
    return Seen(tokens_1S, states, choices, logits_1SV[0].float())


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the exported model does not compute what was trained: {reason}; {KEPT}"
    )


def _chosen(choices_SK: Tensor, experts: int) -> Tensor:
    """Return which experts each token goes to, [S, E] bool: their order does not count."""
    return F.one_hot(choices_SK, experts).sum(1).bool()


@dataclass
class _Comparison:
    """Follows the stock model through its layers, beside what the engine's were seen to do."""

    seen: Seen
    bounds: Bounds
    found: Agreement = field(default_factory=Agreement)

    def __post_init__(self) -> None:
        tokens_S = self.seen.tokens_1S[0]
        self.same_S = torch.ones_like(tokens_S, dtype=torch.bool)
        """Whether the checkpoint's own way has agreed so far."""
        self.judged_S = self.same_S
        """Whether a token's route in the last layer was the engine's, given the engine's states."""
        self.given_2SH: Tensor = torch.empty(0)

    def watch(self, model: PreTrainedModel) -> None:
        """Put hooks into the model, before its first pass."""
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(self._giver(index))
            gate = getattr(layer.mlp, "gate", None)
            if self.seen.choices and gate is not None:
                gate.register_forward_hook(self._router_judge(index))
            layer.register_forward_hook(self._layer_judge(index))
        model.model.norm.register_forward_pre_hook(self._giver(len(model.model.layers)))

    def _giver(self, index: int) -> Hook:
        """Return a hook that puts the engine's states into the first row."""

        def give(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            watchdog.at_layer("the check of what it computes", index)
            own_2SH = inputs[0]
            states_SH = self.seen.states[index].to(own_2SH)
            if index == 0 and not torch.equal(own_2SH[0], states_SH):
                raise _refused("the embeddings of the probe's tokens are others")
            # a new tensor: the stock model may still use what it gave
            self.given_2SH = torch.stack([states_SH, own_2SH[1]])
            return (self.given_2SH, *inputs[1:])

        return give

    def _router_judge(self, index: int) -> Hook:
        def judge(_: nn.Module, __: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_TE, chosen_TK = output[0], output[2]
            forced_SE = logits_TE.float().chunk(2)[0]
            experts = forced_SE.shape[-1]
            engine_SE = _chosen(self.seen.choices[index].to(chosen_TK), experts)
            forced_SK, own_SK = chosen_TK.chunk(2)
            own_SE = _chosen(own_SK, experts)
            self.same_S = self.same_S.to(own_SE.device) & (own_SE == engine_SE).all(-1)
            self._judge_routes(index, forced_SE, _chosen(forced_SK, experts), engine_SE)

        return judge

    def _judge_routes(
        self, index: int, logits_SE: Tensor, stock_SE: Tensor, engine_SE: Tensor
    ) -> None:
        """Refuse routes that differ though the engine's states are given, unless near a tie."""
        self.judged_S = (stock_SE == engine_SE).all(-1)
        gained_SE = logits_SE.masked_fill(~(stock_SE & ~engine_SE), -torch.inf)
        lost_SE = logits_SE.masked_fill(~(engine_SE & ~stock_SE), torch.inf)
        scale = logits_SE.square().mean().sqrt().clamp_min(1e-30)
        # -inf where nothing differs
        gap_S = (gained_SE.amax(-1) - lost_SE.amin(-1)) / scale
        far = int((gap_S > self.bounds.tie).sum())
        flips = int((~self.judged_S).sum())
        if far or flips > MOST_FLIPS * len(gap_S) or not torch.isfinite(scale):
            widest = float(gap_S.max())
            raise _refused(
                f"given the engine's states, the router of layer {index} sends {flips} of "
                f"{len(gap_S)} tokens to other experts, {far} of them with logits apart by more "
                f"than {self.bounds.tie:.0e} of their size, up to {widest:.1e}; "
                f"expected none of these, and at most {MOST_FLIPS:.0%} near a tie"
            )

    def _layer_judge(self, index: int) -> Hook:
        def judge(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states_2SH = output if isinstance(output, Tensor) else output[0]
            given_SH: Tensor = self.given_2SH[0].float()
            engine_SH = self.seen.states[index + 1].to(given_SH)
            difference_S = (states_2SH[0].float() - engine_SH).norm(dim=-1)
            added_S = (engine_SH - given_SH).norm(dim=-1)
            rounded_S = self.bounds.rounding * engine_SH.norm(dim=-1)
            allowed_S = (self.bounds.layer * added_S + rounded_S).clamp_min(1e-30)
            used_S = (difference_S / allowed_S)[self.judged_S.to(given_SH.device)]
            used = float(used_S.max())
            # "not <=": NaN is no agreement
            if not used <= 1:
                raise _refused(
                    f"given the engine's states, layer {index} differs {used:.1f} times as much as "
                    f"rounding is allowed ({self.bounds.layer:.0e} of what the layer adds and "
                    f"{self.bounds.rounding:.0e} of the sum), expected at most once"
                )
            self.found.layer = max(self.found.layer, used)

        return judge

    def judge_logits(self, logits_2SV: Tensor) -> Agreement:
        """Compare the logits of both rows with the engine's, and the loss of the second."""
        engine_SV = self.seen.logits_SV.to(logits_2SV.device)
        scale = engine_SV.abs().max().clamp_min(1e-9)
        forced_SV, own_SV = logits_2SV.float()
        head_S = (forced_SV - engine_SV).abs().amax(-1) / scale
        _within("logits", float(head_S.max()), self.bounds.head)
        same_S = self.same_S.to(own_SV.device)
        own_S = ((own_SV - engine_SV).abs().amax(-1) / scale)[same_S]
        found = self.found
        found.tokens = len(same_S)
        found.flips = int((~same_S).sum())
        # none may be left in a deep mixture; each layer has been judged by itself all the same
        if len(own_S):
            _within("logits", float(own_S.quantile(self.bounds.judged)), self.bounds.logits)
            found.logits = float(own_S.max())
        found.loss = abs(self._loss(own_SV) - self._loss(engine_SV))
        if not found.loss <= self.bounds.loss:
            bound = self.bounds.loss
            raise _refused(
                f"the mean loss differs by {found.loss:.1e}, expected at most {bound:.0e}"
            )
        return found

    def _loss(self, logits_SV: Tensor) -> float:
        """Return the mean loss of the probe's tokens but the first, in nats."""
        targets_s = self.seen.tokens_1S[0, 1:].to(logits_SV.device)
        return float(F.cross_entropy(logits_SV[:-1], targets_s)) if len(targets_s) else 0.0


def _within(what: str, found: float, bound: float) -> None:
    # "not <=": NaN is no agreement
    if not found <= bound:
        raise _refused(f"{what} differ by {found:.1e} of the largest, expected at most {bound:.0e}")


@contextmanager
def _cores_for(device: torch.device, engine: torch.device) -> Iterator[None]:
    """Let a pass that had to leave the GPU use half of the cores that this rank may run on.

    Launchers leave one thread a rank; the others' ranks only wait meanwhile.
    """
    threads = torch.get_num_threads()
    if device != engine and device.type == "cpu":
        torch.set_num_threads(max(threads, len(os.sched_getaffinity(0)) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def bytes_at_once(reader: TensorReader, logits: int) -> int:
    """Return bytes that the pass holds on the device at once (`planning/export.py` plans the same).

    Args:
        reader: of the checkpoint; its largest layer, the last norm and the output layer are held.
        logits: bytes of those of both rows.
    """
    sizes: dict[str, int] = {}
    for name in reader.names():
        info = reader.info(name)
        # "model.layers.3" of what stands in a layer
        place = ".".join(name.split(".")[:3]) if name.startswith(LAYERS) else name
        sizes[place] = sizes.get(place, 0) + info.end - info.start
    head = sizes[HEAD] if HEAD in sizes else sizes[EMBEDDING]
    layers = [size for place, size in sizes.items() if place.startswith(LAYERS)]
    return head + sizes["model.norm.weight"] + max(layers, default=0) + logits


def _streamed(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        return streamed_model(directory, dtype, device)
    # whoever trained for days has to read that nothing is lost
    except CheckpointError as error:
        raise _refused(str(error)) from error


# a graph would keep every layer that was read
@torch.no_grad()
def check_computes(directory: Path, dtype: torch.dtype, seen: Seen) -> Agreement:
    """Compute the probe out of a written checkpoint with stock transformers, layer by layer.

    It runs where the engine does if a layer fits there beside it, else on the CPU; a layer is read
    when its turn comes.

    Args:
        directory: of the checkpoint.
        dtype: working dtype.
        seen: the engine's pass.

    Raises:
        CheckpointError: it computes something else, or transformers can't load it.
    """
    # what training has freed is the allocator's still, and the driver's numbers don't show it
    gc.collect()
    internals.empty_cache()
    logits = 2 * seen.logits_SV.numel() * dtype.itemsize
    room = bytes_at_once(TensorReader(directory), logits)
    device = internals.device_with_room(room)
    comparison = _Comparison(seen, BOUNDS[dtype])
    # the streamed model stands on the CPU, whatever its layers compute on
    tokens_2S = seen.tokens_1S.cpu().expand(2, -1)
    comparison.found.device = str(device)
    with _cores_for(device, seen.logits_SV.device):
        try:
            model = _streamed(directory, dtype, device)
            # a loop over the experts: grouped kernels of some GPUs take TF32 for fp32
            model.config._experts_implementation = "eager"
            comparison.watch(model)
            logits_2SV = model(input_ids=tokens_2S, use_cache=False).logits
        except LOAD_ERRORS as error:
            said = " ".join(str(error).split())[:300]
            raise _refused(f"transformers can't load it: {said}") from error
        return comparison.judge_logits(logits_2SV)
