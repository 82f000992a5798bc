"""Directories for other programs: their weights and configuration, against what each asks for."""

import functools
import importlib
import json
import shutil

import pytest
import torch
import vllm_cpu
from branches import edit_tensors, make_parts, stock, tensors_of, upcycle
from conftest import save_tokenizer
from safetensors.torch import load_file, save_file
from transformers4 import run
from transformers4_worker import LENGTH, log_probs, tokens

from nexus_ds.checkpoint import assembly
from nexus_ds.checkpoint.tensors import DTYPE_NAMES
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import CheckpointError, ServingError
from nexus_ds.serving import directory
from nexus_ds.serving.directory import (
    check_weights,
    open_checkpoint,
    own_plan,
    served_config,
    write_directory,
    write_weights,
)
from nexus_ds.serving.targets import TARGETS
from tests.checkpoint import test_dense, test_older_stacks
from tests.checkpoint.test_older_stacks import make

WORKER = __file__.rpartition("/serving/")[0] + "/transformers4_worker.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_dir, text_folder):
    """A mixture of a tied Llama."""
    folder = tmp_path_factory.mktemp("made")
    make_parts(folder, dense_dir, text_folder)
    upcycle(folder)
    (folder / "out" / "LICENSE.txt").write_text("free")
    (folder / "out" / "training.yaml").write_text("path: /home/me/text")
    return folder / "out"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Mixtures of other kinds, by kind."""
    folder = tmp_path_factory.mktemp("others")
    save_tokenizer(folder / "tokenizer")
    more = test_dense.KINDS | test_older_stacks.KINDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_dense, "KINDS", more)
        kinds = ("qwen3-tied", "mistral-sliding", "longrope-factor", "qwen2", "glm")
        yield {kind: make(folder, kind, 3, 2)[0] for kind in kinds}


def exported(source, name, out):
    out.mkdir()
    write_directory(open_checkpoint(source), TARGETS[name], out)
    return out


def config_in(directory):
    return json.loads((directory / "config.json").read_text())


def logits(directory):
    with torch.no_grad():
        return stock(directory)(torch.arange(24)[None] % 31).logits


# Names that a program's model has -----------------------------------------------------------------


def names_in_vllm(layers, experts):
    """Return what vLLM 0.32.0 loads into its Qwen2-MoE: `QKVParallelLinear(bias=True)` whatever
    config.json says, and no name that it doesn't know is passed over."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        names |= {at + "input_layernorm.weight", at + "post_attention_layernorm.weight"}
        names |= {f"{at}self_attn.{part}_proj.weight" for part in "qkvo"}
        names |= {f"{at}self_attn.{part}_proj.bias" for part in "qkv"}
        names |= {f"{at}mlp.gate.weight", f"{at}mlp.shared_expert_gate.weight"}
        ffns = ["shared_expert", *(f"experts.{expert}" for expert in range(experts))]
        for ffn in ffns:
            names |= {f"{at}mlp.{ffn}.{part}_proj.weight" for part in ("gate", "up", "down")}
    return names


def test_vllm_finds_every_tensor_that_it_has_and_no_other(made, tmp_path):
    out = exported(made, "vllm", tmp_path / "vllm")
    found = tensors_of(out)
    assert set(found) == names_in_vllm(layers=2, experts=3)
    biases = [tensor for name, tensor in found.items() if name.endswith(".bias")]
    assert len(biases) == 6 and not any(bias.any() for bias in biases)
    # a loader takes all *.safetensors beside it, and drops what the index doesn't list
    assert [path.name for path in out.rglob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in found.values())
    assert config_in(out)["qkv_bias"] is True and config_in(made)["qkv_bias"] is False
    assert torch.equal(logits(out), logits(made))


def test_biases_that_are_there_stay_as_they_are(others, tmp_path):
    out = exported(others["qwen2"], "vllm", tmp_path / "vllm")
    for name, tensor in tensors_of(others["qwen2"]).items():
        assert torch.equal(tensors_of(out)[name], tensor), name


