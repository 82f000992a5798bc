"""The training loop: batches in, optimizer steps, validation, states, the verified checkpoint.

A run begins with what is cheap: `resolve` (small files, the layout), `check` (model and text
against each other), `read_data` (tokenises what is missing), `load` (the model), then the engine.
Shapes: B sequences, S tokens, N validation windows, D domains, E routed experts.
Not covered: choosing what to train (train.py) and saving (states, export).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nexus_ds.checkpoint.build import DTYPES, new_dense
from nexus_ds.checkpoint.config_json import read_config
from nexus_ds.checkpoint.records import ExpertRecord, TrainStep, is_nexus
from nexus_ds.checkpoint.sidecar import content_fingerprint, read_sidecar
from nexus_ds.checkpoint.tokenizer import check_tokenizer
from nexus_ds.command_lines import next_evaluation
from nexus_ds.config import dump, get_key
from nexus_ds.data.corpora import TokenFile, open_source, windows
from nexus_ds.data.mixture import Sampler, cycle_slots, domain_weights
from nexus_ds.data.preparation import tokenised
from nexus_ds.data.sources import Source
from nexus_ds.data.tokenizer import open_tokenizer, vocabulary_size
from nexus_ds.errors import (
    BadBatchesError,
    CheckpointError,
    ConfigError,
    DataError,
    LayoutError,
)
from nexus_ds.launch import EXIT_STOPPED, Position
from nexus_ds.model.experts import grouped_kernel
from nexus_ds.model.head import next_token_loss, unmarked
from nexus_ds.model.router import SATURATED
from nexus_ds.outputs import new_file, write_text
from nexus_ds.planning.fitting import fitted, host_refusal, offload_of, refusal, zero_of
from nexus_ds.planning.layout import Layout, Machine, deepspeed_json
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import Sizes, sizes_of
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import states, watchdog
from nexus_ds.runtime.bad_batches import BadBatches
from nexus_ds.runtime.deepspeed_internals import DeepSpeedConfig
from nexus_ds.runtime.domain_card import prepare_card, wants_card
from nexus_ds.runtime.engine import (
    Batch,
    check_layout,
    deepspeed_config,
    moe_layers,
    placement,
    read_deepspeed_json,
    set_learning_rate,
    start_engine,
)
from nexus_ds.runtime.export import export
from nexus_ds.runtime.frozen_experts import freeze, old_experts
from nexus_ds.runtime.metrics import Metrics, Values, steps_told
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.node_checks import gpu_memory, host_memory, machine_of
from nexus_ds.runtime.parallel_model import Partition, keep_whole, load_for_training
from nexus_ds.runtime.ranks import on_rank_0, together, use_cores
from nexus_ds.runtime.schedule import learning_rate, tokens_per_step, total_steps
from nexus_ds.runtime.signals import StopRequest
from nexus_ds.runtime.tally import Routing, Tally
from nexus_ds.settings import Config, that_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLLECTIVE_MARGIN = 1.0  # minutes that a collective may wait longer than the watchdog
ROUNDS_A_LOOK = 8  # of a validation: for each look the host waits until the device is done


MicroBatch = tuple[Tensor, Tensor]
"""Token windows [B, S+1], of chats marked (`head.unmarked`), and domain indices [B], int64, on the
device."""


@dataclass
class Data:
    """What a run reads."""

    files: dict[str, TokenFile]
    sampler: Sampler
    weights: dict[str, float]
    validation: dict[str, np.ndarray] = field(default_factory=dict)
    """Per domain: windows [n, S+1] int64, of chats marked (`head.unmarked`)."""
    messages: list[str] = field(default_factory=list)
    """What a user should know of the text."""


def read_data(config: Config, tokenizer: Path) -> Data:
    """Tokenise what is missing and return the sampler and validation windows. All ranks call.

    Validation text comes first: it is little, and what is wrong with it is told before hours go
    into the other.

    Raises:
        DataError: text that is missing, damaged, or too little.
        ConfigError: domains or weights that don't fit the text.
    """
    settings = config.data
    length = settings.sequence_length
    source = open_source(settings.path)
    scored = _tokenised(config, source, settings.validation_domains, "validation", tokenizer)
    counts = {}
    for name, file in scored.items():
        counts[name] = _windows_of(name, file.blocks(length), config)
    files = _tokenised(config, source, settings.domains, "train", tokenizer)
    weights = domain_weights(settings, {name: file.tokens for name, file in files.items()})
    data = Data(files, Sampler(files, weights, length, config.seed), weights)
    wanted = config.training.eval_windows
    for name, count in counts.items():
        data.validation[name] = _validation(name, scored[name], count, length)
        if count < wanted:
            data.messages.append(
                f"{name}: {count} validation windows, training.eval_windows is {wanted}"
            )
    data.messages += _answers(files)
    return data


def _answers(files: dict[str, TokenFile]) -> list[str]:
    """Return how much of each domain's text is learned, in words; nothing of plain text."""
    found = []
    for domain, file in files.items():
        if file.answers is not None:
            count = f"{file.answers:,} of {file.tokens:,}"
            found.append(f"{domain}: {count} training tokens are answers or text")
    return found


