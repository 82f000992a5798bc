"""extend --replace: the branch stands where the old expert stood, rows follow the embeddings, and
mistakes are named."""

import argparse
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import of_another_origin, save_branch, train_shared_gates
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.cards import card_of, write_card
from nexus_ds.checkpoint.families.record import FFN_PARTS, dense_ffn_name
from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import expert_name, gate_name
from nexus_ds.checkpoint.records import ReplaceStep
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings, write_sidecar
from nexus_ds.commands import extend
from nexus_ds.data.domains import (
    DomainEmbeddings,
    read_domain_embeddings,
    write_domain_embeddings,
)
from nexus_ds.errors import CheckpointError, ConfigError, DataError, IncompatibleModelsError
from nexus_ds.pipeline import checkpoint_domains

REVISION = "1" * 64  # of the checkpoint's encoder


def embed(path, names, vectors=None, revision=REVISION):
    if vectors is None:
        vectors = np.random.default_rng(5).normal(size=(len(names), 8)).astype(np.float32)
    facts = ("tiny", revision, 16, 4, dict.fromkeys(names, 5), 0, "nowhere")
    write_domain_embeddings(path, DomainEmbeddings(list(names), vectors, *facts), overwrite=True)
    return torch.from_numpy(vectors)


@pytest.fixture
def parts(tmp_path, nexus_dir):
    """A checkpoint with experts alpha, beta, gamma, and better branches of beta and gamma."""
    shutil.copytree(nexus_dir, tmp_path / "nexus")
    for seed, name in enumerate(("beta", "gamma")):
        save_branch(nexus_dir, tmp_path / name, seed)
    return tmp_path


