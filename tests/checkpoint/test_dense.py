"""Dense families to Qwen2-MoE and back: logits against the plain formula, and refusals by name."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from nexus_ds.checkpoint import dense as on_disk
from nexus_ds.checkpoint import dense_settings, qwen2_moe
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, NexusError, UnsupportedModelError
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config, RouterConfig
from nexus_ds.upcycling.remove import reduced
from nexus_ds.upcycling.upcycle import upcycled

SIZES = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
FP32 = 1e-6  # of the largest logit
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
KINDS = {
    "qwen3": ("qwen3", dict(head_dim=12)),
    "qwen3-tied": ("qwen3", dict(tie_word_embeddings=True, head_dim=8)),
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-head-dim": ("llama", dict(head_dim=12)),
    "llama3-rope": ("llama", dict(rope_parameters=LLAMA3)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-sliding": ("mistral", dict(sliding_window=6)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
}


def dense(kind, out, seed, vocabulary, tokenizer):
    """Save a random dense model whose every weight matters, or with another seed than 0 a branch of
    it, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, extra = KINDS[kind]
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **SIZES, **extra)
    model = AutoModelForCausalLM.from_config(config)
    base, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=base)
        parameter.data += bool(seed) * 0.1 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(out)
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, out)
    return model.eval()


def embeddings(names, width=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(len(names), width)).astype(np.float32)
    documents = dict.fromkeys(names, 5)
    return DomainEmbeddings(list(names), vectors, "tiny", "1" * 64, 16, 4, documents, 0, "nowhere")


class Formula(nn.Module):
    """shared(x) + sum over the top-k of p_i expert_i(x), straight from the paper."""

    def __init__(self, shared, experts, rows, top_k):
        super().__init__()
        self.shared, self.experts, self.rows, self.top_k = (
            shared,
            nn.ModuleList(experts),
            rows,
            top_k,
        )
        self.chosen = set()

    def forward(self, x):
        gates, indices = F.softmax(x @ self.rows.T, dim=-1).topk(self.top_k, dim=-1)
        y = self.shared(x)
        for expert, ffn in enumerate(self.experts):
            y = y + (gates * (indices == expert)).sum(-1, keepdim=True) * ffn(x)
        self.chosen |= set(indices.flatten().tolist())
        return y


def formula_model(seed, experts, rows, top_k):
    """Return the seed's own transformers model with averaged weights and the formula in each
    layer."""
    import copy

    model = copy.deepcopy(experts[0])
    states = [expert.state_dict() for expert in experts]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    model.load_state_dict(mean)
    for layer, block in enumerate(model.model.layers):
        ffns = [expert.model.layers[layer].mlp for expert in experts]
        block.mlp = Formula(seed.model.layers[layer].mlp, ffns, rows[layer], top_k)
    return model


def load(directory):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stock_transformers_computes_the_formula(kind, tmp_path, dense_dir):
    vocabulary = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    names, top_k = ("a", "b", "c"), 2 if kind in ("llama", "qwen2-tied") else 1
    models = {
        n: dense(kind, tmp_path / n, i, vocabulary, dense_dir)
        for i, n in enumerate(("seed", *names))
    }
    config = Config()
    config.router.top_k, config.router.init_norm = top_k, 2.0
    new = upcycled(tmp_path / "seed", {n: tmp_path / n for n in names}, embeddings(names), config)
    out = tmp_path / "out"
    out.mkdir()
    new.write(out, None, config.router, 0)
    made = [new.tensors[qwen2_moe.gate_name(layer)].make() for layer in range(3)]
    rows = [torch.from_numpy(each) for each in made]
    oracle = formula_model(models["seed"], [models[n] for n in names], rows, top_k)
    tokens = torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, found = oracle(tokens).logits, load(out)(tokens).logits
    assert all(len(block.mlp.chosen) > 1 for block in oracle.model.layers)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= FP32 * expected.abs().max()
    oracle.model.layers[1].mlp.experts[0].down_proj.weight.data *= -1  # the comparison can fail
    assert (found - oracle(tokens).logits).abs().max() > 1e-2 * expected.abs().max()