def _validation(domain: str, file: TokenFile, count: int, length: int) -> np.ndarray:
    """Return a domain's validation windows [N, S+1]; DataError where nothing in them is learned."""
    windows_NS = windows(file, count, length, marked=True)
    if not (windows_NS[:, 1:] >= 0).any():
        raise DataError(
            f"{domain}: no token of an answer in its {count} validation windows; raise "
            "training.eval_windows, or give chats whose answers fit into data.sequence_length"
        )
    return windows_NS


def _tokenised(
    config: Config, source: Source, domains: list[str], split: str, tokenizer: Path
) -> dict[str, TokenFile]:
    """Return the token file of each domain.

    Rank 0 verifies what is there and makes what is missing, the others wait.
    """

    def make(verify: bool) -> dict[str, TokenFile]:
        return tokenised(config.data, source, domains, split, tokenizer, verify)

    on_rank_0(lambda: len(make(verify=True)))
    return make(verify=False)


def _windows_of(domain: str, there: int, config: Config) -> int:
    """Return how many of a domain's validation windows are scored.

    Raises:
        DataError: its text has fewer than that.
    """
    training = config.training
    wanted = training.eval_windows
    few = ""
    if not training.eval_every:
        # Scored at both ends alone, no curve: what text there is will do.
        wanted = max(1, min(there, wanted))
        few = " (with training.eval_every 0 one is enough)"
    if there < wanted:
        raise DataError(
            f"{domain}: the validation text makes {there} windows of data.sequence_length "
            f"{config.data.sequence_length}, expected training.eval_windows "
            f"{training.eval_windows}{few}; give more text, or lower one of them"
        )
    return wanted


# The start, cheap steps first ---------------------------------------------------------------------


@dataclass(frozen=True)
class RunLayout:
    """How a run is spread over its ranks, and what of the model that depends on."""

    values: DeepSpeedConfig
    """The DeepSpeed JSON, checked."""
    stage: int
    """Of ZeRO: 1, 2 or 3."""
    batch: Batch
    experts: list[ExpertRecord]
    """Of the model that is trained; empty for a dense one."""
    placement: Placement | None
    """Where this rank's experts are; None for a dense model."""
    frozen: frozenset[int] = frozenset()
    """Numbers of the experts that learn nothing."""

    @property
    def expert_parallel(self) -> int:
        """Ranks over which the experts are spread."""
        return self.placement.ep_size if self.placement else 1


def resolve(config: Config, ds_json: str, here: Position) -> RunLayout:
    """Read the DeepSpeed JSON and the sidecar, and judge the layout; seconds at most.

    Raises:
        ConfigError: the JSON is missing, damaged, or has keys that don't belong there.
        LayoutError: ranks, batch or ZeRO settings that don't go together.
        CheckpointError: a damaged sidecar.
    """
    values = read_deepspeed_json(Path(ds_json) if ds_json else None, config.parallel)
    nexus = bool(config.model.path) and is_nexus(Path(config.model.path))
    experts = read_sidecar(Path(config.model.path)).experts if nexus else []
    count = len(experts)
    stage, batch = check_layout(values, config, here.world, here.local_world, count)
    where = None
    if experts:
        where = placement(config.parallel, count, here.rank, here.world, here.local_world)
    frozen: frozenset[int] = frozenset()
    if config.training.freeze_old_experts:
        frozen = old_experts(config.model.path)
    return RunLayout(values, stage, batch, experts, where, frozen)


