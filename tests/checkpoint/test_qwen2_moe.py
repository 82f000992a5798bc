"""The table of what a mixture's checkpoint stores, against checkpoints and their sources."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from nexus_ds.checkpoint import qwen2_moe
from nexus_ds.checkpoint.file_layout import repeated
from nexus_ds.checkpoint.qwen2_moe import Role, stored
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.config import load_config
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import dense, embeddings

NAMES = ("a", "b", "c")
FORMS = {
    "untied": ("llama", ()),
    "tied": ("llama-tied", ()),
    "biases": ("qwen2", ()),
    "context router": ("llama", ("router.input=context",)),
    "no shared expert": ("llama-tied", ("model.shared_expert=none",)),
}


@pytest.fixture(params=FORMS)
def mixture(request, tmp_path, dense_dir):
    """A written mixture of three branches, in each form; the branches lie beside it."""
    kind, words = FORMS[request.param]
    vocabulary = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    for number, name in enumerate(("seed", *NAMES)):
        dense(kind, tmp_path / name, number, vocabulary, dense_dir)
    config = load_config("demo", list(words))
    branches = {name: tmp_path / name for name in NAMES}
    new = upcycled(tmp_path / "seed", branches, embeddings(NAMES), config)
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, config.router, 0)
    return tmp_path / "out"


def test_the_table_has_every_tensor_with_its_shape_and_nothing_else(mixture):
    config, reader = qwen2_moe.open_moe(mixture)
    written = {name: reader.info(name).shape for name in TensorReader(mixture).names()}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    stock = config["model_type"] == "qwen2_moe"
    assert repeated(config) == (tied if config["tie_word_embeddings"] and stock else {})
    for copy, source in repeated(config).items():
        whole = TensorReader.of(reader)
        assert torch.equal(whole.read(copy), whole.read(source))
        del written[copy]
    assert {name: entry.shape for name, entry in stored(config).items()} == written
    total, _ = qwen2_moe.parameter_counts(config)
    assert total == sum(math.prod(shape) for shape in written.values())


def test_what_is_stored_is_the_source_times_its_scale_or_a_constant(mixture):
    config, reader = qwen2_moe.open_moe(mixture)
    sources = {n: load_file(mixture.parent / n / "model.safetensors") for n in ("seed", *NAMES)}
    none = json.loads((mixture / "nexus.json").read_text())["shared_expert"] == "none"
    for name, entry in stored(config).items():
        tensor = TensorReader.of(reader).read(name)
        if entry.fill is not None:
            assert entry.role is Role.SHARED_GATE and torch.sigmoid(tensor.sum()) == 0.5
        elif entry.role is Role.ROUTED:
            assert torch.equal(tensor, sources[NAMES[entry.expert]][entry.dense_name])
        elif entry.role is Role.SHARED:
            seed = sources["seed"][entry.dense_name]
            assert torch.equal(tensor, torch.zeros_like(seed) if none else seed * entry.scale)
        elif entry.role is Role.DENSE:
            mean = torch.stack([sources[branch][name] for branch in NAMES]).mean(0)
            torch.testing.assert_close(tensor, mean)


def test_every_layer_has_every_role_once_for_each_of_its_parts(mixture):
    config, _ = qwen2_moe.open_moe(mixture)
    context = config["model_type"] == "nexus_moe"
    for layer in range(config["num_hidden_layers"]):
        roles = [entry.role for entry in stored(config).values() if entry.layer == layer]
        assert roles.count(Role.ROUTED) == 3 * len(NAMES)
        assert roles.count(Role.SHARED) == 3
        assert roles.count(Role.ROUTER) == roles.count(Role.SHARED_GATE) == 1
        assert roles.count(Role.CONTEXT_MEAN) == context
        assert qwen2_moe.gate_name(layer) in stored(config)


def test_a_shared_expert_of_zeros_is_not_active(mixture):
    config, _ = qwen2_moe.open_moe(mixture)
    entries = stored(config).values()
    stack = sum(math.prod(e.shape) for e in entries if e.role is Role.SHARED)
    total, active = qwen2_moe.parameter_counts(config)
    assert total - active == (len(NAMES) - config["num_experts_per_tok"]) * stack
    assert qwen2_moe.parameter_counts(config, shared=False) == (total, active - stack)
