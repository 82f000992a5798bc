"""Dense families that are read through a view: what stock Qwen2-MoE computes of the checkpoint is
what the family's own class computes with the paper's formula in place of its FFNs."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.dense_settings import family_of, rotary
from nexus_ds.checkpoint.families.record import dense_weights
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.checkpoint.views import head_order
from nexus_ds.errors import CheckpointError
from nexus_ds.upcycling.average import average_dense
from tests.checkpoint.test_dense import Formula, changed
from tests.checkpoint.test_qwen3_next import (
    BF16,
    NOISE,
    assert_streams_alike,
    difference,
    in_fp32,
    mixture,
    noise_of,
    renormalised,
    tokens,
)

SIZES = dict(
    vocab_size=31,
    hidden_size=64,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
)
LONG = dict(
    rope_type="longrope",
    rope_theta=500.0,
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
)
GRANITE = dict(
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    logits_scaling=8.0,
    tie_word_embeddings=True,
)
KINDS = {  # family, keys of its config.json, whether bf16 is equal bit by bit
    "phi-4": ("phi3", {}, True),
    "phi-3-window": ("phi3", dict(sliding_window=6, tie_word_embeddings=True), True),
    "phi-4-mini": ("phi3", dict(rope_parameters=LONG, original_max_position_embeddings=16), False),
    "phi-part": (
        "phi3",
        dict(rope_parameters=dict(rope_theta=9e3), partial_rotary_factor=0.5),
        True,
    ),
    "ministral": (
        "ministral",
        dict(
            head_dim=16,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention"],
        ),
        True,
    ),
    # 1/64 of 1/sqrt(16) is a power of two, as in the 2B; 2^-7/2 of the 8B is not
    "granite-2b": ("granite", dict(attention_multiplier=1 / 64, **GRANITE), False),
    "granite-8b": ("granite", dict(attention_multiplier=0.35, **GRANITE), False),
    "seed-oss": ("seed_oss", dict(head_dim=24, residual_dropout=0.0), True),
    "glm-4": ("glm", dict(head_dim=16), True),
    "ernie-4.5": ("ernie4_5", dict(head_dim=16), False),
}


class InOrder(Formula):
    """The formula rounded as transformers rounds it: gates in fp32, the shared expert last.

    So a bf16 model may be equal bit by bit.
    """

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)
        logits = F.linear(x, self.rows)
        gates, indices = F.softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1)
        y = torch.zeros_like(x)
        for expert, ffn in enumerate(self.experts):
            place, token = torch.where((indices == expert).T)
            y.index_add_(0, token, ffn(x[token]) * gates[token, place, None].to(x.dtype))
        self.chosen |= set(indices.flatten().tolist())
        return (y + self.shared(x)).view(shape)


@pytest.fixture(
    scope="module", params=[(k, *how) for k in KINDS for how in (("fp32", 1), ("bf16", 2))], ids=str
)
def made(request, tmp_path_factory, dense_dir):
    """(kind, folder of the mixture, folder of seed and branches, the reference)."""
    kind, dtype, top_k = request.param
    family, keys, _ = KINDS[kind]
    root = tmp_path_factory.mktemp(f"{kind}-{dtype}")
    oracle = mixture(root, dense_dir, family, SIZES | keys, dtype, top_k)
    for layer in oracle.model.layers:
        layer.mlp.__class__ = InOrder
    return kind, root / "out", root, oracle


def loaded(directory):
    # one expert after the other, as the formula has them: bits depend on it
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        local_files_only=True,
        dtype="auto",
        output_loading_info=True,
        experts_implementation="eager",
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def stock(directory):
    model = loaded(directory)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    return model


def file_order(model, config):
    """Give q and k the rows of a head as the family's file has them."""
    width = model.model.layers[0].self_attn.head_dim
    order = head_order(rotary(config).turned, width, family_of(config).interleaved)
    back = torch.tensor(order).argsort()
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for weight in part.parameters():
                rows = weight.data.unflatten(0, (-1, len(back)))
                weight.data = rows[:, back].flatten(0, 1)


def all_turn(model, config):
    """Turn the channels that stand still, too."""
    rotary_emb = model.model.rotary_emb
    rope = dict(model.config.rope_parameters)
    for key in ("short_factor", "long_factor"):
        rope[key] = [min(factor, 1.0) for factor in rope[key]]
    model.config.rope_parameters = rope
    model.model.rotary_emb = type(rotary_emb)(model.config)


