"""The verb extend: facts 8 and 9 of the paper, several experts at once, linear routers, refit, and
bad input."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import add_token, of_another_origin, save_branch, train_shared_gates
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.expert_rows import condition
from nexus_ds.checkpoint.families.record import FFN_PARTS, dense_ffn_name
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import expert_name, gate_name
from nexus_ds.checkpoint.records import RouterRecord
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings, write_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.commands import extend
from nexus_ds.data.domains import DomainEmbeddings, write_domain_embeddings
from nexus_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    IncompatibleModelsError,
    OutputExistsError,
)

OLD = ("alpha", "beta", "gamma")
LAYERS = 2
REVISION = "1" * 64  # of the checkpoint's encoder


def embed(path, names, data="nowhere", revision=REVISION, width=8):
    vectors = np.random.default_rng(5).normal(size=(len(names), width)).astype(np.float32)
    documents = dict.fromkeys(names, 5)
    embeddings = DomainEmbeddings(
        list(names), vectors, "tiny", revision, 16, 4, documents, 0, str(data)
    )
    write_domain_embeddings(path, embeddings, overwrite=True)
    return torch.from_numpy(vectors)


def edit_config(directory, **keys):
    config = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def parts(tmp_path, nexus_dir, text_folder):
    """A checkpoint with experts alpha, beta, gamma; new branches delta and epsilon; their
    embeddings; text; a recipe."""
    shutil.copytree(nexus_dir, tmp_path / "nexus")
    for index, name in enumerate(("delta", "epsilon")):
        save_branch(nexus_dir, tmp_path / name, index)
    shutil.copytree(text_folder, tmp_path / "text")
    shutil.copytree(text_folder / "alpha", tmp_path / "text" / "delta")
    words = "proof lemma axiom", "coral reef kelp"
    for split in ("train", "validation"):
        path = tmp_path / "text" / "delta" / f"{split}.jsonl"
        path.write_text(path.read_text().replace("tree", words[0]).replace("leaf", words[1]))
    embed(tmp_path / "domains.safetensors", ("delta", "epsilon"), tmp_path / "text")
    (tmp_path / "recipe.yaml").write_text(
        "training: {steps: 1}\ndata: {sequence_length: 32, workers: 1}\n"
        "router: {fit_steps: 30, fit_windows: 8}\n"
    )
    return tmp_path


def run(parts, *extra, names=("delta",), refit=False, recipe="recipe.yaml"):
    """Run the verb as the command line would."""
    parser = argparse.ArgumentParser()
    extend.add_arguments(parser)
    arguments = [
        "--checkpoint",
        str(parts / "nexus"),
        "--domains",
        str(parts / "domains.safetensors"),
    ]
    arguments += ["--out", str(parts / "out"), "--config", str(parts / recipe)]
    for name in names:
        arguments += ["--expert", f"{name}={parts / name}"]
    return extend.run(parser.parse_args([*arguments, *([] if refit else ["--no-refit"]), *extra]))


def make_linear(parts):
    """Turn the checkpoint's router into a linear one with the same rows."""
    sidecar = read_sidecar(parts / "nexus")
    sidecar.router, sidecar.projections = (
        RouterRecord("linear", 2, 0, "swiglu", "free", "token", True, 1),
        [],
    )
    write_sidecar(parts / "nexus", sidecar)


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


def averaged(names):
    """Return what is averaged; a tied head is a copy of the embeddings, which dense models lack."""
    return [name for name in names if ".mlp." not in name and name != "lm_head.weight"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("alpha,alpha", "--scored names a domain twice: alpha, alpha; name each once"),
        ("alpha", "--scored is of a table: give --verdict or --fail-if-worse too"),
    ],
)
def test_domains_of_a_table_that_is_not_asked_for(parts, names, message):
    with pytest.raises(ConfigError, match=message):
        run(parts, "--scored", names)
    assert not left_over(parts)


