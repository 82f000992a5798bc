"""Every dense family through training: one row of `FAMILIES` each, on real ranks.

What a family's mixture computes before it is trained is held in tests/checkpoint/.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import finish, start_ranks
from test_train import settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nexus_ds.__main__ import main
from nexus_ds.checkpoint import qwen2_moe
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.config import load_config
from nexus_ds.data.domains import write_domain_embeddings
from nexus_ds.pipeline import resolve
from nexus_ds.runtime.loop import read_data
from nexus_ds.settings import Config
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import embeddings

TRAIN = Path(__file__).parents[1] / "nexus_ds" / "train.py"
DOMAINS = ("alpha", "beta", "gamma")
SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.2,
)
TOKENS = dict(bos_token_id=None, eos_token_id=0, pad_token_id=None)
"""Of the tokenizer: families whose defaults are far beyond it ask for them."""
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
ROWS = {  # family: keys of its config.json, the class that transformers finds on disk
    "qwen3": (dict(head_dim=12, tie_word_embeddings=True), "Qwen3NextForCausalLM"),
    # one layer of each kind; in training linear attention is the family's own, as all else is
    "qwen3_5_text": (
        dict(
            head_dim=12,
            full_attention_interval=2,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
            tie_word_embeddings=True,
        ),
        "Qwen3NextForCausalLM",
    ),
    "granite": (
        dict(
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.125,
            logits_scaling=8.0,
            tie_word_embeddings=True,
        ),
        "Qwen2MoeForCausalLM",
    ),
    # part of a head turns, with factors of its own beyond 12 positions
    "phi3": (
        dict(
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=500.0,
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.5, 2.0],
                long_factor=[2.0, 3.0, 4.0],
            ),
            original_max_position_embeddings=12,
            **TOKENS,
        ),
        "Qwen2MoeForCausalLM",
    ),
    "ministral": (
        dict(
            head_dim=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
            **TOKENS,
        ),
        "Qwen2MoeForCausalLM",
    ),
    "seed_oss": (dict(head_dim=12, **TOKENS), "Qwen2MoeForCausalLM"),
    "glm": (dict(head_dim=8, **TOKENS), "Qwen2MoeForCausalLM"),
    "ernie4_5": (dict(head_dim=8, **TOKENS), "Qwen2MoeForCausalLM"),
    "olmo2": (TOKENS, "NexusOlmo2ForCausalLM"),
    "olmo3": (WINDOWS | TOKENS, "NexusOlmo3ForCausalLM"),
    "smollm3": (dict(no_rope_layers=[1, 0], **TOKENS), "NexusSmollm3ForCausalLM"),
    "exaone4": (dict(head_dim=12) | WINDOWS | TOKENS, "NexusExaone4ForCausalLM"),
    "glm4": (dict(head_dim=8, **TOKENS), "NexusGlm4ForCausalLM"),
    "gemma3_text": (
        WINDOWS | dict(head_dim=8, query_pre_attn_scalar=24, **TOKENS),
        "NexusGemma3TextForCausalLM",
    ),
    "gemma2": (
        WINDOWS
        | dict(
            head_dim=8,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            **TOKENS,
        ),
        "NexusGemma2ForCausalLM",
    ),
    "gemma": (dict(head_dim=8, **TOKENS), "NexusGemmaForCausalLM"),
    "cohere2": (WINDOWS | dict(logit_scale=0.25, **TOKENS), "NexusCohere2ForCausalLM"),
    "hunyuan_v1_dense": (dict(head_dim=8, **TOKENS), "NexusHunyuanV1DenseForCausalLM"),
}
PER_FORM = ("qwen3", "olmo2")
"""Families whose layouts are compared in every run: one for each form with a class of its own."""
AGREEMENT = 5e-5  # of weights after a few steps
# what is read through a view is trained as any Qwen2-MoE: test_parity.py has that in all layouts
LAYOUT_ROWS = [
    "qwen3",
    *(pytest.param(row, marks=pytest.mark.full) for row in ROWS if row != "qwen3"),
]
LAYOUTS = {"z1": (1, 1), "z3": (3, 1), "z3-experts": (3, 2)}


def dense_models(family, root, dense_dir):
    """Write a seed and its branches, one a domain, each in a folder of its name."""
    vocabulary = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    for number, name in enumerate(("seed", *DOMAINS)):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=vocabulary, **SIZES, **ROWS[family][0])
        model = AutoModelForCausalLM.from_config(config)
        noise = torch.Generator().manual_seed(number)
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=noise)
        model.save_pretrained(root / name)
        for file in dense_dir.glob("tokenizer*.json"):
            shutil.copy(file, root / name)


def mixture(family, root, dense_dir, text):
    """Write seed, branches and their mixture, its router fitted to text; return its folder."""
    dense_models(family, root, dense_dir)
    config = Config()
    config.router.warm_start, config.router.fit_steps = "label_fit", 40
    config.data.sequence_length = 16
    branches = {name: root / name for name in DOMAINS}
    new = upcycled(root / "seed", branches, embeddings(DOMAINS), config)
    (root / "out").mkdir()
    report = new.write(root / "out", new.fit_text(str(text), config, "--data"), config.router, 0)
    assert report.after > max(report.before, 0.5)
    return root / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [name if name in PER_FORM else pytest.param(name, marks=pytest.mark.full) for name in ROWS],
)
def test_a_family_trains_alike_in_every_layout(family, tmp_path, dense_dir, text_folder):
    """The export check holds each to stock transformers; all of them to one another."""
    start = mixture(family, tmp_path, dense_dir, text_folder)
    found = {}
    for layout, (stage, experts) in LAYOUTS.items():
        out = tmp_path / layout
        values = {"zero_optimization": {"stage": stage}}
        (tmp_path / f"{layout}.json").write_text(json.dumps(values))
        words = settings(start, text_folder, out, f"parallel.expert={experts}", "training.lr=1e-3")
        words += ["--config", "demo", "--deepspeed", tmp_path / f"{layout}.json"]
        log = finish(start_ranks([TRAIN, *words], 2))
        assert "reloaded in plain transformers: logits differ by" in log
        found[layout] = TensorReader.of(qwen2_moe.open_moe(out)[1])
        model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        assert type(model).__name__ == ROWS[family][1]
    first = found["z1"]
    before = TensorReader.of(qwen2_moe.open_moe(start)[1])
    for name in first.names():
        # what all of a head's scores get softmax does not see: where RoPE does not turn a key's
        # bias its gradient is rounding alone, and AdamW makes whole steps of that
        if name.endswith("k_proj.bias"):
            continue
        expected = first.read(name)
        for layout, reader in found.items():
            error = float((reader.read(name) - expected).abs().max())
            assert error < AGREEMENT, (layout, name)
    last = [name for name in first.names() if name.startswith("model.layers.1.")]
    moved = [name for name in last if ".mlp." not in name]
    for name in (*moved, qwen2_moe.gate_name(1)):
        assert not torch.equal(first.read(name), before.read(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ROWS)
def test_every_verb_takes_a_family(family, tmp_path, dense_dir, text_folder, capsys, monkeypatch):
    """As commands, one on what the other wrote; training on two ranks, ZeRO-2 and bf16."""
    monkeypatch.chdir(tmp_path)
    dense_models(family, tmp_path, dense_dir)
    write_domain_embeddings(Path("domains.safetensors"), embeddings(DOMAINS))
    text = ["--domains", "domains.safetensors", "--data", text_folder]
    fit = [*text, "router.warm_start=label_fit", "router.fit_steps=20", "data.sequence_length=16"]

    def said(*words):
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0, words
        return json.loads(capsys.readouterr().out)

    experts = [f"--expert={name}={name}" for name in DOMAINS[:2]]
    said("upcycle", "--seed=seed", *experts, "--out=new", *fit)
    Path("z2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    words = settings("new", text_folder, tmp_path / "trained", "parallel.expert=2")
    words += ["data.domains=[alpha,beta]", "data.validation_domains=[alpha]", "training.lr=1e-3"]
    words += ["model.dtype=bf16", "--config", "demo", "--deepspeed", "z2.json"]
    log = finish(start_ranks([TRAIN, *words], 2))
    assert "ZeRO stage 2" in log and "reloaded in plain transformers: logits differ by" in log
    # a branch of fp32 is cast to what training wrote
    said("extend", "--checkpoint=trained", "--expert=gamma=gamma", "--out=more", *fit)
    replaced = ["--expert=beta=gamma", "--replace", "--no-refit", "--lambda=0"]
    said("extend", "--checkpoint=more", *replaced, "--out=other")
    said("remove", "--checkpoint=other", "--expert=alpha", "--out=fewer")
    made = {"new": 2, "trained": 2, "more": 3, "other": 3, "fewer": 2}
    for name in ("seed", *made):
        facts = said("inspect", name)
        planned = said("plan", "--gpus=2", "--gpu-memory=8GB", f"model.path={name}")
        assert planned["parameters"]["total"] == facts["parameters"]["total"]
        assert planned["parameters"]["active"] == facts["parameters"]["active"]
    for name, count in made.items():
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, dtype="auto")
        assert type(model).__name__ == ROWS[family][1] and model.config.num_experts == count
        assert model.dtype == (torch.float32 if name == "new" else torch.bfloat16), name
        verify_expert_embeddings(tmp_path / name)
        said("verify", name)
    moved = [qwen2_moe.open_moe(tmp_path / name)[1] for name in ("more", "other", "fewer")]
    places = [qwen2_moe.expert_name(1, expert, "up_proj") for expert in (2, 1, 0)]
    first, *others = (
        TensorReader.of(part).read(place) for part, place in zip(moved, places, strict=True)
    )
    assert all(torch.equal(one, first) for one in others)
    checkpoints = [f"--checkpoint={name}" for name in ("seed", *made)]
    scores = said("evaluate", *checkpoints, f"--data={text_folder}", "--windows=4", "--out=scores")
    assert set(scores["perplexity"]) == {"seed", *made}
    assert all(1 < score < 1e4 for row in scores["perplexity"].values() for score in row.values())
    written = said("generate", "--checkpoint=trained", "tree leaf", "--tokens=6")
    tokenizer = AutoTokenizer.from_pretrained("trained", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained("trained", dtype=torch.float32)
    ids = tokenizer("tree leaf", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
    assert "tree leaf" + written["text"] == tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["granite", "phi3", "gemma2", "qwen3_5_text", pytest.param("cohere2", marks=pytest.mark.full)],
)
def test_a_branch_is_trained_with_its_familys_own_loss(family, tmp_path, dense_dir, text_folder):
    """Every loss and the trained weights are those of the same steps in plain PyTorch, on
    transformers' own class: logits are divided or capped, fused projections stay fused."""
    dense_models(family, tmp_path, dense_dir)
    out = tmp_path / "branch"
    words = settings(tmp_path / "seed", text_folder, out, "stage=branch", "branch=alpha")
    words += ["data.domains=[alpha]", "data.validation_domains=[alpha]", "pipeline.card=false"]
    words += ["training.log_every=1", "model.dtype=fp32"]
    finish(start_ranks([TRAIN, "--config", "demo", *words], 1))
    log = (tmp_path / "branch.training" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    steps = [record for record in records if record["kind"] == "train"]
    scored = [record["loss"]["alpha"] for record in records if record["kind"] == "validation"]
    config = resolve(load_config("demo", words))
    data = read_data(config, tmp_path / "seed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "seed", dtype=torch.float32)
    training = config.training
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=training.weight_decay)

    def loss_of(windows):
        logits = model(windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    validation = torch.from_numpy(data.validation["alpha"])
    found = [loss_of(validation).item()]
    for number, record in enumerate(steps):
        first = number * training.batch_size
        samples = [data.sampler.sample(first + i).tokens for i in range(training.batch_size)]
        loss = loss_of(torch.from_numpy(np.stack(samples)))
        assert loss.item() == pytest.approx(record["loss"], rel=1e-5), number
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        optimizer.step()
        optimizer.zero_grad()
    found.append(loss_of(validation).item())
    assert len(steps) == 8 and found == pytest.approx(scored, rel=1e-5) and found[1] < found[0]
    trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    # AdamW's first steps are a gradient's sign: the smallest ones are rounding
    for name, weight in model.state_dict().items():
        assert (trained[name] - weight).abs().max() < AGREEMENT, name
    assert open_dense(out).family == family