def machine_here(here: Position) -> Machine | None:
    """Return what all ranks have of memory, the least of each kind; None on CPUs. All must call."""
    if internals.on_cpu():
        return None
    found = together(lambda: (gpu_memory(), host_memory(os.environ)))
    gpu, host = (min(kind) for kind in zip(*found, strict=True))
    return machine_of(here, gpu, host)


def sizes_here(config: Config) -> Sizes:
    """Return the sizes of what is trained; a new model's vocabulary is its tokenizer's."""
    sizes = sizes_of(config)
    if config.model.path:
        return sizes
    words = vocabulary_size(open_tokenizer(Path(config.model.tokenizer)))
    return dataclasses.replace(sizes, vocabulary=words)


def fit(config: Config, ds_json: str, layout: RunLayout, machine: Machine) -> RunLayout:
    """Return the layout with the batch cut so that it fits the GPUs; with all of ZeRO where the
    recipe leaves it open.

    What the DeepSpeed JSON does not say becomes what the plan counts on. The same on all ranks.

    Raises:
        LayoutError: the plan says that it can't fit, and `parallel.check_memory` stands.
    """
    sizes = sizes_here(config)
    given = layout.values["zero_optimization"] if ds_json else zero_of(config)
    found = fitted(sizes, machine, config, given)
    if config.parallel.check_memory and not found.fits:
        raise LayoutError(refusal(sizes, machine, config, found))
    chosen = found.layout
    zero = deepspeed_json(sizes, chosen)["zero_optimization"] | given
    return dataclasses.replace(
        layout,
        values=layout.values | {"zero_optimization": zero},
        stage=chosen.stage,
        batch=Batch(chosen.micro, chosen.accumulation, chosen.checkpointing),
    )


def check_host(config: Config, layout: RunLayout, here: Position) -> None:
    """Refuse a run on CPUs whose model states alone exceed this node's main memory.

    Raises:
        LayoutError: with the bytes that are needed and there.
    """
    planned = Layout(
        stage=layout.stage,
        offload=offload_of(layout.values["zero_optimization"]),
        expert=layout.expert_parallel,
        world=here.world,
        **vars(layout.batch),
    )
    width = DTYPES[config.model.dtype].itemsize
    memory = host_memory(os.environ)
    problem = host_refusal(sizes_here(config), planned, here.local_world, memory, width)
    if problem:
        raise LayoutError(problem)


def fit_here(config: Config, ds_json: str, layout: RunLayout, here: Position) -> RunLayout:
    """Return the layout as it fits this machine, on CPUs as it is. All must call.

    Raises:
        LayoutError: see `fit` and `check_host`.
    """
    machine = machine_here(here)
    if machine is None:
        if config.parallel.check_memory:
            check_host(config, layout, here)
        return layout
    layout = fit(config, ds_json, layout, machine)
    if offload_of(layout.values["zero_optimization"]) != "none":
        use_cores()
    return layout


def check(config: Config) -> None:
    """Refuse text and model that don't go together, before the text is tokenised, maybe for hours.

    Raises:
        ConfigError: sequences longer than the model's positions, or a mixture that can't be.
        IncompatibleModelsError: tokens that the model does not embed.
    """
    length = config.data.sequence_length
    longest = config.model.max_positions
    if config.model.path:
        stored = read_config(Path(config.model.path))
        longest = int(stored.get("max_position_embeddings") or length)
        check_tokenizer(Path(config.model.tokenizer), int(stored["vocab_size"]))
    if length > longest:
        raise ConfigError(
            f"data.sequence_length {length}: the model reads at most {longest} tokens; lower it"
        )
    # Shares don't depend on the tokens but for `proportional`, which has no settings to be wrong.
    cycle_slots(domain_weights(config.data, dict.fromkeys(config.data.domains, 1)))