def test_appends_one_expert(parts, capsys):
    """Facts 8 and 9: FFN list + 1, old FFNs bit-equal, lambda = 1/(n+1), rows P(d_new), no new
    router parameter."""
    assert run(parts) == 0
    old, new, dense = (tensors_of(parts / name) for name in ("nexus", "out", "delta"))
    grown = {expert_name(layer, 3, part) for layer in range(LAYERS) for part in FFN_PARTS}
    assert set(new) - set(old) == grown and set(old) <= set(new)
    for layer in range(LAYERS):
        assert torch.equal(new[gate_name(layer)][:3], old[gate_name(layer)])
        for part in FFN_PARTS:
            assert torch.equal(new[expert_name(layer, 3, part)], dense[dense_ffn_name(layer, part)])
    for name in averaged(old):
        torch.testing.assert_close(
            new[name], 0.75 * old[name] + 0.25 * dense[name], atol=1e-7, rtol=1e-6
        )
    assert all(
        torch.equal(new[n], old[n])
        for n in old
        if ".mlp." in n and not n.endswith("mlp.gate.weight")
    )
    before, after = read_sidecar(parts / "nexus"), read_sidecar(parts / "out")
    for layer in range(LAYERS):
        assert all(
            np.array_equal(before.projections[layer][n], after.projections[layer][n])
            for n in before.projections[0]
        )
    assert np.array_equal(after.centre, before.centre)
    assert np.array_equal(after.vectors[:3], before.vectors)
    assert [e.name for e in after.experts] == [*OLD, "delta"]
    assert [step.verb for step in after.lineage] == ["upcycle", "extend"]
    assert (
        after.lineage[-1].share == 0.25
        and str(parts) not in (parts / "out" / "nexus.json").read_text()
    )
    verify_expert_embeddings(parts / "out")
    printed = capsys.readouterr().out
    assert "4 experts (alpha, beta, gamma, delta)" in printed
    assert "stage=extend" in printed and f"output={parts / 'out'}-trained" in printed


def test_new_row_is_p_of_the_conditioned_embedding(parts):
    vectors = embed(parts / "domains.safetensors", ("delta",))
    run(parts)
    sidecar, rows = read_sidecar(parts / "out"), tensors_of(parts / "out")[gate_name(1)]
    state = {name: torch.from_numpy(w) for name, w in sidecar.projections[1].items()}
    inputs = torch.from_numpy(condition(np.asarray(vectors, np.float32), sidecar.centre))
    a, b = (inputs @ state["maps.0.weight"].T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(a) * b) @ state["maps.1.weight"].T
    torch.testing.assert_close(rows[3:], expected)


@torch.no_grad()
def test_with_lambda_zero_old_logits_stay_and_probabilities_lose_one_term(parts):
    """Weights are bit-equal; logits agree to rounding (a product with four rows may sum in another
    order than with three)."""
    run(parts, "--lambda", "0")
    old, new = stock(parts / "nexus"), stock(parts / "out")
    tokens = torch.arange(24)[None] % old.config.vocab_size
    seen = []
    for model in (old, new):
        gate = model.model.layers[0].mlp.gate
        gate.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0])))
        assert torch.isfinite(model(tokens).logits).all()
    (x_old, logits_old), (x_new, logits_new) = seen
    torch.testing.assert_close(x_new, x_old)
    torch.testing.assert_close(logits_new[:, :3], logits_old)
    probabilities = logits_new.softmax(-1)
    rescaled = probabilities[:, :3] / (1 - probabilities[:, 3:])
    torch.testing.assert_close(rescaled, logits_old.softmax(-1))
    a, b = tensors_of(parts / "nexus"), tensors_of(parts / "out")
    assert all(torch.equal(a[name], b[name]) for name in averaged(a))
    assert all(torch.equal(a[gate_name(layer)], b[gate_name(layer)][:3]) for layer in range(LAYERS))


