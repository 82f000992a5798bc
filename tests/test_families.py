"""Every dense family through training: one row of `FAMILIES` each, on real ranks.

What a family's mixture computes before it is trained is held in tests/checkpoint/.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import finish, start_ranks
from test_train import settings
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint import qwen2_moe
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
ROWS = {  # family: keys of its config.json, the class that transformers finds on disk
    "qwen3": (dict(head_dim=12, tie_word_embeddings=True), "Qwen3NextForCausalLM"),
}
LAYOUTS = {"z1": (1, 1), "z3-experts": (3, 2)}


def mixture(family, root, dense_dir, text):
    """Write seed, branches and their mixture, its router fitted to text; return its folder."""
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
    config = Config()
    config.router.warm_start, config.router.fit_steps = "label_fit", 20
    config.data.sequence_length = 16
    branches = {name: root / name for name in DOMAINS}
    new = upcycled(root / "seed", branches, embeddings(DOMAINS), config)
    (root / "out").mkdir()
    report = new.write(root / "out", new.fit_text(str(text), config, "--data"), config.router, 0)
    assert report.after > max(report.before, 0.5)
    return root / "out"


@pytest.mark.slow
@pytest.mark.parametrize("family", ROWS)
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
        found[layout] = qwen2_moe.open_moe(out)[1]
        model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        assert type(model).__name__ == ROWS[family][1]
    first = found["z1"]
    before = qwen2_moe.open_moe(start)[1]
    for name in first.names():
        expected = first.read(name)
        for layout, reader in found.items():
            error = float((reader.read(name) - expected).abs().max())
            assert error < 1e-5, (layout, name)
    for part in ("self_attn.q_norm", "self_attn.q_proj", "input_layernorm", "mlp.gate"):
        name = f"model.layers.1.{part}.weight"
        assert not torch.equal(first.read(name), before.read(name)), name