def without_factor(model, config):
    """Leave out what RoPE multiplies the channels by that it turns."""
    turned, factor = rotary(config)
    assert factor > 1.1
    pairs, width = turned // 2, model.model.layers[0].self_attn.head_dim
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        rows = weight.data.unflatten(0, (-1, 2, width // 2))
        rows[:, :, :pairs] /= factor**2
        weight.data = rows.flatten(0, 2)


def short_alone(model, config):
    """Keep to the factors of few positions."""
    rope = dict(model.config.rope_parameters)
    model.config.rope_parameters = rope | {"long_factor": rope["short_factor"]}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def no_window(model, config):
    model.config.layer_types = ["full_attention"] * len(model.config.layer_types)


def all_windows(model, config):
    model.config.layer_types = ["sliding_attention"] * len(model.config.layer_types)


def no_biases(model, config):
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.data.zero_()


def unscaled(module, key, of=float):
    """Return a control that takes one of Granite's multipliers away again."""

    def control(model, config):
        scale = of(config[key])
        for name, weight in model.named_parameters():
            if module in name:
                weight.data /= scale

    control.__name__ = f"without {key}"
    return control


GRANITES = (
    unscaled("embed_tokens", "embedding_multiplier"),
    unscaled("embed_tokens", "residual_multiplier", lambda r: 1 / r),
    unscaled("q_proj", "attention_multiplier", lambda m: 4 * m),
    unscaled("lm_head", "logits_scaling", lambda d: 1 / d),
)
CONTROLS = {  # what each kind's view does: without it the output is another
    "phi-3-window": (no_window,),
    "phi-4-mini": (file_order, all_turn, without_factor, short_alone),
    "phi-part": (file_order, all_turn),
    "ministral": (no_window, all_windows),
    "granite-2b": GRANITES,
    "granite-8b": GRANITES,
    "seed-oss": (no_biases,),
    "glm-4": (file_order, all_turn, no_biases),
    "ernie-4.5": (file_order,),
}


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_stock_transformers_computes_the_formula(made, top_k, tmp_path):
    kind, out, root, oracle = made
    oracle = copy.deepcopy(oracle)
    # the number of chosen experts stands in config.json alone
    out = changed(out, tmp_path / "out", num_experts_per_tok=top_k)
    for block in oracle.model.layers:
        block.mlp.top_k = top_k
    model, x = stock(out), tokens()
    expected, found = oracle(x).logits, model(x).logits
    if expected.dtype is torch.float32:
        assert difference(found, expected) < NOISE * noise_of(oracle, x), kind
    elif KINDS[kind][2]:
        # All of them where sums of a permuted head are made in one order; on other processors a
        # few round to the other side.
        assert float((found == expected).float().mean()) > 0.8, kind
    else:
        exact = in_fp32(oracle)(x).logits
        own = (expected.float() - exact).abs().median()
        assert (found.float() - exact).abs().median() < BF16 * own
    assert all(len(block.mlp.chosen) > 1 for block in oracle.model.layers)
    config = json.loads((root / "seed" / "config.json").read_text())
    for control in (lambda model, _: renormalised(model), *CONTROLS.get(kind, ())):
        model = stock(out)
        control(model, config)
        assert difference(model(x).logits, expected) > 0.01, control


@torch.no_grad()
def test_with_left_padding_and_with_a_cache_it_is_the_same(made):
    kind, out, _, oracle = made
    model, x = stock(out), tokens()
    if model.dtype is not torch.float32:
        pytest.skip("rounding hides what is looked for")
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    expected = oracle(x, attention_mask=mask).logits[mask.bool()]
    found = model(x, attention_mask=mask).logits[mask.bool()]
    assert difference(found, expected) < 2 * noise_of(oracle, x), kind
    greedy = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    texts = [m.generate(x, use_cache=c, **greedy) for m in (oracle, model) for c in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts), kind


@pytest.fixture(scope="module")
def phi_4_mini(tmp_path_factory, dense_dir):
    """(the mixture, the reference), in fp32."""
    root = tmp_path_factory.mktemp("phi-4-mini")
    family, keys, _ = KINDS["phi-4-mini"]
    oracle = mixture(root, dense_dir, family, SIZES | keys, "fp32", 1)
    return stock(root / "out"), oracle


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 16, 17, 60])
def test_phi_4_minis_rope_below_and_above_the_positions_of_its_first_training(phi_4_mini, length):
    """Short factors up to there, long ones beyond; the turned channels' factor in both."""
    model, oracle = copy.deepcopy(phi_4_mini)
    assert oracle.model.rotary_emb.attention_scaling == pytest.approx(1.5**0.5)
    assert model.model.rotary_emb.attention_scaling == 1.0
    x = tokens(2, length)
    found, expected = model(x).logits, oracle(x).logits
    # an ulp of q_proj and of some frequencies; 7e-6 was measured, and 6e-6 of the reference itself
    assert difference(found, expected) < 1e-5
    without_factor(model, oracle.config.to_dict())
    assert difference(model(x).logits, expected) > 0.01


@torch.no_grad()
def test_generation_that_crosses_these_positions_is_right_without_a_cache(phi_4_mini):
    """A Phi-3 computes its cache anew there; a Qwen2-MoE goes on with keys of the short factors."""
    model, oracle = phi_4_mini
    x = tokens(3, 10)
    assert x.shape[1] < oracle.config.original_max_position_embeddings < 30
    greedy = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    texts = [m.generate(x, use_cache=c, **greedy) for m in (oracle, model) for c in (True, False)]
    cached, plain, kept, found = texts
    assert torch.equal(found, plain) and torch.equal(cached, plain)
    # up to there it is the same with a cache
    assert torch.equal(kept[:, :16], plain[:, :16]) and not torch.equal(kept, plain)