def test_several_at_once_share_as_one_after_the_other(parts):
    run(parts, names=("delta", "epsilon"))
    old, new = tensors_of(parts / "nexus"), tensors_of(parts / "out")
    delta, epsilon = tensors_of(parts / "delta"), tensors_of(parts / "epsilon")
    for name in averaged(old):
        first = 0.75 * old[name] + 0.25 * delta[name]  # 1 / (3 + 1), then 1 / (4 + 1)
        torch.testing.assert_close(
            new[name], 0.8 * first + 0.2 * epsilon[name], atol=1e-6, rtol=1e-5
        )
    assert torch.equal(new[expert_name(0, 4, "up_proj")], epsilon[dense_ffn_name(0, "up_proj")])
    shutil.rmtree(parts / "out")
    run(parts, "--lambda", "0.5", names=("delta", "epsilon"))
    new = tensors_of(parts / "out")
    for name in averaged(old):
        expected = 0.5 * old[name] + 0.25 * delta[name] + 0.25 * epsilon[name]
        torch.testing.assert_close(new[name], expected, atol=1e-6, rtol=1e-5)


def test_a_recipe_may_set_lambda(parts):
    (parts / "other.yaml").write_text(
        (parts / "recipe.yaml").read_text() + "pipeline: {merge_weight: 0.125}\n"
    )
    run(parts, recipe="other.yaml")
    assert read_sidecar(parts / "out").lineage[-1].share == 0.125


def test_extended_models_extend(parts):
    run(parts)
    shutil.rmtree(parts / "nexus")
    (parts / "out").rename(parts / "nexus")
    run(parts, names=("epsilon",))
    sidecar = read_sidecar(parts / "out")
    assert [e.name for e in sidecar.experts] == [*OLD, "delta", "epsilon"] and len(
        sidecar.lineage
    ) == 3
    assert sidecar.lineage[-1].share == 0.2


@pytest.mark.parametrize("choice", ["keep", "reset"])
def test_linear_routers(parts, choice):
    make_linear(parts)
    run(parts, "--linear-init", choice)
    old, new = (tensors_of(parts / name)[gate_name(0)] for name in ("nexus", "out"))
    assert new.shape == (4, 16)
    assert torch.equal(new[:3], old) == (choice == "keep")
    if choice == "keep":
        torch.testing.assert_close(new[3].norm(), old.norm(dim=-1).mean())
    else:
        torch.testing.assert_close((new - new.mean(0)).norm(dim=-1).mean(), torch.tensor(0.5))
    assert not read_sidecar(parts / "out").projections
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


@pytest.mark.parametrize("kind", ["nexus", "linear"])
def test_refit_reads_old_and_new_text(parts, capsys, kind):
    if kind == "linear":
        make_linear(parts)
    run(parts, "--json", refit=True)
    result = json.loads(capsys.readouterr().out)
    assert result["fit"]["after"] > result["fit"]["before"] and result["lambda"] == 0.25
    verify_expert_embeddings(parts / "out")
    sidecar = read_sidecar(parts / "out")
    assert sidecar.router.kind == kind and sidecar.lineage[-1].fit.steps == 30
    if kind == "nexus":
        before = read_sidecar(parts / "nexus").projections[0]
        assert sidecar.projections[0].keys() == before.keys()
        assert not np.array_equal(sidecar.projections[0]["maps.0.weight"], before["maps.0.weight"])
        assert torch.equal(
            tensors_of(parts / "out")[gate_name(0)], expert_embeddings(sidecar, 0, torch.float32)
        )


@pytest.mark.parametrize("start", ["hidden_mean", "ridge", "embedding"])
def test_starts_of_a_linear_router(parts, capsys, start):
    make_linear(parts)
    run(parts, "--json", f"router.warm_start={start}", refit=True)
    fit = json.loads(capsys.readouterr().out)["fit"]
    old, new = (tensors_of(parts / name)[gate_name(0)] for name in ("nexus", "out"))
    assert torch.equal(new[:3], old) == (start != "ridge")
    if start != "ridge":
        torch.testing.assert_close(new[3].norm(), old.norm(dim=-1).mean())
    assert (fit is None) == (start == "embedding")
    random = torch.Generator()
    if start == "embedding":  # not the random row that `none` appends
        fresh = torch.empty(1, 16).normal_(generator=random.manual_seed(0))[0]
        assert abs(torch.cosine_similarity(fresh, new[3], dim=0)) < 0.99


