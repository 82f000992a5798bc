"""Old experts keep every bit while a new one learns, wherever they are."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_nexus
from launch import finish, start_ranks

from nexus_ds.checkpoint.records import ExtendStep
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import ConfigError
from nexus_ds.runtime.engine import moe_layers, parameter_groups, set_learning_rate
from nexus_ds.runtime.frozen_experts import freeze, old_experts
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config

WORKER = Path(__file__).parents[1] / "loop_worker.py"
WORDS = (
    "stage=extend",
    "pipeline.domains=[alpha,beta]",
    "pipeline.new_domains=[gamma]",
    "data.domains=[alpha,beta,gamma]",
    "data.sequence_length=16",
    "data.max_bytes=0",
    "data.mixture=uniform",
    "parallel.expert=2",
    "model.dtype=bf16",
    "training.steps=4",
    "training.tokens=0",
    "training.lr=1e-2",
    "training.eval_windows=2",
    "training.batch_size=8",
    "training.freeze_old_experts=true",
)


@pytest.fixture
def trained(nexus_dir):
    """A model whose experts 0 and 2 are frozen, and its weights before three steps of AdamW."""
    config = Config()
    config.training.freeze_old_experts = True
    config.training.weight_decay = 0.2
    model = load_nexus(nexus_dir, torch.float32, Placement(3), config.router, False)
    freeze(moe_layers(model), {0, 2})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config.training, 0.05), lr=1.0)
    tokens_BS = torch.arange(48).view(3, 16) % model.config.vocab_size
    model.train()
    for _ in range(3):
        set_learning_rate(SimpleNamespace(optimizer=optimizer), 1e-2)
        model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


def test_a_frozen_expert_keeps_every_bit_and_all_else_learns(trained):
    model, before = trained
    for name, after in model.named_parameters():
        if ".mlp.experts." not in name:
            assert not torch.equal(after, before[name]), name
            continue
        for expert in (0, 2):
            assert torch.equal(after[expert], before[name][expert]), name
        assert not torch.equal(after[1], before[name][1]), name


def test_what_is_not_frozen_gets_the_gradient_that_it_had(nexus_dir):
    gradients = []
    for frozen in ((), (1,)):
        model = load_nexus(nexus_dir, torch.float32, Placement(3), Config().router, False)
        freeze(moe_layers(model), frozen)
        tokens_BS = torch.arange(48).view(3, 16) % model.config.vocab_size
        model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    free, held = gradients
    for name, gradient in held.items():
        if ".mlp.experts." in name:
            assert not gradient[1].any() and free[name][1].any()
            free[name][1] = 0
        assert torch.equal(gradient, free[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_of_experts_on_several_ranks_each_freezes_its_own(rank):
    """Three experts in four slots of two ranks: 0 and 2 on the first, 1 and a vacant one."""
    weights = torch.nn.Parameter(torch.ones(2, 4, 3))
    experts = torch.nn.ParameterList([weights])
    layer = SimpleNamespace(placement=Placement(3, 2, rank), experts=experts)
    freeze([layer], {0, 1})
    (weights * 5).sum().backward()
    # of each rank the first: behind it stands expert 2 on one, nothing on the other
    assert weights.grad.flatten(1).any(1).tolist() == [False, True]


def test_no_gradient_of_a_frozen_expert_is_infinite():
    weights = torch.nn.Parameter(torch.ones(2, 1, 1))
    layer = SimpleNamespace(placement=Placement(2), experts=torch.nn.ParameterList([weights]))
    freeze([layer], {0})
    (weights * torch.tensor([torch.inf, 2.0])[:, None, None]).sum().backward()
    assert weights.grad.flatten().tolist() == [0.0, 2.0]


def extended_by(directory, *names):
    """Note an extension in a mixture's lineage, as if its experts of these names were new."""
    sidecar = read_sidecar(directory)
    step = ExtendStep(
        checkpoint="before",
        experts=list(names),
        share=0.2,
        linear_init=None,
        router=Config().router,
        seed=0,
    )
    write_sidecar(directory, replace(sidecar, lineage=[*sidecar.lineage, step]))


def test_the_old_ones_are_those_that_the_last_extension_did_not_bring(tmp_path):
    directory = make_nexus(tmp_path / "nexus")
    names = [expert.name for expert in read_sidecar(directory).experts]
    extended_by(directory, names[1])
    extended_by(directory, names[2])
    assert old_experts(str(directory)) == {0, 1}


@pytest.mark.parametrize("kind", ["new", "dense", "never extended"])
def test_where_nothing_is_old_it_is_refused(kind, dense_dir, nexus_dir):
    path = {"new": "", "dense": str(dense_dir), "never extended": str(nexus_dir)}[kind]
    found = path or "a new model"
    message = (
        f"training.freeze_old_experts=true: found {found}, expected a mixture that extend wrote; "
        "leave the setting out"
    )
    with pytest.raises(ConfigError) as refused:
        old_experts(path)
    assert str(refused.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_under_deepspeed_a_checkpoint_has_the_bits_of_the_old_experts(stage, tmp_path, text_folder):
    """Three experts on two ranks, of which the last one is new, four steps in bf16."""
    directory = make_nexus(tmp_path / "nexus")
    names = [expert.name for expert in read_sidecar(directory).experts]
    extended_by(directory, names[2])
    words = (
        f"model.path={directory}",
        f"model.tokenizer={directory}",
        f"data.path={text_folder}",
        f"data.cache={tmp_path / 'tokens'}",
        f"output={tmp_path / 'out'}",
        f"parallel.zero_stage={stage}",
        *WORDS,
    )
    finish(start_ranks([WORKER, tmp_path / "seen", *words], 2))
    before = TensorReader(directory)
    after = TensorReader(tmp_path / "out")
    changed = set()
    for name in before.names():
        # as the training's working precision has it at the start
        if not torch.equal(before.read(name).bfloat16(), after.read(name)):
            changed.add(name)
    for layer in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts"
            learned = [f"{prefix}.{e}.{part}.weight" in changed for e in range(3)]
            assert learned == [False, False, True]
