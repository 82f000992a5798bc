"""A family's own model with Qwen2-MoE's blocks: registered, saved and loaded like any other, and
what it computes is the paper's formula on the dense family's own class."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import nexus_ds.hf  # noqa: F401
from nexus_ds.checkpoint import qwen2_moe
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.families.record import AFTER_FFN
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import NATIVE, native_class
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.native import empty_dense, empty_mixture, mixture_classes
from nexus_ds.checkpoint.qwen2_moe import stored
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import UnsupportedModelError
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.settings import Config
from nexus_ds.upcycling import upcycle
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.remove import reduced
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import LLAMA3, changed, embeddings
from tests.checkpoint.test_qwen3_next import (
    NAMES,
    NOISE,
    assert_streams_alike,
    difference,
    gradients_compared,
    mixture,
    noise_of,
    opened,
    renormalised,
    tokens,
)
from tests.checkpoint.test_views import InOrder, loaded

CONFIG = dict(
    model_type="nexus_qwen3",
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_experts=3,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    moe_intermediate_size=40,
    shared_expert_intermediate_size=40,
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
FULL = "full_attention"
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", FULL])
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
BY_KIND = {
    FULL: dict(rope_theta=500.0, **YARN),
    "sliding_attention": dict(rope_type="default", rope_theta=900.0),
}
ALPHA = dict(rope_type="dynamic", rope_theta=500.0, factor=1.0, alpha=1000.0)
# transformers takes rope_scaling, which is written too, before rope_parameters
SHORT_WAVES = dict(rope_parameters=dict(rope_type="default", rope_theta=9.0), rope_scaling=...)
WHOLE_HEAD = dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=1.0))
KINDS = {  # family, keys of its config.json, keys without which it is another model
    "olmo-2": ("olmo2", {}, dict(rms_norm_eps=0.5)),
    "olmo-2-tied": ("olmo2", dict(tie_word_embeddings=True), SHORT_WAVES),
    # a window in the first layer alone; RoPE is stretched in the second alone
    "olmo-3": ("olmo3", WINDOWS | dict(rope_parameters=BY_KIND), dict(sliding_window=2)),
    "olmo-3-older": (
        "olmo3",
        WINDOWS | dict(rope_theta=500.0, rope_scaling=YARN),
        dict(rope_parameters=BY_KIND),
    ),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0]), dict(no_rope_layers=[1, 1])),
    "exaone-4": ("exaone4", WINDOWS | dict(head_dim=12), dict(layer_types=[FULL, FULL])),
    "exaone-4-full": (
        "exaone4",
        dict(sliding_window=None, layer_types=[FULL, FULL], rope_parameters=LLAMA3),
        SHORT_WAVES,
    ),
    "glm-4-0414": ("glm4", dict(head_dim=16), WHOLE_HEAD),
    "gemma-3": (
        "gemma3_text",
        WINDOWS | dict(head_dim=16, query_pre_attn_scalar=24, rope_parameters=BY_KIND),
        dict(query_pre_attn_scalar=99),
    ),
    "cohere-2": (
        "cohere2",
        WINDOWS | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        dict(layer_types=[FULL, FULL]),
    ),
    "cohere-2-untied": (
        "cohere2",
        dict(
            sliding_window=6,
            sliding_window_pattern=2,
            logit_scale=0.3,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
        dict(layer_norm_eps=0.5),
    ),
    "gemma": (
        "gemma",
        dict(head_dim=12, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        dict(hidden_act="silu"),
    ),
    "gemma-older": (
        "gemma",
        dict(head_dim=16, hidden_act="gelu", num_key_value_heads=1, tie_word_embeddings=False),
        dict(rms_norm_eps=0.5),
    ),
    "gemma-2": (
        "gemma2",
        WINDOWS | dict(head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=1.5),
        dict(attn_logit_softcapping=None),
    ),
    "gemma-2-capped": (
        "gemma2",
        dict(head_dim=12, sliding_window=6, final_logit_softcapping=2.5, tie_word_embeddings=False),
        dict(final_logit_softcapping=None),
    ),
    # as its first files were: windows by a pattern, RoPE scaled in the layers without one
    "gemma-3-older": (
        "gemma3_text",
        dict(
            head_dim=12,
            sliding_window=6,
            sliding_window_pattern=2,
            rope_theta=500.0,
            rope_local_base_freq=90.0,
            rope_scaling=dict(rope_type="linear", factor=8.0),
            tie_word_embeddings=False,
            final_logit_softcapping=2.5,
        ),
        dict(final_logit_softcapping=None),
    ),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=12, rope_parameters=ALPHA), SHORT_WAVES),
}


@pytest.fixture(
    scope="module",
    params=[(k, *how) for k in KINDS for how in (("fp32", 1), ("fp32", 2), ("bf16", 2))],
    ids=str,
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


def float32_only(made):
    kind, out, root, oracle = made
    if next(oracle.parameters()).dtype is not torch.float32:
        pytest.skip("rounding hides what is looked for")
    return kind, out, root, oracle


@torch.no_grad()
def test_transformers_computes_the_formula(made, tmp_path):
    """fp32 within twice what the reference differs from itself by; bf16 mostly bit by bit: on some
    processors a few round to the other side."""
    kind, out, _, oracle = made
    model, x = loaded(out), tokens()
    family, _, others = KINDS[kind]
    assert type(model).__name__ == native_class(family) == model.config.architectures[0]
    expected, found = oracle(x).logits, model(x).logits
    if expected.dtype is torch.float32:
        assert difference(found, expected) <= NOISE * noise_of(oracle, x), kind
    else:
        assert float((found == expected).float().mean()) > 0.8, kind
    assert all(len(block.mlp.chosen) > 1 for block in oracle.model.layers)
    # the comparison can fail
    other = loaded(changed(out, tmp_path / "other", **others))
    assert difference(other(x).logits, expected) > 0.01, kind
    # norms behind the block take part of it away
    renormalised(model)
    assert difference(model(x).logits, expected) > 0.001


@torch.no_grad()
def test_with_left_padding_and_with_a_cache_it_is_the_same(made):
    kind, out, _, oracle = float32_only(made)
    model, x = loaded(out), tokens()
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    # what a row of padding computes is nobody's: it is left out
    expected = oracle(x, attention_mask=mask).logits[mask.bool()]
    found = model(x, attention_mask=mask).logits[mask.bool()]
    assert difference(found, expected) <= NOISE * noise_of(oracle, x), kind
    assert difference(model(x).logits[0, 9:], expected[: 24 - 9]) > 1e-3
    greedy = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    texts = [m.generate(x, use_cache=c, **greedy) for m in (oracle, model) for c in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts), kind


@torch.no_grad()
def test_layer_by_layer_it_is_the_same(made):
    _, out, _, _ = made
    model, x = loaded(out), tokens()
    streamed = streamed_model(out, model.dtype, torch.device("cpu"), rows=2)
    streamed.set_experts_implementation("eager")
    assert_streams_alike(streamed, model, x)
    greedy = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(*(one.generate(x[:2], **greedy) for one in (model, streamed)))


def test_it_is_read_back_bit_by_bit(made):
    kind, out, root, _ = made
    config, reader = opened(out)
    table = stored(config)
    assert set(reader.names()) == set(table)
    assert config["model_type"] == NATIVE + KINDS[kind][0]
    branches = [TensorReader.of(open_dense(root / name).reader) for name in NAMES]
    for name, entry in table.items():
        tensor = reader.read(name)
        if entry.role is qwen2_moe.Role.DENSE:
            mean = sum(branch.read(name).float() for branch in branches) / 3
            assert torch.equal(tensor, mean.to(tensor.dtype)), name
        if entry.role is qwen2_moe.Role.ROUTED:
            assert torch.equal(tensor, branches[entry.expert].read(entry.dense_name)), name
    verify_expert_embeddings(out)


def test_training_computes_the_reference_and_its_gradients(made):
    kind, out, _, oracle = float32_only(made)
    model, compared = gradients_compared(out, oracle)
    assert type(model).__name__ == type(oracle).__name__, kind
    # the shared expert's 3, 3 stacks and P's 2 instead of 3 of a dense FFN
    dense = [name for name, _ in oracle.named_parameters() if ".mlp." not in name]
    assert compared == len(dense) + 2 * (3 + 3 + 2)


def test_experts_come_and_go(made, tmp_path):
    kind, out, root, _ = made
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
        assert type(loaded(tmp_path / name)).__name__ == native_class(KINDS[kind][0])
        old = tmp_path / name
    after, first = opened(old)[1], opened(out)[1]
    places = [qwen2_moe.expert_name(1, expert, "up_proj") for expert in (0, 1, 2)]
    assert all(torch.equal(after.read(place), first.read(places[0])) for place in places)
    assert describe(old)["experts"][2]["name"] == "d"


def test_experts_of_another_activation_are_refused(made, tmp_path):
    """The dense layers' key may be another than that of the experts."""
    kind, out, _, _ = made
    for key in {"hidden_act", FAMILIES[KINDS[kind][0]].activation_key}:
        other = changed(out, tmp_path / key, **{key: "relu"})
        with pytest.raises(UnsupportedModelError, match=rf"{key} 'relu'; of {KINDS[kind][0]} only"):
            opened(other)