def test_a_branch_of_another_dtype_is_cast_and_named(parts, capsys):
    """The README's models: a checkpoint in bf16, a branch that was trained in fp32."""
    edit_tensors(
        parts / "nexus", lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()})
    )
    sidecar = read_sidecar(parts / "nexus")
    rows = {
        gate_name(layer): expert_embeddings(sidecar, layer, torch.bfloat16)
        for layer in range(LAYERS)
    }
    edit_tensors(parts / "nexus", lambda t: t.update(rows))
    run(parts)
    said = f"expert delta: weights cast from float32 to bfloat16, the dtype of {parts / 'nexus'}"
    assert said in capsys.readouterr().out
    old, new, dense = (tensors_of(parts / name) for name in ("nexus", "out", "delta"))
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    for part in FFN_PARTS:
        assert torch.equal(new[expert_name(1, 3, part)], dense[dense_ffn_name(1, part)].bfloat16())
    for name in averaged(old):
        mean = 0.75 * old[name].double() + 0.25 * dense[name].double()
        assert ((new[name].double() - mean).abs() <= mean.abs() * (2**-8 + 1e-5)).all(), name
    ffn = [dense_ffn_name(layer, part) for layer in range(LAYERS) for part in FFN_PARTS]
    assert read_sidecar(parts / "out").experts[3].sha256 == sha256_of_tensors(
        TensorReader(parts / "delta"), ffn
    )
    verify_expert_embeddings(parts / "out")
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


def test_bf16_branches_of_an_fp32_checkpoint(parts, nexus_dir, capsys):
    shutil.rmtree(parts / "delta")
    save_branch(nexus_dir, parts / "delta", 0, torch.bfloat16)
    run(parts, "--json")
    assert json.loads(capsys.readouterr().out)["cast"] == {"delta": "bfloat16"}
    dense, new = tensors_of(parts / "delta"), tensors_of(parts / "out")
    assert torch.equal(
        new[expert_name(0, 3, "up_proj")], dense[dense_ffn_name(0, "up_proj")].float()
    )


def test_older_checkpoints_get_the_older_spelling_of_rope(parts):
    assert "rope_theta" not in json.loads((parts / "nexus" / "config.json").read_text())
    run(parts)
    config = json.loads((parts / "out" / "config.json").read_text())
    assert (
        config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
        and "rope_scaling" not in config
    )


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [dict(revision="2" * 64), dict(width=9)])
def test_another_encoder(parts, change):
    embed(parts / "domains.safetensors", ("delta",), **change)
    with pytest.raises(
        IncompatibleModelsError,
        match=r"the encoder tiny .* the checkpoint's from tiny .* embed the new",
    ):
        run(parts)
    assert not left_over(parts)


def test_another_model(parts):
    edit_config(
        parts / "delta",
        rope_parameters={"rope_type": "default", "rope_theta": 5.0},
        rms_norm_eps=1e-3,
    )
    with pytest.raises(IncompatibleModelsError) as caught:
        run(parts)
    table = str(caught.value).splitlines()[1:4]
    lines = {line.split()[0]: line.split()[1:] for line in table}
    assert lines["checkpoint"] == ["delta"] and lines["rope.rope_theta"] == ["10000.0", "5.0"]
    assert set(lines) == {"checkpoint", "rope.rope_theta", "norm_eps"}
    assert not left_over(parts)


def test_a_branch_of_another_origin(parts):
    of_another_origin(parts / "delta")
    message = (
        rf"the checkpoint {parts / 'nexus'}: expert delta \({parts / 'delta'}\): cosine -?0\.0"
    )
    with pytest.raises(IncompatibleModelsError, match=message):
        run(parts)
    assert not left_over(parts)