def run(parts, *extra, names=("beta",), refit=("--no-refit",)):
    parser = argparse.ArgumentParser()
    extend.add_arguments(parser)
    words = ["--replace", "--checkpoint", str(parts / "nexus"), "--out", str(parts / "out")]
    words += [word for name in names for word in ("--expert", f"{name}={parts / name}")]
    return extend.run(parser.parse_args([*words, *refit, *extra]))


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def test_the_branch_stands_where_the_old_expert_stood(parts, capsys):
    assert run(parts) == 0
    old, new, dense = (tensors_of(parts / name) for name in ("nexus", "out", "beta"))
    assert old.keys() == new.keys()
    for layer in range(2):
        for part in FFN_PARTS:
            assert torch.equal(new[expert_name(layer, 1, part)], dense[dense_ffn_name(layer, part)])
    # rows too: the embedding is the old one
    for name in (n for n in old if ".mlp." in n and ".experts.1." not in n):
        assert torch.equal(new[name], old[name]), name
    for name in (n for n in old if ".mlp." not in n):
        # tied embeddings stand under both names
        branch = dense[name.replace("lm_head", "model.embed_tokens")]
        expected = 2 / 3 * old[name] + 1 / 3 * branch  # one of three experts
        torch.testing.assert_close(new[name], expected, atol=1e-7, rtol=1e-6)
    before, after = read_sidecar(parts / "nexus"), read_sidecar(parts / "out")
    assert [expert.name for expert in after.experts] == ["alpha", "beta", "gamma"]
    assert after.experts[1].source == "beta" and after.experts[1].sha256 != before.experts[1].sha256
    assert (after.experts[0], after.experts[2]) == (before.experts[0], before.experts[2])
    step = after.lineage[-1]
    assert isinstance(step, ReplaceStep) and step.is_extension and step.experts == ["beta"]
    assert step.entry()["verb"] == "extend"  # what all readers of the file take it for
    assert step.share == pytest.approx(1 / 3)
    assert "stage=extend" in capsys.readouterr().out
    config = json.loads((parts / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    # A finetune that goes on from here takes the replaced expert for the new one.
    assert checkpoint_domains(str(parts / "out")) == (["alpha", "gamma"], ["beta"])


def test_rows_follow_the_embeddings(parts):
    stored = read_sidecar(parts / "nexus").vectors
    fresh = embed(parts / "domains.safetensors", ("gamma", "beta"))
    run(parts, "--domains", str(parts / "domains.safetensors"), "--lambda", "0")
    old, new, sidecar = (
        tensors_of(parts / "nexus"),
        tensors_of(parts / "out"),
        read_sidecar(parts / "out"),
    )
    assert np.array_equal(sidecar.vectors, np.stack([stored[0], fresh[1], stored[2]]))
    for layer in range(2):
        rows = new[gate_name(layer)]
        assert torch.equal(rows[[0, 2]], old[gate_name(layer)][[0, 2]])
        torch.testing.assert_close(rows[1], expert_embeddings(sidecar, layer, torch.float32)[1])
        assert not torch.equal(rows[1], old[gate_name(layer)][1])
    assert all(torch.equal(new[n], old[n]) for n in old if ".mlp." not in n)  # lambda 0
    verify_expert_embeddings(parts / "out")


def test_a_row_of_the_file_is_that_of_the_domain(parts):
    """Which may be another word than the expert's name, where a card has said so."""
    sidecar = read_sidecar(parts / "nexus")
    sidecar.experts[1].domain = "bark"
    write_sidecar(parts / "nexus", sidecar)
    where = ("--domains", str(parts / "domains.safetensors"))
    fresh = embed(parts / "domains.safetensors", ("beta", "bark"))
    run(parts, *where)
    out = read_sidecar(parts / "out")
    assert np.array_equal(out.vectors[1], fresh[1]) and out.experts[1].domain == "bark"
    embed(parts / "domains.safetensors", ("beta",))
    shutil.rmtree(parts / "out")
    with pytest.raises(DataError, match="no embedding of the domain 'bark'; the file has: beta"):
        run(parts, *where)


@pytest.mark.parametrize("domain", ["alpha", "bark", "beta"])
def test_a_card_says_the_domain_unless_another_expert_has_it(parts, domain):
    fresh = embed(parts / "domains.safetensors", (domain,))
    embeddings = read_domain_embeddings(parts / "domains.safetensors")
    write_card(parts / "beta", card_of(embeddings, {domain: 1.0}, domain))
    if domain == "alpha":
        said = "expert beta is of the domain alpha, as the expert alpha is; expected a domain of"
        with pytest.raises(ConfigError, match=said):
            run(parts)
        assert not (parts / "out").exists()
        return
    run(parts)
    out = read_sidecar(parts / "out")
    assert [expert.domain for expert in out.experts] == ["alpha", domain, "gamma"]
    assert np.array_equal(out.vectors[1], fresh[0])


def test_the_same_embedding_keeps_the_row(parts):
    vectors = read_sidecar(parts / "nexus").vectors[1:2]
    embed(parts / "domains.safetensors", ("beta",), vectors)
    run(parts, "--domains", str(parts / "domains.safetensors"))
    assert torch.equal(
        tensors_of(parts / "out")[gate_name(0)], tensors_of(parts / "nexus")[gate_name(0)]
    )


def test_a_linear_router_keeps_its_rows(parts):
    sidecar = read_sidecar(parts / "nexus")
    sidecar.router, sidecar.projections = dataclasses.replace(sidecar.router, kind="linear"), []
    write_sidecar(parts / "nexus", sidecar)
    embed(parts / "domains.safetensors", ("beta",))
    run(parts, "--domains", str(parts / "domains.safetensors"))
    assert torch.equal(
        tensors_of(parts / "out")[gate_name(0)], tensors_of(parts / "nexus")[gate_name(0)]
    )


def test_several_at_once_share_lambda(parts):
    run(parts, "--lambda", "0.5", names=("gamma", "beta"))
    old, new, beta, gamma = (tensors_of(parts / name) for name in ("nexus", "out", "beta", "gamma"))
    name = "model.norm.weight"
    torch.testing.assert_close(new[name], 0.5 * old[name] + 0.25 * beta[name] + 0.25 * gamma[name])
    assert torch.equal(new[expert_name(0, 2, "up_proj")], gamma[dense_ffn_name(0, "up_proj")])
    assert torch.equal(new[expert_name(0, 1, "up_proj")], beta[dense_ffn_name(0, "up_proj")])


def test_verdict_and_exit_code(parts, text_folder, capsys):
    """The new branch's FFNs are noise: its domain gets worse, the checkpoint is there all the
    same."""
    tensors = {
        name: 50 * t if ".mlp." in name else t for name, t in tensors_of(parts / "beta").items()
    }
    save_file(tensors, parts / "beta" / "model.safetensors", metadata={"format": "pt"})
    words = ["--data", str(text_folder), "--windows", "6"]
    assert run(parts, *words, "--verdict", "--json") == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    worst = max(verdict["domains"], key=lambda domain: verdict["domains"][domain]["change"])
    assert (
        list(verdict["domains"]) == ["alpha", "beta", "gamma"]
        and verdict["domains"][worst]["verdict"] == "worse"
    )
    shutil.rmtree(parts / "out")
    assert run(parts, *words, "--fail-if-worse", "0%") == 3
    said = capsys.readouterr()
    assert (
        "nexus-ds extend: worse than --fail-if-worse 0% allows: " in said.err and worst in said.err
    )
    assert "verdict" in said.out and (parts / "out" / "nexus.json").is_file()


def test_a_branch_of_another_dtype_is_cast_and_named(parts, nexus_dir, capsys):
    shutil.rmtree(parts / "beta")
    save_branch(nexus_dir, parts / "beta", 0, torch.bfloat16)
    run(parts)
    assert (
        "expert beta: weights cast from bfloat16 to float32, the dtype of "
        in capsys.readouterr().out
    )
    dense, new = tensors_of(parts / "beta"), tensors_of(parts / "out")
    assert torch.equal(
        new[expert_name(0, 1, "down_proj")], dense[dense_ffn_name(0, "down_proj")].float()
    )


def test_models_that_do_not_belong_together(parts):
    of_another_origin(parts / "beta")
    with pytest.raises(
        IncompatibleModelsError, match=r"unrelated to those of the checkpoint .*: expert beta "
    ):
        run(parts)
    train_shared_gates(parts / "nexus")
    with pytest.raises(
        CheckpointError, match=r"the shared expert's gate has weights up to 1\.0e-02"
    ):
        run(parts)
    assert not (parts / "out").exists()


def test_mistakes(parts, dense_dir):
    with pytest.raises(
        ConfigError,
        match=r"--expert delta: --replace needs the name of an expert .*alpha, beta, gamma",
    ):
        run(parts, "--expert", f"delta={dense_dir}")
    embed(parts / "domains.safetensors", ("alpha",))
    with pytest.raises(DataError, match="no embedding of the domain 'beta'; the file has: alpha"):
        run(parts, "--domains", str(parts / "domains.safetensors"))
    embed(parts / "domains.safetensors", ("beta",), revision="2" * 64)
    with pytest.raises(IncompatibleModelsError, match="the checkpoint's from tiny"):
        run(parts, "--domains", str(parts / "domains.safetensors"))
    with pytest.raises(ConfigError, match="--linear-init reset is for experts that are added"):
        run(parts, "--linear-init", "reset")
    with pytest.raises(ConfigError, match=r"text of the router's warm start is: give --data DIR"):
        run(parts, refit=())
    said = r"^without --domains nothing says where the text is: .* leave out --verdict"
    with pytest.raises(ConfigError, match=said):
        run(parts, "--verdict", refit=("--no-refit",))
    path = parts / "beta" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(IncompatibleModelsError, match="norm_eps"):
        run(parts)
    assert not (parts / "out").exists()


def test_adding_still_needs_embeddings(parts):
    parser = argparse.ArgumentParser()
    extend.add_arguments(parser)
    words = [
        "--checkpoint",
        str(parts / "nexus"),
        "--out",
        str(parts / "out"),
        "--expert",
        f"delta={parts / 'beta'}",
    ]
    with pytest.raises(
        ConfigError, match=r"no domain card \(domain_card.json\) of delta .*give --domains FILE"
    ):
        extend.run(parser.parse_args(words))
