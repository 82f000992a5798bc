"""Dense families to Qwen2-MoE and back: logits against the plain formula, and refusals by name."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from nexus_ds.config import Config
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from nexus_ds.model import families
from nexus_ds.model.growth import upcycled

SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
KINDS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-head-dim": ("llama", dict(head_dim=12)),
    "llama3-rope": ("llama", dict(rope_parameters=LLAMA3)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-sliding": ("mistral", dict(sliding_window=6)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-sliding": ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
}


def dense(kind, out, seed, vocabulary, tokenizer):
    """Save a random dense model whose every weight matters, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, extra = KINDS[kind]
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **SIZES, **extra)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
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
        self.shared, self.experts, self.rows, self.top_k = shared, nn.ModuleList(experts), rows, top_k
        self.chosen = set()

    def forward(self, x):
        gates, indices = F.softmax(x @ self.rows.T, dim=-1).topk(self.top_k, dim=-1)
        y = self.shared(x)
        for expert, ffn in enumerate(self.experts):
            y = y + (gates * (indices == expert)).sum(-1, keepdim=True) * ffn(x)
        self.chosen |= set(indices.flatten().tolist())
        return y


def formula_model(seed, experts, rows, top_k):
    """Return the seed's own transformers model with averaged weights and the formula in each layer."""
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

    model, report = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stock_transformers_computes_the_formula(kind, tmp_path, dense_dir):
    vocabulary = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    names, top_k = ("a", "b", "c"), 2 if kind in ("llama", "qwen2-tied") else 1
    models = {n: dense(kind, tmp_path / n, i, vocabulary, dense_dir) for i, n in enumerate(("seed", *names))}
    config = Config()
    config.router.top_k, config.router.init_norm = top_k, 2.0
    new = upcycled(tmp_path / "seed", {n: tmp_path / n for n in names}, embeddings(names), config)
    out = tmp_path / "out"
    out.mkdir()
    new.write(out, None, config.router, 0)
    rows = [new.tensors[families.gate_name(layer)] for layer in range(3)]
    oracle = formula_model(models["seed"], [models[n] for n in names], rows, top_k)
    tokens = torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, found = oracle(tokens).logits, load(out)(tokens).logits
    assert all(len(block.mlp.chosen) > 1 for block in oracle.model.layers)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    oracle.model.layers[1].mlp.experts[0].down_proj.weight.data *= -1  # the comparison can fail
    assert (found - oracle(tokens).logits).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_expert_goes_back_to_its_dense_family(kind, tmp_path, dense_dir):
    vocabulary = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    dense(kind, tmp_path / "seed", 0, vocabulary, dense_dir)
    model = dense(kind, tmp_path / "a", 1, vocabulary, dense_dir)
    new = upcycled(tmp_path / "seed", dict.fromkeys(("x", "y"), tmp_path / "a"), embeddings(("x", "y")), Config())
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, Config().router, 0)
    config, reader = families.open_moe(tmp_path / "out")

    def back(expert):
        names = families.expert_as_dense(config, expert)
        return {name: reader.read(stored) * factor for name, (stored, factor) in names.items()}

    (tmp_path / "back").mkdir()
    save_file(back(1), tmp_path / "back" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "back" / "config.json").write_text(json.dumps(families.dense_config(config, KINDS[kind][0])))
    tokens = torch.arange(24)[None] % vocabulary
    torch.testing.assert_close(load(tmp_path / "back")(tokens).logits, model(tokens).logits, atol=1e-6, rtol=1e-6)
    seed = load_file(tmp_path / "seed" / "model.safetensors")
    shared = back(None)
    assert all(torch.equal(shared[n], seed[n]) for n in seed if ".mlp." in n)
    reopened = families.open_dense(tmp_path / "back")
    assert reopened.settings == families.open_dense(tmp_path / "a").settings