def check_room(config: Config) -> None:
    """Refuse a run whose first training state and checkpoint have no room, before it trains.

    A run that has saved states has shown that it has room; a new model's sizes are not read here.

    Raises:
        CheckpointError: with the bytes that are needed and free.
    """
    work = Path(config.output + ".training")
    if not config.model.path or states.steps_saved(work / "states"):
        return
    width = DTYPES[config.model.dtype].itemsize
    planned = disk(sizes_of(config), width, config.training.keep_last)
    needed = int(planned["state"] + planned["export"])
    there = next(folder for folder in work.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"{there}: not enough space for a training state and the checkpoint: need {needed:,} "
            f"bytes, free {free:,}; make room, or give another output"
        )


def grouped_products(config: Config) -> bool:
    """Return whether the experts compute in grouped products: the setting, or what is fast here."""
    if config.parallel.grouped_mm is not None:
        return config.parallel.grouped_mm
    # In fp32 the kernels of older GPUs compute in TF32, and the export would not equal the engine.
    if config.model.dtype != "bf16":
        return False
    return grouped_kernel(internals.capability(), internals.has_triton_kernel()) is not None


def load(config: Config, layout: RunLayout) -> PreTrainedModel:
    """Return the model that trains: read from `model.path`, or new with the sizes of the recipe."""
    if not config.model.path:
        tokenizer = open_tokenizer(Path(config.model.tokenizer))
        vocabulary = vocabulary_size(tokenizer)
        model = new_dense(config.model, vocabulary, tokenizer.eos_token_id, config.seed)
        return model.to(DTYPES[config.model.dtype])
    partition: Partition = keep_whole
    if layout.stage == 3:
        complete = deepspeed_config(layout.values, config, layout.batch)
        partition = internals.partitioner(complete)
    elif not internals.on_cpu():
        # Part by part: main memory would hold the whole model once a rank.
        partition = internals.module_to_device
    return load_for_training(config, layout.placement, grouped_products(config), partition)