def test_a_mixture_that_was_finetuned_elsewhere_extends(parts):
    """As the README says: with both gates frozen, and the sidecar beside what stock transformers
    saves."""
    model = stock(parts / "nexus").train()
    trained = [
        p
        for n, p in model.named_parameters()
        if not n.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
    ]
    tokens = torch.arange(24)[None]
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    model.save_pretrained(parts / "tuned")
    before = tensors_of(parts / "nexus")
    for name in ("nexus.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parts / "nexus" / name, parts / "tuned" / name)
    shutil.copytree(parts / "nexus" / "nexus", parts / "tuned" / "nexus")
    shutil.rmtree(parts / "nexus")
    (parts / "tuned").rename(parts / "nexus")
    run(parts, "--lambda", "0")
    verify_expert_embeddings(parts / "out")
    tuned, new = tensors_of(parts / "nexus"), tensors_of(parts / "out")
    for name in ("model.layers.0.self_attn.q_proj.weight", expert_name(1, 0, "up_proj")):
        assert torch.equal(new[name], tuned[name]) and not torch.equal(new[name], before[name])
    assert torch.equal(new[gate_name(0)][:3], before[gate_name(0)])


def test_a_shared_gate_that_was_trained_elsewhere(parts):
    """No later training would take such a model: it is refused before anything is written."""
    train_shared_gates(parts / "nexus")
    with pytest.raises(
        CheckpointError, match=r"layer 0: the shared expert's gate .*keep shared_expert_gate frozen"
    ):
        run(parts)
    assert not left_over(parts)


def test_another_tokenizer(parts):
    path = parts / "delta" / "tokenizer.json"
    path.write_text(path.read_text().replace('"sail"', '"mast2"'))
    with pytest.raises(
        IncompatibleModelsError,
        match=r"expert delta .* 1 of 31 tokens differ.* 21 'sail' / 'mast2'",
    ):
        run(parts)


def test_a_tokenizer_too_large_leaves_nothing(parts):
    for name in ("nexus", "delta"):
        add_token(parts / name)
    with pytest.raises(
        IncompatibleModelsError,
        match=r"nexus: .* ids up to 31 \('<\|im_end\|>'\), the model embeds 31",
    ):
        run(parts)
    assert not left_over(parts)


def test_nan_in_a_new_expert(parts):
    edit_tensors(
        parts / "delta", lambda t: t[dense_ffn_name(0, "up_proj")].view(-1)[:2].fill_(torch.nan)
    )
    with pytest.raises(
        CheckpointError,
        match=r"expert delta \(.*\): tensor .*up_proj.weight has 2 values that are NaN",
    ):
        run(parts)
    assert not left_over(parts)


def test_rows_that_are_not_p_of_d(parts):
    edit_tensors(parts / "nexus", lambda t: t[gate_name(0)].add_(1))
    with pytest.raises(CheckpointError, match=r"differs from P\(D\)"):
        run(parts)


def test_names_domains_and_output(parts):
    with pytest.raises(
        ConfigError, match=r"--expert alpha: the checkpoint has an expert of this name"
    ):
        run(parts, "--expert", "alpha=x")
    with pytest.raises(
        DataError, match="no embedding of the domain 'zeta'; the file has: delta, epsilon"
    ):
        run(parts, "--expert", "zeta=x")
    with pytest.raises(
        CheckpointError,
        match=r"model_type is 'llama', a Nexus checkpoint has 'qwen2_moe' .*nexus-ds upcycle",
    ):
        run(parts, "--checkpoint", str(parts / "delta"))
    with pytest.raises(ConfigError, match=r"--lambda -0.1: expected a share"):
        run(parts, "--lambda", "-0.1")
    assert not left_over(parts)
    (parts / "out").write_text("taken")
    with pytest.raises(OutputExistsError, match="exists already"):
        run(parts)


@pytest.mark.parametrize("gone", ["folder", "old domain"])
def test_refit_without_text(parts, gone):
    shutil.rmtree(parts / "text" if gone == "folder" else parts / "text" / "gamma")
    with pytest.raises(DataError) as caught:
        run(parts, refit=True)
    assert "give --data DIR" in str(caught.value) and "--no-refit" in str(caught.value)
    assert ("no text at" if gone == "folder" else "no domain gamma") in str(caught.value)
    assert not left_over(parts)


def test_a_plain_mixture_is_no_nexus_checkpoint(parts, plain_moe_dir):
    with pytest.raises(CheckpointError, match=r"has no nexus.json: it is no Nexus checkpoint"):
        run(parts, "--checkpoint", str(plain_moe_dir))
