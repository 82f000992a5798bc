"""Qwen3 written as Qwen3-Next: the same numbers out of stock transformers, the same bits back."""

import copy
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import Projection, domain_inputs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint import qwen2_moe
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.qwen3_next_headers import NORMS
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config, RouterConfig
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.remove import reduced
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import Formula, changed, embeddings, with_tensors

SIZES = dict(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
)
NAMES = ("a", "b", "c")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOISE, BF16, GRADIENTS = 2, 1.5, 1e-4  # bounds; docs/families.md repeats them
CASES = [("fp32", 1, False), ("fp32", 2, True), ("bf16", 1, False), ("bf16", 2, True)]
STACKED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def trained_looking(model, noise):
    """Give a model norms from 0.03 to 8, negative and zero ones among them, and matrices that
    matter; `noise` is what makes it a branch of the others."""
    base = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(noise)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=base)
        if weight.ndim > 1:
            drawn *= 1.5 / math.sqrt(weight.shape[-1])
        else:
            drawn = torch.exp(drawn * 0.8)
            if "layernorm" in name or name == "model.norm.weight":
                drawn[::7] *= -1
                drawn[1] = 0.0
            if name.endswith("A_log"):
                # a memory of some tokens
                drawn -= 3
        drawn += bool(noise) * 0.1 * drawn.abs().mean() * torch.randn(drawn.shape, generator=own)
        weight.data.copy_(drawn)


def mixture(root, dense_dir, family, keys, dtype, top_k):
    """Write a seed, its branches and their mixture; return the reference.

    Args:
        root: gets seed, a folder a branch, and `out`.
        dense_dir: whose tokenizer they have.
        family: of transformers.
        keys: of its config.json.
        dtype: fp32 | bf16.
        top_k: chosen experts.
    """
    models = {}
    for noise, name in enumerate(("seed", *NAMES)):
        config = AutoConfig.for_model(family, **keys)
        model = AutoModelForCausalLM.from_config(config).float()
        trained_looking(model, noise)
        model.to(DTYPES[dtype]).save_pretrained(root / name)
        # loaded, not cast: `to` would round RoPE's frequencies, too
        models[name] = AutoModelForCausalLM.from_pretrained(root / name, dtype="auto").eval()
        for file in dense_dir.glob("tokenizer*.json"):
            shutil.copy(file, root / name)
    config = Config()
    config.router.top_k, config.router.init_norm = top_k, 0.5
    branches = {name: root / name for name in NAMES}
    new = upcycled(root / "seed", branches, embeddings(NAMES), config)
    (root / "out").mkdir()
    new.write(root / "out", None, config.router, 0)
    return reference(models, new, top_k)


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request, tmp_path_factory, dense_dir):
    """(dtype, top-k, folder of the mixture, folder of seed and branches, the reference)."""
    kind, top_k, tied = request.param
    root = tmp_path_factory.mktemp(f"qwen3-{kind}")
    keys = SIZES | {"tie_word_embeddings": tied}
    oracle = mixture(root, dense_dir, "qwen3", keys, kind, top_k)
    return DTYPES[kind], top_k, root / "out", root, oracle


def reference(models, new, top_k):
    """Return the dense Qwen3 of transformers with averaged weights and the paper's formula."""
    model = copy.deepcopy(models["seed"])
    states = [models[name].state_dict() for name in NAMES]
    mean = {n: torch.stack([s[n].float() for s in states]).mean(0) for n in states[0]}
    model.load_state_dict(mean)
    for layer, block in enumerate(model.model.layers):
        ffns = [models[name].model.layers[layer].mlp for name in NAMES]
        rows = torch.from_numpy(new.tensors[qwen2_moe.gate_name(layer)].make()).to(model.dtype)
        block.mlp = Formula(models["seed"].model.layers[layer].mlp, ffns, rows, top_k)
    return model.eval()


def opened(directory):
    config, reader = qwen2_moe.open_moe(directory)
    return config, TensorReader.of(reader)


def tokens(rows=3, length=24):
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(1))