def older(config):
    """Return a config.json as transformers 4 wrote it: RoPE in two or three places, `torch_dtype`,
    and no key that says what its class takes anyway."""
    rope = dict(config["rope_parameters"])
    found = {key: value for key, value in config.items() if key != "rope_parameters"}
    found["torch_dtype"] = found.pop("dtype")
    found["rope_theta"] = rope.pop("rope_theta")
    part = rope.pop("partial_rotary_factor", None)
    if part is not None:
        found["partial_rotary_factor"] = part
    kind = rope.pop("rope_type")
    found["rope_scaling"] = None
    if kind != "default":
        rope.pop("original_max_position_embeddings", None)
        found["rope_scaling"] = {"type": kind, **rope}
    taken = CONFIG_MAPPING[config["model_type"]]().to_dict()
    kept = ("model_type", "head_dim", "sliding_window", "layer_types")
    return {
        key: value
        for key, value in found.items()
        if key in kept or key not in taken or value != taken[key]
    } | {"rope_theta": found["rope_theta"], "rope_scaling": found["rope_scaling"]}


def test_older_spellings_are_the_same_model(made, tmp_path):
    kind, _, root, _ = made
    config = json.loads((root / "a" / "config.json").read_text())
    shutil.copytree(root / "a", tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(older(config)))
    assert older(config) != config
    now, then = open_dense(root / "a"), open_dense(tmp_path / "a")
    assert then.settings == now.settings, kind
    names = dense_weights(now.settings)
    assert sha256_of_tensors(then.reader, names) == sha256_of_tensors(now.reader, names)
    x = tokens()
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        for path in (root / "a", tmp_path / "a")
    )
    assert torch.equal(first(x).logits, second(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["seed", "out"])
def test_layer_by_layer_it_is_the_same(made, name):
    """The family's own model out of its own file, and the mixture."""
    _, _, root, _ = made
    x = tokens()
    model = AutoModelForCausalLM.from_pretrained(root / name, dtype="auto").eval()
    streamed = streamed_model(root / name, None, torch.device("cpu"), rows=2)
    assert_streams_alike(streamed, model, x)
    greedy = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(*(one.generate(x[:2], **greedy) for one in (model, streamed)))


@pytest.mark.parametrize(
    ("turned", "width", "interleaved", "order"),
    [
        (8, 8, False, (0, 1, 2, 3, 4, 5, 6, 7)),
        (8, 8, True, (0, 2, 4, 6, 1, 3, 5, 7)),
        (4, 8, False, (0, 1, 4, 5, 2, 3, 6, 7)),
        (4, 8, True, (0, 2, 4, 5, 1, 3, 6, 7)),
    ],
)
def test_a_heads_halves_turn_with_each_other(turned, width, interleaved, order):
    assert head_order(turned, width, interleaved) == order


def test_slices_ranges_and_hashes_are_those_of_a_file_of_llamas_names(made, tmp_path):
    """What is read by rows, by ranges and whole is one and the same; the file's own names are
    those of the family."""
    _, _, root, _ = made
    model = open_dense(root / "a")
    reader = TensorReader.of(model.reader)
    assert set(reader.names()) == set(dense_weights(model.settings))
    whole = {name: reader.read(name) for name in reader.names()}
    save_file({n: t.contiguous().clone() for n, t in whole.items()}, tmp_path / "model.safetensors")
    plain = TensorReader(tmp_path)
    for name, tensor in whole.items():
        assert tensor.shape == dense_weights(model.settings)[name].shape == reader.info(name).shape
        for start, stop in ((0, 1), (1, len(tensor) - 1), (3, 3)):
            assert torch.equal(reader.read_rows(name, start, stop), tensor[start:stop]), name
        # within a row, to within another
        assert reader.items(name, 3, 7) == plain.items(name, 3, 7), name
    assert sha256_of_tensors(reader, model.ffn_names()) == sha256_of_tensors(
        plain, model.ffn_names()
    )
    assert set(model.in_file().reader.names()) == set(load_file(root / "a" / "model.safetensors"))
    with pytest.raises(CheckpointError, match="no tensor 'x' among its"):
        reader.info("x")


def test_the_average_of_models_is_of_their_family(made, tmp_path):
    _, _, root, _ = made
    average_dense([root / "a", root / "b"], tmp_path / "mean")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "mean", dtype="auto")
    pair = [AutoModelForCausalLM.from_pretrained(root / n, dtype="auto") for n in "ab"]
    assert type(found) is type(pair[0])
    weights = [dict(model.named_parameters()) for model in pair]
    for name, weight in found.named_parameters():
        mean = (weights[0][name].float() + weights[1][name].float()) / 2
        assert torch.equal(weight, mean.to(weight.dtype)), name
    x = tokens()
    assert found.config.rope_parameters == pair[0].config.rope_parameters
    assert torch.isfinite(found(x).logits).all()
