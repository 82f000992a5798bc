"""GGUF files: what llama.cpp computes of them against transformers, and what stands in them."""

import json
import math
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import llama_cpp
import numpy as np
import pytest
import torch
from branches import make_parts, tensors_of, upcycle
from safetensors.torch import save_file

from nexus_ds.checkpoint.qwen2_moe import moe_config
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import CheckpointError, ConfigError, ServingError
from nexus_ds.serving import gguf_file
from nexus_ds.serving.directory import open_checkpoint
from nexus_ds.serving.gguf_file import (
    architecture,
    entries,
    facts_of,
    gguf_package,
    rope_factors,
    write_gguf,
)
from nexus_ds.serving.gguf_words import Words, read_words
from nexus_ds.serving.targets import Mixture
from tests.checkpoint import test_dense, test_older_stacks
from tests.checkpoint.test_dense import load
from tests.checkpoint.test_older_stacks import make

KINDS = test_dense.KINDS | test_older_stacks.KINDS
POSITIONS = 200
NEAR = 5e-4
"""Largest difference of log-probabilities, of values above LEAST; found: 6.5e-5."""
LEAST = -20
RUN = [
    ("llama-tied", 3, 1),
    ("llama-tied", 5, 2),
    ("llama3-rope", 3, 1),
    ("llama3-rope", 5, 2),
    ("qwen2", 3, 2),
    ("qwen2", 5, 1),
    ("qwen3", 3, 1),
    ("qwen3-tied", 5, 2),
    ("llama-head-dim", 3, 2),
    ("mistral-sliding", 3, 1),
    ("linear", 3, 1),
    ("yarn", 5, 2),
]
ARCHITECTURES = {"llama3-rope": "step35", "mistral-sliding": "step35"}
TEXT = "the tree has a leaf, 12 roots; don't they? def f(x): return x + 1\n"


def mixture(kind, experts=3):
    family, more = KINDS[kind]
    config = {"model_type": family, **test_dense.SIZES, "vocab_size": 31, "rms_norm_eps": 1e-6}
    return Mixture.of(moe_config(config | more, experts, 1))


def plain_words(size):
    """Return a tokenizer's part of the file that no test reads."""
    tokens = [f"t{index}" for index in range(size)]
    kinds = dict(model="gpt2", way="gpt-2", types=[1] * size, merges=["t 1"], scores=[])
    rest = dict(roles={"eos": 0}, begins=False, spaced=False, template="{{ x }}")
    return Words(tokens=tokens, **kinds, **rest)


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_dir, text_folder):
    """A mixture of a tied Llama."""
    folder = tmp_path_factory.mktemp("made")
    make_parts(folder, dense_dir, text_folder)
    upcycle(folder)
    return folder / "out"


# What llama.cpp computes --------------------------------------------------------------------------


def written(source, out):
    opened = open_checkpoint(source)
    words = read_words(source, opened.mixture.sizes.vocabulary)
    write_gguf(opened, words, out)
    return out


def expected(directory, ids):
    with torch.no_grad():
        return load(directory).float()(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


def apart(answer, wanted):
    """Return the largest difference of log-probabilities that are not too small to matter."""
    found = np.log(np.maximum(np.array(answer["probabilities"]), 1e-30))
    assert found.shape == wanted.shape and len(wanted) == POSITIONS
    return float(np.abs(found - wanted)[wanted > LEAST].max())


@pytest.mark.slow
def test_llama_cpp_computes_what_transformers_does(tmp_path, monkeypatch):
    llama_cpp.gguf()
    monkeypatch.setattr(test_dense, "KINDS", KINDS)
    monkeypatch.setattr(test_dense, "SIZES", test_dense.SIZES | {"max_position_embeddings": 256})
    train_tokenizer(iter([TEXT] * 9), 300, tmp_path / "tokenizer")
    cases, wanted = [], []
    for case in RUN:
        source, _ = make(tmp_path, *case)
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        ids = [position * 7 % (vocabulary - 2) + 1 for position in range(POSITIONS)]
        file = written(source, tmp_path / f"{source.name}.gguf")
        cases.append({"file": str(file), "ids": ids, "texts": [TEXT]})
        wanted.append(expected(source, ids))
    half = tmp_path / "half"
    halve(tmp_path / "llama-tied 3 1", half)
    cases.append(cases[0] | {"file": str(written(half, tmp_path / "half.gguf"))})
    monkeypatch.setattr(gguf_file, "rope_factors", lambda m: np.ones_like(rope_factors(m)))
    unstretched = written(tmp_path / "llama3-rope 3 1", tmp_path / "unstretched.gguf")
    cases.append(cases[2] | {"file": str(unstretched)})
    *said, of_half, without = llama_cpp.answers(tmp_path, cases)
    for case, answer, values in zip(RUN, said, wanted, strict=True):
        assert apart(answer, values) <= NEAR, case
    # rounded weights, and products that llama.cpp rounds once more
    assert apart(of_half, expected(half, cases[0]["ids"])) <= 0.5
    assert apart(without, wanted[2]) > 0.1, "without its factors it should be another model"


def halve(source, out, dtype=torch.bfloat16):
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text()) | {
        "dtype": str(dtype).removeprefix("torch.")
    }
    (out / "config.json").write_text(json.dumps(config))
    halved = {name: tensor.to(dtype) for name, tensor in tensors_of(source).items()}
    save_file(halved, out / "model.safetensors", metadata={"format": "pt"})


