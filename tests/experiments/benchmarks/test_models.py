"""The compared models do the same work: one loss, one set of gradients.

The dense one has as many active parameters.
"""

import pytest
import torch

from nexus_ds.errors import ConfigError
from nexus_ds.experiments.benchmarks.layer_speed import train_step
from nexus_ds.experiments.benchmarks.models import PRESETS, VARIANTS, Shape, build, preset

CPU = torch.device("cpu")
SMALL = Shape(
    hidden=32, layers=2, heads=2, ffn=24, vocabulary=60, experts=3, batch=2, length=16, embedding=8
)


def trained(name, shape=SMALL):
    model = build(name, shape, CPU, torch.float32)
    tokens = torch.randint(
        shape.vocabulary,
        (shape.batch, shape.length + 1),
        generator=torch.Generator().manual_seed(0),
    )
    return model, float(train_step(model, tokens))


@pytest.fixture(scope="module")
def oracle():
    return trained("nexus-loop")


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name not in ("dense", "deepspeed-drop")]
)
def test_every_mixture_has_the_same_loss_and_gradients(name, oracle):
    model, loss = trained(name)
    assert loss == pytest.approx(oracle[1], abs=1e-5)
    for which in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        expected = oracle[0].get_parameter(which).grad
        # no balancing loss there, which moves what is below it a little
        if name.startswith("transformers"):
            assert (
                float((model.get_parameter(which).grad - expected).norm() / expected.norm()) < 0.1
            )
        else:
            assert torch.allclose(model.get_parameter(which).grad, expected, rtol=1e-3, atol=1e-5)


def test_deepspeed_with_its_defaults_drops_tokens(oracle):
    assert abs(trained("deepspeed-drop")[1] - oracle[1]) > 1e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_dense_model_has_as_many_active_parameters(top_k):
    shape = Shape(**{**vars(SMALL), "top_k": top_k})
    dense = build("dense", shape, CPU, torch.float32)
    counts = shape.sizes().counts()
    # the router's, and the shared expert's gate
    rows = shape.layers * shape.hidden * (shape.experts + 1)
    assert sum(p.numel() for p in dense.parameters()) == counts["active"] - rows
    mixture = build("nexus-loop", shape, CPU, torch.float32)
    assert sum(p.numel() for p in mixture.parameters()) == counts["trained"]


def test_the_large_preset_is_that_of_the_recipe():
    from nexus_ds.config import load_config
    from nexus_ds.planning.sizes import sizes_of

    sizes = sizes_of(load_config("nexus-470m", ["stage=moe"]))
    assert PRESETS["470m"].sizes().counts() == sizes.counts()
    assert preset("470m").length == load_config("nexus-470m").data.sequence_length


def test_an_unknown_preset_is_named():
    with pytest.raises(
        ConfigError, match="--preset: unknown preset 'huge'; expected one of tiny, cpu, 470m"
    ):
        preset("huge")