def test_older_keys_mean_the_same(dense_dir):
    config = json.loads((dense_dir / "config.json").read_text())
    rope = dict(rope_type="llama3", rope_theta=7.0, factor=2.0, original_max_position_embeddings=64)
    new = config | {"rope_parameters": rope}
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    old |= {"rope_theta": 7.0, "rope_scaling": {"type": "llama3", "factor": 2.0}, "torch_dtype": "bfloat16"}
    old.pop("dtype", None)
    assert families.settings(old) == families.settings(new)
    assert families.moe_config(old, 2, 1)["dtype"] == "bfloat16"
    mistral = {k: v for k, v in config.items() if k not in ("sliding_window", "num_key_value_heads")}
    mistral |= {"model_type": "mistral", "num_attention_heads": 8, "hidden_size": 64}
    assert families.settings(mistral)["kv_heads"] == 8 and families.settings(mistral)["sliding_window"] == 4096


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
        (dict(model_type="qwen3"), ["'qwen3'", "q_norm", "supported: llama, mistral, qwen2"]),
        (dict(model_type="olmo2"), ["'olmo2'", "norms after attention"]),
        (dict(model_type="gemma2"), ["'gemma2'", "add 1"]),
        (dict(model_type="blender"), ["'blender'", "supported: llama"]),
        (dict(model_type=...), ["None", "supported: llama"]),
        (dict(hidden_act="gelu"), ["hidden_act 'gelu'", "silu"]),
        (dict(quantization_config={"bits": 4}), ["quantization_config", "unquantised"]),
        (dict(auto_map={"AutoModel": "evil.Model"}), ["auto_map", "never run"]),
        (dict(trust_remote_code=True), ["trust_remote_code", "never run"]),
        (dict(_attn_implementation_internal="a/b"), ["_attn_implementation_internal"]),
        (dict(_experts_implementation_internal="a/b"), ["_experts_implementation_internal"]),
        (dict(attn_implementation="a/b"), ["attn_implementation = 'a/b'"]),
        (dict(text_config={"auto_map": {"AutoModel": "evil.Model"}}), ["text_config.auto_map"]),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), ["RoPE that differs between layers"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    ],
)
def test_refuses_by_name(keys, words, tmp_path, dense_dir):
    with pytest.raises(UnsupportedModelError) as caught:
        families.open_dense(changed(dense_dir, tmp_path / "m", **keys))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("keys", [dict(attn_implementation="sdpa"), dict(trust_remote_code=False), dict(auto_map=None)])
def test_harmless_keys_pass(keys, tmp_path, dense_dir):
    assert families.open_dense(changed(dense_dir, tmp_path / "m", **keys)).family == "llama"


@pytest.mark.parametrize(
    ("keys", "message"),
    [(dict(hidden_size=0), "hidden_size is 0"), (dict(vocab_size="x"), "vocab_size is 'x', expected a number")],
)
def test_sizes_must_be_numbers(keys, message, tmp_path, dense_dir):
    with pytest.raises(CheckpointError, match=message):
        families.open_dense(changed(dense_dir, tmp_path / "m", **keys))


def with_tensors(source, out, change):
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_tensors_are_held_against_the_configuration(tmp_path, dense_dir):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"1 missing: {name}"):
        families.open_dense(with_tensors(dense_dir, tmp_path / "missing", lambda t: t.pop(name)))
    with pytest.raises(CheckpointError, match=r"1 unknown: model.surprise"):
        extra = {"model.surprise": torch.zeros(1)}
        families.open_dense(with_tensors(dense_dir, tmp_path / "extra", lambda t: t.update(extra)))
    with pytest.raises(CheckpointError, match=r"up_proj.weight \(2, 3\), expected \(24, 16\)"):
        families.open_dense(with_tensors(dense_dir, tmp_path / "shape", lambda t: t.update({name: torch.ones(2, 3)})))
    with pytest.raises(UnsupportedModelError, match=r"no place for model.layers.0.self_attn.o_proj.bias"):
        bias = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)}
        families.open_dense(with_tensors(dense_dir, tmp_path / "bias", lambda t: t.update(bias)))
    with pytest.raises(UnsupportedModelError, match=r"several dtypes: BF16 .* F32 .*save the model in one"):
        families.open_dense(with_tensors(dense_dir, tmp_path / "mixed", lambda t: t.update({name: t[name].bfloat16()})))
    with pytest.raises(UnsupportedModelError, match=r"weights are F16 .*fp32 or bf16"):
        half = lambda t: t.update({k: v.half() for k, v in t.items()})  # noqa: E731
        families.open_dense(with_tensors(dense_dir, tmp_path / "half", half))


def test_a_tied_models_repeated_head_and_old_buffers_are_ignored(tmp_path, dense_dir):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert families.open_dense(with_tensors(dense_dir, tmp_path / "m", repeat)).settings["tied_embeddings"]


def test_a_hub_name_is_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        families.open_dense(tmp_path / "meta-llama" / "Llama-2-7b")