class Run:
    """One training run on this rank: engine, data, bookkeeping.

    Args:
        config: the run's configuration, with all paths.
        ds_json: path of the DeepSpeed JSON; '' for the recipe's ZeRO stage.
        here: this rank.

    Raises:
        NexusError: see `resolve`, `check`, `fit`, `read_data` and `load`, in this order.
    """

    ahead: tuple[int, int, MicroBatch] | None = None
    """Step and part of the micro-batch that was made ahead, and it."""
    saved = 0
    """Optimizer step of the newest state; 0: there is none."""

    def __init__(self, config: Config, ds_json: str, here: Position) -> None:
        self.config = config
        self.rank = here.rank
        self.world = here.world
        watchdog.at("the checks of the recipe")
        layout = resolve(config, ds_json, here)
        check(config)
        on_rank_0(lambda: check_room(config))
        layout = fit_here(config, ds_json, layout, here)
        watchdog.at("the text", minutes=watchdog.PREPARING)
        self.data = read_data(config, Path(config.model.tokenizer))
        self.work = Path(config.output + ".training")
        if wants_card(config):
            on_rank_0(lambda: prepare_card(config, self.data.weights, self.work))
        torch.manual_seed(config.seed)
        watchdog.at("the loading of the model", minutes=watchdog.SAVING)
        model = load(config, layout)
        if layout.frozen:
            freeze(moe_layers(model), layout.frozen)
        # Disks differ in speed, and whoever is first would wait for the last in a collective.
        together(lambda: None)
        watchdog.at("the start of the engine")
        self.engine = start_engine(model, layout.values, config, layout.batch)

        self.batch = layout.batch
        self.layers = moe_layers(self.engine.module)
        self.device = self.engine.device
        self.bad = BadBatches(config, self.data.sampler)
        self.perplexity: dict[str, float] = {}
        """Of each domain, at the last validation."""
        self.domains = list(self.data.files)
        self.experts = [expert.name for expert in layout.experts]
        self.expert_domains = [expert.domain for expert in layout.experts]
        self.total = total_steps(config.training, config.data)
        self.description: states.Description = {
            "layout": f"{here.world} ranks, expert parallel {layout.expert_parallel}, "
            f"ZeRO stage {layout.stage}",
            "config": self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """Return the settings and data on which the course of the run depends; the layout is not
        among them."""
        path = self.config.model.path
        keys = that_change("course")
        if not path:
            keys += that_change("new model")
        kept = {
            **{key: get_key(self.config, key) for key in keys},
            "model at the start": content_fingerprint(Path(path)) if path else "new",
            "data.weights": self.data.weights,
            states.FINGERPRINTS: {name: file.fingerprint for name, file in self.data.files.items()},
            states.MADE_FROM: {name: file.made_from for name, file in self.data.files.items()},
        }
        return json.loads(json.dumps(kept))

    def _batch(self, step: int, part: int) -> MicroBatch:
        """Return token windows [B, S+1] and domain indices [B] of one micro-batch, int64.

        The ids of a step's samples depend on the step alone, not on ranks or passes: a run may be
        resumed with others.
        """
        micro = self.batch.micro
        share = micro * self.batch.accumulation
        first = step * self.config.training.batch_size + self.rank * share + part * micro
        samples = [self.data.sampler.sample(first + i) for i in range(micro)]
        tokens_BS = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        domain_B = torch.tensor([sample.domain_index for sample in samples])
        return internals.to_device(tokens_BS), internals.to_device(domain_B)

    def _windows(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ids [B, S+1], and which labels [B, S] are learned; None: all."""
        if not self.config.data.chat:
            return tokens_BS, None
        return unmarked(tokens_BS), tokens_BS[:, 1:] >= 0

    def _weight(self, step: int) -> float:
        """Return by what a micro-batch's mean loss over all tokens is multiplied.

        The engine takes the mean over ranks and passes. Of chats the loss of a step is the mean
        over the answers in all of them: each rank counts those of the whole batch, of which the
        numbers of its samples are all that it takes.
        """
        data, size = self.config.data, self.config.training.batch_size
        if not data.chat:
            return 1.0
        # read, not summed over ranks: no collective, and the same number on any layout
        labels = self.data.sampler.labels(step * size, size)
        # a batch of questions alone teaches nothing
        return size * data.sequence_length / max(labels, 1)

    def _take(self, step: int, part: int) -> MicroBatch:
        """Return a micro-batch: the one that was made ahead, or at the start a new one."""
        ahead = self.ahead
        self.ahead = None
        if ahead is not None and ahead[:2] == (step, part):
            return ahead[2]
        return self._batch(step, part)

    def _make_next(self, step: int, part: int) -> None:
        """Make the micro-batch that follows this one, while the device is at work on this one."""
        part += 1
        if part == self.batch.accumulation:
            step, part = step + 1, 0
        if step < self.total:
            self.ahead = step, part, self._batch(step, part)

    def _step(self, step: int, tally: Tally) -> float | None:
        """Do one optimizer step; return the gradient norm before clipping.

        None says that it is not finite: then nothing was updated, and `tally` is as it was.
        """
        self.engine.train()
        before = tally.copies()
        self.bad.start()
        set_learning_rate(self.engine, learning_rate(step, self.config.training, self.config.data))
        weight = self._weight(step)
        for part in range(self.batch.accumulation):
            watchdog.at("the forward pass", step + 1)
            marked_BS, domain_B = self._take(step, part)
            tokens_BS, learned_BS = self._windows(marked_BS)
            loss, losses_BS = next_token_loss(self.engine, tokens_BS, learned_BS)
            tally.add(losses_BS, domain_B, self.layers, learned_BS)
            self.bad.see(losses_BS)
            watchdog.at("the backward pass", step + 1)
            self.engine.backward(loss if learned_BS is None else loss * weight)
            # Before the step: at its end the host waits until the device is done.
            self._make_next(step, part)
            watchdog.at("the optimizer's update", step + 1)
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if norm is None or not math.isfinite(float(norm)):
            tally.back_to(before)
            return None
        return float(norm)

    def _leave_out(self, step: int, metrics: Metrics) -> None:
        """Tell of a step that updated nothing. All ranks must call.

        Raises:
            BadBatchesError: too many in a row; the state behind them is saved.
        """
        watchdog.at("the naming of a bad batch", step + 1, watchdog.SAVING)
        share = self.batch.micro * self.batch.accumulation
        first = step * self.config.training.batch_size + self.rank * share
        what = self.bad.named(range(first, first + share))
        self.bad.next(bad=True)
        count, limit = self.bad.in_a_row, self.config.training.bad_batches
        metrics.log(
            "left out",
            step + 1,
            {"in_a_row": count, "what": what},
            f"step {step + 1} left out, nothing was updated ({count} in a row, {limit} end the "
            f"run): {what}",
        )
        if count < limit:
            return
        self.save(step + 1)
        raise BadBatchesError(
            f"{count} batches in a row without a finite gradient, the last at step {step + 1} "
            f"({what}); stopped. The weights are those of step {step + 1 - count}, saved with the "
            "place behind these batches: lower training.lr or mend this text, then start the same "
            "command again, which goes on behind them; training.bad_batches allows more"
        )

    @torch.no_grad()
    def validate(self, step: int, metrics: Metrics, stop: StopRequest | None = None) -> int:
        """Score the validation windows, spread over the ranks, and log the result.

        Returns:
            The signal that `stop` was agreed for on the way, for which nothing is logged; else 0.
        """
        self.engine.eval()
        names = list(self.data.validation)
        tally = Tally(len(names), len(self.experts), self.device)
        for index, name in enumerate(names):
            windows_NS = torch.from_numpy(self.data.validation[name])
            if number := self._score(windows_NS, index, tally, stop):
                return number
        tally.reduced()
        self._log_validation(step, names, tally, metrics)
        return 0

    def _log_validation(self, step: int, names: list[str], tally: Tally, metrics: Metrics) -> None:
        """Log what a validation found, and keep the perplexities."""
        losses = tally.losses(names)
        # e^700 is nearly the largest float64.
        perplexity = {}
        for name, loss in losses.items():
            perplexity[name] = math.exp(min(loss, 700))
        routing = tally.routing(names, self.experts)
        values: dict[str, float | Values] = {
            "loss": losses,
            "perplexity": perplexity,
            "routing": routing,
        }
        numbers = " ".join(f"{name} {value:.1f}" for name, value in perplexity.items())
        line = f"step {step} validation perplexity: {numbers}"
        own = self.own_share(routing)
        if own is not None:
            values["own_share"] = own
            line += f" | own-domain share {own:.2f}"
        metrics.log("validation", step, values, line)
        self.perplexity = perplexity

    def _score(
        self, windows_NS: Tensor, domain: int, tally: Tally, stop: StopRequest | None
    ) -> int:
        """Add this rank's share of a domain's windows [N, S+1] to `tally`; return as `validate`.

        Expert parallelism needs every rank in every pass, so that one without windows of its own
        passes the first one, which does not count.
        """
        batch = max(1, self.batch.micro)
        rounds = math.ceil(len(windows_NS) / (batch * self.world))
        for turn in range(rounds):
            due = turn % ROUNDS_A_LOOK == 0
            if due and stop is not None and (number := stop.agreed()):
                return number
            watchdog.at("validation")
            start = (turn * self.world + self.rank) * batch
            mine_BS = windows_NS[start : start + batch]
            idle = len(mine_BS) == 0
            if idle:
                mine_BS = windows_NS[:1]
            tokens_BS, learned_BS = self._windows(internals.to_device(mine_BS))
            _, losses_BS = next_token_loss(self.engine, tokens_BS, learned_BS)
            if not idle:
                domain_B = torch.full((len(mine_BS),), domain, device=self.device)
                tally.add(losses_BS, domain_B, self.layers, learned_BS)
        return 0

    def own_share(self, routing: Routing) -> float | None:
        """Return the mean share of a domain's tokens at its own expert; None if none was seen."""
        pairs = zip(self.experts, self.expert_domains, strict=True)
        shares = [routing[domain][expert] for expert, domain in pairs if domain in routing]
        return sum(shares) / len(shares) if shares else None

    def log(
        self, step: int, tally: Tally, norm: float, seconds: float, steps: int, metrics: Metrics
    ) -> None:
        """Log a stretch of `steps` optimizer steps that took `seconds`. All ranks must call."""
        tally.reduced()
        if tally.is_empty():
            return  # all of it was left out
        training, data = self.config.training, self.config.data
        loss = tally.mean_loss()
        domain_losses = tally.losses(self.domains)
        lr = learning_rate(step - 1, training, data)
        speed = steps * tokens_per_step(training, data) / max(seconds, 1e-9)
        router = self._router_values(tally)
        values: Values = {
            "loss": loss,
            "domain_loss": domain_losses,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "router": router,
        }
        domains = " ".join(f"{name} {value:.2f}" for name, value in domain_losses.items())
        line = f"{step}/{self.total} loss {loss:.3f} ({domains})"
        if router:
            line += (
                f" aux {router['load_balance']:.2f} gate {router['gate']:.2f}"
                f" own {router['own_share']:.2f}"
                f" load {router['load_min']:.2f}-{router['load_max']:.2f}"
            )
        line += f" lr {lr:.2e} norm {norm:.2f} {speed:,.0f} tok/s eta {metrics.eta(step)}"
        metrics.log("train", step, values, line)
        # A single expert's gate is 1 whatever the router does.
        if router.get("gate", 0) > SATURATED and len(self.experts) > 1:
            metrics.say(
                f"warning: mean gate {router['gate']:.2f}: the router is saturated; lower "
                "router.lr_scale or training.lr"
            )

    def _router_values(self, tally: Tally) -> dict[str, float]:
        """Return the routers' numbers under the log's names; an empty dict for a dense model."""
        router = tally.router()
        if router is None:
            return {}
        own = self.own_share(tally.routing(self.domains, self.experts))
        computed = {name: value for name, value in asdict(router).items() if value is not None}
        return computed | {"own_share": float("nan") if own is None else own}

    def save(self, step: int) -> None:
        """Save a training state."""
        watchdog.at("the saving of the state", step, watchdog.SAVING)
        if not internals.optimizer_step(self.engine):
            # No step has updated anything yet, so there may be no moments to save.
            internals.set_optimizer_step(self.engine, 0)
        states.save(
            self.engine,
            self.work / "states",
            step,
            self.description,
            self.config.training.keep_last,
        )
        self.saved = step

    def end_early(self, number: int, step: int, metrics: Metrics) -> None:
        """Save the state of this step, if it isn't, and tell of the signal that ended the run."""
        if self.saved != step:
            self.save(step)
        metrics.say(
            f"stopped by signal {number} after step {step}; start the same command again to go on"
        )

    def loop(self, first: int, metrics: Metrics, stop: StopRequest) -> bool:
        """Train from step `first` to the end.

        Returns:
            False if a signal ended it early; the state is saved.
        """
        training = self.config.training
        tally = self._tally()
        norm = math.nan
        since = first
        started = time.monotonic()
        for step in range(first, self.total):
            found = self._step(step, tally)
            if found is None:
                self._leave_out(step, metrics)
            else:
                self.bad.next(bad=False)
                norm = found
            metrics.advance()
            done = step + 1
            if done % training.log_every == 0 or done == self.total:
                seconds = time.monotonic() - started
                self.log(done, tally, norm, seconds, done - since, metrics)
                tally = self._tally()
                since = done
                started = time.monotonic()
            if done == self.total:
                break
            number = stop.agreed()
            if not number and training.save_every and done % training.save_every == 0:
                self.save(done)
            if not number and training.eval_every and done % training.eval_every == 0:
                paused = time.monotonic()
                number = self.validate(done, metrics, stop)
                started += time.monotonic() - paused  # the speed is that of training
            if number:
                self.end_early(number, done, metrics)
                return False
        return True

    def _tally(self) -> Tally:
        return Tally(len(self.domains), len(self.experts), self.device)

    def finish(self, metrics: Metrics) -> None:
        """Write the verified checkpoint, and say where it is.

        Without `save_every` the last state, which is saved before, is removed afterwards.
        """
        windows_NS = torch.from_numpy(next(iter(self.data.validation.values())))
        probe_BS = unmarked(windows_NS[:1, :-1]).to(self.device)
        # steps that were left out taught nothing, before a resume or since
        taught = internals.optimizer_step(self.engine)
        step = TrainStep(
            stage=self.config.stage,
            steps=self.total,
            tokens=taught * tokens_per_step(self.config.training, self.config.data),
            mixture=self.data.weights,
            perplexity={name: float(f"{x:.6g}") for name, x in self.perplexity.items()},
        )
        out = Path(self.config.output)
        dtype = DTYPES[self.config.model.dtype]
        # its layers say where it is from then on
        watchdog.at("the export", self.total, watchdog.LAYER)
        found = export(self.engine, self.config, dtype, out, probe_BS, step)
        if not self.config.training.save_every:
            states.remove(self.work / "states")
        metrics.say(
            f"wrote {out} (reloaded in plain transformers: logits differ by {found.logits:.1e})"
        )
        metrics.say(f"export checked: {found.describe()}")
        metrics.say(f"next: {next_evaluation(out, self.config.data)}")

    def complete(self, first: int, metrics: Metrics, stop: StopRequest) -> bool:
        """Train from step `first` to the end, validate and export.

        The last state comes before the export: if that fails, no training is lost.

        Returns:
            False if a signal ended it early; the state is saved.
        """
        if not self.loop(first, metrics, stop):
            return False
        number = self.validate(self.total, metrics, stop)
        if not number:
            self.save(self.total)
            number = stop.agreed()
        if number:
            self.end_early(number, self.total, metrics)
            return False
        self.finish(metrics)
        return True


def write_config(work: Path, config: Config) -> None:
    """Leave the configuration beside the states, in one step.

    `status` reads it at any time, and a kill or a full disk leaves the old one whole.
    """
    with new_file(work / "config.yaml", overwrite=True) as temporary:
        write_text(temporary, dump(config))


def train(config: Config, ds_json: str, here: Position) -> int:
    """Train `config` on this rank.

    Args:
        config: the run's configuration, with all paths.
        ds_json: path of the DeepSpeed JSON; '' for the recipe's ZeRO stage.
        here: this rank.

    Returns:
        The exit code: 0 finished, EXIT_STOPPED stopped by a signal with its state saved. Before
        the first step there is nothing to save: until then signals are the caller's affair.
    """
    # The watchdog speaks first: it knows more.
    internals.start(config.parallel.timeout_minutes + COLLECTIVE_MARGIN)
    run = Run(config, ds_json, here)
    watchdog.at("the reading of the state", minutes=watchdog.SAVING)
    first, messages = states.resume(run.engine, run.work / "states", run.description)
    run.saved = first
    messages = run.data.messages + messages
    on_first = here.rank == 0
    if on_first and not first:
        messages = messages + lost_steps(run.work)
    with closing(Metrics(run.work, config.name, first, run.total, on_first)) as metrics:
        if on_first:
            write_config(run.work, config)
        for message in messages:
            metrics.say(message)
        metrics.say(describe(run, first))
        if first == 0:
            run.validate(0, metrics)
        finished = run.complete(first, metrics, StopRequest())
    watchdog.at("the end")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if finished else EXIT_STOPPED


def lost_steps(work: Path) -> list[str]:
    """Say that a run begins anew although its log tells of steps.

    That is no error: to remove the states is how one starts over, and a run that was killed before
    its first save has none. But they may also have been lost.
    """
    log = work / "metrics.jsonl"
    told = steps_told(log)
    if not told:
        return []
    return [
        f"warning: {log} tells of training up to step {told}, but {work / 'states'} holds no "
        "state: the run starts over at step 0, and its records follow those"
    ]


def describe(run: Run, first: int) -> str:
    """Return one line that says what is about to be trained."""
    kind = f"{len(run.experts)} routed experts + shared" if run.experts else "dense"
    mixture = ", ".join(f"{name} {weight:.0%}" for name, weight in run.data.weights.items())
    start = f", resumed after step {first}" if first else ""
    config = run.config
    nexus = "Nexus" if run.experts else "model"
    tokens = tokens_per_step(config.training, config.data)
    return (
        f"{config.name}: {nexus} ({kind}), {run.total} steps of {tokens} tokens ({mixture}); "
        f"{run.description['layout']}, micro-batch {run.batch.micro} x {run.batch.accumulation}, "
        f"activation checkpointing {run.batch.checkpointing}, {config.model.dtype}{start}"
    )
