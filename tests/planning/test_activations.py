"""Planned activations against what a forward pass keeps, in one process: within 5%."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plan_models import LENGTH, OTHER, SMALL, make_model
from plan_worker import Kept, forward
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint.build import DTYPES, new_dense
from nexus_ds.config import load_config
from nexus_ds.model.head import use_loss_head
from nexus_ds.planning.layout import Layout
from nexus_ds.planning.memory import activations
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import RouterConfig

SEQUENCES = 6


def layout(checkpointing):
    return Layout(
        stage=2,
        offload="none",
        expert=1,
        world=1,
        micro=SEQUENCES,
        accumulation=1,
        checkpointing=checkpointing,
    )


def measured(model, checkpointing):
    """Return bytes that the forward pass keeps, and those of the output layer's gradient."""
    model.train()
    use_loss_head(model)
    if checkpointing != "none":
        reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    kept = Kept(SimpleNamespace(module=model))
    forward(model, torch.randint(model.config.vocab_size, (SEQUENCES, LENGTH + 1)), kept)
    return kept.bytes(model.config.vocab_size)


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("sizes", [SMALL, OTHER], ids=["small", "other"])
def test_a_mixture_keeps_what_was_planned(sizes, dtype, checkpointing, tmp_path):
    checkpoint = make_model(tmp_path / "model", sizes)
    model = load_nexus(
        checkpoint, DTYPES[dtype], Placement(sizes.experts), RouterConfig(), dtype == "bf16"
    )
    total, head = measured(model, checkpointing)
    tokens, width = SEQUENCES * LENGTH, DTYPES[dtype].itemsize
    assert total - head == pytest.approx(
        activations(sizes, layout(checkpointing), width, tokens), rel=0.05
    )
    assert head == width * sizes.vocabulary * sizes.hidden


NORMED = dict(
    vocab_size=900,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["olmo2", "glm4", "gemma2", "gemma3_text"])
def test_a_family_of_more_norms_keeps_about_what_was_planned(family, dtype, tmp_path):
    """Norms differ in what they keep in fp32; scores of Gemma 2 are kept whole."""
    config = AutoConfig.for_model(family, **NORMED)
    model = AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
    model.save_pretrained(tmp_path)
    total, head = measured(model, "none")
    sizes = sizes_of(load_config("demo", ["stage=seed", f"model.path={tmp_path}"]))
    tokens, width = SEQUENCES * LENGTH, DTYPES[dtype].itemsize
    planned = activations(sizes, layout("none"), width, tokens)
    assert total - head == pytest.approx(planned, rel=0.12)
    if family == "gemma2":
        unscored = activations(replace(sizes, scored_heads=0), layout("none"), width, tokens)
        assert planned - unscored == 3 * tokens * LENGTH * 4 * (4 + 2 * width)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_a_dense_model_keeps_what_was_planned(dtype, kv_heads):
    config = load_config(
        "demo", ["stage=seed", f"model.kv_heads={kv_heads}", "pipeline.vocabulary=900"]
    )
    model = new_dense(config.model, 900, 0, 0).to(DTYPES[dtype])
    total, head = measured(model, "none")
    planned = activations(
        sizes_of(config), layout("none"), DTYPES[dtype].itemsize, SEQUENCES * LENGTH
    )
    assert total - head == pytest.approx(planned, rel=0.05)