POST_NORMS = [kind for kind, (of, *_) in KINDS.items() if set(FAMILIES[of].norms) & set(AFTER_FFN)]


@pytest.mark.parametrize("kind", POST_NORMS)
def test_a_router_whose_gate_is_normed_away_learns_nothing(kind, tmp_path, dense_dir, monkeypatch):
    """A gradient of the router beside that of the experts, of each pair; the one that has next to
    none is refused, the others are not."""
    family, keys, _ = KINDS[kind]
    monkeypatch.setattr(upcycle, "_check_learns", lambda base, config: None)
    oracle = mixture(tmp_path, dense_dir, family, SIZES | keys, "fp32", 1)
    monkeypatch.undo()
    shares = {(s, k): router_share(oracle, s, k) for s in ("seed", "none") for k in (1, 2)}
    assert shares.pop(("none", 1)) < 1e-3 < 1e-2 < min(shares.values()), shares
    for (shared, top_k), _ in (*shares.items(), (("none", 1), 0)):
        config = Config()
        config.model.shared_expert, config.router.top_k = shared, top_k
        branches = {name: tmp_path / name for name in NAMES}
        arguments = tmp_path / "seed", branches, embeddings(NAMES), config
        if (shared, top_k) != ("none", 1):
            upcycled(*arguments)
            continue
        message = (
            rf"model.shared_expert=none with router.top_k=1: {family} norms what its FFN returns "
            r"\(post_\w+_layernorm\), which undoes the gate, .* set router.top_k=2, or leave"
        )
        with pytest.raises(UnsupportedModelError, match=message):
            upcycled(*arguments)