# What is handed to the writer ---------------------------------------------------------------------


def test_every_tensor_is_its_sources_and_the_shared_expert_half_of_them(made):
    """Without the package that writes it."""
    opened, dense = open_checkpoint(made), tensors_of(made)
    table = dict(entries(opened.mixture))
    halved = set()
    for name, entry in table.items():
        found = torch.from_numpy(gguf_file._values(opened, entry))
        if entry.values is not None:
            assert name.endswith("exp_probs_b.bias") and not found.any()
            continue
        whole = torch.stack([dense[source] for source in entry.sources]).reshape(entry.shape)
        if torch.equal(found, whole / 2):
            halved.add(name)
        else:
            assert torch.equal(found, whole), name
    # no gate halves it there; of a gate and of what it multiplies one alone is halved
    assert halved == {f"blk.{layer}.ffn_down_shexp.weight" for layer in range(2)}
    experts = tuple(f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(3))
    assert table["blk.1.ffn_up_exps.weight"].sources == experts
    full = {name for name, entry in table.items() if entry.full}
    assert full == {name for name in table if name.endswith(("norm.weight", "gate_inp.weight"))}
    assert facts_of(opened.mixture)["expert_weights_norm"] is False


def test_a_file_without_its_tensors_is_refused(made, tmp_path, monkeypatch):
    """By a package that writes nothing."""
    empty = SimpleNamespace(tensors=[])
    lost = MagicMock(GGUFReader=lambda path: empty)
    monkeypatch.setitem(sys.modules, "gguf", lost)
    with pytest.raises(ServingError, match=r"token_embd.weight is not what was to be written"):
        write_gguf(open_checkpoint(made), plain_words(31), tmp_path / "m.gguf")


def test_a_disk_that_is_full_on_the_way_gets_the_file_named(made, tmp_path, monkeypatch):
    """numpy, by which the package writes, has no number of such an error."""
    package = MagicMock()
    short = OSError("100 requested and 5 written")
    package.GGUFWriter.return_value.write_tensor_data.side_effect = short
    monkeypatch.setitem(sys.modules, "gguf", package)
    said = rf"100 requested and 5 written: free [\d,]+: '{tmp_path / 'm.gguf'}'$"
    with pytest.raises(OSError, match=said):
        write_gguf(open_checkpoint(made), plain_words(31), tmp_path / "m.gguf")


# What stands in the file --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package():
    return llama_cpp.gguf()


