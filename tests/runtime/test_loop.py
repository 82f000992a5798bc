"""The loop's own numbers: learning rates in the engine, samples of a step, what it logs and scores,
what a resume refuses."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import DOMAINS, make_nexus, save_tokenizer
from launch import file_limit, finish, start_ranks
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ds.config import _apply, dump, load_config, parse_override
from nexus_ds.data.mixture import Sample
from nexus_ds.errors import CheckpointError, LayoutError, NexusError
from nexus_ds.evaluation.perplexity import score
from nexus_ds.launch import Position
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import loop, portable_state, states
from nexus_ds.runtime.bad_batches import BadBatches
from nexus_ds.runtime.engine import Batch, split_batch
from nexus_ds.runtime.loop import (
    Run,
    RunLayout,
    fit,
    fit_here,
    grouped_products,
    load,
    machine_here,
    read_data,
    resolve,
    write_config,
)
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.settings import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RouterConfig,
    TrainingConfig,
)

WORKER = Path(__file__).parents[1] / "loop_worker.py"
LENGTH, WINDOWS, BATCH, WORLD = 16, 5, 8, 2
LR_SCALE, BALANCE, Z = 0.25, 0.1, 0.01
# By hand: 3 steps of warm-up to 1e-2, a half cosine over 6 to 2e-3, a half cosine over the anneal's
# 4 steps to 5e-4.
RATES = [
    1e-2 / 3,
    2e-2 / 3,
    1e-2,
    1e-2,
    9.4641e-3,
    8e-3,
    6e-3,
    4e-3,
    2.5359e-3,
    2e-3,
    1.78033e-3,
    1.25e-3,
    7.19670e-4,
    5e-4,
]
GROUPS = {
    "matrices": (0.1, 1.0),
    "ep_size_2": (0.1, 1.0),
    "vectors": (0.0, 1.0),
    "router": (0.0, LR_SCALE),
}
SETTINGS = [
    f"data.domains=[{','.join(DOMAINS)}]",
    "data.validation_domains=[gamma,alpha]",
    f"data.sequence_length={LENGTH}",
    "data.mixture=uniform",
    "model.dtype=fp32",
    "parallel.expert=2",
    "parallel.zero_stage=2",
    f"router.lr_scale={LR_SCALE}",
    f"router.load_balance={BALANCE}",
    f"router.z_loss={Z}",
    "training.tokens=0",
    "training.steps=10",
    "training.warmup=0.3",
    f"training.anneal_tokens={4 * BATCH * LENGTH}",
    "training.lr=1e-2",
    "training.final_lr=2e-3",
    "training.anneal_lr=5e-4",
    f"training.batch_size={BATCH}",
    "training.micro_batch_size=2",
    "training.log_every=1",
    f"training.eval_windows={WINDOWS}",
    "pipeline.run=unused",
]


# One run of two ranks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory, nexus_dir, text_folder):
    """What two ranks of a whole run saw; five windows a domain, so that a rank is idle in the last
    pass of each."""
    folder = tmp_path_factory.mktemp("watched")
    words = [
        f"model.path={nexus_dir}",
        f"model.tokenizer={nexus_dir}",
        f"data.path={text_folder}",
        f"output={folder / 'out'}",
        f"data.cache={folder / 'tokens'}",
        *SETTINGS,
    ]
    finish(start_ranks([WORKER, folder / "seen", *words], WORLD))
    lines = [
        json.loads(line)
        for line in (folder / "out.training" / "metrics.jsonl").read_text().splitlines()
    ]
    return SimpleNamespace(
        ranks=[json.loads(Path(f"{folder}/seen-{rank}.json").read_text()) for rank in range(WORLD)],
        train=[line for line in lines if line["kind"] == "train"],
        validation={line["step"]: line for line in lines if line["kind"] == "validation"},
        start=nexus_dir,
        out=folder / "out",
        cache=folder / "tokens",
    )


def blocks(text_folder, directory, domain, split):
    """Return all blocks of a domain's text [n, LENGTH + 1]: documents tokenised here, each closed
    by the end of text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = (text_folder / domain / f"{split}.jsonl").read_text().splitlines()
    ids = [
        i
        for line in lines
        for i in [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    return np.array(
        [ids[n * LENGTH : (n + 1) * LENGTH + 1] for n in range((len(ids) - 1) // LENGTH)]
    )


def validation_windows(text_folder, directory):
    """Return five windows of each validation domain, evenly over its text."""
    found = {
        domain: blocks(text_folder, directory, domain, "validation")
        for domain in ("gamma", "alpha")
    }
    return {
        domain: all_of[[n * len(all_of) // WINDOWS for n in range(WINDOWS)]]
        for domain, all_of in found.items()
    }


@pytest.mark.slow
def test_every_group_of_the_engine_gets_the_schedules_rate_times_its_scale_at_every_step(watched):
    for seen in watched.ranks:
        assert len(seen["groups"]) == len(RATES)
        for step, (groups, rate) in enumerate(zip(seen["groups"], RATES, strict=True)):
            assert {g["name"]: (g["weight_decay"], g["lr_scale"]) for g in groups} == GROUPS
            for group in groups:
                assert group["lr"] == pytest.approx(rate * group["lr_scale"], rel=1e-5), (
                    step,
                    group,
                )
    assert [line["lr"] for line in watched.train] == pytest.approx(RATES, rel=1e-5)


@pytest.mark.slow
def test_each_step_trains_on_each_of_its_samples_once(watched):
    for step in range(len(RATES)):
        drawn = [seen["samples"][step] for seen in watched.ranks]
        assert [len(samples) for samples in drawn] == [BATCH // WORLD] * WORLD
        assert sorted(number for samples in drawn for number in samples) == list(
            range(step * BATCH, (step + 1) * BATCH)
        )


def judge(line, model_dir, windows):
    """Compare a logged validation with the scoring of a checkpoint, and that with plain
    transformers."""
    expected = score(model_dir, windows, batch=3, precision="fp32")
    assert line["loss"].keys() == windows.keys()
    assert line["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert line["perplexity"] == pytest.approx(
        {name: np.exp(loss) for name, loss in expected.loss.items()}, rel=1e-4
    )
    shares = expected.routing.mean_share()
    for name in windows:
        assert line["routing"][name] == pytest.approx(shares[name], abs=1e-9)
    own = [shares["gamma"]["gamma"], shares["alpha"]["alpha"]]
    assert line["own_share"] == pytest.approx(sum(own) / 2, abs=1e-9)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for name, found in windows.items():
        tokens = torch.from_numpy(found)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        assert line["loss"][name] == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.slow
def test_validation_before_and_after_is_the_scoring_of_the_validation_text(watched, text_folder):
    windows = validation_windows(text_folder, watched.start)
    assert sorted(watched.validation) == [0, len(RATES)]
    judge(watched.validation[0], watched.start, windows)
    judge(watched.validation[len(RATES)], watched.out, windows)


@pytest.mark.slow
def test_the_first_line_of_the_log_is_what_the_oracle_computes_of_the_first_steps_samples(
    watched, text_folder, alone
):
    sampler = reading(made(watched.start, text_folder, watched.cache)).data.sampler
    parts = [seen["samples"][0][first : first + 2] for seen in watched.ranks for first in (0, 2)]
    model = oracle.load(watched.start, torch.float32, RouterConfig())
    experts = len(DOMAINS)
    losses, counts, units = {name: [] for name in DOMAINS}, torch.zeros(experts, experts), []
    for part in parts:
        samples = [sampler.sample(number) for number in part]
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        for sample, windows in zip(samples, tokens, strict=True):
            with torch.no_grad():
                losses[sampler.domains[sample.domain_index]].append(
                    float(oracle.losses(model, windows[None])[0])
                )
            for block in model.model.layers:
                counts[sample.domain_index] += torch.bincount(
                    block.mlp.selected.flatten(), minlength=experts
                )
        for name in ("load_balance", "z_loss"):
            for block in model.model.layers:
                block.mlp.load_balance, block.mlp.z_loss = (
                    float(name == "load_balance"),
                    float(name == "z_loss"),
                )
            units.append(float(oracle.losses(model, tokens)[1].detach()) / 2)
    line, router = watched.train[0], watched.train[0]["router"]
    seen = {name: found for name, found in losses.items() if found}
    assert line["domain_loss"] == pytest.approx(
        {name: sum(found) / len(found) for name, found in seen.items()}, abs=1e-5
    )
    assert line["loss"] == pytest.approx(sum(map(sum, seen.values())) / BATCH, abs=1e-5)
    assert router["load_balance"] == pytest.approx(sum(units[0::2]) / len(parts), abs=1e-5)
    assert router["z"] == pytest.approx(sum(units[1::2]) / len(parts), abs=1e-5)
    share = counts.sum(0) / counts.sum()
    assert (router["load_min"], router["load_max"]) == pytest.approx(
        (float(share.min()), float(share.max())), abs=1e-9
    )
    own = [float(counts[d, d] / counts[d].sum()) for d in range(experts) if counts[d].sum()]
    assert router["own_share"] == pytest.approx(sum(own) / len(own), abs=1e-6)


# A step and its samples, without processes --------------------------------------------------------


class Numbers:
    """Stands for a sampler: sample i is full of the number i and of domain i % 3."""

    def sample(self, number):
        return Sample(number % 3, number, np.full(LENGTH + 1, number))


def bare(training, rank=0, world=1, **more):
    """Return a Run without engine and data."""
    run = object.__new__(Run)
    run.config, run.rank, run.world, run.device = Config(), rank, world, torch.device("cpu")
    run.config.training, run.config.data.sequence_length = training, LENGTH
    run.batch, run.layers, run.total = split_batch(training, world), [], training.steps
    run.data = SimpleNamespace(sampler=Numbers())
    run.bad = BadBatches(run.config, run.data.sampler)
    vars(run).update(more)
    return run


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [0, 1, 2])
def test_the_samples_of_a_step_come_each_once_over_ranks_and_passes(world, micro):
    training = TrainingConfig(batch_size=8, micro_batch_size=micro)
    runs = [bare(training, rank, world) for rank in range(world)]
    assert {run.batch.accumulation for run in runs} == {8 // world // micro if micro else 1}
    for step in (0, 3):
        found = [run._batch(step, part) for run in runs for part in range(run.batch.accumulation)]
        numbers = torch.cat([tokens[:, 0] for tokens, _ in found])
        assert numbers.tolist() == list(range(step * 8, step * 8 + 8))
        assert torch.cat([domains for _, domains in found]).tolist() == [
            int(n) % 3 for n in numbers
        ]
        assert all(
            tokens.shape == (run.batch.micro, LENGTH + 1) for run in runs for tokens, _ in found
        )


class Engine(torch.nn.Module):
    """Stands for an engine of one group and one weight; notes the rate with which each step is
    made."""

    def __init__(self, norm=1.0):
        super().__init__()
        self.lm_head = torch.nn.Linear(4, 100, bias=False)
        self.embed = torch.nn.Embedding(100, 4)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}, {"lr": 0.0, "lr_scale": 0.5}])
        self.norm, self.rates, self.backwards = norm, [], 0

    @property
    def module(self):
        return self

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.lm_head(self.embed(input_ids)))

    def backward(self, loss):
        self.backwards += 1

    def step(self):
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])

    def get_global_grad_norm(self):
        return self.norm


def test_a_step_has_its_own_rate_and_goes_through_all_passes():
    training = TrainingConfig(
        steps=4, batch_size=4, micro_batch_size=2, warmup=0.5, schedule="constant", lr=1e-2
    )
    run = bare(training, engine=Engine(), experts=[], domains=["a", "b", "c"])
    tally = run._tally()
    assert [run._step(step, tally) for step in range(3)] == [1.0] * 3
    assert run.engine.rates == [[rate, rate / 2] for rate in (5e-3, 5e-3, 1e-2, 1e-2, 1e-2, 1e-2)]
    assert run.engine.backwards == 6
    assert tally.tokens_D.tolist() == [4 * LENGTH] * 3  # samples 0 to 11


@pytest.mark.parametrize("norm", [None, float("nan"), float("inf")])
def test_a_step_whose_norm_is_no_number_counts_nowhere(norm):
    run = bare(
        TrainingConfig(steps=4, batch_size=4), engine=Engine(), experts=[], domains=list("abc")
    )
    tally = run._tally()
    run._step(0, tally)
    before = tally.copies()
    run.engine.norm = norm
    assert run._step(1, tally) is None
    assert all(map(torch.equal, tally.copies(), before))


def test_a_stretch_that_was_left_out_is_not_logged(capsys):
    run = bare(TrainingConfig(steps=4, batch_size=4), experts=[], domains=list("abc"))
    run.log(1, run._tally(), math.nan, 1.0, 1, None)


class Stop:
    """Agrees on signal 10 at the nth look, from 0 on."""

    def __init__(self, look):
        self.looks, self.look = 0, look

    def agreed(self):
        self.looks += 1
        return 10 if self.looks > self.look else 0


class Told:
    """Stands for the metrics: keeps what is said and of what kind the records are."""

    def __init__(self):
        self.kinds, self.said = [], []

    def log(self, kind, step, values, line):
        self.kinds.append((kind, step))

    def say(self, text):
        self.said.append(text)

    def advance(self):
        pass

    def eta(self, step):
        return ""


def stoppable(monkeypatch, steps=2, **training):
    """Return a run of 40 validation windows, and the steps whose state is saved and exported."""
    training = TrainingConfig(steps=steps, batch_size=1, log_every=1, **training)
    run = bare(training, engine=Engine(), experts=[], expert_domains=[], domains=list("abc"))
    run.data.validation = {"a": np.full((40, LENGTH + 1), 7)}
    done = []
    monkeypatch.setattr(internals, "optimizer_step", lambda engine: 1)
    monkeypatch.setattr(states, "save", lambda engine, folder, step, *more: done.append(step))
    run.work, run.description = Path("out.training"), {}
    monkeypatch.setattr(loop, "export", lambda *arguments: done.append("export"))
    return run, done


STOPS = (
    # looks that find nothing, what was done, what was logged
    (0, [1], [("train", 1)]),
    (1, [1], [("train", 1)]),  # at the first round of the validation after step 1
    (5, [1], [("train", 1)]),  # at its last look
    (6, [2], [("train", 1), ("validation", 1), ("train", 2)]),  # in the one at the end
    (11, [2], [("train", 1), ("validation", 1), ("train", 2), ("validation", 2)]),
)


@pytest.mark.parametrize(("look", "done", "logged"), STOPS)
def test_a_signal_ends_a_run_in_validations_and_before_the_export(monkeypatch, look, done, logged):
    run, found = stoppable(monkeypatch, eval_every=1)
    told = Told()
    assert not run.complete(0, told, Stop(look))
    assert (found, told.kinds) == (done, logged)
    assert told.said == [
        f"stopped by signal 10 after step {done[0]}; start the same command again to go on"
    ]


def test_a_state_that_a_signal_finds_saved_is_not_saved_twice(monkeypatch):
    run, found = stoppable(monkeypatch, eval_every=1, save_every=1)
    assert not run.complete(0, Told(), Stop(1))
    assert found == [1]


@pytest.mark.parametrize(("first", "steps"), [(0, [1, 2]), (0, []), (2, [1, 2])])
def test_a_run_that_starts_over_says_so(tmp_path, monkeypatch, capsys, first, steps):
    """Its states may have been removed for that, or lost."""
    records = [json.dumps({"kind": "train", "step": step}) + "\n" for step in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(records))
    run = SimpleNamespace(work=tmp_path, total=9, engine=None, description={})
    run.data = SimpleNamespace(messages=[])
    run.validate = lambda *_: None
    run.complete = lambda *_: True
    monkeypatch.setattr(loop, "Run", lambda *_: run)
    monkeypatch.setattr(loop, "describe", lambda *_: "what is trained")
    monkeypatch.setattr(loop, "dist", SimpleNamespace(barrier=int, destroy_process_group=int))
    monkeypatch.setattr(internals, "start", lambda minutes: None)
    monkeypatch.setattr(states, "resume", lambda *_: (first, []))
    # it would stay this process's handler of signals
    monkeypatch.setattr(loop, "StopRequest", int)
    assert loop.train(Config(), "", Position(0, 1, 1, "node")) == 0
    warned = f"warning: {tmp_path}/metrics.jsonl tells of training up to step 2, but "
    warned += f"{tmp_path}/states holds no state: the run starts over at step 0"
    assert (warned in capsys.readouterr().err) == (first == 0 and bool(steps))


def test_the_own_share_is_that_of_each_experts_domain():
    run = bare(TrainingConfig(), experts=["x", "y", "z"], expert_domains=["b", "a", "unseen"])
    routing = {"a": {"x": 0.1, "y": 0.7, "z": 0.2}, "b": {"x": 0.5, "y": 0.25, "z": 0.25}}
    assert run.own_share(routing) == pytest.approx((0.5 + 0.7) / 2)
    assert run.own_share({"other": {"x": 1.0, "y": 0.0, "z": 0.0}}) is None


# What is refused before the text is tokenised -----------------------------------------------------

CHEAP = (
    # setting, ranks, what is said
    ("data.sequence_length=65", 1, "data.sequence_length 65: the model reads at most 64 tokens"),
    ("model.tokenizer=LARGE_TOKENIZER", 1, "the tokenizer has token ids up to"),
    ("data.weights={alpha: 0.5, beta: 0.5}", 1, "data.weights: no weight for gamma"),
    ("data.weights={alpha: 1, beta: 1, gamma: 1}", 1, "data.weights: shares sum to 3"),
    ("data.new_domains=[delta]", 1, "data.new_domains: unknown domain delta"),
    ("parallel.expert=4", 2, "parallel.expert 4 does not divide 2 ranks"),
    ("training.batch_size=9", 2, "training.batch_size 9 does not divide over 2 ranks"),
    ('DS_JSON={"zero_optimisation": {}}', 1, "unknown key zero_optimisation"),
    ('DS_JSON={"zero_optimization": {"stag": 2}}', 1, "unknown key zero_optimization.stag"),
)


@pytest.mark.parametrize(("word", "ranks", "message"), CHEAP, ids=lambda value: str(value)[:40])
def test_what_can_be_told_in_seconds_is_told_before_the_text_is_read(
    word, ranks, message, tmp_path, nexus_dir, monkeypatch
):
    """Tokenising may take hours, with all ranks waiting: here it fails the test, and so does all
    that comes after it."""
    for name in ("read_data", "load", "start_engine"):
        monkeypatch.setattr(loop, name, lambda *arguments, name=name: pytest.fail(f"{name} first"))
    key, _, value = word.partition("=")
    words, ds_json = [word], ""
    if key == "DS_JSON":
        words, ds_json = [], tmp_path / "ds.json"
        ds_json.write_text(value)
    elif value == "LARGE_TOKENIZER":
        text = {name: " ".join(f"{name}{number}" for number in range(50)) for name in DOMAINS}
        save_tokenizer(tmp_path / "large", text)
        words = [f"model.tokenizer={tmp_path / 'large'}"]
    elif key != "data.sequence_length":
        mixture = {"data.weights": "explicit", "data.new_domains": "replay"}.get(key, "uniform")
        words = [f"data.mixture={mixture}", "parallel.expert=1", word]
    config = made(nexus_dir, tmp_path / "no-text", tmp_path / "tokens", "parallel.expert=1", *words)
    with pytest.raises(NexusError, match=re.escape(message)):
        Run(config, str(ds_json), Position(0, ranks, ranks, "here"))


@pytest.mark.parametrize(
    ("capability", "dtype", "asked", "expected"),
    [
        ((9, 0), "bf16", None, True),
        ((12, 0), "bf16", None, False),
        ((12, 0), "bf16", True, True),
        ((9, 0), "bf16", False, False),
        ((9, 0), "fp32", None, False),
        (None, "bf16", None, False),
    ],
)
def test_experts_compute_in_groups_where_that_is_fast_or_asked_for(
    capability, dtype, asked, expected, monkeypatch
):
    monkeypatch.setattr(loop.internals, "capability", lambda: capability)
    config = Config(model=ModelConfig(dtype=dtype), parallel=ParallelConfig(grouped_mm=asked))
    assert grouped_products(config) is expected


def test_a_run_without_room_for_its_first_state_is_refused_before_the_text_is_read(
    tmp_path, nexus_dir, monkeypatch, alone
):
    """Without save_every the only state is saved at the end: hours of training would be lost."""
    monkeypatch.setattr(loop, "read_data", lambda *arguments: pytest.fail("read first"))
    config = made(nexus_dir, tmp_path / "no-text", tmp_path / "tokens", "parallel.expert=1")
    config.output = str(tmp_path / "deep" / "out")
    needed = disk(sizes_of(config), 4, 1)
    free = SimpleNamespace(free=int(needed["state"] + needed["export"]) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    said = rf"{tmp_path}: not enough space for a training state and the checkpoint: need [\d,]+ by"
    with pytest.raises(CheckpointError, match=said):
        Run(config, "", Position(0, 1, 1, "here"))
    (tmp_path / "deep" / "out.training" / "states" / "step_2").mkdir(parents=True)
    loop.check_room(config)


# What a resume refuses ----------------------------------------------------------------------------

REFUSED = "refused"
SPEED = "free: where, how fast or how often, not what is trained"
BEFORE = "free: read before training; the model at the start is what it made"
HALF = ("data.mixture=explicit", 'data.weights={"alpha":0.5,"beta":0.25,"gamma":0.25}')
REPLAY = ("data.mixture=replay", "data.new_domains=[gamma]")
DENSE = ("model.path=", "model.hidden_size=24", "model.heads=2", "model.ffn_size=32")
# section, verdict, what both runs have, settings with another value: every setting has a place here
VERDICTS = (
    (
        "training",
        REFUSED,
        (),
        "tokens=4096 steps=11 batch_size=16 lr=2e-2 final_lr=1e-3 warmup=0.2 schedule=constant "
        "anneal_tokens=0 anneal_lr=1e-4 weight_decay=0.2 beta1=0.8 beta2=0.99 "
        "clip=0.5 eval_windows=4 backbone_lr_scale=0.5 shared_lr_scale=0.5 "
        "freeze_old_experts=true",
    ),
    (
        "training",
        SPEED,
        (),
        "micro_batch_size=4 activation_checkpointing=reentrant loss_kernel=eager "
        "layer_kernels=eager gradient_dtype=fp32 log_every=5 eval_every=5 save_every=5 "
        "keep_last=3 bad_batches=5",
    ),
    ("router", REFUSED, (), "lr_scale=0.5 load_balance=0.2 z_loss=0.02"),
    (
        "router",
        BEFORE,
        (),
        "kind=linear input=context depth=1 width=8 projection=gelu row_norm=fixed init=normal "
        "init_norm=0.25 centre=false top_k=2 warm_start=none fit_steps=7 fit_lr=0.1 "
        "fit_windows=7 fit_chunks=7 fit_background=[alpha] fit_text=background",
    ),
    (
        "data",
        REFUSED,
        (),
        "path=OTHER_TEXT domains=[alpha,beta] domains=[beta,alpha,gamma] "
        "sequence_length=8 max_bytes=2000 on_bad_row=skip",
    ),
    ("data", REFUSED, HALF, 'weights={"alpha":0.25,"beta":0.5,"gamma":0.25} mixture=uniform'),
    ("data", REFUSED, REPLAY, "new_domains=[alpha] new_share=0.25"),
    ("data", REFUSED, ("model.tokenizer=BOS_TOKENIZER",), "bos=false chat=true"),
    ("data", SPEED, (), "validation_domains=[alpha] cache=OTHER_CACHE workers=1"),
    ("model", REFUSED, (), "path=OTHER_MODEL dtype=bf16 tokenizer=OTHER_TOKENIZER"),
    (
        "model",
        REFUSED,
        DENSE,
        "hidden_size=48 layers=2 heads=4 kv_heads=1 ffn_size=48 max_positions=128 "
        "rope_theta=5000.0 tied_embeddings=false",
    ),
    (
        "model",
        BEFORE,
        (),
        "shared_expert=none shared_scale=0.5 routed_scale=0.5 task_scale=3.0 "
        "merge=seed merge_density=0.25 merge_rows=counted "
        'merge_weights={"alpha":2.0}',
    ),
    ("model", SPEED, (), "license=mit"),
    (
        "parallel",
        SPEED,
        (),
        "expert=1 zero_stage=3 grouped_mm=true timeout_minutes=20 check_memory=false",
    ),
)
CHANGES = [
    (f"{section}.{word}", verdict, both)
    for section, verdict, both, words in VERDICTS
    for word in words.split()
] + [("seed=1", REFUSED, ())]
SECTIONS = {
    "training": TrainingConfig,
    "router": RouterConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
}


def made(model, text, cache, *words):
    """Return the configuration of the watched run, and `words` laid over it."""
    config = Config()
    common = (
        f"model.path={model}",
        f"model.tokenizer={model}",
        f"data.path={text}",
        f"data.cache={cache}",
    )
    for word in (*common, *SETTINGS, *words):
        _apply(config, parse_override(word), "")
    return config


def reading(config):
    """Return a Run without an engine that has read its data. Needs a process group."""
    data = read_data(config, Path(config.model.tokenizer))
    return bare(config.training, config=config, data=data)


def put_bos(directory):
    """Let a saved tokenizer begin every text with a token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    template = TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def others(tmp_path_factory, text_folder, nexus_dir):
    """Another model, text with one more line in one domain, and another tokenizer."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(text_folder, folder / "text")
    with (folder / "text" / "beta" / "train.jsonl").open("a") as file:
        file.write('{"text": "one more line"}\n')
    save_tokenizer(folder / "tokenizer", {"alpha": "tree leaf", "beta": "sum", "gamma": "ship"})
    put_bos(shutil.copytree(nexus_dir, folder / "bos"))
    return {
        "OTHER_TEXT": folder / "text",
        "OTHER_CACHE": folder / "other-tokens",
        "OTHER_TOKENIZER": folder / "tokenizer",
        "BOS_TOKENIZER": folder / "bos",
        "OTHER_MODEL": make_nexus(folder / "model", seed=5),
        "cache": folder / "tokens",
    }


def test_every_setting_has_its_place_in_the_verdicts():
    settings = {
        f"{section}.{field.name}"
        for section, form in SECTIONS.items()
        for field in dataclasses.fields(form)
    }
    assert {word.partition("=")[0] for word, _, _ in CHANGES} - {"seed"} == settings


@pytest.mark.parametrize(("word", "verdict", "both"), CHANGES, ids=lambda value: str(value)[:40])
def test_a_state_goes_on_under_the_same_course_alone(
    word, verdict, both, alone, others, nexus_dir, text_folder
):
    def state(*words):
        words = [
            f"{key}={others.get(value, value)}"
            for key, _, value in (w.partition("=") for w in (*both, *words))
        ]
        run = reading(made(nexus_dir, text_folder, others["cache"], *words))
        layout = RunLayout({}, stage=2, batch=Batch(1, 1), experts=[], placement=None)
        model = None if run.config.model.path else load(run.config, layout)
        return {
            "step": 3,
            "config": run._identity(),
            "parameters": portable_state.shapes(model) if model else {},
        }

    saved = json.loads(json.dumps(state()))
    states._compare(saved, *_now(state()))
    now = _now(state(word))
    if verdict != REFUSED:
        return states._compare(saved, *now)
    with pytest.raises(CheckpointError, match="the training state at step 3 belongs to another"):
        states._compare(saved, *now)


def _now(state):
    return {"config": state["config"]}, state["parameters"]


def test_a_state_of_before_a_setting_was_recorded_goes_on():
    states._compare({"step": 3, "config": {}, "parameters": {}}, {"config": {"model.heads": 2}}, {})


# The memory of the machine ------------------------------------------------------------------------


def fitted_layout(nexus_dir, *words, ds_json="", memory=80e9):
    """Return the layout of a run of two ranks on GPUs of `memory` bytes."""
    config = Config()
    for word in (f"model.path={nexus_dir}", f"model.tokenizer={nexus_dir}", *words):
        _apply(config, parse_override(word), "")
    here = Position(0, 2, 2, "n1")
    layout = resolve(config, ds_json, here)
    return fit(config, ds_json, layout, Machine(gpus=2, gpu_memory=memory))


def test_a_micro_batch_of_0_is_what_fits_the_gpus(nexus_dir):
    large = fitted_layout(nexus_dir, "training.batch_size=64", "data.sequence_length=4096")
    assert large.batch == Batch(32, 1, "none")
    words = ("training.batch_size=64", "data.sequence_length=4096")
    small = fitted_layout(nexus_dir, *words, memory=1.5e9)
    assert small.batch.micro < 32 and small.batch.micro * small.batch.accumulation == 32
    # a run that is cut otherwise goes on: its states know no batch
    set_by_hand = fitted_layout(nexus_dir, *words, "training.micro_batch_size=8")
    assert set_by_hand.batch == Batch(8, 4, "none")


def test_what_cannot_fit_is_refused_unless_that_is_switched_off(nexus_dir):
    parts = r"\(CUDA context \(estimated\) 1.2 GB, gradient buckets 100 MB\)"
    message = rf"need 1.31 GB of GPU memory, a GPU has 1 GB {parts}; .*check_memory=false starts"
    with pytest.raises(LayoutError, match=message):
        fitted_layout(nexus_dir, memory=1e9)
    assert fitted_layout(nexus_dir, "parallel.check_memory=false", memory=1e9).batch.micro == 1


def test_zero_is_what_was_planned_where_it_is_left_open(nexus_dir, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}')
    zero = fitted_layout(nexus_dir, ds_json=str(path)).values["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 7
    assert zero["stage3_max_live_parameters"] < 1e9, "DeepSpeed's own number"
    chosen = fitted_layout(nexus_dir, "parallel.zero_stage=0")
    zero = chosen.values["zero_optimization"]
    assert (chosen.stage, zero["reduce_bucket_size"]) == (zero["stage"], 50_000_000)
    assert "offload_optimizer" not in zero
    # settled by the recipe
    assert fitted_layout(nexus_dir, "parallel.zero_stage=1").stage == 1


def test_the_least_memory_of_all_ranks_counts_and_cpus_have_none(monkeypatch):
    here = Position(0, 4, 2, "n1")
    assert machine_here(here) is None
    monkeypatch.setattr(internals, "on_cpu", lambda: False)
    monkeypatch.setattr(loop, "together", lambda ask: [(25e9, 64e9), (24e9, 128e9)])
    assert machine_here(here) == Machine(gpus=4, nodes=2, gpu_memory=24e9, host_memory=64e9)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_goes_to_the_gpu_part_by_part_under_zero_1_and_2(monkeypatch, nexus_dir, stage):
    config = Config()
    config.model.path, config.model.dtype = str(nexus_dir), "fp32"
    moved = []

    def to_device(module):
        moved.append(sum(p.numel() for p in module.parameters()))

    monkeypatch.setattr(internals, "on_cpu", lambda: False)
    monkeypatch.setattr(internals, "module_to_device", to_device)
    where = Placement(3)
    layout = RunLayout({}, stage=stage, batch=Batch(1, 1), experts=[], placement=where)
    model = load(config, layout)
    assert len(moved) == model.config.num_hidden_layers + 2
    assert sum(moved) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "calls"), [("z3", 0), ("z3_offload", 1)])
def test_an_offloaded_optimizer_has_the_cores_of_the_host(monkeypatch, nexus_dir, name, calls):
    used = []
    monkeypatch.setattr(loop, "use_cores", lambda: used.append(name))
    monkeypatch.setattr(loop, "machine_here", lambda here: Machine(gpus=2, gpu_memory=80e9))
    config = Config()
    config.model.path = config.model.tokenizer = str(nexus_dir)
    here = Position(0, 2, 2, "n1")
    ds_json = str(Path(__file__).parents[2] / "ds_configs" / f"{name}.json")
    layout = fit_here(config, ds_json, resolve(config, ds_json, here), here)
    assert layout.batch == Batch(4, 1, "none") and len(used) == calls
    # CPUs that train keep their threads, and a rank's share as it was
    monkeypatch.setattr(loop, "machine_here", lambda here: None)
    layout = resolve(config, ds_json, here)
    assert fit_here(config, ds_json, layout, here) is layout and len(used) == calls


def test_a_configuration_that_does_not_fit_leaves_the_old_one(tmp_path):
    (tmp_path / "config.yaml").write_text("old")
    config = load_config("demo", [])
    with (
        file_limit(100),
        pytest.raises(OSError, match=r"File too large: need .*config\.yaml\.tmp-"),
    ):
        write_config(tmp_path, config)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_config(tmp_path, config)
    assert [path.read_text() for path in tmp_path.iterdir()] == [dump(config)]


def test_the_first_line_says_how_the_batch_was_cut():
    run = bare(
        TrainingConfig(batch_size=8, micro_batch_size=2, activation_checkpointing="reentrant"),
        experts=[],
        total=3,
        description={"layout": "1 ranks"},
    )
    run.data.weights = {"a": 1.0}
    said = loop.describe(run, 0)
    assert said.endswith("; 1 ranks, micro-batch 2 x 4, activation checkpointing reentrant, bf16")


def test_on_cpus_states_that_exceed_the_main_memory_are_refused(monkeypatch, nexus_dir):
    config = Config()
    config.model.path = config.model.tokenizer = str(nexus_dir)
    here = Position(0, 2, 2, "n1")
    trained = sizes_of(config).counts()["trained"]

    def start(memory):
        monkeypatch.setattr(loop, "host_memory", lambda env: memory)
        return fit_here(config, "", resolve(config, "", here), here)

    # bf16 weights on both ranks, masters and moments once
    assert start(20.0 * trained).batch == Batch(4, 1, "none")
    with pytest.raises(LayoutError, match=r"states of 2 ranks on this node take .*B of main mem"):
        start(15.0 * trained)
    config.parallel.check_memory = False
    assert start(0.0)