def test_older_keys_mean_the_same(dense_dir):
    config = json.loads((dense_dir / "config.json").read_text())
    scaling = dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope = dict(rope_type="llama3", rope_theta=7.0, original_max_position_embeddings=64, **scaling)
    new = config | {"rope_parameters": rope}
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    old |= {
        "rope_theta": 7.0,
        "rope_scaling": {"type": "llama3", **scaling},
        "torch_dtype": "bfloat16",
    }
    old.pop("dtype", None)
    assert dense_settings.settings(old) == dense_settings.settings(new)
    assert qwen2_moe.moe_config(old, 2, 1)["dtype"] == "bfloat16"
    mistral = {
        k: v for k, v in config.items() if k not in ("sliding_window", "num_key_value_heads")
    }
    mistral |= {"model_type": "mistral", "num_attention_heads": 8, "hidden_size": 64}
    assert (
        dense_settings.settings(mistral).kv_heads == 8
        and dense_settings.settings(mistral).sliding_window == 4096
    )


@pytest.mark.parametrize("kind", ["llama", "llama3-rope", "qwen2-sliding"])
def test_written_configurations_say_their_rope_in_both_spellings(kind, tmp_path, dense_dir):
    """transformers before 5 knows rope_theta and rope_scaling alone, and takes 10000 where they are
    missing."""
    family, extra = KINDS[kind]
    extra = {"rope_parameters": dict(rope_type="default", rope_theta=500.0)} | extra
    plain = dict(model_type=family, vocab_size=31, **SIZES, **extra)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    mixture = qwen2_moe.moe_config(plain, 2, 1)
    context = qwen2_moe.moe_config(plain, 2, 1, "context")
    for config in (mixture, context, dense_settings.both_ropes(plain)):
        assert (
            config["rope_parameters"] == extra["rope_parameters"] and config["rope_theta"] == 500.0
        )
        assert config.get("rope_scaling") == (scaling if kind == "llama3-rope" else None)
        assert dense_settings.settings(config).rope == dense_settings.settings(plain).rope


def test_branches_whose_stretched_rope_depends_on_other_positions_differ(dense_dir):
    config = json.loads((dense_dir / "config.json").read_text())
    dynamic = config | {"rope_parameters": dict(rope_type="dynamic", rope_theta=9.0, factor=2.0)}
    for plain, equal in ((config, True), (dynamic, False)):
        longer = plain | {"max_position_embeddings": 128}
        assert (dense_settings.settings(plain) == dense_settings.settings(longer)) == equal


