"""What transformers 4.57 makes of the checkpoints that are written here, beside what 5 makes of
them."""

import json
import shutil

import pytest
import torch
from conftest import save_tokenizer
from safetensors.torch import load_file
from transformers4 import run
from transformers4_worker import answers

from nexus_ds.checkpoint.older_stacks import unlike_transformers_4
from nexus_ds.checkpoint.qwen2_moe import moe_config
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.config import load_config
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint import test_dense
from tests.checkpoint.test_dense import dense, embeddings
from tests.data.conftest import save_sentencepiece

WORKER = __file__.rpartition("/checkpoint/")[0] + "/transformers4_worker.py"
FACTORS = dict(short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[2.0, 3.5, 4.0, 5.5])


def stretched(kind, **more):
    return "llama", dict(rope_parameters=dict(rope_type=kind, rope_theta=500.0, **more))


KINDS = {
    "linear": stretched("linear", factor=4.0),
    "dynamic": stretched("dynamic", factor=4.0),
    "yarn": stretched("yarn", factor=4.0, original_max_position_embeddings=16),
    "longrope": stretched("longrope", original_max_position_embeddings=16, **FACTORS),
    # not 64 / 16
    "longrope-factor": stretched(
        "longrope", factor=2.0, original_max_position_embeddings=16, **FACTORS
    ),
    # what views make: a longrope of a whole head of which only some channels turn, and an epsilon
    "glm": ("glm", dict(head_dim=8, pad_token_id=None)),
    "phi-4-mini": (
        "phi3",
        dict(
            pad_token_id=None,
            original_max_position_embeddings=16,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=500.0,
                partial_rotary_factor=0.75,
                short_factor=FACTORS["short_factor"][:3],
                long_factor=FACTORS["long_factor"][:3],
            ),
        ),
    ),
    "granite": ("granite", dict(residual_multiplier=0.25, embedding_multiplier=12.0)),
    # with a cache too: it has a layer of linear attention
    "qwen3.5": (
        "qwen3_5_text",
        dict(
            head_dim=16,
            full_attention_interval=2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
        ),
    ),
}
ALIKE = [
    (kind, experts, top_k)
    for kind in ("llama-tied", "llama3-rope", "qwen2", "mistral", "mistral-sliding")
    for experts, top_k in ((3, 1), (5, 2))
] + [
    ("qwen2-tied", 5, 1),
    *((kind, 3, 2) for kind in KINDS if kind != "longrope-factor"),
]
QWEN3 = "it generates with use_cache=False alone, and refuses else"
UNCACHED = [("qwen3", 3, 1), ("qwen3-tied", 5, 2)]
UNLIKE = {
    "qwen2-sliding": "it gives all layers the window of some: right for texts of up to 6 tokens",
    "longrope-factor": "it takes 4 for RoPE's factor of 2",
    "llama-head-dim": "it refuses 4 heads of 12 in a model of 32",
}


def make(folder, kind, experts, top_k, *more):
    """Write a mixture of random branches; return its directory and what is said of it."""
    tokenizer, parts = folder / "tokenizer", folder / f"parts of {kind}"
    vocabulary = len(open_tokenizer(tokenizer))
    names = [f"e{number}" for number in range(experts)]
    for number, name in enumerate(("seed", *names)):
        if not (parts / name).is_dir():
            dense(kind, parts / name, number, vocabulary, tokenizer)
    config = load_config("demo", [f"router.top_k={top_k}", "router.init_norm=2.0", *more])
    branches = {name: parts / name for name in names}
    new = upcycled(parts / "seed", branches, embeddings(names), config)
    out = folder / f"{kind} {experts} {top_k}"
    out.mkdir()
    new.write(out, None, config.router, 0)
    return out, new.describe(out, None)


def config_of(kind):
    family, more = (test_dense.KINDS | KINDS)[kind]
    sizes = test_dense.SIZES | {"vocab_size": 31, "rms_norm_eps": 1e-6}
    return {"model_type": family, **sizes, **more}


# What is said -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, _, _ in ALIKE if kind != "mistral-sliding"])
def test_nothing_is_said_of_what_is_computed_alike(kind):
    assert unlike_transformers_4(moe_config(config_of(kind), 3, 1)) == []


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied"])
def test_a_qwen3_next_is_said_to_need_generation_without_a_cache(kind):
    assert unlike_transformers_4(moe_config(config_of(kind), 3, 1)) == [QWEN3]


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_computed_otherwise_is_said(kind):
    assert unlike_transformers_4(moe_config(config_of(kind), 3, 1)) == [UNLIKE[kind]]


