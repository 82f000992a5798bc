"""Qwen3.5 written as Qwen3-Next: the same numbers out of stock transformers, the same bits back."""

import pytest
import torch
from safetensors.torch import load_file

from nexus_ds.checkpoint import qwen2_moe
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.settings import Config
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.remove import reduced
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import changed, embeddings, with_tensors
from tests.checkpoint.test_qwen3_next import (
    NAMES,
    NOISE,
    another_norm,
    assert_streams_alike,
    difference,
    gradients_compared,
    mixture,
    noise_of,
    renormalised,
    tokens,
)
from tests.checkpoint.test_views import InOrder, loaded

SIZES = dict(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
)
ROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
KINDS = {  # keys of its config.json
    "qwen3.5": dict(full_attention_interval=2),
    "qwen3.5-tied": dict(
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        tie_word_embeddings=True,
        rope_parameters=ROPE | dict(mrope_section=[1, 1, 2], mrope_interleaved=True),
    ),
}
CASES = [(kind, *how) for kind in KINDS for how in (("fp32", 1), ("fp32", 2), ("bf16", 2))]
LINEAR = "model.layers.2.linear_attn."


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request, tmp_path_factory, dense_dir):
    """(folder of the mixture, folder of seed and branches, the reference)."""
    kind, dtype, top_k = request.param
    root = tmp_path_factory.mktemp(f"{kind}-{dtype}")
    oracle = mixture(root, dense_dir, "qwen3_5_text", SIZES | KINDS[kind], dtype, top_k)
    for layer in oracle.model.layers:
        layer.mlp.__class__ = InOrder
    return root / "out", root, oracle


def stock(directory):
    model = loaded(directory)
    assert type(model).__name__ == "Qwen3NextForCausalLM"
    return model


def opened(directory):
    config, reader = qwen2_moe.open_moe(directory)
    return config, TensorReader.of(reader)


def float32_only(made):
    out, root, oracle = made
    if next(oracle.parameters()).dtype is not torch.float32:
        pytest.skip("rounding hides what is looked for")
    return out, root, oracle


def another_order(model):
    """As Qwen3.5 has the rows."""
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            weight = layer.linear_attn.in_proj_qkvz.weight.data
            weight.copy_(weight.view(2, -1, 32).transpose(0, 1).reshape(weight.shape))


def another_decay(model):
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.A_log.data += 1


def ungated(model):
    """With the gate of attention at 1/2."""
    for layer in model.model.layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.q_proj.weight.data.view(4, 2, 16, 32)[:, 1] = 0


@torch.no_grad()
def test_stock_transformers_computes_the_formula(made):
    """fp32 within twice what the reference differs from itself by; bf16 mostly bit by bit: on some
    processors a few round to the other side. Texts are longer than a chunk of linear attention,
    64."""
    out, _, oracle = made
    model, x = stock(out), tokens(length=80)
    expected, found = oracle(x).logits, model(x).logits
    if expected.dtype is torch.float32:
        assert difference(found, expected) <= NOISE * noise_of(oracle, x)
    else:
        assert float((found == expected).float().mean()) > 0.8
    assert all(len(block.mlp.chosen) > 1 for block in oracle.model.layers)
    # the comparison can fail
    for change in (renormalised, another_norm, another_order, another_decay, ungated):
        model = stock(out)
        change(model)
        assert difference(model(x).logits, expected) > 0.01, change.__name__


@torch.no_grad()
def test_with_left_padding_and_with_a_cache_it_is_the_same(made):
    out, _, oracle = float32_only(made)
    model, x = stock(out), tokens(length=70)
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    # what a row of padding computes is nobody's: it is left out
    expected = oracle(x, attention_mask=mask).logits[mask.bool()]
    found = model(x, attention_mask=mask).logits[mask.bool()]
    assert difference(found, expected) <= NOISE * noise_of(oracle, x)
    assert difference(model(x).logits[0, 9:], expected[: 70 - 9]) > 1e-3
    greedy = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    texts = [m.generate(x, use_cache=c, **greedy) for m in (oracle, model) for c in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts)


@torch.no_grad()
def test_layer_by_layer_it_is_the_same(made):
    out, _, _ = made
    model, x = stock(out), tokens()
    streamed = streamed_model(out, model.dtype, torch.device("cpu"), rows=2)
    streamed.set_experts_implementation("eager")
    assert_streams_alike(streamed, model, x)
    greedy = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(*(one.generate(x[:2], **greedy) for one in (model, streamed)))


def test_it_is_read_back_bit_by_bit(made):
    """Names, shapes and bits are those of the dense Qwen3.5, of slices of rows too; what decays
    stands in fp32."""
    out, root, _ = made
    config, reader = opened(out)
    table = qwen2_moe.stored(config)
    assert set(reader.names()) == set(table) and config["model_type"] == "qwen3_next"
    assert f"{LINEAR}in_proj_z.weight" not in reader.raw or config["layer_types"][2][0] == "f"
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
            decays = name.endswith(("A_log", "linear_attn.norm.weight"))
            assert (tensor.dtype is torch.float32) == (decays or config["dtype"] == "float32")
        if entry.role is qwen2_moe.Role.ROUTED:
            assert torch.equal(tensor, branches[entry.expert][entry.dense_name]), name
    verify_expert_embeddings(out)


def test_training_computes_the_reference_and_its_gradients(made):
    out, _, oracle = float32_only(made)
    model, compared = gradients_compared(out, oracle)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    # the shared expert's 3, 3 stacks and P's 2 instead of 3 of a dense FFN
    dense = [name for name, _ in oracle.named_parameters() if ".mlp." not in name]
    assert compared == len(dense) + 3 * (3 + 3 + 2)