def changed(source, out, **keys):
    """Copy a model with other keys in its config.json (None removes one)."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return out


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(attention_bias=True), ["attention_bias", "o_proj.bias"]),
        (dict(mlp_bias=True), ["mlp_bias", "FFN"]),
        (dict(model_type="qwen3", use_sliding_window=True), ["Qwen3-Next has no sliding windows"]),
        (dict(model_type="cohere"), ["'cohere'", "side by side"]),
        (dict(model_type="ministral3"), ["'ministral3'", "llama_4_scaling_beta"]),
        (dict(model_type="nemotron"), ["'nemotron'", "FFN has no gate"]),
        (dict(model_type="starcoder2"), ["'starcoder2'", "no gate but biases"]),
        (dict(model_type="phi"), ["'phi'", "side by side"]),
        (dict(model_type="granite", mlp_bias=True), ["mlp_bias", "FFN"]),
        (dict(model_type="granite", attention_bias=True), ["attention_bias", "o_proj.bias"]),
        (
            dict(model_type="seed_oss", attention_out_bias=True, attention_bias=True),
            ["attention_out_bias is set", "o_proj.bias"],
        ),
        (dict(model_type="ernie4_5", use_bias=True), ["use_bias", "o_proj and the FFN"]),
        (
            dict(model_type="idefics3", text_config=dict(model_type="llama")),
            ["'idefics3'", "wraps", "'llama'"],
        ),
        (dict(model_type="blender"), ["'blender'", "supported: llama"]),
        (dict(model_type=...), ["None", "supported: llama"]),
        (dict(hidden_act="gelu"), ["hidden_act 'gelu'", "silu"]),
        (
            dict(model_type="gemma3_text", hidden_activation="gelu"),
            ["hidden_activation 'gelu'", "of gemma3_text only gelu_pytorch_tanh"],
        ),
        (
            dict(model_type="gemma3_text", use_bidirectional_attention=True),
            ["use_bidirectional_attention", "no later tokens"],
        ),
        (dict(quantization_config={"bits": 4}), ["quantization_config", "unquantised"]),
        (dict(auto_map={"AutoModel": "evil.Model"}), ["auto_map", "never run"]),
        (dict(trust_remote_code=True), ["trust_remote_code", "never run"]),
        (dict(_attn_implementation_internal="a/b"), ["_attn_implementation_internal"]),
        (dict(_experts_implementation_internal="a/b"), ["_experts_implementation_internal"]),
        (dict(attn_implementation="a/b"), ["attn_implementation = 'a/b'"]),
        (dict(text_config={"auto_map": {"AutoModel": "evil.Model"}}), ["text_config.auto_map"]),
        (
            dict(parts=[1, [{"auto_map": {"AutoModel": "evil.Model"}}]]),
            ["parts.1.0.auto_map", "never run"],
        ),
        (
            dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
            ["RoPE that differs between layers"],
        ),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    ],
)
def test_refuses_by_name(keys, words, tmp_path, dense_dir):
    with pytest.raises(UnsupportedModelError) as caught:
        on_disk.open_dense(changed(dense_dir, tmp_path / "m", **keys))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "keys", [dict(attn_implementation="sdpa"), dict(trust_remote_code=False), dict(auto_map=None)]
)
def test_harmless_keys_pass(keys, tmp_path, dense_dir):
    assert on_disk.open_dense(changed(dense_dir, tmp_path / "m", **keys)).family == "llama"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(hidden_size=0), "hidden_size is 0"),
        (dict(vocab_size="x"), "vocab_size is 'x', expected a number"),
        (
            dict(num_hidden_layers=10**12),
            "num_hidden_layers is 1000000000000, expected at most 10000",
        ),
    ],
)
def test_sizes_must_be_numbers(keys, message, tmp_path, dense_dir):
    with pytest.raises(CheckpointError, match=message):
        on_disk.open_dense(changed(dense_dir, tmp_path / "m", **keys))


def with_tensors(source, out, change):
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_tensors_are_held_against_the_configuration(tmp_path, dense_dir):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"1 missing: {name}"):
        on_disk.open_dense(with_tensors(dense_dir, tmp_path / "missing", lambda t: t.pop(name)))
    with pytest.raises(CheckpointError, match=r"1 unknown: model.surprise"):
        extra = {"model.surprise": torch.zeros(1)}
        on_disk.open_dense(with_tensors(dense_dir, tmp_path / "extra", lambda t: t.update(extra)))
    with pytest.raises(CheckpointError, match=r"up_proj.weight \(2, 3\), expected \(24, 16\)"):
        on_disk.open_dense(
            with_tensors(
                dense_dir, tmp_path / "shape", lambda t: t.update({name: torch.ones(2, 3)})
            )
        )
    with pytest.raises(
        UnsupportedModelError, match=r"no place for model.layers.0.self_attn.o_proj.bias"
    ):
        bias = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)}
        on_disk.open_dense(with_tensors(dense_dir, tmp_path / "bias", lambda t: t.update(bias)))
    with pytest.raises(
        UnsupportedModelError, match=r"several dtypes: BF16 .* F32 .*save the model in one"
    ):
        on_disk.open_dense(
            with_tensors(
                dense_dir, tmp_path / "mixed", lambda t: t.update({name: t[name].bfloat16()})
            )
        )
    with pytest.raises(
        UnsupportedModelError, match="weights are F64; save the model in fp32, bf16 or fp16 first"
    ):
        wide = lambda t: t.update({k: v.double() for k, v in t.items()})  # noqa: E731
        on_disk.open_dense(with_tensors(dense_dir, tmp_path / "wide", wide))


def test_a_tied_models_repeated_head_and_old_buffers_are_ignored(tmp_path, dense_dir):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    model = on_disk.open_dense(with_tensors(dense_dir, tmp_path / "m", repeat))
    assert model.settings.tied_embeddings


def test_a_hub_name_is_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        on_disk.open_dense(tmp_path / "meta-llama" / "Llama-2-7b")


# Odd files ----------------------------------------------------------------------------------------
# Each is read by stock transformers and by this program: both compute the same, or this program
# refuses it by name.

YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0)
LONG = dict(
    rope_type="longrope",
    rope_theta=500.0,
    factor=4.0,
    short_factor=[1.5] * 4,
    long_factor=[3.0] * 4,
)
SLIDING = dict(use_sliding_window=True, sliding_window=6)
ALL = ("llama", "mistral", "qwen2")
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
# what is changed in config.json (... removes a key) -> a word of the refusal, "" where both compute
# the same
ODD_KEYS = {
    "older base of RoPE": (ALL, dict(rope_parameters=..., rope_theta=500.0), ""),
    "no base of RoPE": (ALL, dict(rope_parameters=...), ""),
    "two bases of RoPE": (
        ALL,
        dict(rope_parameters=dict(rope_type="default", rope_theta=500.0), rope_theta=7.0),
        "",
    ),
    "a base beside RoPE without one": (
        ALL,
        dict(rope_parameters=dict(rope_type="default"), rope_theta=500.0),
        "",
    ),
    "rope_scaling before rope_parameters": (
        ALL,
        dict(
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
            rope_scaling=dict(type="linear", factor=2.0),
        ),
        "",
    ),
    "linear RoPE": (
        ALL,
        dict(rope_parameters=..., rope_theta=9.0, rope_scaling=dict(type="linear", factor=2.0)),
        "",
    ),
    "dynamic RoPE beyond its positions": (
        ALL,
        dict(
            rope_parameters=dict(rope_type="dynamic", rope_theta=9.0, factor=4.0),
            max_position_embeddings=8,
        ),
        "",
    ),
    "yarn": (ALL, dict(rope_parameters=YARN), ""),
    "yarn of few positions": (
        ALL,
        dict(rope_parameters=YARN | dict(original_max_position_embeddings=8)),
        "",
    ),
    "yarn of two minds": (
        ALL,
        dict(
            rope_parameters=YARN | dict(original_max_position_embeddings=32),
            original_max_position_embeddings=8,
        ),
        "",
    ),
    "longrope": (ALL, dict(rope_parameters=LONG | dict(original_max_position_embeddings=8)), ""),
    "llama3 without its factors": (
        ALL,
        dict(rope_scaling=dict(rope_type="llama3", factor=2.0)),
        "low_freq_factor",
    ),
    "RoPE of a vision model": (
        ALL,
        dict(rope_scaling=dict(type="mrope", mrope_section=[1])),
        "'mrope'",
    ),
    "proportional RoPE": (
        ALL,
        dict(rope_parameters=dict(rope_type="proportional", rope_theta=9.0)),
        "'proportional'",
    ),
    "RoPE of part of a head": (ALL, dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "RoPE by kind of layer": (
        ALL,
        dict(rope_parameters=dict(full_attention=dict(rope_theta=9.0))),
        "RoPE that differs",
    ),
    "a null as base": (ALL, dict(rope_parameters=..., rope_theta=None), "rope_theta is None"),
    "a text as base": (ALL, dict(rope_parameters=..., rope_theta="9"), "rope_theta is '9'"),
    "no eps": (ALL, dict(rms_norm_eps=...), ""),
    "a large eps": (ALL, dict(rms_norm_eps=0.5), ""),
    "a null as eps": (ALL, dict(rms_norm_eps=None), "rms_norm_eps"),
    "no key-value heads": (("llama",), dict(num_key_value_heads=None), "another shape"),
    "key-value heads left out": (ALL, dict(num_key_value_heads=...), "another shape"),
    "a null as head_dim": (("llama", "mistral"), dict(head_dim=None), ""),
    "no head_dim": (ALL, dict(head_dim=...), ""),
    "swish": (ALL, dict(hidden_act="swish"), ""),
    "gelu": (ALL, dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    "no activation": (ALL, dict(hidden_act=...), ""),
    "another dtype than the weights": (ALL, dict(dtype="bfloat16"), ""),
    "older name of the dtype": (ALL, dict(dtype=..., torch_dtype="float32"), ""),
    "not causal": (ALL, dict(is_causal=False), "is_causal"),
    "a model within a model": (ALL, dict(text_config=dict(model_type="llama")), "text_config"),
    "weights elsewhere": (
        ALL,
        dict(transformers_weights="other.safetensors"),
        "transformers_weights",
    ),
    "configuration elsewhere": (
        ALL,
        dict(configuration_files=["config.4.0.0.json"]),
        "configuration_files",
    ),
    "no key about tying": (ALL, dict(tie_word_embeddings=...), ""),
    "tied, with a head of its own": (ALL, dict(tie_word_embeddings=True), ""),
    "a window that Llama has not": (
        ("llama",),
        dict(sliding_window=6, layer_types=["sliding_attention"] * 3),
        "",
    ),
    "no window": (("mistral",), dict(sliding_window=...), ""),
    "a null as window": (("mistral",), dict(sliding_window=None), ""),
    "a window": (("mistral",), dict(sliding_window=6), ""),
    "a window of nothing": (("mistral",), dict(sliding_window=0), "sliding_window is 0"),
    "kinds of layers in a mistral": (
        ("mistral",),
        dict(
            sliding_window=6, layer_types=["full_attention", "sliding_attention", "full_attention"]
        ),
        "",
    ),
    "a mistral of full layers": (
        ("mistral",),
        dict(sliding_window=6, layer_types=["full_attention"] * 3),
        "",
    ),
    "window in the last layers": (
        ("qwen2",),
        SLIDING | dict(max_window_layers=1, layer_types=...),
        "",
    ),
    "window by layer": (
        ("qwen2",),
        SLIDING | dict(layer_types=["sliding_attention", "full_attention", "full_attention"]),
        "",
    ),
    "a window that is not used": (("qwen2",), dict(sliding_window=6, layer_types=...), ""),
    "layers of an unused window": (
        ("qwen2",),
        dict(sliding_window=6, layer_types=["sliding_attention"] * 3),
        "sliding_window is None",
    ),
    "no kinds of layers": (("qwen2",), dict(layer_types=[]), "layer_types"),
    "chunked attention": (("qwen2",), dict(layer_types=["chunked_attention"] * 3), "layer_types"),
    "bias key of Qwen2-MoE": (("qwen2",), dict(qkv_bias=False), ""),
    "attention_bias": (ALL, dict(attention_bias=True), "attention_bias"),
}
ODD_TENSORS = {  # what is changed in the file of weights
    "old buffers": (
        ALL,
        lambda t: t.update(
            {FREQUENCIES: torch.ones(4), "model.rotary_emb.inv_freq": torch.ones(4)}
        ),
        "",
    ),
    "no head": (ALL, lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
    "biases that Llama has not": (
        ALL,
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}),
        "o_proj.bias",
    ),
    "biases that Qwen2 lacks": (
        ("qwen2",),
        lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"),
        "q_proj.bias",
    ),
    "names without prefix": (
        ALL,
        lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)],
        "missing",
    ),
}
ODD_FILES = {  # what is changed in the directory
    "shards": (ALL, lambda directory: in_shards(directory), ""),
    "a single file before its shards": (ALL, lambda directory: beside_shards(directory), ""),
    "an adapter": (
        ALL,
        lambda directory: (directory / "adapter_config.json").write_text("{}"),
        "merge_and_unload",
    ),
    "shards of ranks": (
        ALL,
        lambda directory: of_ranks(directory),
        "shard-00001-model-00001-of-00001.safetensors",
    ),
}
ODD = {
    f"{family}: {name}": (family, kind, change, refusal)
    for kind, table in (("keys", ODD_KEYS), ("tensors", ODD_TENSORS), ("files", ODD_FILES))
    for name, (of, change, refusal) in table.items()
    for family in of
}


def in_shards(directory, change=lambda tensor: tensor):
    """Save a model's tensors, changed, in two shards too."""
    tensors, names = load_file(directory / "model.safetensors"), {}
    for part, file in enumerate(
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    ):
        shard = {
            name: change(tensor)
            for index, (name, tensor) in enumerate(tensors.items())
            if index % 2 == part
        }
        save_file(shard, directory / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
    (directory / "model.safetensors").unlink()


def beside_shards(directory):
    whole = (directory / "model.safetensors").read_bytes()
    in_shards(directory, lambda tensor: 2 * tensor)
    (directory / "model.safetensors").write_bytes(whole)


def of_ranks(directory):
    tensors = {
        name: 2 * tensor for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(
        tensors,
        directory / "shard-00001-model-00001-of-00001.safetensors",
        metadata={"format": "pt"},
    )


@pytest.fixture(scope="module")
def plain_models(tmp_path_factory, dense_dir):
    """A directory for each family: a model with a head of its own, and its tokenizer."""
    root, vocabulary = (
        tmp_path_factory.mktemp("plain"),
        json.loads((dense_dir / "config.json").read_text())["vocab_size"],
    )
    for family in ALL:
        dense(family, root / family, 0, vocabulary, dense_dir)
    return root


def made_odd(source, out, kind, change):
    if kind == "keys":
        return changed(source, out, **change)
    if kind == "tensors":
        return with_tensors(source, out, change)
    shutil.copytree(source, out)
    change(out)
    return out


@torch.no_grad()
def logits_in_fp32(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32
    ).eval()
    return model(torch.arange(24)[None] % model.config.vocab_size, use_cache=False).logits


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_read_as_transformers_reads_it_or_refused_by_name(
    odd, tmp_path, plain_models
):
    """A mixture of one expert without a shared one computes what its dense model computes."""
    family, kind, change, refusal = ODD[odd]
    source = made_odd(plain_models / family, tmp_path / "odd", kind, change)
    config = Config()
    config.model.shared_expert = "none"
    (tmp_path / "out").mkdir()
    try:
        upcycled(source, {"a": source}, embeddings(("a",)), config).write(
            tmp_path / "out", None, config.router, 0
        )
    except NexusError as error:
        assert refusal and refusal in str(error) and str(source) in str(error), error
        return
    expected, found = logits_in_fp32(source), logits_in_fp32(tmp_path / "out")
    assert not refusal, "it was not refused"
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_odd_files_are_odd(tmp_path, plain_models):
    """The keys of the table above change what transformers computes, where they should: the
    comparison can fail."""
    for name in (
        "mistral: a window",
        "llama: rope_scaling before rope_parameters",
        "qwen2: window by layer",
        "llama: yarn of two minds",
    ):
        family, kind, change, _ = ODD[name]
        odd = logits_in_fp32(
            made_odd(plain_models / family, tmp_path / name.replace(" ", "-"), kind, change)
        )
        assert (odd - logits_in_fp32(plain_models / family)).abs().max() > 1e-2 * odd.abs().max(), (
            name
        )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(is_causal=False), "is_causal"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(transformers_weights="x.safetensors"), "transformers_weights"),
    ],
)
def test_a_mixture_is_held_to_the_same(keys, words, tmp_path, nexus_dir):
    with pytest.raises(UnsupportedModelError, match=words):
        qwen2_moe.open_moe(changed(nexus_dir, tmp_path / "m", **keys))