def stock(directory, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__name__ == "Qwen3NextForCausalLM"
    return model.eval()


def difference(a, b):
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


@torch.no_grad()
def test_stock_transformers_computes_the_formula(made):
    """fp32 within twice what the reference differs from itself by; bf16 no farther from fp32 than
    the reference in bf16 is."""
    dtype, _, out, _, oracle = made
    model, x = stock(out, dtype), tokens()
    expected, found = oracle(x).logits, model(x).logits
    if dtype is torch.float32:
        assert difference(found, expected) <= NOISE * noise_of(oracle, x)
    else:
        exact = in_fp32(oracle)(x).logits
        own = (expected.float() - exact).abs().median()
        assert (found.float() - exact).abs().median() < BF16 * own
    assert all(len(block.mlp.chosen) > 1 for block in oracle.model.layers)
    # the comparison can fail
    for change in (renormalised, a_quarter, without_o_proj, another_norm):
        model = stock(out, dtype)
        change(model)
        assert difference(model(x).logits, expected) > 0.05, change.__name__


@torch.no_grad()
def noise_of(oracle, x):
    """Return how far the reference is from itself: with other kernels, with embeddings that are an
    ulp larger, and with queries of which half the weights are."""
    expected = oracle(x).logits
    found = []
    if oracle._supports_sdpa:
        oracle.set_attn_implementation("eager")
        found.append(oracle(x).logits)
        oracle.set_attn_implementation("sdpa")
    for name, every in (("embed_tokens", 1), ("q_proj", 2), ("qkv_proj", 2)):
        moved = copy.deepcopy(oracle)
        for own, weight in moved.named_parameters():
            if f"{name}.weight" in own:
                flat = weight.data.view(-1)[::every]
                flat.copy_(torch.nextafter(flat, 2 * flat))
        found.append(moved(x).logits)
    return max(difference(one, expected) for one in found)


def assert_streams_alike(streamed, model, x, rows=2):
    """Layers get `rows` sequences at a time, and so compute every bit that the whole model does of
    as many. The head gets all at once, for which a processor may have another kernel."""
    parts = x.split(rows)
    states = torch.cat([model.base_model(part).last_hidden_state for part in parts])
    found = streamed.base_model(input_ids=x, use_cache=False).last_hidden_state
    assert torch.equal(found, states)
    logits = torch.cat([model(part).logits for part in parts])
    torch.testing.assert_close(streamed(input_ids=x, use_cache=False).logits, logits)


def in_fp32(oracle):
    """Return a copy of the reference that computes in fp32 with the same weights."""
    exact = copy.deepcopy(oracle).float()
    for layer in exact.model.layers:
        layer.mlp.rows = layer.mlp.rows.float()
    return exact


def renormalised(model):
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = True


def a_quarter(model):
    config = model.config
    config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": 0.25}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.model.rotary_emb.inv_freq[1:] = 0


def without_o_proj(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data /= 2


def another_norm(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data += 1


@torch.no_grad()
def test_with_left_padding_and_with_a_cache_it_is_the_same(made):
    dtype, _, out, _, oracle = made
    if dtype is not torch.float32:
        pytest.skip("rounding hides what is looked for")
    model, x = stock(out, dtype), tokens()
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    # what a row of padding computes is nobody's: it is left out
    expected = oracle(x, attention_mask=mask).logits[mask.bool()]
    found = model(x, attention_mask=mask).logits[mask.bool()]
    assert difference(found, expected) <= NOISE * noise_of(oracle, x)
    assert difference(model(x).logits[0, 9:], expected[: 24 - 9]) > 1e-3
    greedy = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    texts = [m.generate(x, use_cache=c, **greedy) for m in (oracle, model) for c in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts)


@torch.no_grad()
def test_layer_by_layer_it_is_the_same(made):
    dtype, _, out, _, _ = made
    model, x = stock(out, dtype), tokens()
    streamed = streamed_model(out, dtype, torch.device("cpu"), rows=2)
    assert_streams_alike(streamed, model, x)
    greedy = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(*(one.generate(x[:2], **greedy) for one in (model, streamed)))


def test_it_is_read_back_bit_by_bit(made):
    """Names, shapes and bits are those of the dense Qwen3, of slices of rows too."""
    _, _, out, root, _ = made
    config, reader = opened(out)
    table = qwen2_moe.stored(config)
    assert set(reader.names()) == set(table) and config["model_type"] == "qwen3_next"
    branches = [load_file(root / name / "model.safetensors") for name in NAMES]
    for name, entry in table.items():
        tensor = reader.read(name)
        assert tensor.shape == entry.shape == reader.info(name).shape, name
        part = reader.read_rows(name, 1, max(1, len(tensor) - 1))
        assert torch.equal(part, tensor[1:-1]) and not len(reader.read_rows(name, 1, 1)), name
        # from within a row to within another: what samples and hashes of files are made of
        some = tensor.reshape(-1)[3:45]
        assert reader.items(name, 3, len(some)) == some.view(torch.uint8).numpy().tobytes(), name
        if entry.role is qwen2_moe.Role.DENSE:
            mean = sum(state[name].float() for state in branches) / 3
            assert torch.equal(tensor, mean.to(tensor.dtype)), name
        if entry.role is qwen2_moe.Role.ROUTED:
            assert torch.equal(tensor, branches[entry.expert][entry.dense_name]), name
    verify_expert_embeddings(out)


@torch.no_grad()
def test_training_computes_the_reference_and_its_gradients(made):
    """In the family's own form: no gate of zeros, no rescaled columns. Rows of the router by P."""
    dtype, _, out, _, oracle = made
    if dtype is not torch.float32:
        pytest.skip("gradients are compared in fp32")
    model, compared = gradients_compared(out, oracle)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    # of each layer 8 outside of the FFN, the shared expert's 3, 3 stacks and P's 2
    assert compared == 2 * (8 + 3 + 3 + 2) + (2 if oracle.config.tie_word_embeddings else 3)


def gradients_compared(out, oracle):
    """Hold the gradients of a mixture in training to the reference's; return the model and how
    many were held."""
    oracle = copy.deepcopy(oracle)
    model = load_nexus(out, torch.float32, Placement(3), RouterConfig(load_balance=0.0), False)
    router_file = load_file(out / "nexus" / "nexus_router.safetensors")
    inputs = domain_inputs(router_file, read_sidecar(out).router.centre)
    x = tokens()
    with torch.enable_grad():
        for index, layer in enumerate(oracle.model.layers):
            inside = f"layers.{index}."
            weights = {name.removeprefix(inside): w for name, w in router_file.items()}
            layer.mlp.projection = Projection(weights)
            layer.mlp.rows = layer.mlp.projection(inputs)
        for one in (model, oracle):
            one.zero_grad()
            logits = one(input_ids=x, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    own, compared = dict(oracle.named_parameters()), 0
    for name, parameter in model.named_parameters():
        block, _, stack = name.partition(".experts.")
        sharing, _, shared = name.partition(".shared_experts.")
        if stack:
            experts = oracle.get_submodule(block).experts
            expected = torch.stack([ffn_gradient(ffn, STACKED[stack]) for ffn in experts])
        elif shared:
            part = shared.removesuffix(".weight")
            expected = ffn_gradient(oracle.get_submodule(sharing).shared, part)
        else:
            expected = own[name.replace("router.", "")].grad
        assert expected.abs().max() > 0 and difference(parameter.grad, expected) < GRADIENTS, name
        compared += 1
    return model, compared


def ffn_gradient(ffn, part):
    """Return the gradient of one matrix of a dense family's FFN, which may have two in one."""
    if hasattr(ffn, part):
        return getattr(ffn, part).weight.grad
    gate, up = ffn.gate_up_proj.weight.grad.chunk(2)
    return gate if part == "gate_proj" else up


def test_experts_come_and_go(made, tmp_path):
    """Extension, replacement and removal speak the dense family's names; what is copied keeps its
    bits."""
    dtype, _, out, root, _ = made
    config = Config()
    more = embeddings((*NAMES, "d"))
    steps = {
        "extend": lambda old: extended(old, {"d": root / "a"}, more, config),
        "replace": lambda old: replaced(old, {"b": root / "a"}, None, config, share=0.0),
        "remove": lambda old: reduced(old, ["c"]),
    }
    old = out
    for name, step in steps.items():
        (tmp_path / name).mkdir()
        step(old).write(tmp_path / name, None, config.router, 0)
        stock(tmp_path / name, dtype)
        old = tmp_path / name
    (_, before), (_, after) = opened(out), opened(old)
    norm = "model.layers.0.self_attn.k_norm.weight"
    assert not torch.equal(before.read(norm), after.read(norm))
    kept = qwen2_moe.expert_name(1, 0, "up_proj")
    assert torch.equal(before.read(kept), after.read(kept))
    moved = after.read(qwen2_moe.expert_name(1, 1, "up_proj"))
    assert torch.equal(
        moved, load_file(root / "a" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    )
    assert describe(old)["experts"][2]["name"] == "d"


def test_it_is_counted_as_the_dense_family_counts(made):
    _, top_k, out, root, _ = made
    facts = describe(out)
    config = Config()
    config.model.path = str(out)
    counted = sizes_of(config).counts()
    assert counted["total"] == facts["parameters"]["total"]
    assert counted["active"] == facts["parameters"]["active"]
    dense = sum(
        math.prod(open_dense(root / "a").reader.info(n).shape)
        for n in open_dense(root / "a").reader.names()
    )
    ffn = 2 * 3 * 32 * 40
    assert facts["parameters"]["active"] == dense + top_k * ffn + 2 * 4 * 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "output gate in .*q_proj.weight is not zero"),
        ("model.layers.1.input_layernorm.weight", "is not that of nexus/nexus_source.safetensors"),
        ("model.layers.1.self_attn.q_norm.weight", "is not that of nexus/nexus_source.safetensors"),
    ],
)
def test_what_was_trained_elsewhere_is_named(made, tmp_path, name, message):
    _, _, out, _, _ = made
    odd = with_tensors(out, tmp_path / "odd", lambda t: t[name].add_(0.5))
    with pytest.raises(CheckpointError, match=message):
        opened(odd)[1].read(name)


def test_a_qwen3_next_of_another_origin_is_refused(made, tmp_path):
    _, _, out, _, _ = made
    message = (
        "other/config.json: a Qwen3-Next whose nexus_source is None, expected the dense family"
    )
    with pytest.raises(CheckpointError, match=message):
        qwen2_moe.open_moe(changed(out, tmp_path / "other", nexus_source=...))
    (shutil.copytree(out, tmp_path / "bare") / NORMS).unlink()
    with pytest.raises(CheckpointError, match="no nexus/nexus_source"):
        qwen2_moe.open_moe(tmp_path / "bare")
    with pytest.raises(
        CheckpointError, match="norm_topk_prob is None, a Nexus checkpoint has False"
    ):
        qwen2_moe.open_moe(changed(out, tmp_path / "silent", norm_topk_prob=...))


def test_a_router_that_reads_contexts_is_refused(made):
    _, _, _, root, _ = made
    config = Config()
    config.router.input = "context"
    with pytest.raises(UnsupportedModelError, match="a mixture of qwen3 can't be written with it"):
        upcycled(root / "seed", {"a": root / "a"}, embeddings(("a",)), config)


def test_a_seed_in_fp16_is_refused(made, tmp_path):
    """Its branches in fp16 are not: they are cast."""
    _, _, _, root, _ = made
    for name in ("seed", "a"):
        with_tensors(
            root / name, tmp_path / name, lambda t: t.update({n: x.half() for n, x in t.items()})
        )
    rest = ({"a": tmp_path / "a"}, embeddings(("a",)), Config())
    assert upcycled(root / "seed", *rest).cast == {"a": "float16"}
    with pytest.raises(UnsupportedModelError, match=r"seed: weights are F16, .* save the seed in "):
        upcycled(tmp_path / "seed", *rest)


@pytest.mark.slow
def test_stock_transformers_loads_it_without_this_package(made):
    _, _, out, _, _ = made
    said = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(out)!r}, local_files_only=True)\n"
        "print(model.config.model_type, 'nexus_ds' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["qwen3_next", "False"], done.stderr