def router_share(oracle, shared, top_k):
    """Return the routers' gradient divided by that of all experts' matrices."""
    oracle = copy.deepcopy(oracle)
    for layer in oracle.model.layers:
        layer.mlp.top_k = top_k
        layer.mlp.rows = layer.mlp.rows.requires_grad_()
        if shared == "none":
            for weight in layer.mlp.shared.parameters():
                weight.data.zero_()
    x = tokens()
    logits = oracle(x, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    blocks = [layer.mlp for layer in oracle.model.layers]
    experts = [w.grad for block in blocks for w in block.experts.parameters()]
    rows = [block.rows.grad for block in blocks]
    return float(norm_of(rows) / norm_of(experts))


def norm_of(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm()


def test_it_is_counted_as_it_is_stored(made):
    _, out, _, _ = made
    facts, config = describe(out)["parameters"], Config()
    config.model.path = str(out)
    counted = sizes_of(config).counts()
    assert {key: counted[key] for key in facts} == facts
    assert facts["total"] == sum(weight.numel() for weight in loaded(out).parameters())


def test_every_native_family_is_registered():
    for name, family in FAMILIES.items():
        if not family.mixture:
            assert type(AutoConfig.for_model(NATIVE + name)).model_type == NATIVE + name


@torch.no_grad()
def test_the_auto_classes_load_what_was_saved(tmp_path):
    config_class, causal_class = mixture_classes("qwen3")
    values = {key: value for key, value in CONFIG.items() if key != "model_type"}
    torch.manual_seed(0)
    model = causal_class(config_class(**values)).eval()
    # a dense family's class does not draw the experts' stacks: nobody starts from a new one
    for weight in model.parameters():
        weight.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: entry.shape for name, entry in stored(CONFIG).items()}
    assert AutoConfig.from_pretrained(tmp_path).model_type == "nexus_qwen3"
    found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = torch.arange(24)[None]
    logits = found(x).logits
    assert torch.isfinite(logits).all() and torch.equal(logits, model(x).logits)


def test_empty_models_hold_no_weight():
    dense = empty_dense(CONFIG, False, torch.bfloat16)
    mixture = empty_mixture(CONFIG, False, torch.bfloat16)
    for model in (dense, mixture):
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        assert model.model.rotary_emb.inv_freq.device.type == "cpu"
        assert next(model.parameters()).dtype is torch.bfloat16
    assert not [name for name, _ in dense.named_parameters() if ".mlp." in name]