def test_a_tied_mixture_keeps_the_head_that_its_file_has(tmp_path, nexus_dir):
    head = torch.randn(31, 16, generator=torch.Generator().manual_seed(3))
    odd = with_tensors(nexus_dir, tmp_path / "m", lambda t: t.update({"lm_head.weight": head}))
    assert json.loads((odd / "config.json").read_text())["tie_word_embeddings"] is True
    assert qwen2_moe.open_moe(odd)[0]["tie_word_embeddings"] is False
    with torch.no_grad():
        tokens = torch.arange(24)[None]
        model = load_nexus(odd, torch.float32, Placement(3), RouterConfig(), False)
        found = model(input_ids=tokens, use_cache=False).logits
    expected = logits_in_fp32(odd)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (expected - logits_in_fp32(nexus_dir)).abs().max() > 0.1 * expected.abs().max()
    new = reduced(odd, ["beta"])
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, RouterConfig(), 0)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)
    assert describe(odd)["tied_embeddings"] is False
    assert (
        describe(odd)["parameters"]["total"]
        == describe(nexus_dir)["parameters"]["total"] + head.numel()
    )


def test_all_mistakes_of_one_model_are_told_at_once(dense_dir, tmp_path):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 3)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.bfloat16)

    with_tensors(dense_dir, tmp_path / "m", damage)
    changed(tmp_path / "m", tmp_path / "n", mlp_bias=True, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError) as caught:
        on_disk.open_dense(tmp_path / "n")
    said = str(caught.value).splitlines()
    assert said[0] == "5 things to mend; nothing was written:"
    for line, expected in zip(
        said[1:],
        ("mlp_bias is set", "hidden_act 'gelu'", "1 missing", "(2, 3), expected", "several dtypes"),
        strict=True,
    ):
        assert expected in line