def test_longrope_says_where_4_looks_how_long_the_first_texts_were():
    config = moe_config(config_of("longrope"), 3, 1)
    assert config["original_max_position_embeddings"] == 16
    assert config["rope_scaling"]["original_max_position_embeddings"] == 16


def test_windows_in_all_layers_and_a_router_of_its_own_are_said():
    config = moe_config(config_of("mistral-sliding"), 3, 1, "context")
    assert config["max_window_layers"] == 0
    windows, router = unlike_transformers_4(config)
    assert windows == "beyond 6 tokens it generates right with use_cache=False alone"
    assert router == "it has no model of type nexus_moe; nexus_ds.hf is for transformers 5"


# What is computed ---------------------------------------------------------------------------------


def tokenizers(folder):
    """Copy tokenizers that transformers 5 has saved, of three kinds; return the copies."""
    spm, words, bare = folder / "spm", folder / "words", folder / "bare"
    open_tokenizer(save_sentencepiece(folder / "slow")).save_pretrained(spm)
    # nothing says that a text begins with BOS: 4's class of this name would put one there
    shutil.copytree(spm, bare)
    value = json.loads((bare / "tokenizer.json").read_text()) | {"post_processor": None}
    (bare / "tokenizer.json").write_text(json.dumps(value))
    save_tokenizer(words)
    tokenizer = open_tokenizer(words)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<law>"]})
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(words)
    copies = []
    for source in (spm, bare, words):
        copy = folder / f"copy of {source.name}"
        copy.mkdir()
        copy_tokenizer(source, copy)
        copies.append(copy)
    return copies, [bare, words]


def spelled_as_5_alone(source, out):
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    kept = {key: v for key, v in config.items() if key not in ("rope_theta", "rope_scaling")}
    (out / "config.json").write_text(json.dumps(kept))
    return out


@pytest.mark.slow
def test_transformers_4_computes_what_5_does(tmp_path, monkeypatch):
    monkeypatch.setattr(test_dense, "KINDS", test_dense.KINDS | KINDS)
    save_tokenizer(tmp_path / "tokenizer")
    alike = [make(tmp_path, *case)[0] for case in ALIKE]
    uncached = []
    for case in UNCACHED:
        directory, said = make(tmp_path, *case)
        assert f"note: transformers 4: {QWEN3}" in said
        uncached.append(directory)
    unlike = {}
    for kind, sentence in UNLIKE.items():
        directory, said = make(tmp_path, kind, 3, 1)
        assert f"note: transformers 4: {sentence}" in said
        unlike[kind] = directory
    only_5 = spelled_as_5_alone(tmp_path / "llama3-rope 3 1", tmp_path / "only 5")
    copies, sources = tokenizers(tmp_path)
    everything = [*alike, *uncached, *unlike.values(), only_5, *copies, *sources]
    run(WORKER, tmp_path / "4.safetensors", tmp_path / "4.json", *everything)
    four, said_4 = (
        load_file(tmp_path / "4.safetensors"),
        json.loads((tmp_path / "4.json").read_text()),
    )
    five, said_5 = answers(everything)

    def apart(name):
        return float((four[name] - five[name]).abs().max())

    for directory in alike:
        # 4 solves the triangular system of linear attention row by row
        bound = 1e-4 if "qwen3.5" in directory.name else 1e-5
        assert apart(f"{directory.name} whole") <= bound, directory.name
        cached = apart(f"{directory.name} generated")
        # what is said of windows is true
        assert (cached > 0.1) == ("sliding" in directory.name), (directory.name, cached)
    for directory in uncached:
        assert apart(f"{directory.name} whole") <= 1e-5, directory.name
        assert "is not in list" in said_4[f"{directory.name} generated"]
    for directory in (*alike, *uncached, *copies):
        assert said_4[directory.name] == said_5[directory.name] and "ids" in said_4[directory.name]
        assert said_4[directory.name]["inputs"] == ["input_ids", "attention_mask"]
    # Controls: without what is written for it, it is wrong, and what is said to be wrong is.
    assert apart("only 5 whole") > 0.1
    assert apart(f"{unlike['qwen2-sliding'].name} whole") > 0.1
    assert apart(f"{unlike['longrope-factor'].name} whole") > 0.1
    assert "must be divisible by num_heads" in said_4[unlike["llama-head-dim"].name]["error"]
    assert said_4["bare"] != said_5["bare"] and "error" in said_4["words"]
    assert torch.isfinite(torch.cat([t.flatten() for t in four.values()])).all()