def test_experts_come_and_go(made, tmp_path):
    out, root, _ = made
    config, old = Config(), out
    more = embeddings((*NAMES, "d"))
    steps = {
        "extend": lambda old: extended(old, {"d": root / "a"}, more, config),
        "replace": lambda old: replaced(old, {"b": root / "a"}, None, config, share=0.0),
        "remove": lambda old: reduced(old, ["c"]),
    }
    for name, step in steps.items():
        (tmp_path / name).mkdir()
        step(old).write(tmp_path / name, None, config.router, 0)
        stock(tmp_path / name)
        old = tmp_path / name
    after, first = opened(old)[1], opened(out)[1]
    places = [qwen2_moe.expert_name(1, expert, "up_proj") for expert in (0, 1, 2)]
    assert all(torch.equal(after.read(place), first.read(places[0])) for place in places)
    assert describe(old)["experts"][2]["name"] == "d"


def test_it_is_counted_as_it_is_stored(made):
    out, root, _ = made
    facts, config = describe(out)["parameters"], Config()
    config.model.path = str(out)
    counted = sizes_of(config).counts()
    assert {key: counted[key] for key in facts} == facts
    config.model.path = str(root / "a")
    assert sizes_of(config).counts()["total"] == describe(root / "a")["parameters"]["total"]


@pytest.fixture(scope="module")
def published(tmp_path_factory, dense_dir):
    """Branches as they are published: bf16 with some weights in fp32, and layers that predict
    further tokens."""
    root = tmp_path_factory.mktemp("published")
    mixture(root, dense_dir, "qwen3_5_text", SIZES | KINDS["qwen3.5"], "bf16", 1)

    def as_published(tensors):
        for name in tensors:
            if name.endswith(("A_log", "linear_attn.norm.weight")):
                tensors[name] = tensors[name].float() + 1e-4
        tensors["mtp.fc.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)

    for name in ("seed", *NAMES):
        with_tensors(root / name, root / f"p-{name}", as_published)
    return root


def test_what_is_published_in_fp32_stays_and_what_predicts_further_goes(published, tmp_path):
    branches = {name: published / f"p-{name}" for name in NAMES}
    config = Config()
    new = upcycled(published / "p-seed", branches, embeddings(NAMES), config)
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, config.router, 0)
    _, reader = opened(tmp_path / "out")
    assert not any(name.startswith("mtp") for name in reader.names())
    name = "model.layers.0.linear_attn.A_log"
    files = [load_file(path / "model.safetensors")[name] for path in branches.values()]
    found = reader.read(name)
    assert torch.equal(found, sum(files) / 3) and not torch.equal(found, found.bfloat16().float())
    assert describe(tmp_path / "out")["dtype"] == "BF16+F32"
    assert stock(tmp_path / "out").dtype is torch.bfloat16


def test_other_weights_of_another_dtype_are_refused(published, tmp_path):
    name = "model.layers.0.linear_attn.dt_bias"
    odd = with_tensors(
        published / "p-a", tmp_path / "odd", lambda t: t.update({name: t[name].float()})
    )
    with pytest.raises(UnsupportedModelError, match=rf"several dtypes: .*F32 \({name}\)"):
        open_dense(odd)


def test_a_file_of_another_height_is_named(made, tmp_path):
    out, _, _ = made
    name = f"{LINEAR}in_proj_ba.weight"
    layer = 0 if f"{LINEAR}in_proj_ba.weight" not in opened(out)[1].raw else 2
    name = name.replace("layers.2", f"layers.{layer}")
    odd = with_tensors(out, tmp_path / "odd", lambda t: t.update({name: t[name][1:].clone()}))
    with pytest.raises(
        CheckpointError, match=r"have another shape .*in_proj_[ab].weight \(3, 32\)"
    ):
        qwen2_moe.open_moe(odd)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            dict(layer_types=["linear_attention", "sliding_attention"] * 2),
            UnsupportedModelError,
            "layer_types",
        ),
        (
            dict(full_attention_interval=0, layer_types=...),
            CheckpointError,
            "full_attention_interval is 0, expected a",
        ),
        (dict(linear_num_value_heads=3), CheckpointError, "is 3, expected a multiple of"),
        (
            dict(linear_key_head_dim=None),
            CheckpointError,
            "linear_key_head_dim is None, expected a",
        ),
        (dict(attention_bias=True), UnsupportedModelError, "o_proj.bias"),
    ],
)
def test_what_can_not_be_read_is_named(published, tmp_path, keys, error, message):
    with pytest.raises(error, match=message):
        open_dense(changed(published / "a", tmp_path / "odd", **keys))


def test_the_kinds_of_layers_and_the_rope_are_those_of_its_class():
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= dict(model_type="qwen3_5_text", num_hidden_layers=5, num_attention_heads=4)
    found = settings(sizes)
    kinds = [kind[0] for kind in found.layer_types]
    assert kinds == ["l", "l", "l", "f", "l"]
    assert found.rope == ROPE | dict(partial_rotary_factor=0.25)
    rope = ROPE | dict(partial_rotary_factor=1.0, mrope_section=[1, 1, 2])
    whole = settings(sizes | dict(rope_parameters=rope, full_attention_interval=2))
    assert whole.rope["partial_rotary_factor"] == 1.0 and "mrope_section" not in whole.rope
    kinds = [kind[0] for kind in whole.layer_types]
    assert kinds == ["l", "f", "l", "f", "l"]
    # what is written says it of itself, in both places
    written = qwen2_moe.moe_config(sizes | dict(rope_parameters=rope), 3, 1)
    assert settings(written).rope == whole.rope and written["partial_rotary_factor"] == 1.0
    assert written["full_attention_interval"] == 4