@pytest.mark.parametrize("name", ["transformers4", "sglang"])
def test_others_get_the_tensors_as_they_are(name, made, tmp_path):
    out = exported(made, name, tmp_path / name)
    before = tensors_of(made)
    assert set(tensors_of(out)) == set(before) >= {"lm_head.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(out).items())
    assert torch.equal(logits(out), logits(made))


@pytest.mark.parametrize("name", ["transformers4", "vllm", "sglang"])
def test_just_what_a_program_reads_is_there(name, made, tmp_path):
    out = exported(made, name, tmp_path / name)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    weights = {"model.safetensors", "model.safetensors.index.json", "config.json"}
    assert names == tokenizer | weights | {"LICENSE.txt"}


def test_the_output_layer_is_written_where_an_old_checkpoint_has_none(made, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(made, old)
    edit_tensors(old, lambda tensors: tensors.pop("lm_head.weight"))
    found = tensors_of(exported(old, "sglang", tmp_path / "sglang"))
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_a_qwen3_next_needs_nothing_of_its_sidecar(others, tmp_path):
    source = others["qwen3-tied"]
    for name in ("vllm", "sglang"):
        out = exported(source, name, tmp_path / name)
        config = config_in(out)
        assert "nexus_source" not in config and not (out / "nexus").exists()
        assert config["full_attention_interval"] == 1 and config["norm_topk_prob"] is False
        assert set(tensors_of(out)) == set(load_file(source / "model.safetensors"))
        assert torch.equal(logits(out), logits(source))


# What can be wrong --------------------------------------------------------------------------------


def test_what_was_written_is_read_again(made, tmp_path):
    opened = open_checkpoint(made)
    plan = write_weights(opened, TARGETS["vllm"], tmp_path)
    check_weights(opened, tmp_path, plan)
    (tmp_path / "more.safetensors").write_bytes((made / "model.safetensors").read_bytes())
    with pytest.raises(ServingError, match=r"more.safetensors is not what was to be written"):
        check_weights(opened, tmp_path, plan)
    (tmp_path / "more.safetensors").unlink()
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.bias"):
        before = (tmp_path / "model.safetensors").read_bytes()
        edit_tensors(tmp_path, lambda tensors, name=name: tensors[name].add_(1))
        with pytest.raises(ServingError, match=f"{name} is not what was to be written.*again"):
            check_weights(opened, tmp_path, plan)
        (tmp_path / "model.safetensors").write_bytes(before)


def test_a_directory_that_is_not_what_was_written_is_refused(made, tmp_path, monkeypatch):
    piece = directory._piece

    def broken(opened, name, files):
        made_of = piece(opened, name, files)
        return assembly.Fill(made_of.target, 7.0) if name == "model.norm.weight" else made_of

    monkeypatch.setattr(directory, "_piece", broken)
    with pytest.raises(ServingError, match=r"model.norm.weight is not what was to be written"):
        exported(made, "sglang", tmp_path / "out")


def test_a_damaged_checkpoint_is_no_export(made, tmp_path):
    shutil.copytree(made, tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: t["model.layers.0.mlp.gate.weight"].add_(1))
    with pytest.raises(CheckpointError, match="differs from P"):
        open_checkpoint(tmp_path / "m")
    shutil.copytree(made, tmp_path / "gate")
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    edit_tensors(tmp_path / "gate", lambda tensors: tensors[name].add_(1))
    with pytest.raises(CheckpointError, match="the shared expert's gate has weights"):
        open_checkpoint(tmp_path / "gate")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_of_two_bytes_is_kept(made, tmp_path, dtype):
    shutil.copytree(made, tmp_path / "half")
    halved = {n: t.to(dtype) for n, t in tensors_of(made).items()}
    save_file(halved, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(tmp_path / "half")
    assert {kind for kind, _ in own_plan(opened).values()} == {DTYPE_NAMES[dtype]}
    out = exported(tmp_path / "half", "vllm", tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {dtype}


# vLLM ---------------------------------------------------------------------------------------------

WIDE = {
    "llama3-rope": ("llama3-rope", 5, 2),
    "mistral-sliding": ("mistral-sliding", 3, 1),
    "qwen2": ("qwen2", 3, 2),
    "yarn": ("yarn", 3, 1),
    "qwen3": ("qwen3-wide", 3, 2),
    "olmo2": ("olmo2", 3, 2),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """What makes mixtures with heads of a width that vLLM's attention has."""
    folder = tmp_path_factory.mktemp("wide")
    train_tokenizer(iter(["the tree has a leaf and 12 roots. "] * 9), 300, folder / "tokenizer")
    more = {"qwen3-wide": ("qwen3", dict(head_dim=64, tie_word_embeddings=True))}
    more["olmo2"] = ("olmo2", {})
    sizes = {"hidden_size": 128, "max_position_embeddings": 256}
    with pytest.MonkeyPatch.context() as patch:
        kinds = test_dense.KINDS | test_older_stacks.KINDS | more
        patch.setattr(test_dense, "KINDS", kinds)
        patch.setattr(test_dense, "SIZES", test_dense.SIZES | sizes)
        # two tests ask for one of them
        yield functools.cache(lambda kind: make(folder, *WIDE[kind])[0])


def apart_in_vllm(source, directory, out):
    """Return the largest difference of log-probabilities to transformers, over 199 positions."""
    vocabulary = config_in(source)["vocab_size"]
    ids = [position * 7 % (vocabulary - 2) + 1 for position in range(200)]
    found = vllm_cpu.answers(directory, [ids], 1, out)["log_probs.0"][:-1]
    # transformers, too, has to be told of forms of their own
    importlib.import_module("nexus_ds.hf")
    with torch.no_grad():
        wanted = stock(source)(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    # "not <=" is true of NaN as well
    return float((found - wanted).abs().max())


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("kind", WIDE)
def test_vllm_computes_what_transformers_does(kind, wide, tmp_path):
    source = wide(kind)
    out = exported(source, "vllm", tmp_path / "vllm")
    assert apart_in_vllm(source, out, tmp_path / "found") <= 1e-3


@pytest.mark.slow
@pytest.mark.full
def test_without_zero_biases_vllm_computes_another_model(wide, tmp_path):
    """It loads without a word: the export is what makes it right."""
    source = wide("llama3-rope")
    assert not apart_in_vllm(source, source, tmp_path / "found") <= 0.1


# transformers 4 -----------------------------------------------------------------------------------


def test_no_cache_where_that_of_transformers_4_is_wrong(others, made, tmp_path):
    for kind in ("qwen3-tied", "mistral-sliding"):
        out = exported(others[kind], "transformers4", tmp_path / kind)
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation["use_cache"] is False and config_in(out)["use_cache"] is False
    assert config_in(exported(made, "transformers4", tmp_path / "made"))["use_cache"] is True


def test_the_factor_of_longrope_is_stated(others):
    opened = open_checkpoint(others["longrope-factor"])
    config = served_config(opened, TARGETS["transformers4"])
    # sqrt(1 + log 2 / log 16)
    assert config["rope_parameters"]["attention_factor"] == pytest.approx(1.25**0.5)
    assert config["rope_scaling"]["attention_factor"] == pytest.approx(1.25**0.5)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_factor_of_a_longrope_of_part_of_a_head_is_stated(others, name, tmp_path):
    """Both would multiply all channels by what they make of the positions, and read no other key;
    a GLM-4 turns half of a head, by one list of factors."""
    out = exported(others["glm"], name, tmp_path / "out")
    rope = config_in(out)["rope_parameters"]
    assert rope == config_in(out)["rope_scaling"] and rope["rope_type"] == "longrope"
    assert rope["short_mscale"] == rope["long_mscale"] == 1.0
    assert rope["short_factor"] == rope["long_factor"] and rope["long_factor"][-1] == 1e30
    assert torch.equal(logits(out), logits(others["glm"]))


@pytest.mark.slow
def test_transformers_4_computes_what_5_does_of_an_export(others, made, tmp_path):
    """All of a text at once, and what generation sees with the cache that the export says."""
    sources = [made, *others.values()]
    outs = []
    for source in sources:
        outs.append(exported(source, "transformers4", tmp_path / source.name))
    run(WORKER, tmp_path / "4.safetensors", tmp_path / "4.json", *outs)
    four = load_file(tmp_path / "4.safetensors")
    for source in sources:
        five, error = log_probs(source)
        assert error is None and five["whole"].shape[0] == tokens().shape[1] == LENGTH
        for part in ("whole", "generated"):
            apart = float((four[f"{source.name} {part}"] - five[part]).abs().max())
            assert apart <= 1e-5, (source.name, part, apart)
