"""The training loop: batches in, optimizer steps, validation, training states, and the verified
checkpoint at the end.

Shapes: B sequences, S tokens, D domains, E routed experts.
Not covered: choosing what to train (train.py) and saving (states, export).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_ds.checkpoint.build import DTYPES, new_dense
from nexus_ds.checkpoint.loading import read_config
from nexus_ds.checkpoint.records import TrainStep, is_nexus
from nexus_ds.checkpoint.sidecar import content_fingerprint, read_sidecar
from nexus_ds.checkpoint.tokenizer import check_tokenizer
from nexus_ds.config import as_dict, dump
from nexus_ds.data.corpora import TokenFile, open_source, token_files, windows
from nexus_ds.data.mixture import Sampler, domain_weights
from nexus_ds.data.tokenizer import open_tokenizer, vocabulary_size
from nexus_ds.errors import ConfigError, DataError, TrainingError
from nexus_ds.launch import EXIT_STOPPED
from nexus_ds.model.head import next_token_loss
from nexus_ds.model.router import SATURATED
from nexus_ds.outputs import write_text
from nexus_ds.pipeline import next_evaluation
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import states
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
from nexus_ds.runtime.metrics import Metrics
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import leave, load_for_training
from nexus_ds.runtime.ranks import on_rank_0
from nexus_ds.runtime.schedule import learning_rate, tokens_per_step, total_steps
from nexus_ds.runtime.signals import StopRequest
from nexus_ds.runtime.tally import Tally
from nexus_ds.settings import Config

# Settings of `training` that may change between a training state and its resumption: the course
# stays the same.
FREE = ("keep_last", "micro_batch_size", "activation_checkpointing")
# Settings of `model` that a new model's shapes do not say, or not all.
NEW_MODEL = (
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "ffn_size",
    "max_positions",
    "rope_theta",
    "tied_embeddings",
)


@dataclass
class Data:
    """What a run reads."""

    files: dict[str, TokenFile]
    sampler: Sampler
    weights: dict[str, float]
    validation: dict[str, np.ndarray]
    """Per domain: windows [n, S+1] int64."""
    messages: list[str] = field(default_factory=list)
    """What a user should know of the text."""


def read_data(config: Config, tokenizer: Path) -> Data:
    """Tokenise what is missing and return the training sampler and validation windows. All ranks
    call.

    Validation text comes first: it is little, and what is wrong with it is told before hours go
    into the other.
    """
    settings, source, length = (
        config.data,
        open_source(config.data.path),
        config.data.sequence_length,
    )
    common: dict[str, Any] = {
        "workers": settings.workers,
        "on_bad_row": settings.on_bad_row,
        "bos": settings.bos,
    }

    def made(domains: list[str], split: str, max_bytes: int) -> dict[str, TokenFile]:
        def make() -> dict[str, TokenFile]:
            cache = Path(settings.cache)
            return token_files(
                source, domains, split, tokenizer, cache, max_bytes=max_bytes, **common
            )

        on_rank_0(lambda: len(make()))  # the others wait, and read
        return make()

    scored = made(settings.validation_domains, "validation", 0)
    counts = {name: _windows_of(name, file.blocks(length), config) for name, file in scored.items()}
    files = made(settings.domains, "train", settings.max_bytes)
    weights = domain_weights(settings, {name: file.tokens for name, file in files.items()})
    sampler = Sampler(files, weights, length, config.seed)
    wanted = config.training.eval_windows
    messages = [
        f"{n}: {c} validation windows, training.eval_windows is {wanted}"
        for n, c in counts.items()
        if c < wanted
    ]
    validation = {name: windows(scored[name], count, length) for name, count in counts.items()}
    return Data(files, sampler, weights, validation, messages)


def _windows_of(domain: str, there: int, config: Config) -> int:
    """Return how many validation windows of a domain are scored; DataError if its text has fewer
    than that."""
    training, length = config.training, config.data.sequence_length
    wanted = (
        training.eval_windows if training.eval_every else max(1, min(there, training.eval_windows))
    )
    if there < wanted:
        few = "" if training.eval_every else " (with training.eval_every 0 one is enough)"
        raise DataError(
            f"{domain}: the validation text makes {there} windows of data.sequence_length {length}, expected "
            f"training.eval_windows {training.eval_windows}{few}; give more text, or lower one of them"
        )
    return wanted


class Run:
    """One training run on this rank: engine, data, bookkeeping."""

    def __init__(
        self, config: Config, ds_json: str, rank: int, world: int, local_world: int
    ) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.tokenizer = Path(config.model.tokenizer)
        values = read_deepspeed_json(Path(ds_json) if ds_json else None, config.parallel)
        nexus = bool(config.model.path) and is_nexus(Path(config.model.path))
        records = read_sidecar(Path(config.model.path)).experts if nexus else []
        self.batch: Batch
        stage, self.batch = check_layout(values, config, world, local_world, len(records))
        self._check_model()  # before the text is tokenised, which may take hours
        self.data = read_data(config, self.tokenizer)
        torch.manual_seed(config.seed)
        # In fp32 the kernels of older GPUs compute in TF32, and the export would not equal the
        # engine.
        grouped = config.parallel.grouped_mm
        grouped = (
            config.model.dtype == "bf16" and not internals.on_cpu() if grouped is None else grouped
        )
        place = (
            placement(config.parallel, len(records), rank, world, local_world) if records else None
        )
        partition = (
            internals.partitioner(deepspeed_config(values, config, self.batch))
            if stage == 3
            else leave
        )
        model = self._model(place, grouped, partition)
        self.engine = start_engine(model, values, config, self.batch)
        self.layers = moe_layers(self.engine.module)
        self.device = self.engine.device
        self.work = Path(config.output + ".training")
        self.domains = list(self.data.files)
        self.experts, self.expert_domains = [r.name for r in records], [r.domain for r in records]
        self.total = total_steps(config.training, config.data)
        ep_size = place.ep_size if place else 1
        self.description: states.Description = {
            "layout": f"{world} ranks, expert parallel {ep_size}, ZeRO stage {stage}",
            "config": self._identity(),
        }

    def _model(
        self, place: Placement | None, grouped: bool, partition: Callable[[nn.Module], None]
    ) -> Any:
        config = self.config
        if config.model.path:
            return load_for_training(config, place, grouped, partition)
        tokenizer = open_tokenizer(self.tokenizer)
        model = new_dense(
            config.model, vocabulary_size(tokenizer), tokenizer.eos_token_id, config.seed
        )
        return model.to(DTYPES[config.model.dtype])

    def _check_model(self) -> None:
        """Refuse text that the model can't read: sequences longer than its positions, tokens that
        it does not embed."""
        given, length = self.config.model, self.config.data.sequence_length
        longest = given.max_positions
        if given.path:
            facts = read_config(Path(given.path))
            longest = int(facts.get("max_position_embeddings") or length)
            check_tokenizer(self.tokenizer, int(facts["vocab_size"]))
        if length > longest:
            raise ConfigError(
                f"data.sequence_length {length}: the model reads at most {longest} tokens; lower it"
            )

    def _identity(self) -> dict[str, Any]:
        """Return the settings and data on which the course of the run depends; the layout is not
        among them."""
        flat = as_dict(self.config)
        kept = {
            **{
                f"training.{k}": v
                for k, v in flat["training"].items()
                if k not in FREE and not k.endswith("every")
            },
            **{f"router.{k}": flat["router"][k] for k in ("lr_scale", "load_balance", "z_loss")},
            "seed": self.config.seed,
            "model at the start": content_fingerprint(Path(flat["model"]["path"]))
            if flat["model"]["path"]
            else "new",
            "model.dtype": self.config.model.dtype,
            **(
                {} if flat["model"]["path"] else {f"model.{k}": flat["model"][k] for k in NEW_MODEL}
            ),
            "data.sequence_length": self.config.data.sequence_length,
            "data.weights": self.data.weights,
            "data fingerprint": {name: file.fingerprint for name, file in self.data.files.items()},
        }
        return json.loads(json.dumps(kept))

    def _batch(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        """Return token windows [B, S+1] and domain indices [B] of one micro-batch; sample ids
        depend on the step alone."""
        share = self.batch.micro * self.batch.accumulation
        first = step * self.config.training.batch_size + self.rank * share + part * self.batch.micro
        samples = [self.data.sampler.sample(first + i) for i in range(self.batch.micro)]
        tokens = torch.from_numpy(np.stack([s.tokens for s in samples]))
        return tokens.to(self.device), torch.tensor(
            [s.domain_index for s in samples], device=self.device
        )

    def _step(self, step: int, tally: Tally) -> float:
        """Do one optimizer step; return the gradient norm before clipping."""
        self.engine.train()
        set_learning_rate(self.engine, learning_rate(step, self.config.training, self.config.data))
        for part in range(self.batch.accumulation):
            tokens_BS, domain_B = self._batch(step, part)
            loss, losses_BS = next_token_loss(self.engine, tokens_BS)
            tally.add(losses_BS, domain_B, self.layers)
            self.engine.backward(loss)
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if norm is None or not math.isfinite(float(norm)):
            saved = states.steps_saved(self.work / "states")
            raise TrainingError(
                f"the gradient norm is {norm} at step {step + 1} (samples from {step * self.config.training.batch_size}); "
                f"stopped, last training state: {f'step {saved[-1]}' if saved else 'none'}; lower training.lr, or look "
                "at these samples"
            )
        return float(norm)

    @torch.no_grad()
    def validate(self, step: int, metrics: Metrics) -> None:
        """Score the validation windows, spread over the ranks (each does as many forward passes),
        and log the result."""
        self.engine.eval()
        names = list(self.data.validation)
        tally = Tally(len(names), len(self.experts), self.device)
        for index, name in enumerate(names):
            windows_NS = torch.from_numpy(self.data.validation[name])
            batch = max(1, self.batch.micro)
            rounds = math.ceil(len(windows_NS) / (batch * self.world))
            for turn in range(rounds):
                start = (turn * self.world + self.rank) * batch
                mine = windows_NS[start : start + batch].to(self.device)
                idle = len(mine) == 0  # expert parallelism needs every rank in every pass
                _, losses = next_token_loss(
                    self.engine, windows_NS[:1].to(self.device) if idle else mine
                )
                if not idle:
                    tally.add(
                        losses, torch.full((len(mine),), index, device=self.device), self.layers
                    )
        tally.reduced()
        losses_D = tally.losses(names)
        values: dict[str, Any] = {
            "loss": losses_D,
            "perplexity": {name: math.exp(min(loss, 700)) for name, loss in losses_D.items()},
            "routing": tally.routing(names, self.experts),
        }
        line = " ".join(f"{name} {ppl:.1f}" for name, ppl in values["perplexity"].items())
        own = self.own_share(values["routing"])
        if own is not None:
            values["own_share"] = own
            line += f" | own-domain share {own:.2f}"
        metrics.log("validation", step, values, f"step {step} validation perplexity: {line}")

    def own_share(self, routing: dict[str, dict[str, float]]) -> float | None:
        """Return the mean share of a domain's tokens at that domain's expert."""
        pairs = zip(self.experts, self.expert_domains, strict=True)
        shares = [routing[domain][expert] for expert, domain in pairs if domain in routing]
        return sum(shares) / len(shares) if shares else None

    def log(
        self, step: int, tally: Tally, norm: float, seconds: float, steps: int, metrics: Metrics
    ) -> None:
        """Log a stretch of `steps` optimizer steps that took `seconds`."""
        tally.reduced()
        lr = learning_rate(step - 1, self.config.training, self.config.data)
        speed = steps * tokens_per_step(self.config.training, self.config.data) / max(seconds, 1e-9)
        router = tally.router()
        values: dict[str, Any] = {
            "loss": tally.mean_loss(),
            "domain_loss": tally.losses(self.domains),
            "lr": lr,
        }
        values |= {"grad_norm": norm, "tokens_per_second": speed, "router": router}
        domains = " ".join(f"{name} {loss:.2f}" for name, loss in values["domain_loss"].items())
        line = f"{step}/{self.total} loss {values['loss']:.3f} ({domains})"
        if router:
            own = self.own_share(tally.routing(self.domains, self.experts))
            router["own_share"] = float("nan") if own is None else own
            line += (
                f" aux {router['load_balance']:.2f} gate {router['gate']:.2f} own {router['own_share']:.2f}"
                f" load {router['load_min']:.2f}-{router['load_max']:.2f}"
            )
        line += f" lr {lr:.2e} norm {norm:.2f} {speed:,.0f} tok/s eta {metrics.eta(step)}"
        metrics.log("train", step, values, line)
        if router.get("gate", 0) > SATURATED and len(self.experts) > 1:
            metrics.say(
                f"warning: mean gate {router['gate']:.2f}: the router is saturated; lower router.lr_scale or training.lr"
            )

    def save(self, step: int) -> None:
        """Save a training state."""
        states.save(
            self.engine,
            self.work / "states",
            step,
            self.description,
            self.config.training.keep_last,
        )

    def loop(self, first: int, metrics: Metrics, stop: StopRequest) -> bool:
        """Train from step `first` to the end; return False if a signal ended it early (the state is
        saved)."""
        training = self.config.training
        tally, since, started = self._tally(), first, time.monotonic()
        for step in range(first, self.total):
            norm = self._step(step, tally)
            metrics.advance()
            done = step + 1
            if done % training.log_every == 0 or done == self.total:
                self.log(done, tally, norm, time.monotonic() - started, done - since, metrics)
                tally, since, started = self._tally(), done, time.monotonic()
            if done == self.total:
                break
            number = stop.agreed()
            if number or (training.save_every and done % training.save_every == 0):
                self.save(done)
            if number:
                metrics.say(
                    f"stopped by signal {number} after step {done}; start the same command again to go on"
                )
                return False
            if training.eval_every and done % training.eval_every == 0:
                paused = time.monotonic()
                self.validate(done, metrics)
                started += time.monotonic() - paused  # the speed is that of training
        return True

    def _tally(self) -> Tally:
        return Tally(len(self.domains), len(self.experts), self.device)

    def finish(self, metrics: Metrics) -> None:
        """Save the last state, write the verified checkpoint, and say where it is.

        The state comes first: if the export fails, no training is lost. Without `save_every` it is
        removed afterwards.
        """
        self.save(self.total)
        name = next(iter(self.data.validation))
        probe = torch.from_numpy(self.data.validation[name][:2, :-1]).to(self.device)
        step = TrainStep(
            stage=self.config.stage,
            steps=self.total,
            tokens=self.total * tokens_per_step(self.config.training, self.config.data),
            mixture=self.data.weights,
        )
        out = Path(self.config.output)
        difference = export(
            self.engine, self.config, DTYPES[self.config.model.dtype], out, probe, step
        )
        if not self.config.training.save_every:
            states.remove(self.work / "states")
        metrics.say(
            f"wrote {out} (reloaded in plain transformers: logits differ by {difference:.1e})"
        )
        metrics.say(f"next: {next_evaluation(out, self.config.data)}")


def train(
    config: Config, ds_json: str, rank: int, world: int, local_world: int, wait_minutes: float
) -> int:
    """Train `config` on this rank; return the exit code (0 finished, 75 stopped by a signal with
    its state saved)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    internals.start(wait_minutes)
    stop = StopRequest()
    run = Run(config, ds_json, rank, world, local_world)
    first, messages = states.resume(run.engine, run.work / "states", run.description)
    messages = run.data.messages + messages
    if not first and config.training.moments:
        messages += states.adopt(run.engine, Path(config.training.moments))
    with closing(Metrics(run.work, config.name, first, run.total, rank == 0)) as metrics:
        if rank == 0:
            write_text(run.work / "config.yaml", dump(config))
        for message in messages:
            metrics.say(message)
        metrics.say(describe(run, first))
        if first == 0:
            run.validate(0, metrics)
        finished = run.loop(first, metrics, stop)
        if finished:
            run.validate(run.total, metrics)
            run.finish(metrics)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if finished else EXIT_STOPPED


def describe(run: Run, first: int) -> str:
    """Return one line that says what is about to be trained."""
    kind = f"{len(run.experts)} routed experts + shared" if run.experts else "dense"
    mixture = ", ".join(f"{name} {weight:.0%}" for name, weight in run.data.weights.items())
    start = f", resumed after step {first}" if first else ""
    nexus = "Nexus" if run.config.model.path and is_nexus(Path(run.config.model.path)) else "model"
    return (
        f"{run.config.name}: {nexus} ({kind}), {run.total} steps of "
        f"{tokens_per_step(run.config.training, run.config.data)} tokens ({mixture}); "
        f"{run.description['layout']}, {run.config.model.dtype}{start}"
    )