def test_every_weight_is_there_as_llama_cpp_takes_it(package, made, tmp_path):
    opened = open_checkpoint(made)
    count = write_gguf(opened, plain_words(31), tmp_path / "m.gguf")
    reader = package.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(found) == count
    dense = tensors_of(made)
    layer = "model.layers.1."
    experts = [dense[f"{layer}mlp.experts.{e}.up_proj.weight"] for e in range(3)]
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], torch.stack(experts))
    # no gate halves it there
    shared = dense[f"{layer}mlp.shared_expert.down_proj.weight"]
    assert torch.equal(found["blk.1.ffn_down_shexp.weight"], shared / 2)
    assert torch.equal(found["blk.1.ffn_gate_inp.weight"], dense[f"{layer}mlp.gate.weight"])
    assert not found["blk.1.exp_probs_b.bias"].any()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "glm4moe"
    assert fields["glm4moe.expert_gating_func"] == 1
    assert fields["glm4moe.expert_weights_norm"] is False
    assert fields["tokenizer.chat_template"] == "{{ x }}"
    assert fields["tokenizer.ggml.eos_token_id"] == 0


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_16_bits_stay_what_they_are_but_for_router_and_norms(package, made, tmp_path, dtype, kind):
    halve(made, tmp_path / "half", dtype)
    write_gguf(open_checkpoint(tmp_path / "half"), plain_words(31), tmp_path / "m.gguf")
    tensors = package.GGUFReader(tmp_path / "m.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    full = {name for name, kind in kinds.items() if kind == "F32"}
    ends = ("norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")
    assert full == {name for name in kinds if name.endswith(ends)}
    assert set(kinds.values()) == {"F32", kind}


def test_a_file_that_is_not_what_was_written_is_refused(package, made, tmp_path, monkeypatch):
    class Broken(package.GGUFWriter):
        def write_tensor_data(self, tensor, *more):
            super().write_tensor_data(tensor * 2, *more)

    monkeypatch.setattr(package, "GGUFWriter", Broken)
    with pytest.raises(ServingError, match=r"token_embd.weight is not what was to be written"):
        write_gguf(open_checkpoint(made), plain_words(31), tmp_path / "m.gguf")


def test_a_full_disk_is_told_before_anything_is_written(package, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(CheckpointError, match=r"not enough space: need .* free 0; make room first"):
        write_gguf(open_checkpoint(made), plain_words(31), tmp_path / "m.gguf")


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="not installed; pip install gguf"):
        gguf_package()


# What is said of the model ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_architecture_is_one_that_computes_it(kind):
    windows = "sliding" in kind
    assert architecture(mixture(kind)) == ARCHITECTURES.get(
        kind, "step35" if windows else "glm4moe"
    )


def test_rope_is_that_of_the_model():
    """500, and not the 10000 that llama.cpp takes where nothing is said."""
    facts = facts_of(mixture("llama3-rope"))
    assert facts["rope.freq_base"] == facts["rope.freq_base_swa"] == 500.0
    # it is stretched by factors of its own
    assert "rope.scaling.type" not in facts
    for kind in ("linear", "yarn"):
        facts = facts_of(mixture(kind))
        assert facts["rope.freq_base"] == 500.0 and "rope.freq_base_swa" not in facts
        assert (facts["rope.scaling.type"], facts["rope.scaling.factor"]) == (kind, 4.0)
        first = facts.get("rope.scaling.original_context_length")
        assert first == (16 if kind == "yarn" else None)


def test_windows_are_said_layer_by_layer():
    facts = facts_of(mixture("mistral-sliding"))
    assert facts["attention.sliding_window_pattern"] == [True] * 3
    assert facts["attention.sliding_window"] == 6 and facts["block_count"] == 3
    # a layer without a window turns half of it
    assert (facts["rope.dimension_count"], facts["rope.dimension_count_swa"]) == (16, 8)


def test_without_a_window_an_idle_layer_has_one():
    facts = facts_of(mixture("llama3-rope"))
    assert facts["block_count"] == 4
    assert facts["attention.sliding_window_pattern"] == [False] * 3 + [True]
    assert facts["attention.head_count"] == [4, 4, 4, 1]
    table = dict(entries(mixture("llama3-rope")))
    idle = [entry for name, entry in table.items() if name.startswith("blk.3.")]
    assert len(idle) == 9 and "output.weight" in table
    for entry in idle:
        assert entry.values.shape == entry.shape and not entry.values.any()


def test_llama3_factors_are_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    _, more = KINDS["llama3-rope"]
    config = LlamaConfig(**test_dense.SIZES, **more)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    width = 8
    plain = [500.0 ** (-2 * pair / width) for pair in range(width // 2)]
    found = np.array(plain) / rope_factors(mixture("llama3-rope"))
    assert np.allclose(found, wanted.numpy(), rtol=1e-6)
    assert math.isclose(float(rope_factors(mixture("llama3-rope")).max()), 8.0)
