"""LoRA adapters merged while they are read: against the formula, against PEFT, and refusals."""

import itertools
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from branches import edit_config
from launch import clean_environment
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers4 import python

from nexus_ds.checkpoint.adapters import (
    ADAPTER_WEIGHTS,
    MergedReader,
    describe_merge,
    is_adapter,
    open_branch,
    tokenizer_home,
)
from nexus_ds.checkpoint.config_json import ADAPTER
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.checkpoint.values import sample
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.test_qwen3_next import trained_looking
from tests.checkpoint.test_views import KINDS as VIEWED
from tests.checkpoint.test_views import SIZES as VIEW_SIZES

WORKER = __file__.rpartition("/checkpoint/")[0] + "/peft_worker.py"
ATTENTION = ("self_attn.q_proj", "self_attn.o_proj")
FFN = ("mlp.gate_proj", "mlp.down_proj")
LINEAR = {"r": 4, "lora_alpha": 6}


def untied(directory, out, dtype=torch.float32):
    """Save a copy with a head of its own."""
    shutil.copytree(directory, out)
    tensors = {name: t.to(dtype) for name, t in load_file(out / "model.safetensors").items()}
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_config(out, tie_word_embeddings=False, dtype=str(dtype).removeprefix("torch."))
    return out


def save_adapter(out, base, modules, config=None, ranks=None, more=None, dtype=torch.float32):
    """Save a random adapter of some modules of all layers; return its matrices by weight."""
    out.mkdir(exist_ok=True)
    stored = load_file(base / "model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), **LINEAR}
    settings |= config or {}
    generator = torch.Generator().manual_seed(3)
    tensors, pairs = dict(more or {}), {}
    for name in [n for n in stored if n.removesuffix(".weight").endswith(tuple(modules))]:
        module = name.removesuffix(".weight")
        rank = (ranks or {}).get(module.rpartition(".")[2], settings["r"])
        rows, width = stored[name].shape
        a = torch.randn(rank, width, generator=generator).to(dtype)
        b = torch.randn(rows, rank, generator=generator).to(dtype)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        pairs[name] = a, b
    save_file(tensors, out / ADAPTER_WEIGHTS)
    (out / ADAPTER).write_text(json.dumps(settings))
    return pairs


def expected(base, pairs, scale):
    """Return the merged weights by the formula, in float64 and rounded once to fp32."""
    merged = load_file(base / "model.safetensors")
    for name, (a, b) in pairs.items():
        product = b.double() @ a.double()
        factor = scale(name) if callable(scale) else scale
        merged[name] = (merged[name].double() + factor * product).float().to(merged[name].dtype)
    return merged


@pytest.mark.parametrize("modules", [ATTENTION, FFN, ATTENTION + FFN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_by_the_formula(tmp_path, dense_dir, modules, dtype):
    """Whole, by rows, and as bytes; what the adapter leaves alone is the base's."""
    base = untied(dense_dir, tmp_path / "base", dtype)
    pairs = save_adapter(tmp_path / "law", base, modules, dtype=torch.float16)
    model = open_branch(tmp_path / "law")
    wanted = expected(base, pairs, 6 / 4)
    assert model.directory == tmp_path / "law" and set(model.reader.names()) == set(wanted)
    for name, tensor in wanted.items():
        reader = TensorReader.of(model.reader)
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(reader.read_rows(name, 3, 9), tensor[3:9])
        whole = tensor.view(torch.uint8).numpy().tobytes()
        # from the middle of a row to that of another
        for start, stop in ((5, 6), (7, len(whole) - 3), (0, len(whole))):
            data = bytearray(stop - start)
            model.reader.read_range(name, start, memoryview(data))
            assert data == whole[start:stop]
        assert np.array_equal(sample(model.reader, name), tensor.float().flatten().numpy())
    shutil.copytree(base, tmp_path / "merged")
    save_file(wanted, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    merged = open_dense(tmp_path / "merged")
    assert sha256_of_tensors(model.reader, model.ffn_names()) == sha256_of_tensors(
        merged.reader, merged.ffn_names()
    )
    assert ("none of the FFN" in describe_merge(model)) == (modules == ATTENTION)
    assert describe_merge(merged) == ""


def test_a_changed_tensor_lies_in_no_file(tmp_path, dense_dir):
    """So that nobody who copies ranges of files takes the base's bytes for the merged ones."""
    pairs = save_adapter(tmp_path / "law", dense_dir, FFN)
    reader = open_branch(tmp_path / "law").reader
    assert isinstance(reader, MergedReader) and EMBEDDING in reader and "x" not in reader
    for name in reader.names():
        info = reader.info(name)
        assert (info.start == info.end == -1) == (name in pairs)
        assert info[:2] == reader.base.info(name)[:2]
    assert tmp_path / "law" / ADAPTER_WEIGHTS in reader.files()
    assert reader.adapter.rows(next(iter(pairs)), 2, 5).shape[0] == 3


@pytest.mark.parametrize(
    ("config", "ranks", "scale"),
    [
        ({"use_rslora": True}, {}, lambda name: 3.0),
        (
            {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 10}},
            {"down_proj": 2},
            lambda name: (
                10 / 2 if "layers.1.mlp.down" in name else 6 / (2 if "down" in name else 4)
            ),
        ),
        (
            {"rank_pattern": {".*mlp.down_proj": 2}, "use_rslora": True},
            {"down_proj": 2},
            lambda name: 6 / 2**0.5 if "down" in name else 3.0,
        ),
    ],
)
def test_scales(tmp_path, dense_dir, config, ranks, scale):
    pairs = save_adapter(tmp_path / "law", dense_dir, FFN, config, ranks)
    reader = TensorReader.of(open_branch(tmp_path / "law").reader)
    for name, tensor in expected(dense_dir, pairs, scale).items():
        assert torch.equal(reader.read(name), tensor), name


def test_whole_weights_and_embeddings(tmp_path, dense_dir):
    base = untied(dense_dir, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    vocabulary, hidden = stored[EMBEDDING].shape
    norm = "model.norm.weight"
    a, b = torch.randn(4, vocabulary), torch.randn(hidden, 4)
    more = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
        # as PEFT repeats it beside an adapted embedding
        "base_model.model.model.embed_tokens.base_layer.weight": stored[EMBEDDING],
        f"base_model.model.{norm}": stored[norm] + 1,
        "base_model.model.lm_head.modules_to_save.default.weight": 2 * stored[HEAD],
    }
    save_adapter(tmp_path / "law", base, (), more=more)
    reader = TensorReader.of(open_branch(tmp_path / "law").reader)
    assert torch.equal(reader.read(HEAD), 2 * stored[HEAD])
    assert torch.equal(reader.read(norm), stored[norm] + 1)
    wanted = stored[EMBEDDING].double() + 1.5 * (b.double() @ a.double()).T
    assert torch.equal(reader.read_rows(EMBEDDING, 2, 7), wanted.float()[2:7])
    more["base_model.model.model.embed_tokens.base_layer.weight"] = stored[EMBEDDING] + 1
    save_adapter(tmp_path / "law", base, (), more=more)
    with pytest.raises(CheckpointError, match=r"holds model.embed_tokens.weight whole, another"):
        open_branch(tmp_path / "law")


@pytest.mark.slow
def test_peft_merges_the_same(tmp_path, dense_dir):
    """PEFT's own adapters and its own merge, up to the order of its sum in fp32."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    bases = [untied(dense_dir, tmp_path / name, dtype) for name, dtype in dtypes.items()]
    command = [python("finetuning"), WORKER, tmp_path, *bases]
    environment = clean_environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    for base, kind in itertools.product(bases, ("plain", "rslora")):
        folder = tmp_path / f"{base.name}-{kind}"
        merged = load_file(folder / "merged.safetensors")
        before = load_file(base / "model.safetensors")
        assert set(merged) == set(before)
        reader = TensorReader.of(open_branch(folder, base).reader)
        eps = torch.finfo(dtypes[base.name]).eps
        for name, tensor in merged.items():
            difference = (reader.read(name).double() - tensor.double()).abs().max()
            # the last bit of the largest number, before weight and product cancel
            assert difference <= 4 * eps * tensor.double().abs().max(), (folder.name, name)
        changed = [name for name in merged if not torch.equal(merged[name], before[name])]
        assert len(changed) == 2 * 4 + 1, folder.name


def test_a_tied_base(tmp_path, dense_dir):
    """Merged anywhere else; a change of embeddings or head would untie them."""
    save_adapter(tmp_path / "law", dense_dir, ATTENTION)
    assert open_branch(tmp_path / "law").settings.tied_embeddings
    embedding = load_file(dense_dir / "model.safetensors")[EMBEDDING]
    key = "base_model.model.lm_head.weight"
    save_adapter(tmp_path / "law", dense_dir, FFN, more={key: embedding})
    open_branch(tmp_path / "law")
    rows, hidden = embedding.shape
    lora = "base_model.model.lm_head.lora_{}.weight"
    for more in (
        {key: embedding + 1},
        {lora.format("A"): torch.ones(4, hidden), lora.format("B"): torch.ones(rows, 4)},
    ):
        save_adapter(tmp_path / "law", dense_dir, FFN, more=more)
        with pytest.raises(UnsupportedModelError, match=r"it changes lm_head.weight, but .* ties"):
            open_branch(tmp_path / "law")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
        ({"use_dora": True}, "use_dora is 'True': DoRA scales the merged rows"),
        ({"lora_bias": True}, "lora_bias is 'True'"),
        ({"fan_in_fan_out": True}, "stores weights transposed"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"trainable_token_indices": [1]}, "embeddings of single tokens"),
        ({"target_parameters": ["x"]}, "stacks of weights"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which may have changed"),
        ({"use_newthing": 1}, "use_newthing is '1': this version does not know"),
    ],
)
def test_adapters_that_are_no_sum(tmp_path, dense_dir, config, message):
    save_adapter(tmp_path / "law", dense_dir, FFN, config)
    with pytest.raises(UnsupportedModelError, match=f"{message}.*merge it with peft"):
        open_branch(tmp_path / "law")


WIDE = torch.ones(4, 99)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"r": 8}, {}, r"r is 8 for .*down_proj, its matrices have rank 4|r is 8 for"),
        ({"lora_alpha": 0}, {}, "expected a number above 0"),
        ({"lora_alpha": True}, {}, "expected a number above 0"),
        ({"alpha_pattern": {"*": 1}}, {}, r"the pattern '\*' is none"),
        ({}, {"a.lora_A.weight": WIDE}, "has lora_A of a without its other matrix and can't be me"),
        (
            {},
            {"a.lora_A.weight": WIDE, "a.lora_B.weight": WIDE.T.contiguous()},
            "it adapts a.weight, which .* does not have; is that the adapter's base",
        ),
        ({}, {"a.weight": WIDE}, r"it holds base_model.model.a.weight of shape \(4, 99\)"),
        (
            {},
            {f"model.layers.0.mlp.up_proj.lora_{side}.weight": WIDE for side in "AB"},
            r"matrices \(4, 99\) and \(4, 99\) for model.layers.0.mlp.up_proj.weight of shape",
        ),
    ],
)
def test_damaged_adapters(tmp_path, dense_dir, config, more, message):
    named = {f"base_model.model.{name}": tensor.clone() for name, tensor in more.items()}
    save_adapter(
        tmp_path / "law", dense_dir, FFN, {"r": 4} | config, {"gate_proj": 4, "down_proj": 4}, named
    )
    with pytest.raises(CheckpointError, match=message):
        open_branch(tmp_path / "law")


@pytest.mark.parametrize(
    "pattern", ["([a-z_.0-9]+)+!", "(.|.)(.|.)", "a{9999999999}", "(" * 3000, ".*.*x", "x" * 402]
)
def test_patterns_that_could_take_for_ever(tmp_path, dense_dir, pattern):
    save_adapter(tmp_path / "law", dense_dir, FFN, {"alpha_pattern": {pattern: 1}})
    with pytest.raises(UnsupportedModelError, match=r"the pattern .* is more than a module's name"):
        open_branch(tmp_path / "law")


def test_more_patterns_than_modules(tmp_path, dense_dir):
    patterns = {f"x{number}": 1 for number in range(2049)}
    save_adapter(tmp_path / "law", dense_dir, FFN, {"rank_pattern": patterns})
    with pytest.raises(UnsupportedModelError, match="has 2,049 patterns of modules, expected at"):
        open_branch(tmp_path / "law")


def test_files(tmp_path, dense_dir):
    out = tmp_path / "law"
    save_adapter(out, dense_dir, FFN)
    assert is_adapter(out) and not is_adapter(dense_dir)
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2, dtype=torch.int64)},
        out / ADAPTER_WEIGHTS,
    )
    with pytest.raises(UnsupportedModelError, match="is I64, expected floating-point numbers"):
        open_branch(out)
    save_adapter(out, dense_dir, ())
    with pytest.raises(CheckpointError, match="holds nothing to merge"):
        open_branch(out)
    (out / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"an adapter without adapter_model.safetensors"):
        open_branch(out)
    # weights beside it: read in two ways, so in none
    shutil.copy(dense_dir / "config.json", out)
    with pytest.raises(UnsupportedModelError, match="holds an adapter"):
        open_branch(out)


def test_which_base(tmp_path, dense_dir):
    """As given, as the adapter says, or the seed if it is called so."""
    seed = tmp_path / "Llama-3"
    shutil.copytree(dense_dir, seed)
    out = tmp_path / "law"
    save_adapter(out, dense_dir, FFN, {"base_model_name_or_path": "meta/Llama-3"})
    assert open_branch(out, seed=seed).reader.base.directory == seed
    assert open_branch(out, dense_dir, seed).reader.base.directory == dense_dir
    assert tokenizer_home(open_branch(out, dense_dir)) == dense_dir
    shutil.copy(dense_dir / "tokenizer.json", out)
    assert tokenizer_home(open_branch(out, dense_dir)) == out
    assert tokenizer_home(open_branch(dense_dir)) == dense_dir
    for given in (None, dense_dir):
        with pytest.raises(CheckpointError, match=r"adapter of 'meta/Llama-3', .*give --base DIR"):
            open_branch(out, seed=given)


def test_a_fallback_is_the_base_of_adapters_that_name_no_model(tmp_path, dense_dir, monkeypatch):
    out = tmp_path / "law"
    shutil.copytree(dense_dir, tmp_path / "other")
    save_adapter(out, dense_dir, FFN)
    other = tmp_path / "other"
    assert open_branch(out, fallback=other).reader.base.directory == dense_dir
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta" / "Llama-3").mkdir(parents=True)
    for named in ("meta/Llama-3", "meta/Llama-4", "x" * 300):
        save_adapter(out, dense_dir, FFN, {"base_model_name_or_path": named})
        assert open_branch(out, fallback=other).reader.base.directory == other
        with pytest.raises(CheckpointError):
            open_branch(out, option="--sources base=DIR")
    with pytest.raises(CheckpointError, match="is no directory here: give --sources base=DIR, the"):
        open_branch(out, option="--sources base=DIR")


def test_a_base_of_a_name_that_no_folder_can_have(tmp_path, dense_dir):
    """Found by tests/fuzz.py: the traceback of an OSError."""
    save_adapter(tmp_path / "law", dense_dir, FFN, {"base_model_name_or_path": "x" * 300})
    with pytest.raises(CheckpointError, match=r"adapter of 'xxx.*give --base DIR"):
        open_branch(tmp_path / "law")


def behind_a_view(root, kind):
    """Save a model of a family that is read through a view; return its folder."""
    family, keys, _ = VIEWED[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **VIEW_SIZES | keys))
    trained_looking(model, 0)
    model.save_pretrained(root / kind)
    return root / kind


@pytest.mark.parametrize("kind", ["phi-4-mini", "granite-8b", "glm-4", "ernie-4.5"])
def test_an_adapter_of_a_model_behind_a_view(tmp_path, kind):
    """It speaks of the file's tensors: what is shown is what a merged file would show."""
    base = behind_a_view(tmp_path, kind)
    modules = ("qkv_proj", "q_proj", "o_proj", "gate_up_proj", "down_proj")
    pairs = save_adapter(tmp_path / "law", base, modules)
    shutil.copytree(base, tmp_path / "merged")
    merged = {name: t.contiguous() for name, t in expected(base, pairs, 6 / 4).items()}
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    found, wanted = (open_branch(tmp_path / name) for name in ("law", "merged"))
    assert found.reader.names() == wanted.reader.names() and len(pairs) >= 6
    for name in wanted.reader.names():
        expect = TensorReader.of(wanted.reader).read(name)
        assert torch.equal(TensorReader.of(found.reader).read(name), expect), name
    assert f"{len(pairs)} weights" in describe_merge(found)


def split(pairs, names):
    """Return tensors of an adapter for matrices of other names."""
    found = {}
    for name, (rows, width) in names.items():
        a, b = torch.randn(4, width), torch.randn(rows, 4)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        pairs[name] = a, b
    return found


def test_an_adapter_of_split_projections(tmp_path):
    """As one is that was trained on a Phi-4 which was saved as a Llama."""
    base = behind_a_view(tmp_path, "phi-4")
    pairs, layer = {}, "model.layers.1."
    names = {f"{layer}self_attn.k_proj.weight": (32, 64), f"{layer}mlp.up_proj.weight": (40, 64)}
    save_adapter(tmp_path / "law", base, ["o_proj"], more=split(pairs, names))
    found = open_branch(tmp_path / "law")
    assert sorted(found.reader.names()) == sorted(open_dense(base).reader.names())
    own = TensorReader.of(open_dense(base).reader)
    for name, (a, b) in pairs.items():
        wanted = (own.read(name).double() + 6 / 4 * b.double() @ a.double()).float()
        assert torch.equal(TensorReader.of(found.reader).read(name), wanted), name
    query = f"{layer}self_attn.q_proj.weight"
    assert torch.equal(TensorReader.of(found.reader).read(query), own.read(query))
    assert describe_merge(found).endswith("4 weights")


@pytest.mark.parametrize(
    ("kind", "name", "modules", "message"),
    [
        ("phi-4", "self_attn.q_proj", ["qkv_proj"], "qkv_proj.weight as well as .*q_proj.weight"),
        ("phi-4-mini", "self_attn.q_proj", ["o_proj"], "whose rows a Qwen2-MoE has in another"),
        ("glm-4", "mlp.gate_proj", ["self_attn.k_proj"], "k_proj.weight, whose rows a Qwen2-MoE"),
    ],
)
def test_split_projections_that_can_not_be_merged(tmp_path, kind, name, modules, message):
    base = behind_a_view(tmp_path, kind)
    rows = 40 if "mlp" in name else 64
    more = split({}, {f"model.layers.0.{name}.weight": (rows, 64)})
    save_adapter(tmp_path / "law", base, modules, more=more)
    with pytest.raises(UnsupportedModelError, match=rf"it adapts .*{message}.*merge it with peft"):
        open_branch(tmp_path / "law")
