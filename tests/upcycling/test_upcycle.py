"""What a new mixture consists of: facts 3, 4, 5 and 10 of the paper."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from branches import (
    LAYERS,
    NAMES,
    branch,
    edit_tensors,
    embed,
    make_parts,
    stock,
    tensors_of,
    upcycle,
)

from nexus_ds.checkpoint.cards import Packages, ffn_sha256
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.families.record import FFN_PARTS, dense_ffn_name
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import expert_name, gate_name, shared_gate_name, shared_name
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.config import load_config
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import ConfigError, DataError, IncompatibleModelsError
from nexus_ds.outputs import new_directory
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.verification import verify_sources


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_copies_means_and_projections(parts, dtype):
    """Facts 4 and 5: shared == seed's FFN, routed i == expert i's FFN, all else the mean over the
    experts."""
    if dtype != torch.float32:
        for index, name in enumerate(("seed", *NAMES)):
            shutil.rmtree(parts / name)
            branch(parts / "dense", parts / name, index, dtype)
    upcycle(parts)
    out, seed = tensors_of(parts / "out"), tensors_of(parts / "seed")
    experts = [tensors_of(parts / name) for name in NAMES]
    sidecar = read_sidecar(parts / "out")
    # fp16 has no number between 0 and 2^-24
    constant = torch.float32 if dtype == torch.float16 else dtype
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
        expected[shared_gate_name(layer)] = torch.full((1, 16), 2.0**-60, dtype=constant)
    # tied: the output layer stands there, too
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert set(out) == set(expected)
    for name, tensor in expected.items():
        assert out[name].dtype == tensor.dtype
        # P(D) was computed in numpy
        if ".mlp." in name and not name.endswith("mlp.gate.weight"):
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
    upcycle(parts, "router.init_norm=3")
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_may_be_scaled_at_the_start(parts, dtype):
    """0.5 shared(x) + 0.25 p expert(x) in a stock model: only down_proj differs, by powers of two,
    and a model that is added later is scaled as the others were."""
    if dtype != torch.float32:
        for index, name in enumerate(("seed", *NAMES)):
            shutil.rmtree(parts / name)
            branch(parts / "dense", parts / name, index, dtype)
    upcycle(parts)
    plain = tensors_of(parts / "out")
    shutil.rmtree(parts / "out")
    upcycle(parts, "model.shared_scale=0.5", "model.routed_scale=0.25")
    scaled = tensors_of(parts / "out")
    factors = {name: 1.0 for name in plain}
    for layer in range(LAYERS):
        factors[shared_name(layer, "down_proj")] = 0.5
        factors |= {expert_name(layer, i, "down_proj"): 0.25 for i in range(3)}
    for name, factor in factors.items():
        # the smallest numbers of fp16 have no half
        assert torch.equal(scaled[name], (plain[name].float() * factor).to(plain[name].dtype)), name
    # and nobody takes it for damage
    assert not verify_sources(parts / "out", {}).problems
    embed(parts / "more.safetensors", ("delta",), "gone", seed=3)
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    config = load_config(str(parts / "recipe.yaml"))
    with new_directory(parts / "wider") as directory:
        new = extended(parts / "out", {"delta": parts / "alpha"}, embeddings, config)
        new.write(directory, None, config.router, 0)
    wider, alpha = tensors_of(parts / "wider"), tensors_of(parts / "alpha")
    for part, factor in zip(FFN_PARTS, (1.0, 1.0, 0.25), strict=True):
        given = alpha[dense_ffn_name(1, part)]
        assert torch.equal(wider[expert_name(1, 3, part)], (given.float() * factor).to(dtype))
    assert not verify_sources(parts / "wider", {}).problems


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_may_go_further_than_their_branches(parts, dtype):
    """seed + 3 (branch - seed) in fp32, then 0.3 of the output; shared and dense parts as ever."""
    if dtype != torch.float32:
        for index, name in enumerate(("seed", *NAMES)):
            shutil.rmtree(parts / name)
            branch(parts / "dense", parts / name, index, dtype)
    upcycle(parts, "model.shared_scale=0.75", "model.routed_scale=0.3", "model.task_scale=3")
    out, seed = tensors_of(parts / "out"), tensors_of(parts / "seed")

    def far(name, part):
        of_seed = seed[dense_ffn_name(1, part)].float()
        change = tensors_of(parts / name)[dense_ffn_name(1, part)].float() - of_seed
        return (of_seed + 3 * change) * (0.3 if part == "down_proj" else 1)

    # 16 bits are rounded once, at the end
    bound = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2**-8}
    for part in FFN_PARTS:
        for index, name in enumerate(NAMES):
            found = out[expert_name(1, index, part)].float()
            torch.testing.assert_close(found, far(name, part), **bound)
        # twice the seed's, for a gate of a half
        given = seed[dense_ffn_name(1, part)].float() * (1.5 if part == "down_proj" else 1)
        assert torch.equal(out[shared_name(1, part)], given.to(dtype))
    # as its card has it, whatever is made of it
    hashes = [expert.sha256 for expert in read_sidecar(parts / "out").experts]
    assert hashes == [ffn_sha256(open_dense(parts / name)) for name in NAMES]
    assert not verify_sources(parts / "out", {}).problems


@pytest.mark.parametrize("spelled", ["same", "around", "link"])
def test_the_seed_as_an_expert_is_known_however_its_path_is_spelled(parts, spelled, capsys):
    """With free rows it needs no domain; that its FFNs are the seed's is no mistake."""
    (parts / "link").symlink_to(parts / "seed")
    paths = {"same": parts / "seed", "around": parts / "alpha" / ".." / "seed"}
    experts = {"alpha": parts / "alpha", "general": paths.get(spelled, parts / "link")}
    upcycle(parts, "router.kind=linear", "router.warm_start=none", experts=experts)
    alpha, general = read_sidecar(parts / "out").vectors
    assert np.array_equal(alpha, general)
    assert "feed-forward networks are the seed's" not in capsys.readouterr().err
    shutil.copytree(parts / "seed", parts / "copy")
    with pytest.raises(DataError, match="no embedding of the domain 'general'"):
        upcycle(parts, "router.kind=linear", experts=experts | {"general": parts / "copy"})


