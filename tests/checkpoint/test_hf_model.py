"""The transformers model of routers that read running means: same numbers, and who refuses it."""

import json

import oracle
import pytest
import torch
from conftest import make_nexus

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.hf_model import NexusMoeForCausalLM
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.records import SIDECAR
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import RouterConfig

TOKENS = torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def served(context_dir):
    return load_model(context_dir, "fp32")


@torch.no_grad()
def test_transformers_computes_what_the_reference_does(context_dir, served):
    assert type(served) is NexusMoeForCausalLM
    expected = oracle.load(context_dir, torch.float32, RouterConfig())(
        input_ids=TOKENS, use_cache=False
    ).logits
    torch.testing.assert_close(served(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    served.model.layers[0].mlp.gate.mean.data += 1.0
    changed = served(input_ids=TOKENS).logits
    served.model.layers[0].mlp.gate.mean.data -= 1.0
    assert not torch.allclose(changed, expected, atol=1e-3)


@torch.no_grad()
def test_a_stock_model_of_the_same_weights_routes_otherwise(tmp_path, served):
    make_nexus(tmp_path / "token", row_norm="fixed")
    stock = load_model(tmp_path / "token", "fp32")(input_ids=TOKENS).logits
    assert not torch.allclose(served(input_ids=TOKENS).logits, stock, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 20, [7, 1, 1, 5, 6]])
def test_token_by_token_equals_the_whole_pass(served, steps):
    expected = served(input_ids=TOKENS, use_cache=False).logits
    cache, found, start = None, [], 0
    for count in steps:
        out = served(
            input_ids=TOKENS[:, start : start + count], past_key_values=cache, use_cache=True
        )
        cache, start = out.past_key_values, start + count
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-5)
    total, count = cache.layers[0].so_far
    # one vector a layer, however long the text
    assert total.shape == (2, 16) and count.tolist() == [[20.0], [20.0]]


@torch.no_grad()
def test_generation_equals_the_whole_pass_greedily_with_beams_and_padding(served):
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    prompt = TOKENS[:, :8]
    text = served.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    for end in range(8, 20):
        assert torch.equal(
            served(input_ids=text[:, :end], use_cache=False).logits[:, -1].argmax(-1), text[:, end]
        )
    with_cache = served.generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=3, **options
    )
    without = served.generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=3, use_cache=False, **options
    )
    assert torch.equal(with_cache, without)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(prompt)], 1)
    assert torch.equal(served.generate(padded, attention_mask=mask, **options)[:, 3:], text)


@torch.no_grad()
def test_caches_that_keep_no_sum_are_refused(served):
    from transformers import DynamicCache, StaticCache

    with pytest.raises(
        UnsupportedModelError, match="needs an empty DynamicCache to start from, found StaticCache"
    ):
        served(
            input_ids=TOKENS,
            past_key_values=StaticCache(config=served.config, max_cache_len=32),
            use_cache=True,
        )
    cache = DynamicCache(config=served.config)
    cache.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    with pytest.raises(UnsupportedModelError, match="found DynamicCache with 3 tokens"):
        served(input_ids=TOKENS, past_key_values=cache, use_cache=True)
    cache = served(input_ids=TOKENS, use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="can't take -2 tokens back"):
        cache.crop(-2)
    with pytest.raises(UnsupportedModelError, match="which tokens are padding"):
        served(input_ids=TOKENS, attention_mask=torch.ones(2, 1, 20, 20))


def test_saving_and_loading_keeps_the_model(tmp_path, served):
    served.save_pretrained(tmp_path / "again")
    again = load_stock(tmp_path / "again", torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, served(input_ids=TOKENS).logits)


def test_a_sidecar_that_contradicts_the_model_type(context_dir, tmp_path):
    make_nexus(tmp_path / "nexus")
    value = json.loads((tmp_path / "nexus" / SIDECAR).read_text())
    value["router"]["input"] = "context"
    (tmp_path / "nexus" / SIDECAR).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"model_type .qwen2_moe., nexus.json says nexus_moe"):
        read_sidecar(tmp_path / "nexus")
    assert read_sidecar(context_dir).router.input == "context"


# Activation checkpointing: a pass that is made again reads its own text ---------------------------


def two_texts_gradients(model, masks=(None, None)):
    """Return every gradient of the summed losses of two passes over texts of different lengths, one
    backward pass."""
    model.train()
    total = 0.0
    for tokens, mask in zip((TOKENS, TOKENS[:, 3:14].flip(0)), masks, strict=True):
        kept = {} if mask is None else {"attention_mask": mask}
        logits = model(input_ids=tokens, use_cache=False, **kept).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
    total.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def plain_names(gradients):
    """Return gradients under names that the served model, the reference and NexusMoE share."""
    found = {
        name.replace(".mlp.gate.", ".mlp.router."): gradient for name, gradient in gradients.items()
    }
    for name in [name for name in found if name.endswith("experts.gate_up_proj")]:
        found[name.replace("gate_up_proj", "w1")], found[name.replace("gate_up_proj", "w3")] = (
            found[name].chunk(2, 1)
        )
        found[name.replace("gate_up_proj", "w2")] = found[name.replace("gate_up_proj", "down_proj")]
    return found


def assert_same_gradients(found, expected, names=None):
    names = expected.keys() if names is None else names
    assert len(names) >= 20
    for name in names:
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        assert float((found[name] - expected[name]).abs().max()) <= 1e-5 * scale, name


@pytest.fixture(scope="module")
def expected(context_dir):
    """The gradients of the plain reference, which computes each mean of its own and keeps all
    activations."""
    return two_texts_gradients(
        oracle.load(context_dir, torch.float32, RouterConfig(load_balance=0))
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_before_one_backward_pass_of_the_transformers_model(
    context_dir, expected, reentrant
):
    found = plain_names(
        two_texts_gradients(checkpointed(load_stock(context_dir, torch.float32), reentrant))
    )
    shared = [name for name in expected if name in found and "shared_experts" not in name]
    assert {f"model.layers.{layer}.mlp.router.mean" for layer in range(2)} < set(shared)
    assert_same_gradients(found, expected, shared)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_padded_passes_before_one_backward_pass(context_dir, reentrant):
    masks = [torch.ones(2, 20, dtype=torch.long), torch.ones(2, 11, dtype=torch.long)]
    masks[0][0, :7], masks[1][1, :4] = 0, 0
    kept = two_texts_gradients(load_stock(context_dir, torch.float32), masks)
    again = two_texts_gradients(
        checkpointed(load_stock(context_dir, torch.float32), reentrant), masks
    )
    trained = [name for name, gradient in kept.items() if gradient.abs().max() > 0]
    assert_same_gradients(again, kept, trained)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_before_one_backward_pass_in_training(context_dir, reentrant):
    """Of NexusMoE and of the reference, the router's losses among what is trained on."""
    losses = RouterConfig(load_balance=0.1, z_loss=0.01)
    kept = two_texts_gradients(oracle.load(context_dir, torch.float32, losses))
    again = checkpointed(oracle.load(context_dir, torch.float32, losses), reentrant)
    assert_same_gradients(two_texts_gradients(again), kept)
    model = checkpointed(
        load_nexus(context_dir, torch.float32, Placement(3), losses, False), reentrant
    )
    assert_same_gradients(two_texts_gradients(model), kept)


def test_no_module_keeps_what_one_pass_read(served):
    served(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=True)
    for layer in served.model.layers:
        assert layer.mlp.gate.reads is None
