"""Forward passes of a model over windows of text: their losses, and where their routers sent them.

On several devices, each has a copy of the model, a thread, and the next batch that is not begun:
which device made a pass changes no number.

Of chats the answers alone are scored: a window has ~id, which is negative, in the place of an id
that is no label (`data.corpora`). The model reads such ids like all others, and where its routers
send them counts; they have no loss.

Shapes: W windows, S tokens, T = W*S tokens, L layers with a router, E routed experts, K chosen
experts a token, H hidden size, V vocabulary.
Not covered: what the numbers mean (`perplexity`), devices of other nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nexus_ds.checkpoint.loading import routers_of
from nexus_ds.checkpoint.needs import LOGITS_AT_ONCE, MARGIN, Need, Way
from nexus_ds.checkpoint.room import host_room
from nexus_ds.launch import devices
from nexus_ds.model.head import Finish, unmarked
from nexus_ds.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the main memory that a streamed model leaves, for hidden states that wait between two layers.
WAITING_SHARE = 0.25
NO_LABEL = -1  # target whose loss is 0
# Of a module: itself, what it was given, what it returned.
Hook = Callable[[nn.Module, object, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class Routed:
    """Where the tokens of some passes went."""

    layers: list[int]
    """Numbers of the L layers that have a router."""
    counts_LE: np.ndarray
    """Routed slots (tokens times top-k)."""
    gate_sums_L: np.ndarray
    """Probability of the first choice, summed over tokens; float64."""
    tokens: int


@dataclass(frozen=True)
class Passed:
    """What one pass over windows of a domain gave."""

    domain: str
    loss_W: np.ndarray
    """Nats per label of each window, float64."""
    routed: Routed | None
    """None of a model without routers."""


class Unit(NamedTuple):
    """Windows of one domain that a device takes at once."""

    domain: str
    tokens_WS: np.ndarray


class RoutingMeter:
    """Counts routed tokens at a model's routers: `with RoutingMeter(model) as meter: ...`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers = routers_of(model)
        self.layers = list(self.routers)
        self.handles: list[RemovableHandle] = []
        self._forget()

    def take(self) -> Routed | None:
        """Return what was counted since the last call, and begin anew; None without routers."""
        if not self.layers:
            return None
        # Two copies from the device, not two for each layer.
        counts_LE = torch.stack([self.counts[layer] for layer in self.layers]).cpu().numpy()
        sums_L = torch.stack([self.gate_sums[layer] for layer in self.layers]).cpu().numpy()
        tokens = self.tokens[self.layers[0]]
        self._forget()
        return Routed(self.layers, counts_LE, sums_L, tokens)

    def _forget(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.gate_sums: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = dict.fromkeys(self.layers, 0)

    def __enter__(self) -> RoutingMeter:
        for layer, module in self.routers.items():
            self.handles.append(module.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _hook(self, layer: int) -> Hook:
        def count(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
            # transformers 5: (logits, gate values, indices)
            logits_TE, _, chosen_TK = output
            # Sums stay on the device: to ask for them here would wait for it at every layer, and
            # so would bincount, which reads how long its result has to be.
            tokens, experts = logits_TE.shape
            expert_E = torch.arange(experts, device=chosen_TK.device)
            slots_E = (chosen_TK.reshape(-1, 1) == expert_E).sum(0)
            probability_TE = logits_TE.float().softmax(dim=-1)
            gate_T = probability_TE.amax(dim=-1)
            # In fp32, sums over millions of tokens would lose digits.
            gate_sum = gate_T.sum(dtype=torch.float64)
            self.counts[layer] = self.counts.get(layer, 0) + slots_E
            self.gate_sums[layer] = self.gate_sums.get(layer, 0) + gate_sum
            self.tokens[layer] += tokens

        return count


@torch.inference_mode()
def batch_loss(model: PreTrainedModel, tokens_WS: Tensor, rows: int = 0) -> Tensor:
    """Return the next-token cross-entropy (nats, float64 [W]) of each window, summed over labels.

    The logits are made in slices of LOGITS_AT_ONCE numbers and scored in fp32: a large vocabulary
    costs no memory.

    Args:
        model: as transformers loads it, or streamed.
        tokens_WS: token ids [W, S+1]: S inputs and their S targets; ~id for one that is no label.
        rows: windows whose logits are made one after the other; 0: all.
    """
    inputs_WS = unmarked(tokens_WS[:, :-1])
    # Without the output layer, which would make the logits of all tokens at once.
    output = model.base_model(input_ids=inputs_WS, use_cache=False)
    hidden_WSH = output.last_hidden_state
    step = rows or len(tokens_WS)
    parts = zip(hidden_WSH.split(step), tokens_WS[:, 1:].split(step), strict=True)
    return torch.cat([_head_loss(model, *part) for part in parts])


def _head_loss(model: PreTrainedModel, hidden_WSH: Tensor, targets_WS: Tensor) -> Tensor:
    """Return the cross-entropy [W] of windows, of the states that the output layer reads."""
    hidden_TH = hidden_WSH.flatten(0, 1)
    targets_T = targets_WS.flatten().clamp(min=NO_LABEL)
    head = model.get_output_embeddings()
    finish = Finish.of(model.config)
    vocabulary = head.weight.shape[0]
    step = max(1, LOGITS_AT_ONCE // vocabulary)
    losses = []
    for start in range(0, len(hidden_TH), step):
        part = slice(start, start + step)
        logits_tV = finish.logits(head(hidden_TH[part])).float()
        losses_t = F.cross_entropy(
            logits_tV, targets_T[part], reduction="none", ignore_index=NO_LABEL
        )
        losses.append(losses_t)
    losses_WS = torch.cat(losses).view(targets_WS.shape)
    return losses_WS.sum(dim=1, dtype=torch.float64)


def labels(tokens_WS: np.ndarray) -> np.ndarray:
    """Return how many labels each window [W, S+1] has, as [W]; S of plain text."""
    # The first id is an input only.
    learned_WS = tokens_WS[:, 1:] >= 0
    return learned_WS.sum(axis=1)


def on_device(tokens_WS: np.ndarray, model: PreTrainedModel) -> Tensor:
    """Return token ids as int64 on a model's device."""
    # The windows may be a view of a memory-mapped file, of any integer type.
    tokens = np.ascontiguousarray(tokens_WS, dtype=np.int64)
    return torch.from_numpy(tokens).to(model.device)


# Devices -----------------------------------------------------------------------------------------


def all_places() -> list[torch.device]:
    """Return all GPUs of this machine, else the CPU."""
    return [torch.device("cuda", index) for index in range(devices())] or [torch.device("cpu")]


def cut(windows: Mapping[str, np.ndarray], size: int) -> list[Unit]:
    """Return the windows of all domains, `size` of them at once, in order."""
    return [
        Unit(domain, tokens_WS[start : start + size])
        for domain, tokens_WS in windows.items()
        for start in range(0, len(tokens_WS), size)
    ]


def sequences_at_once(need: Need, way: Way, length: int, places: Sequence[torch.device]) -> int:
    """Return the windows of a pass: of a streamed model, which is read anew in each, as many as
    may wait in main memory, in which each device's copy has its own and is itself.

    Args:
        need: of the model.
        way: that it is about to be opened in.
        length: tokens of a window.
        places: devices.
    """
    if not way.streamed:
        return way.rows
    held = need.streamed if places[0].type == "cpu" else need.beside
    free = MARGIN * host_room() / len(places) - held(way.rows, length)
    fit = int(WAITING_SHARE * free / need.waiting(1, length))
    # Whole batches: the sums of a pass are then made of the same parts as those of a whole model.
    return max(way.rows, fit // way.rows * way.rows)


class _Worker:
    """One copy of the model, with what counts at its routers."""

    def __init__(self, model: PreTrainedModel, place: torch.device, rows: int) -> None:
        self.model = model
        self.rows = rows
        self.meter = RoutingMeter(model)
        self.place = place

    def run(self, unit: Unit) -> Passed:
        """Pass once over the windows of a unit."""
        # The current device belongs to a thread; some kernels ask for it.
        current = torch.cuda.device(self.place) if self.place.type == "cuda" else nullcontext()
        with current:
            tokens_WS = on_device(unit.tokens_WS, self.model)
            loss_W = batch_loss(self.model, tokens_WS, self.rows).cpu().numpy()
        return Passed(unit.domain, loss_W / labels(unit.tokens_WS), self.meter.take())


def _passes(workers: Sequence[_Worker], units: Sequence[Unit], progress: Progress) -> list[Passed]:
    """Return the passes over all units, in their order."""
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(unit: Unit) -> Passed:
        worker = idle.get()
        try:
            return worker.run(unit)
        finally:
            idle.put(worker)

    found = []
    with ExitStack() as stack:
        # One device needs no thread, and a thread's memory is an arena of its own.
        made: Iterator[Passed] = map(run, units)
        if len(workers) > 1:
            pool = ThreadPoolExecutor(len(workers))
            # What is queued when one fails would be computed for nobody.
            stack.callback(pool.shutdown, cancel_futures=True)
            made = pool.map(run, units)
        for unit, passed in zip(units, made, strict=True):
            found.append(passed)
            progress.advance(len(unit.tokens_WS))
    return found


def timed_passes(
    models: Sequence[PreTrainedModel],
    places: Sequence[torch.device],
    units: Sequence[Unit],
    way: Way,
    title: str,
) -> tuple[list[Passed], float]:
    """Return the passes over all units in order, and the seconds that they took.

    Args:
        models: copies of one model, each for a device of `places`.
        places: devices.
        units: what is passed over.
        way: that the models were opened in.
        title: what the progress line says.
    """
    workers = [_Worker(model, place, way.rows) for model, place in zip(models, places, strict=True)]
    count = sum(len(unit.tokens_WS) for unit in units)
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.meter)
        # One pass uncounted: the first one pays for allocation and kernel selection. A streamed
        # model would be read once more for it.
        for worker in () if way.streamed else workers:
            worker.run(Unit(units[0].domain, units[0].tokens_WS[:1]))
        progress = stack.enter_context(Progress(title, count, "window"))
        started = time.perf_counter()
        found = _passes(workers, units, progress)
        return found, time.perf_counter() - started
