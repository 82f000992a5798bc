"""Routes: what a model's own router logits say, in every form that a mixture has."""

import copy

import pytest
import torch
from conftest import make_nexus
from transformers import AutoModelForCausalLM, Qwen3Config

from nexus_ds.checkpoint.loading import load_model, routers_of
from nexus_ds.checkpoint.native import mixture_classes
from nexus_ds.generation.routes import Decision, Routes, first_choice

TOKENS = torch.randint(2, 31, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=3,
    max_position_embeddings=64,
)


def qwen2_moe(folder, top_k):
    return load_model(make_nexus(folder / "token", top_k=top_k))


def context(folder, top_k):
    form = dict(router_input="context", row_norm="fixed")
    return load_model(make_nexus(folder / "context", top_k=top_k, **form))


def qwen3_next(folder, top_k):
    from transformers import Qwen3NextConfig

    layers = dict(layer_types=["full_attention"] * 2, norm_topk_prob=True)
    config = Qwen3NextConfig(**SIZES | layers, num_experts_per_tok=top_k)
    return AutoModelForCausalLM.from_config(config).eval()


def native(folder, top_k):
    config_class, model_class = mixture_classes("qwen3")
    assert issubclass(config_class, Qwen3Config)
    return model_class(config_class(**SIZES | {"num_experts_per_tok": top_k})).eval()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("make", [qwen2_moe, context, qwen3_next, native])
@torch.no_grad()
def test_decisions_are_those_of_the_router_logits(make, top_k, tmp_path):
    torch.manual_seed(0)
    model = make(tmp_path, top_k)
    if make is native:
        # it leaves experts as they lie in memory: a file fills them
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    for router in routers_of(model).values():
        torch.nn.init.normal_(router.weight)
    with Routes(model, 2) as routes:
        hidden = []
        layers = model.model.layers
        handles = [
            layer.mlp.gate.register_forward_hook(lambda m, i, out: hidden.append(out[0]))
            for layer in layers
        ]
        model(input_ids=TOKENS[:, :5], use_cache=False)
        model(input_ids=TOKENS[:, 5:], use_cache=False)
        taken = routes.take()
        for handle in handles:
            handle.remove()
    first, second = zip(*(part.view(2, -1, 3).unbind(0) for part in hidden), strict=True)
    for row, parts in enumerate((first, second)):
        for layer in range(2):
            logits = torch.cat([parts[layer], parts[2 + layer]])
            weight = logits.softmax(-1)
            if getattr(model.config, "norm_topk_prob", False):
                weight /= weight.topk(top_k, -1).values.sum(-1, keepdim=True)
            assert len(taken[row]) == 9
            for token, decision in enumerate(taken[row]):
                assert decision.experts[layer] == logits[token].argmax()
                expected = pytest.approx(weight[token].max().item(), rel=1e-5)
                assert decision.weights[layer] == expected


@torch.no_grad()
def test_decisions_agree_with_what_the_model_gives_out(tmp_path):
    model = qwen2_moe(tmp_path, 2)
    with Routes(model, 2) as routes:
        output = model(input_ids=TOKENS, output_router_logits=True, use_cache=False)
        taken = routes.take()
    logits_LBSE = torch.stack(output.router_logits).view(2, 2, 9, 3)
    found = torch.tensor([[decision.experts for decision in row] for row in taken])
    assert torch.equal(found, logits_LBSE.argmax(-1).permute(1, 2, 0))


def test_hooks_are_gone_afterwards(nexus_dir):
    model = load_model(nexus_dir)
    before = copy.copy(routers_of(model)[0]._forward_hooks)
    with Routes(model, 1):
        assert routers_of(model)[0]._forward_hooks != before
    assert routers_of(model)[0]._forward_hooks == before


def test_layers_without_experts_have_no_router(uneven_moe_dir, dense_dir):
    assert list(routers_of(load_model(uneven_moe_dir))) == [1]
    assert routers_of(load_model(dense_dir)) == {}


@pytest.mark.parametrize(
    ("experts", "weights", "place", "expected"),
    [
        ([2, 1, 2], [0.5, 0.9, 0.7], None, (2, 0.6)),
        ([2, 1, 2], [0.5, 0.9, 0.7], 1, (1, 0.9)),
        ([0, 1], [0.5, 0.9], None, (1, 0.9)),
        ([1, 0], [0.5, 0.9], None, (0, 0.9)),
    ],
)
def test_what_is_shown_is_the_choice_of_most_layers_or_of_one(experts, weights, place, expected):
    found = first_choice(Decision(experts, weights), place)
    assert found == pytest.approx(expected)
