"""Dense families that are read through a view: what stock Qwen2-MoE computes of the checkpoint is
what the family's own class computes with the paper's formula in place of its FFNs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.families.record import dense_weights
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.checkpoint.views import head_order
from nexus_ds.errors import CheckpointError
from nexus_ds.upcycling.average import average_dense
from tests.checkpoint.test_dense import Formula
from tests.checkpoint.test_qwen3_next import (
    BF16,
    NOISE,
    difference,
    in_fp32,
    mixture,
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


def stock(directory):
    # one expert after the other, as the formula has them: bits depend on it
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        local_files_only=True,
        dtype="auto",
        output_loading_info=True,
        experts_implementation="eager",
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    return model.eval()


def noise_of(oracle, x):
    """Return how far the reference is from itself: with other kernels, and with embeddings that are
    an ulp larger."""
    expected, moved = oracle(x).logits, copy.deepcopy(oracle)
    weight = moved.model.embed_tokens.weight.data
    weight.copy_(torch.nextafter(weight, 2 * weight))
    oracle.set_attn_implementation("eager")
    eager = oracle(x).logits
    oracle.set_attn_implementation("sdpa")
    return max(difference(eager, expected), difference(moved(x).logits, expected))


@torch.no_grad()
def test_stock_transformers_computes_the_formula(made):
    kind, out, _, oracle = made
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
    renormalised(model)
    assert difference(model(x).logits, expected) > 0.01


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


@torch.no_grad()
@pytest.mark.parametrize("name", ["seed", "out"])
def test_layer_by_layer_it_is_the_same(made, name):
    """The family's own model out of its own file, and the mixture."""
    _, _, root, _ = made
    x = tokens()
    model = AutoModelForCausalLM.from_pretrained(root / name, dtype="auto").eval()
    streamed = streamed_model(root / name, None, torch.device("cpu"), rows=2)
    whole = torch.cat([model(part).logits for part in x.split(2)])
    assert torch.equal(streamed(input_ids=x, use_cache=False).logits, whole)
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