@torch.no_grad()
@pytest.mark.parametrize("replace", [False, True])
def test_a_later_expert_goes_as_far_as_the_first_ones(parts, replace):
    upcycle(parts, "model.routed_scale=0.5", "model.task_scale=3")
    embed(parts / "more.safetensors", ("delta", "beta"), "gone", seed=3)
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    config = load_config(str(parts / "recipe.yaml"))
    make = replaced if replace else extended
    experts = {"beta" if replace else "delta": parts / "alpha"}
    with pytest.raises(ConfigError, match=r"started as seed \+ 3 \(branch - seed\).*--base DIR"):
        make(parts / "out", experts, embeddings, config)
    shutil.copytree(parts / "seed", parts / "stranger")
    torch.manual_seed(7)

    def scramble(tensors):
        tensors.update({name: torch.randn(t.shape) for name, t in tensors.items()})

    edit_tensors(parts / "stranger", scramble)
    stranger = Packages(base=parts / "stranger")
    with pytest.raises(IncompatibleModelsError, match="base"):
        make(parts / "out", experts, embeddings, config, packages=stranger)
    packages = Packages(base=parts / "seed")
    with new_directory(parts / "wider") as directory:
        new = make(parts / "out", experts, embeddings, config, packages=packages)
        new.write(directory, None, config.router, 0)
    out, wider = tensors_of(parts / "out"), tensors_of(parts / "wider")
    place = 1 if replace else 3
    for part in FFN_PARTS:
        assert torch.equal(wider[expert_name(1, place, part)], out[expert_name(1, 0, part)])
    assert not verify_sources(parts / "wider", {}).problems


@torch.no_grad()
def test_copies_of_the_seed_keep_its_attention(parts):
    """Fact 10; and with n = 1 the gate is 1."""
    upcycle(parts, experts={name: parts / "seed" for name in NAMES})
    out, seed = tensors_of(parts / "out"), tensors_of(parts / "seed")
    for name in seed:
        if ".mlp." not in name:
            torch.testing.assert_close(out[name], seed[name], atol=0, rtol=1e-7)
    shutil.rmtree(parts / "out")
    upcycle(parts, experts={"alpha": parts / "seed"})
    model, dense = stock(parts / "out"), stock(parts / "seed")
    dense.model.layers[0].mlp.down_proj.weight.data *= 2  # shared + 1 * the same FFN
    dense.model.layers[1].mlp.down_proj.weight.data *= 2
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)


def test_linear_router(parts):
    upcycle(parts, "router.kind=linear", "router.init=normal")
    sidecar, rows = read_sidecar(parts / "out"), tensors_of(parts / "out")[gate_name(0)]
    assert sidecar.router.kind == "linear" and not sidecar.projections
    assert 0.01 < rows.std() < 0.03
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()


def test_experts_and_embeddings_are_matched_by_name(parts, text_folder):
    """Experts in one order, embeddings in another, neither alphabetical."""
    order = ("gamma", "alpha", "beta")
    embed(parts / "domains.safetensors", ("beta", "gamma", "alpha"), text_folder)
    vectors = dict(
        zip(("beta", "gamma", "alpha"), np.random.default_rng(0).normal(size=(3, 8)), strict=True)
    )
    upcycle(parts, experts={name: parts / name for name in order})
    sidecar, out = read_sidecar(parts / "out"), tensors_of(parts / "out")
    assert [(e.name, e.domain, e.source) for e in sidecar.experts] == [
        (name, name, name) for name in order
    ]
    given = np.stack([vectors[name] for name in order]).astype(np.float32)
    assert np.array_equal(sidecar.vectors, given)
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


def test_unembedded_domain_names_those_that_exist(parts):
    with pytest.raises(
        DataError, match=r"no embedding of the domain 'delta'; the file has: alpha, beta, gamma"
    ):
        upcycle(parts, experts={"alpha": parts / "alpha", "delta": parts / "beta"})


def test_p_needs_an_embedding_of_the_seed_too(parts):
    with pytest.raises(DataError, match="no embedding of the domain 'seed'"):
        upcycle(parts, experts={name: parts / name for name in (*NAMES, "seed")})
